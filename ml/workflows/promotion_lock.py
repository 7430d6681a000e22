"""One promotion or rollback at a time, wherever they run: a lock in the predictions database."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg2

from ml.database import connect
from ml.errors import DatabaseUnavailable, RegistryError
from ml.settings import Settings

logger = logging.getLogger(__name__)

LOCK_KEY = 0x_C1FA_8010
"""PostgreSQL's advisory locks are numbers; this one means: a promotion or rollback is under way."""
LOCK_WAIT_SECONDS = 900.0


@contextmanager
def alone(settings: Settings, wait_seconds: float) -> Iterator[Callable[[], None]]:
    """Holds the lock for the block; yields a check that it is still held, to be made before anything is moved.

    The lock lives in the database's session: it ends with this process, however that ends.

    Raises:
        DatabaseUnavailable: PostgreSQL could not be asked, or went away meanwhile.
        RegistryError: another one held the lock for all of `wait_seconds`.
    """
    if settings.mlops_database_url is None:
        logger.warning("No database is set (MLOPS_DATABASE_URL): nothing keeps two promotions apart.")
        yield lambda: None
        return
    connection = connect(settings.database_url)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_try_advisory_lock(%s)", (LOCK_KEY,))
            if not cursor.fetchone()[0]:
                logger.info("Another promotion is under way: waiting for it, at most %.0f s", wait_seconds)
                cursor.execute("SET lock_timeout = %s", (max(1, int(wait_seconds * 1000)),))
                cursor.execute("SELECT pg_advisory_lock(%s)", (LOCK_KEY,))

            def still_alone() -> None:
                try:
                    cursor.execute("SELECT 1")
                except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
                    raise _lost(error) from error

            yield still_alone
    except psycopg2.errors.LockNotAvailable as error:
        raise RegistryError(
            f"Another promotion or rollback has been under way for more than {wait_seconds:.0f} s.",
            fix="see what it does (`cifar10 status`, the Airflow UI) and try again when it has ended.",
        ) from error
    except psycopg2.OperationalError as error:
        raise _lost(error) from error
    finally:
        connection.close()


def _lost(error: Exception) -> DatabaseUnavailable:
    return DatabaseUnavailable(
        f"PostgreSQL went away while it kept promotions apart: {str(error).strip()}.",
        fix="nothing was moved; see that it runs and promote again.",
    )
