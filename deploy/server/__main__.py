"""`python -m deploy.server` serves predictions: the supervisor of one worker, which holds the model.

One worker: the model, its queue and its figures live once, and threads share them. A worker that dies is replaced; the
socket is the supervisor's, so that callers who come meanwhile wait in its backlog. The worker is a fork, so this must
not load ONNX Runtime, not even indirectly: that starts a thread, which a fork does not copy.
"""

from granian import Granian
from granian.constants import Interfaces
from granian.http import HTTP1Settings

from deploy.server.exposure import check_exposure
from deploy.server.json_logging import logging_config
from ml.errors import ConfigurationError
from ml.settings import load_settings

HEADER_SECONDS = 10
"""From a connection, or from the reply before, to the last byte of a request's headers: slow and idle clients go."""
END_SECONDS = 20
"""For requests in flight when the server is told to end; then what is left is cut off."""


def listen(target: str, host: str, port: int, *, factory: bool = False) -> None:
    """Serves until SIGTERM or SIGINT; then answers what is under way, and returns.

    Args:
        target: `module:name` of a `deploy.server.bridge.Bridge`.
        host: address to listen on.
        port: port to listen on.
        factory: whether the target is a function that makes one, in the worker.
    """
    Granian(
        target,
        address=host,
        port=port,
        interface=Interfaces.RSGI,
        factory=factory,
        websockets=False,
        http1_settings=HTTP1Settings(header_read_timeout=HEADER_SECONDS * 1000),
        respawn_failed_workers=True,
        workers_kill_timeout=END_SECONDS,
        log_dictconfig=logging_config(),
    ).serve()


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
