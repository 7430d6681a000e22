"""The Flask app: puts the parts together and does no I/O. `wsgi.py` hands it parts that run."""

from collections.abc import Callable
from typing import Any

import orjson
from flask import Flask
from flask.json.provider import JSONProvider

from deploy.server import openapi, operations, page, predictions, problems, request_context
from deploy.server.access import Gate
from deploy.server.bodies import MAX_BODY_BYTES
from deploy.server.exposure import check_exposure
from deploy.server.fast_path import FastPath
from deploy.server.metrics import HasLogState, ServerMetrics
from deploy.server.predictions import Log
from ml.serving.router import Follower, Router
from ml.settings import Settings

METRICS = "cifar10_metrics"
FAST_PATH = "cifar10_fast_path"
"""Of `Flask.extensions`: the app's figures, and its short cut, for what stands between it and its callers."""


class _Json(JSONProvider):
    """JSON by orjson: a tenth of the standard library's time."""

    def dumps(self, obj: Any, **_: Any) -> str:
        """Text of it."""
        return orjson.dumps(obj).decode()

    def loads(self, s: str | bytes, **_: Any) -> Any:
        """What the text says."""
        return orjson.loads(s)

    def response(self, *args: Any, **kwargs: Any) -> Any:
        """A reply that holds it."""
        said = orjson.dumps(self._prepare_response_obj(args, kwargs))
        return self._app.response_class(said, mimetype="application/json")  # type: ignore[arg-type]


class _Server(Flask):
    """Flask without what this app has no use for."""

    json_provider_class = _Json

    def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """As it is: no view here is asynchronous, so none need be asked whether it is."""
        return func


def create_app(
    settings: Settings,
    *,
    follower: Follower,
    log: Log,
    router: Router | None = None,
    shadows: HasLogState | None = None,
) -> Flask:
    """The prediction server.

    Args:
        settings: keys and address.
        follower: gives the model that answers.
        log: takes predictions and feedback.
        router: answers by `follower`'s models; where none is given, one that keeps nothing of what it mirrors.
        shadows: the log that `router` records in, for its figures.

    Raises:
        ConfigurationError: when it would serve the network without keys, or they cannot be read.
        LookupError: when a route is not described.
    """
    check_exposure(settings)
    app = _Server("deploy.server", static_folder="static", template_folder="templates")
    # One more than is allowed, so that a body of unknown length that was cut off there can be told from a whole one.
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES + 1
    app.url_map.merge_slashes = False  # no redirects: //v1/predict is nothing
    gate = Gate(settings)
    router = router or Router(follower)
    metrics = ServerMetrics(follower, router.batcher, router, log, shadows)
    app.extensions[METRICS] = metrics
    reporter = request_context.Reporter(metrics, settings.otel_exporter_otlp_endpoint)
    app.extensions[FAST_PATH] = FastPath(router, log=log, gate=gate, metrics=metrics, reporter=reporter)
    request_context.register(app, reporter)
    problems.register(app)
    app.register_blueprint(predictions.blueprint(follower, router, log, gate, metrics))
    app.register_blueprint(operations.blueprint(follower, router, gate, metrics))
    app.register_blueprint(page.blueprint(gate))
    openapi.describe_static(app)
    openapi.describe(app)  # a route without its description is found now
    return app
