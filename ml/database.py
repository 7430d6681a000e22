"""The one way to PostgreSQL: opens connections and translates 'could not ask' into the project's own error."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg2
from psycopg2.extensions import connection as Connection  # noqa: N812 - psycopg2 names its class in lower case

from ml.errors import DatabaseUnavailable


def connect(url: str) -> Connection:
    """Opens a connection to `url` (libpq form).

    Raises:
        DatabaseUnavailable: when the server cannot be asked within five seconds.
    """
    try:
        return psycopg2.connect(url, connect_timeout=5)
    except psycopg2.OperationalError as error:
        raise _unavailable(error) from error


@contextmanager
def transaction(url: str) -> Iterator[Connection]:
    """A connection whose work is committed at the end of the block, or rolled back by an exception in it.

    Raises:
        DatabaseUnavailable: when the server cannot be asked, or goes away inside the block.
    """
    connection = connect(url)
    try:
        with connection:
            yield connection
    except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
        raise _unavailable(error) from error
    finally:
        connection.close()


def _unavailable(error: Exception) -> DatabaseUnavailable:
    return DatabaseUnavailable(
        f"PostgreSQL could not be asked: {str(error).strip()}.",
        fix="see that it runs (`make up`) and that MLOPS_DATABASE_URL names it, then try again.",
    )
