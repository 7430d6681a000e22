"""Brings the predictions database to the newest schema (Alembic, scripts in `deploy/postgres/migrations`)."""

from functools import partial
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from psycopg2.errors import InsufficientPrivilege
from sqlalchemy import create_engine
from sqlalchemy.exc import InterfaceError, OperationalError, ProgrammingError
from sqlalchemy.pool import NullPool

from ml.database import connect, unavailable
from ml.errors import ConfigurationError
from ml.settings import PROJECT_ROOT


def migrate(database_url: str) -> dict[str, Any]:
    """Runs the migrations that are not there yet, each in a transaction of its own. Idempotent.

    Returns:
        `revision` and `previous` (None in an empty database): the schema's, after and before.

    Raises:
        DatabaseUnavailable: when PostgreSQL cannot be asked, or goes away in between.
        ConfigurationError: when the role in `database_url` may not change the schema.
    """
    engine = create_engine("postgresql+psycopg2://", creator=partial(connect, database_url), poolclass=NullPool)
    config = Config()
    config.set_main_option("script_location", str(PROJECT_ROOT / "deploy/postgres/migrations"))
    try:
        with engine.connect() as connection:
            previous = _revision(connection)
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            return {"revision": _revision(connection), "previous": previous}
    except (OperationalError, InterfaceError) as error:
        raise unavailable(error.orig or error) from error
    except ProgrammingError as error:
        if not isinstance(error.orig, InsufficientPrivilege):
            raise
        raise ConfigurationError(
            f"PostgreSQL does not let this role change the schema: {str(error.orig).splitlines()[0]}.",
            fix="name the role that owns the database in MLOPS_DATABASE_URL, for the migration alone.",
        ) from error


def _revision(connection: Any) -> str | None:
    found = MigrationContext.configure(connection).get_current_revision()
    connection.rollback()  # ends the reading: Alembic commits nothing where a transaction is open already
    return found
