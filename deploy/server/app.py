"""The Flask app: puts the parts together and does no I/O. `wsgi.py` hands it a follower and a log that run."""

from flask import Flask

from deploy.server import operations, page, predictions, problems, request_context
from deploy.server.access import Gate, check_exposure
from deploy.server.bodies import MAX_BODY_BYTES
from deploy.server.metrics import ServerMetrics
from deploy.server.predictions import Follower, Log
from ml.settings import Settings


def create_app(settings: Settings, *, follower: Follower, log: Log) -> Flask:
    """The prediction server.

    Args:
        settings: keys and address.
        follower: gives the model that answers.
        log: takes predictions and feedback.

    Raises:
        ConfigurationError: when it would serve the network without keys.
    """
    check_exposure(settings)
    app = Flask("deploy.server", static_folder="static", template_folder="templates")
    # One more than is allowed, so that a body of unknown length that was cut off there can be told from a whole one.
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES + 1
    app.json.sort_keys = False  # type: ignore[attr-defined]
    gate = Gate(settings)
    metrics = ServerMetrics(follower, log)
    request_context.register(app, metrics)
    problems.register(app)
    app.register_blueprint(predictions.blueprint(follower, log, gate, metrics))
    app.register_blueprint(operations.blueprint(follower, gate, metrics))
    app.register_blueprint(page.blueprint(gate))
    return app
