"""The Flask app: puts the parts together and does no I/O. `wsgi.py` hands it parts that run."""

from flask import Flask

from deploy.server import openapi, operations, page, predictions, problems, request_context
from deploy.server.access import Gate, check_exposure
from deploy.server.bodies import MAX_BODY_BYTES
from deploy.server.metrics import HasLogState, ServerMetrics
from deploy.server.predictions import Log
from ml.serving.batcher import Batcher
from ml.serving.router import Follower, Router
from ml.settings import Settings


def create_app(
    settings: Settings,
    *,
    follower: Follower,
    log: Log,
    batcher: Batcher | None = None,
    router: Router | None = None,
    shadows: HasLogState | None = None,
) -> Flask:
    """The prediction server.

    Args:
        settings: keys and address.
        follower: gives the model that answers.
        log: takes predictions and feedback.
        batcher: predicts the images of several requests together; where none is given, one of its own.
        router: answers by `follower`'s models; where none is given, one that keeps nothing of what it mirrors.
        shadows: the log that `router` records in, for its figures.

    Raises:
        ConfigurationError: when it would serve the network without keys, or they cannot be read.
        LookupError: when a route is not described.
    """
    check_exposure(settings)
    app = Flask("deploy.server", static_folder="static", template_folder="templates")
    # One more than is allowed, so that a body of unknown length that was cut off there can be told from a whole one.
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES + 1
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.url_map.merge_slashes = False  # no redirects: //v1/predict is nothing
    gate = Gate(settings)
    batcher = batcher or Batcher()
    router = router or Router(follower, batcher)
    metrics = ServerMetrics(follower, batcher, router, log, shadows)
    request_context.register(app, metrics, settings)
    problems.register(app)
    app.register_blueprint(predictions.blueprint(follower, router, log, gate, metrics))
    app.register_blueprint(operations.blueprint(follower, router, gate, metrics))
    app.register_blueprint(page.blueprint(gate))
    openapi.describe_static(app)
    openapi.describe(app)  # a route without its description is found now
    return app
