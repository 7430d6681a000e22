"""Brings the predictions database to the newest schema (Alembic, scripts in `deploy/postgres/migrations`)."""

from alembic import command
from alembic.config import Config

from ml.settings import PROJECT_ROOT


def migrate(database_url: str) -> None:
    """Runs the migrations that are not there yet. Idempotent.

    Raises:
        sqlalchemy.exc.OperationalError: when PostgreSQL cannot be asked.
    """
    config = Config()
    config.set_main_option("script_location", str(PROJECT_ROOT / "deploy/postgres/migrations"))
    # ConfigParser reads % as an interpolation.
    config.set_main_option("sqlalchemy.url", database_url.replace("%", "%%"))
    command.upgrade(config, "head")
