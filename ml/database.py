"""The one way to PostgreSQL: opens connections and translates 'could not ask' into the project's own error."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg2
from psycopg2.extensions import connection as Connection  # noqa: N812 - psycopg2 names its class in lower case

from ml.errors import ConfigurationError, DatabaseUnavailable


def connect(url: str) -> Connection:
    """Opens a connection to `url` (libpq form).

    Raises:
        DatabaseUnavailable: when the server cannot be asked within five seconds.
        ConfigurationError: when `url` is none of PostgreSQL's.
    """
    # Where nobody asks for Kerberos, libpq is kept from looking for it: krb5 is not safe in threads and after a fork,
    # and libpq's default ("prefer") crashes a process that connects in one now and then.
    kerberos = {} if "gssencmode" in url else {"gssencmode": "disable"}
    try:
        return psycopg2.connect(url, connect_timeout=5, **kerberos)
    except psycopg2.OperationalError as error:
        raise unavailable(error) from error
    except psycopg2.ProgrammingError:
        # The driver's message repeats the address, password and all.
        raise ConfigurationError(
            "MLOPS_DATABASE_URL cannot be read as an address of PostgreSQL.",
            fix="write it as postgresql://user:password@host:port/database, with %-escapes for what is special in it.",
        ) from None


@contextmanager
def transaction(url: str) -> Iterator[Connection]:
    """A connection whose work is committed at the end of the block, or rolled back by an exception in it.

    Raises:
        DatabaseUnavailable: when the server cannot be asked, or goes away inside the block.
        ConfigurationError: as `connect`.
    """
    connection = connect(url)
    try:
        with connection:
            yield connection
    except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
        raise unavailable(error) from error
    finally:
        connection.close()


def unavailable(error: Exception) -> DatabaseUnavailable:
    """The error for 'could not ask', with what was seen."""
    return DatabaseUnavailable(
        f"PostgreSQL could not be asked: {str(error).strip()}.",
        fix="see that it runs (`make up`) and that MLOPS_DATABASE_URL names it, then try again.",
    )
