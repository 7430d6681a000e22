"""Predictions, feedback, monitored windows, alerts and retrainings."""

from alembic import op

revision = "0001"
down_revision = None

SCHEMA = """
CREATE TABLE predictions (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    request_id    uuid        NOT NULL,
    item_index    smallint    NOT NULL,
    created_at    timestamptz NOT NULL,
    model_name    text        NOT NULL,
    model_version integer     NOT NULL,
    class_id      smallint    NOT NULL CHECK (class_id BETWEEN 0 AND 9),
    probabilities real[]      NOT NULL CHECK (cardinality(probabilities) = 10),
    brightness    real        NOT NULL,
    contrast      real        NOT NULL,
    sharpness     real        NOT NULL,
    saturation    real        NOT NULL,
    noise         real        NOT NULL,
    image         bytea       NOT NULL CHECK (octet_length(image) = 3072),
    UNIQUE (request_id, item_index)
);
CREATE INDEX predictions_by_version ON predictions (model_name, model_version, id);
COMMENT ON COLUMN predictions.image IS '32x32x3 uint8 RGB, row-major: what the model saw';

CREATE TABLE feedback (
    request_id uuid        NOT NULL,
    item_index smallint    NOT NULL,
    label      smallint    NOT NULL CHECK (label BETWEEN 0 AND 9),
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (request_id, item_index),
    FOREIGN KEY (request_id, item_index) REFERENCES predictions (request_id, item_index) ON DELETE CASCADE
);

CREATE TABLE monitor_windows (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    created_at    timestamptz NOT NULL DEFAULT now(),
    model_name    text        NOT NULL,
    model_version integer     NOT NULL,
    first_id      bigint,
    last_id       bigint,
    n             integer     NOT NULL CHECK (n >= 0),
    verdict       text        NOT NULL CHECK (verdict IN ('insufficient', 'stable', 'drift')),
    p_value       double precision CHECK (p_value BETWEEN 0 AND 1),
    statistics    jsonb       NOT NULL DEFAULT '{}',
    labelled      integer     NOT NULL DEFAULT 0,
    live_accuracy double precision,
    report        text
);
CREATE INDEX monitor_windows_by_version ON monitor_windows (model_name, model_version, id);
COMMENT ON COLUMN monitor_windows.last_id IS
    'the watermark: the next window of this version starts after it; insufficient windows do not move it';

CREATE TABLE alerts (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    window_id    bigint      NOT NULL REFERENCES monitor_windows (id) ON DELETE CASCADE,
    created_at   timestamptz NOT NULL DEFAULT now(),
    message      text        NOT NULL,
    channel      text        NOT NULL,
    delivered_at timestamptz
);

CREATE TABLE retrainings (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    window_id    bigint      NOT NULL REFERENCES monitor_windows (id) ON DELETE CASCADE,
    architecture text        NOT NULL,
    dataset_id   text,
    recipe       text,
    requested_at timestamptz NOT NULL DEFAULT now(),
    started_at   timestamptz,
    finished_at  timestamptz,
    outcome      text
);
CREATE UNIQUE INDEX one_retraining_at_a_time ON retrainings ((true)) WHERE finished_at IS NULL;
COMMENT ON COLUMN retrainings.started_at IS
    'when a trainer took it; until then each run of the monitor hands it on again';
"""


def upgrade() -> None:
    """Makes the tables."""
    op.execute(SCHEMA)


def downgrade() -> None:
    """Drops them."""
    op.execute("DROP TABLE retrainings, alerts, monitor_windows, feedback, predictions")
