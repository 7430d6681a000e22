"""What every request gets, whatever its route: an id, a line in the log, figures, spans, headers that keep browsers
safe.
"""

import logging
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Protocol
from uuid import UUID, uuid4

from flask import Flask, Response, g, request

from deploy.server.key_ring import NOBODY
from deploy.server.metrics import ServerMetrics
from ml.settings import Settings

access = logging.getLogger("deploy.server.access")

HEADERS = (
    # The page needs its own files and the two ways in which it shows an image; nothing else, and nothing inline.
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Permissions-Policy", "camera=(), microphone=(), geolocation=()"),
)
_HEADERS_OF_WHAT_CHANGES = (*HEADERS, ("Cache-Control", "no-store"))
_SAID_ID = "cifar10.request_id"
_QUIET_ROUTES = {"/healthz", "/readyz", "/ping", "/metrics"}


class Stage:
    """A part of a request, timed: `with visit.stage("decode"):`. The log's line and the request's trace then have it.

    `started` is on `time.perf_counter`'s clock, in seconds as `seconds`.
    """

    __slots__ = ("_stages", "attributes", "name", "seconds", "started")

    def __init__(self, name: str, stages: "list[Stage]", started: float = 0.0, seconds: float = 0.0) -> None:
        self.name = name
        self.started = started
        self.seconds = seconds
        self.attributes: dict[str, str | int | float] = {}
        self._stages = stages

    def __enter__(self) -> "Stage":
        self.started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self.started
        self._stages.append(self)


class Visit:
    """What is known of a request while it is answered. Flask's `g` holds it: one look-up there costs a microsecond."""

    __slots__ = ("caller", "images", "request_id", "said_id", "stages", "started")

    def __init__(self, request_id: UUID) -> None:
        self.started = time.perf_counter()
        self.request_id = request_id
        self.said_id = str(request_id)
        self.images = 0
        self.caller = NOBODY
        self.stages: list[Stage] = []

    def stage(self, name: str) -> Stage:
        """A part of it, to be timed by `with`."""
        return Stage(name, self.stages)

    def add_stage(self, name: str, started: float, seconds: float) -> None:
        """A part of it that was timed elsewhere."""
        self.stages.append(Stage(name, self.stages, started, seconds))


def visit() -> Visit:
    """The request that this thread answers."""
    here: Visit = g.visit
    return here


class Recorder(Protocol):
    """As `deploy.server.tracing.Tracing`."""

    def record(self, fields: dict[str, Any], headers: Any, started: float, stages: Iterable[Stage]) -> str:
        """Sends the spans of one request on; gives the trace's id."""


def register(app: Flask, metrics: ServerMetrics, settings: Settings) -> None:
    """Attaches all of it to `app`."""
    tracing = _tracing(settings.otel_exporter_otlp_endpoint)

    def before() -> None:
        environ = request.environ
        here = g.visit = Visit(_request_id(environ.get("HTTP_X_REQUEST_ID", "")))
        environ[_SAID_ID] = here.said_id

    def after(response: Response) -> Response:
        here, asked = visit(), request._get_current_object()  # type: ignore[attr-defined]
        rule = asked.url_rule
        route = rule.rule if rule else "unmatched"
        method, status = asked.method, response.status_code
        seconds = time.perf_counter() - here.started
        metrics.observe(route, method, status, seconds, here.stages)
        # Probes come every few seconds: they are worth a line, and a trace, only when they fail.
        quiet = route in _QUIET_ROUTES and status < 400
        level = logging.DEBUG if quiet else logging.INFO
        if not access.isEnabledFor(level) and (quiet or tracing is None):
            return response
        fields: dict[str, Any] = {
            "method": method,
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 2),
            "images": here.images,
            "bytes": asked.content_length,
            "remote": asked.environ.get("REMOTE_ADDR"),
            "caller": here.caller.name or None,
        }
        for stage in here.stages:
            fields[f"{stage.name}_ms"] = round(stage.seconds * 1000, 2)
        if tracing is not None and not quiet:
            fields["trace_id"] = tracing.record(fields, asked.headers, here.started, here.stages)
        access.log(level, "%s %s %d", method, route, status, extra={"fields": fields})
        return response

    app.before_request(before)
    app.after_request(after)
    app.wsgi_app = _with_headers(app.wsgi_app)  # type: ignore[method-assign]


def _tracing(endpoint: str | None) -> Recorder | None:
    if endpoint is None:
        return None
    from deploy.server.tracing import Tracing  # noqa: PLC0415 - what nobody asked for is not even loaded

    return Tracing(endpoint)


def _with_headers(application: Any) -> Any:
    """Around the whole app: a reply has these headers wherever it was made, and they cost no look-ups."""

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        more = HEADERS if environ["PATH_INFO"].startswith("/static/") else _HEADERS_OF_WHAT_CHANGES

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            said = [*headers, *more, ("X-Request-ID", environ[_SAID_ID])]
            return start_response(status, said, *((exc_info,) if exc_info else ()))

        return application(environ, start)

    return answer


def _request_id(given: str) -> UUID:
    """The caller's id where it is a UUID, else a fresh one: it is a key in the database, so no other text will do."""
    if given:
        try:
            return UUID(given)
        except ValueError:
            pass
    return uuid4()
