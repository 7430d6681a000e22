"""The database layer against a real PostgreSQL."""

import psycopg2
import pytest

from ml.database import transaction
from ml.errors import DatabaseUnavailable
from ml.stack.migrations import migrate


def test_migrations_run_twice_without_harm(database_url):
    migrate(database_url)
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
