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
HEADERS_OF_WHAT_CHANGES = (*HEADERS, ("Cache-Control", "no-store"))
FAILURE = "cifar10.failure"
"""In a request's environment: why it could not be answered on the fast path; the app says so to its caller."""
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

    def record(self, fields: dict[str, Any], environ: dict[str, Any], started: float, stages: Iterable[Stage]) -> str:
        """Sends the spans of one request on; gives the trace's id."""


class Reporter:
    """Tells of each request that was answered: in the figures, in the log, and to whoever collects traces."""

    def __init__(self, metrics: ServerMetrics, otlp_endpoint: str | None) -> None:
        self._metrics = metrics
        self._tracing = _tracing(otlp_endpoint)

    def report(self, here: Visit, environ: dict[str, Any], route: str, status: int) -> None:
        """Tells of one; `environ` is WSGI's, `route` the rule that it matched."""
        seconds = time.perf_counter() - here.started
        method = environ["REQUEST_METHOD"]
        self._metrics.observe(route, method, status, seconds, here.stages)
        # Probes come every few seconds: they are worth a line, and a trace, only when they fail.
        quiet = route in _QUIET_ROUTES and status < 400
        level = logging.DEBUG if quiet else logging.INFO
        if not access.isEnabledFor(level) and (quiet or self._tracing is None):
            return
        length = environ.get("CONTENT_LENGTH", "")
        fields: dict[str, Any] = {
            "request_id": here.said_id,
            "method": method,
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 2),
            "images": here.images,
            "bytes": int(length) if length.isdecimal() else None,
            "remote": environ.get("REMOTE_ADDR"),
            "caller": here.caller.name or None,
        }
        for stage in here.stages:
            fields[f"{stage.name}_ms"] = round(stage.seconds * 1000, 2)
        if self._tracing is not None and not quiet:
            fields["trace_id"] = self._tracing.record(fields, environ, here.started, here.stages)
        access.log(level, "%s %s %d", method, route, status, extra={"fields": fields})


def register(app: Flask, reporter: Reporter) -> None:
    """Attaches all of it to `app`."""

    def before() -> None:
        environ = request.environ
        here = g.visit = Visit(request_id_of(environ))
        environ[_SAID_ID] = here.said_id
        if FAILURE in environ:
            raise environ[FAILURE]

    def after(response: Response) -> Response:
        asked = request._get_current_object()  # type: ignore[attr-defined]
        rule = asked.url_rule
        reporter.report(visit(), asked.environ, rule.rule if rule else "unmatched", response.status_code)
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
        more = HEADERS if environ["PATH_INFO"].startswith("/static/") else HEADERS_OF_WHAT_CHANGES

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            said = [*headers, *more, ("X-Request-ID", environ[_SAID_ID])]
            return start_response(status, said, *((exc_info,) if exc_info else ()))

        return application(environ, start)

    return answer


def request_id_of(environ: dict[str, Any]) -> UUID:
    """The caller's id where it is a UUID, else a fresh one: it is a key in the database, so no other text will do."""
    given = environ.get("HTTP_X_REQUEST_ID", "")
    if given:
        try:
            return UUID(given)
        except ValueError:
            pass
    return uuid4()
