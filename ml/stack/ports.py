"""Who listens where: asked before anything starts, so that a taken port is named and nothing is half up."""

import socket
from collections.abc import Mapping
from contextlib import suppress

import psutil

from ml.errors import PortTaken


def require_free(ports: Mapping[str, int]) -> None:
    """Checks that every port can be listened on at 127.0.0.1; `ports` is setting name -> port.

    Raises:
        PortTaken: names each taken port, who holds it where that can be known, and the setting that moves it.
    """
    double = {port for port in ports.values() if list(ports.values()).count(port) > 1}
    if double:
        names = ", ".join(f"{name}={port}" for name, port in ports.items() if port in double)
        raise PortTaken(f"Two parts of the stack were given one port: {names}.", fix="give each a port of its own.")
    taken = {name: port for name, port in ports.items() if not _is_free(port)}
    if taken:
        listed = "; ".join(f"port {port} ({name}) is held by {_holder(port)}" for name, port in taken.items())
        moves = " ".join(f"{name}={port + 10_000 if port < 50_000 else port - 10_000}" for name, port in taken.items())
        raise PortTaken(
            f"The stack cannot start: {listed}.",
            fix=f"stop the holder (`make down` for a stack of this folder), or move the port: {moves} make up.",
        )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do: a connection of theirs that lingers in TIME_WAIT is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _holder(port: int) -> str:
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                if connection.pid is None:
                    break
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return "another process"
