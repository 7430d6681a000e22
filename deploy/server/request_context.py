"""What every request gets, whatever its route: an id, a line in the log, figures, headers that keep browsers safe."""

import logging
import time
from uuid import UUID, uuid4

from flask import Flask, Response, g, request

from deploy.server.metrics import ServerMetrics

access = logging.getLogger("deploy.server.access")

_HEADERS = {
    # The page needs its own files and the two ways in which it shows an image; nothing else, and nothing inline.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
_QUIET_ROUTES = {"/healthz", "/readyz", "/ping", "/metrics"}


def register(app: Flask, metrics: ServerMetrics) -> None:
    """Attaches all of it to `app`."""

    def before() -> None:
        g.started = time.perf_counter()
        g.request_id = _request_id(request.headers.get("X-Request-ID", ""))
        g.images = 0

    def after(response: Response) -> Response:
        route = request.url_rule.rule if request.url_rule else "unmatched"
        seconds = time.perf_counter() - g.started
        metrics.observe(route, request.method, response.status_code, seconds)
        response.headers["X-Request-ID"] = str(g.request_id)
        response.headers.update(_HEADERS)
        if not route.startswith("/static"):
            response.headers.setdefault("Cache-Control", "no-store")
        # Probes come every few seconds: they are worth a line only when they fail.
        level = logging.DEBUG if route in _QUIET_ROUTES and response.status_code < 400 else logging.INFO
        access.log(
            level,
            "%s %s %d",
            request.method,
            route,
            response.status_code,
            extra={
                "fields": {
                    "method": request.method,
                    "route": route,
                    "status": response.status_code,
                    "ms": round(seconds * 1000, 2),
                    "images": g.images,
                    "remote": request.remote_addr,
                }
            },
        )
        return response

    app.before_request(before)
    app.after_request(after)


def _request_id(given: str) -> UUID:
    """The caller's id where it is a UUID, else a fresh one: it is a key in the database, so no other text will do."""
    try:
        return UUID(given)
    except ValueError:
        return uuid4()
