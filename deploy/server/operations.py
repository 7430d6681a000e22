"""The routes for those who run the server: is it alive, is it ready, which model, what figures, what interface."""

from dataclasses import asdict

from flask import Blueprint, Response, jsonify, request
from prometheus_client import CONTENT_TYPE_LATEST

from deploy.server import openapi
from deploy.server.access import Gate
from deploy.server.metrics import ServerMetrics
from deploy.server.predictions import model_json
from ml.serving.hot_swap import Challenger, Failure
from ml.serving.router import Counts, Follower, Router


def blueprint(follower: Follower, router: Router, gate: Gate, metrics: ServerMetrics) -> Blueprint:
    """GET /healthz, /readyz, /ping, /v1/model, /metrics, /openapi.json."""
    routes = Blueprint("operations", __name__)
    description = openapi.describe()

    @routes.get("/healthz")
    def healthz() -> Response:
        """Liveness alone: a server that waits for its model must not be killed for it."""
        return jsonify(status="alive")

    @routes.get("/readyz")
    def readyz() -> Response:
        model = follower.current()
        return jsonify(status="ready", model=model_json(model))

    @routes.get("/ping")
    def ping() -> Response:
        """MLflow's scoring protocol: an empty 200 where it can predict."""
        follower.current()
        return Response("\n", content_type="application/json")

    @routes.get("/v1/model")
    def model() -> Response:
        gate.check(request)
        loaded, state = follower.current(), follower.state()
        return jsonify(
            name=loaded.name,
            version=loaded.version,
            alias=loaded.alias,
            data=loaded.data,
            architecture=loaded.architecture,
            weights=loaded.weights,
            loaded_at=loaded.loaded_at.isoformat(),
            swaps=state.swaps,
            failed_swaps=state.failed_swaps,
            failure=_failure_json(state.failure),
            challenger=_challenger_json(state.challenger, router),
        )

    @routes.get("/metrics")
    def figures() -> Response:
        gate.check(request)
        return Response(metrics.exposition(), content_type=CONTENT_TYPE_LATEST)

    @routes.get("/openapi.json")
    def interface() -> Response:
        return jsonify(description)

    return routes


def _challenger_json(challenger: Challenger | None, router: Router) -> dict[str, object] | None:
    if challenger is None:
        return None
    traffic = challenger.traffic
    counts = router.state().counts.get(traffic.version, Counts()) if traffic else Counts()
    return {
        "version": traffic and traffic.version,
        "mode": traffic and traffic.mode,
        "share": traffic and traffic.share,
        "loaded": challenger.model is not None,
        **asdict(counts),
        "failure": _failure_json(challenger.failure),
    }


def _failure_json(failure: Failure | None) -> dict[str, object] | None:
    if failure is None:
        return None
    return {"at": failure.at.isoformat(), "version": failure.version, "message": failure.message}
