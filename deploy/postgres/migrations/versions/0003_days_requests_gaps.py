"""Predictions in a partition for each day, requests that are logged once, and what the logs could not keep.

It does not only add: the server before it cannot write to the new table, and keeps its rows in memory, where they are
lost when it ends. Stop the prediction server, migrate, start the new one (docs/operations.md).
"""

from alembic import op

revision = "0003"
down_revision = "0002"

REQUESTS = """
CREATE TABLE requests (
    request_id uuid        PRIMARY KEY,
    created_at timestamptz NOT NULL,
    images     integer     NOT NULL CHECK (images > 0)
);
CREATE INDEX requests_by_time ON requests (created_at);
COMMENT ON TABLE requests IS 'each request is logged once, by its id, whatever its day';
INSERT INTO requests SELECT request_id, min(created_at), max(item_index) + 1 FROM predictions GROUP BY request_id;
"""

PREDICTIONS = """
ALTER TABLE feedback DROP CONSTRAINT feedback_request_id_item_index_fkey,
    ADD FOREIGN KEY (request_id) REFERENCES requests (request_id) ON DELETE CASCADE;

ALTER TABLE predictions RENAME TO predictions_of_0002;
ALTER TABLE predictions_of_0002 DROP CONSTRAINT predictions_pkey;
DROP INDEX predictions_by_version;

CREATE SEQUENCE prediction_ids;
SELECT setval('prediction_ids', max(id)) FROM predictions_of_0002 HAVING max(id) IS NOT NULL;
CREATE TABLE predictions (
    id            bigint      NOT NULL DEFAULT nextval('prediction_ids'),
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
    PRIMARY KEY (id, created_at)
) PARTITION BY RANGE (created_at);
ALTER SEQUENCE prediction_ids OWNED BY predictions.id;
CREATE INDEX predictions_by_version ON predictions (model_name, model_version, id);
CREATE INDEX predictions_by_request ON predictions (request_id, item_index);
COMMENT ON COLUMN predictions.image IS '32x32x3 uint8 RGB, row-major: what the model saw';
"""

# The server's role may write rows and make no tables: these two run with their owner's rights, and do nothing else.
FUNCTIONS = """
CREATE FUNCTION ensure_prediction_days(days date[]) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    day  date;
    name text;
BEGIN
    FOREACH day IN ARRAY days LOOP
        name := 'predictions_' || to_char(day, 'YYYYMMDD');
        CONTINUE WHEN to_regclass(name) IS NOT NULL;
        -- Made apart and attached, which no reader and no other writer waits for.
        EXECUTE format('CREATE TABLE %I (LIKE predictions INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', name);
        EXECUTE format('ALTER TABLE predictions ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', name,
                       day::timestamp AT TIME ZONE 'UTC', (day + 1)::timestamp AT TIME ZONE 'UTC');
    END LOOP;
END $$;

CREATE FUNCTION drop_prediction_day(day date) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    name text := 'predictions_' || to_char(day, 'YYYYMMDD');
BEGIN
    IF to_regclass(name) IS NOT NULL THEN
        EXECUTE format('ALTER TABLE predictions DETACH PARTITION %I', name);
        EXECUTE format('DROP TABLE %I', name);
    END IF;
END $$;
"""

ROWS = """
SELECT ensure_prediction_days(array_agg(DISTINCT (created_at AT TIME ZONE 'UTC')::date))
    FROM predictions_of_0002 HAVING count(*) > 0;
INSERT INTO predictions SELECT * FROM predictions_of_0002 ORDER BY id;
DROP TABLE predictions_of_0002;
"""

GAPS = """
CREATE TABLE prediction_gaps (
    id       uuid        PRIMARY KEY,
    log      text        NOT NULL,
    began_at timestamptz NOT NULL,
    ended_at timestamptz NOT NULL,
    rows     bigint      NOT NULL CHECK (rows > 0),
    reason   text        NOT NULL,
    told_at  timestamptz
);
COMMENT ON TABLE prediction_gaps IS 'how many rows are missing from a log, from when to when, and why';
CREATE INDEX shadow_predictions_by_time ON shadow_predictions (created_at);
"""

BACK = """
DROP INDEX shadow_predictions_by_time;
DROP TABLE prediction_gaps;
ALTER TABLE predictions RENAME TO predictions_of_0003;
ALTER INDEX predictions_pkey RENAME TO predictions_of_0003_pkey;
ALTER INDEX predictions_by_version RENAME TO predictions_of_0003_by_version;
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
INSERT INTO predictions OVERRIDING SYSTEM VALUE SELECT * FROM predictions_of_0003 ORDER BY id;
SELECT setval(pg_get_serial_sequence('predictions', 'id'), max(id)) FROM predictions HAVING max(id) IS NOT NULL;
DROP TABLE predictions_of_0003;
CREATE INDEX predictions_by_version ON predictions (model_name, model_version, id);
COMMENT ON COLUMN predictions.image IS '32x32x3 uint8 RGB, row-major: what the model saw';
ALTER TABLE feedback DROP CONSTRAINT feedback_request_id_fkey,
    ADD FOREIGN KEY (request_id, item_index) REFERENCES predictions (request_id, item_index) ON DELETE CASCADE;
DROP TABLE requests;
DROP FUNCTION ensure_prediction_days, drop_prediction_day;
"""


def upgrade() -> None:
    """Makes the tables, and moves what was logged until now."""
    for statements in (REQUESTS, PREDICTIONS, FUNCTIONS, ROWS, GAPS):
        op.execute(statements)


def downgrade() -> None:
    """Moves what was logged back, but for what is known of gaps."""
    op.execute(BACK)
