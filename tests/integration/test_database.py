"""The database layer against a real PostgreSQL."""

import secrets
import traceback

import psycopg2
import pytest

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
