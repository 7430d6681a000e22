"""What the challenger predicted unseen, beside what the champion answered."""

from alembic import op

revision = "0002"
down_revision = "0001"

SCHEMA = """
CREATE TABLE shadow_predictions (
    request_id               uuid             NOT NULL,
    item_index               smallint         NOT NULL,
    created_at               timestamptz      NOT NULL,
    champion_version         integer          NOT NULL,
    challenger_version       integer          NOT NULL,
    champion_class           smallint         NOT NULL CHECK (champion_class BETWEEN 0 AND 9),
    challenger_class         smallint         CHECK (challenger_class BETWEEN 0 AND 9),
    challenger_probabilities real[]           CHECK (cardinality(challenger_probabilities) = 10),
    champion_ms              double precision NOT NULL CHECK (champion_ms >= 0),
    challenger_ms            double precision CHECK (challenger_ms >= 0),
    failure                  text,
    PRIMARY KEY (request_id, item_index, challenger_version),
    CHECK (num_nulls(challenger_class, challenger_probabilities, challenger_ms)
           = CASE WHEN failure IS NULL THEN 0 ELSE 3 END)
);
CREATE INDEX shadow_predictions_by_versions
    ON shadow_predictions (champion_version, challenger_version, created_at, request_id, item_index);
COMMENT ON COLUMN shadow_predictions.champion_ms IS
    'time in the engine, of the whole request: the same on each of its rows; so is challenger_ms';
COMMENT ON COLUMN shadow_predictions.failure IS
    'why the challenger gave no answer; NULL where it gave one';
"""


def upgrade() -> None:
    """Makes the table."""
    op.execute(SCHEMA)


def downgrade() -> None:
    """Drops it."""
    op.execute("DROP TABLE shadow_predictions")
