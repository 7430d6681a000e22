"""The database layer against a real PostgreSQL."""

import secrets
import traceback

import psycopg2
import pytest
from alembic import command

from ml.database import connect, transaction
from ml.errors import ConfigurationError, DatabaseUnavailable
from ml.stack.migrations import migrate


def test_migrations_run_twice_without_harm(database_url):
    again = migrate(database_url)
    assert again["revision"] == again["previous"]
    with transaction(database_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM predictions")
        assert cursor.fetchone() == (0,)


def test_a_failed_block_leaves_nothing(database_url):
    insert = "INSERT INTO monitor_windows (model_name, model_version, n, verdict) VALUES ('m', 1, 0, %s)"

    def write_one_good_and_one_bad() -> None:
        with transaction(database_url) as connection:
            connection.cursor().execute(insert, ("stable",))
            connection.cursor().execute(insert, ("no such verdict",))

    with pytest.raises(psycopg2.errors.CheckViolation):
        write_one_good_and_one_bad()
    with transaction(database_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM monitor_windows")
        assert cursor.fetchone() == (0,)


def test_an_absent_server_is_could_not_ask():
    with pytest.raises(DatabaseUnavailable, match="could not be asked"), transaction("postgresql://x@127.0.0.1:9/x"):
        pass


@pytest.mark.parametrize("ask", [connect, migrate])
def test_an_address_that_cannot_be_read_is_not_shown(ask):
    password = secrets.token_hex()
    with pytest.raises(ConfigurationError, match="MLOPS_DATABASE_URL") as caught:
        ask(f"postgresql+psycopg2://user:{password}@host/database")
    assert password not in "".join(traceback.format_exception(caught.value))


def test_a_migration_that_cannot_ask_says_so_and_shows_no_password():
    with pytest.raises(DatabaseUnavailable, match="could not be asked") as caught:
        migrate("postgresql://x:hidden%21@127.0.0.1:9/x")
    assert "hidden" not in str(caught.value)


def test_a_server_that_goes_away_in_a_migration_is_could_not_ask(postgres, monkeypatch):
    def upgrade(config, revision):
        config.attributes["connection"].exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")

    monkeypatch.setattr("ml.stack.migrations.command.upgrade", upgrade)
    with pytest.raises(DatabaseUnavailable, match="could not be asked"):
        migrate(postgres.new_database("cut_off"))


def test_a_role_that_may_only_write_rows_cannot_migrate(postgres):
    owner = postgres.new_database("owned")
    writer = postgres.new_database("writer").removesuffix("/writer") + "/owned"
    with transaction(owner) as connection:
        connection.cursor().execute("GRANT CONNECT ON DATABASE owned TO writer")
    with pytest.raises(ConfigurationError, match="permission denied for schema public"):
        migrate(writer)
    assert migrate(owner)["previous"] is None


def test_one_role_cannot_enter_anothers_database(postgres):
    mine = postgres.new_database("mine")
    postgres.new_database("other")
    with transaction(mine):
        pass
    with (
        pytest.raises(DatabaseUnavailable, match="permission denied"),
        transaction(mine.removesuffix("/mine") + "/other"),
    ):
        pass


ROWS_OF_0002 = """
INSERT INTO predictions (request_id, item_index, created_at, model_name, model_version, class_id, probabilities,
                         brightness, contrast, sharpness, saturation, noise, image)
SELECT ('00000000-0000-0000-0000-00000000000' || request)::uuid, item, timestamptz '2026-03-01 23:59:59+00'
       + request * interval '1 second', 'cifar10-classifier', 1, item, array_fill(0.1::real, ARRAY[10]), 0.1, 0.2, 0.3,
       0.4, 0.5, decode(repeat(lpad(to_hex(request), 2, '0'), 3072), 'hex')
FROM generate_series(0, 5) request, generate_series(0, 2) item ORDER BY request, item;
DELETE FROM predictions WHERE id = 18;
INSERT INTO feedback (request_id, item_index, label) SELECT request_id, item_index, 7 FROM predictions WHERE id <= 4
"""
LOGGED = (
    "SELECT p.*, f.label, f.created_at FROM predictions p LEFT JOIN feedback f USING (request_id, item_index)"
    " ORDER BY p.id"
)


def test_what_was_logged_survives_the_way_to_days_and_back(postgres, monkeypatch):
    """Migration 0003, which copies every row."""
    url = postgres.new_database("with_rows")
    real = command.upgrade

    def brought_to(revision):
        move = real if revision >= "0003" or logged is None else command.downgrade
        monkeypatch.setattr("ml.stack.migrations.command.upgrade", lambda config, _: move(config, revision))
        migrate(url)
        with transaction(url) as connection, connection.cursor() as cursor:
            cursor.execute(LOGGED)
            return [tuple(bytes(value) if isinstance(value, memoryview) else value for value in row)
                    for row in cursor.fetchall()]  # fmt: skip

    logged = None
    assert brought_to("0002") == []
    with transaction(url) as connection, connection.cursor() as cursor:
        cursor.execute(ROWS_OF_0002)
        cursor.execute(LOGGED)
    logged = brought_to("0003")
    assert [row[0] for row in logged] == list(range(1, 18))
    assert [row[-2] for row in logged] == [7] * 4 + [None] * 13
    assert logged[16][1:3] == ("00000000-0000-0000-0000-000000000005", 1)
    assert logged[16][13] == bytes([5]) * 3072
    with transaction(url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT relname FROM pg_class WHERE relispartition AND relkind = 'r' ORDER BY 1")
        assert [row[0] for row in cursor.fetchall()] == ["predictions_20260301", "predictions_20260302"]
        cursor.execute("SELECT images FROM requests ORDER BY request_id")
        assert [row[0] for row in cursor.fetchall()] == [3, 3, 3, 3, 3, 2]
        cursor.execute("SELECT nextval('prediction_ids')")
        assert cursor.fetchone() == (18,)
    assert brought_to("0002") == logged
    assert brought_to("0003") == logged
