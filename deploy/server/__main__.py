"""`python -m deploy.server` serves predictions: the supervisor of one worker, which holds the model.

One worker: the model, its queue and its figures live once, and threads share them. A worker that dies is replaced; the
socket is the supervisor's, so that callers who come meanwhile wait in its backlog. The worker is a fork, so this must
not load ONNX Runtime, not even indirectly: that starts a thread, which a fork does not copy.
"""

import ctypes
import os
import resource
import socket

from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.net import SocketHolder
from granian.server.mp import MPServer

from deploy.server.exposure import check_exposure
from deploy.server.json_logging import logging_config
from ml.errors import ConfigurationError
from ml.settings import load_settings

HEADER_SECONDS = 10
"""From a connection, or from the reply before, to the last byte of a request's headers: slow and idle clients go."""
UNREAD_SECONDS = 20
"""For a client to take what is sent to it: one that reads nothing goes, and with it the memory of its reply."""
END_SECONDS = 20
"""For all that ends with the server, once it is told to: requests in flight first, then the logs."""
CONNECTIONS = 2048
"""At once; more wait in the backlog, until one of these ends."""
HEADER_BYTES = 64 << 10
"""Of a request's headers; each connection may cost as much memory."""


_M_ARENA_MAX = -8  # of malloc.h


class _Supervisor(MPServer):
    """Listens itself, and hands the socket on to its workers.

    On Linux, granian has each worker open a socket of its own, so that callers are refused while there is no worker.
    """

    def _init_shared_socket(self) -> None:
        family = socket.getaddrinfo(self.bind_addr, self.bind_port, type=socket.SOCK_STREAM)[0][0]
        try:
            listener = socket.create_server((self.bind_addr, self.bind_port), family=family, backlog=self.backlog)
        except OSError as error:
            where, why = f"{self.bind_addr}:{self.bind_port}", os.strerror(error.errno or 0)
            raise SystemExit(
                f"The prediction server cannot listen on {where}: {why}. "
                "Fix: end what listens there, or set API_HOST and API_PORT to where it may."
            ) from None
        # What it accepts inherits this.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)
        listener.setblocking(False)
        listener.set_inheritable(True)
        self._sso, self._ssp = listener, None
        self._shd = SocketHolder(listener.fileno(), False, self.backlog)  # type: ignore[call-arg, assignment]


def listen(target: str, host: str, port: int, *, factory: bool = False, header_seconds: float = HEADER_SECONDS) -> None:
    """Serves until SIGTERM or SIGINT; then answers what is under way, and returns.

    Args:
        target: `module:name` of a `deploy.server.bridge.Bridge`.
        host: address to listen on.
        port: port to listen on.
        factory: whether the target is a function that makes one, in the worker.
        header_seconds: as `HEADER_SECONDS`.
    """
    _allow_files(2 * CONNECTIONS)
    _share_arenas()
    _Supervisor(
        target,
        address=host,
        port=port,
        interface=Interfaces.RSGI,
        factory=factory,
        websockets=False,
        # HTTP/2 has no deadline for headers, and neither has a connection that may still become either of the two.
        http=HTTPModes.http1,
        http1_settings=HTTP1Settings(header_read_timeout=round(header_seconds * 1000), max_buffer_size=HEADER_BYTES),
        backlog=CONNECTIONS,
        backpressure=CONNECTIONS,
        respawn_failed_workers=True,
        workers_kill_timeout=END_SECONDS,
        log_dictconfig=logging_config(),
    ).serve()


def _share_arenas() -> None:
    """The C library would keep free memory apart for each of many threads; the GIL lets one at a time have any."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if set_option is not None:
        set_option(_M_ARENA_MAX, 2)


def _allow_files(count: int) -> None:
    """Shells often allow 1024 open files, though more may be asked for: a connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def main() -> None:
    """Reads the settings, and refuses to start on ones that cannot be served with."""
    try:
        settings = load_settings()
        check_exposure(settings)
        settings.database_url  # noqa: B018 - asks for it here, where the reason is shown without a trace
    except ConfigurationError as error:
        raise SystemExit(f"The prediction server cannot start. {error}") from None
    listen("deploy.server.wsgi:server", settings.api_host, settings.api_port)


if __name__ == "__main__":
    main()
