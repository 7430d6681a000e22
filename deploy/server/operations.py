"""The routes for those who run the server: is it alive, is it ready, which model, what figures, what interface."""

from flask import Blueprint, Response, current_app, jsonify, request
from prometheus_client import CONTENT_TYPE_LATEST

from deploy.server import messages
from deploy.server.access import Gate
from deploy.server.bodies import check_query
from deploy.server.metrics import ServerMetrics
from deploy.server.openapi import Reply, describe, describes
from deploy.server.predictions import model_json
from ml.serving.hot_swap import Challenger, Failure
from ml.serving.router import Counts, Follower, Router


def blueprint(follower: Follower, router: Router, gate: Gate, metrics: ServerMetrics) -> Blueprint:
    """GET /healthz, /readyz, /ping, /v1/model, /metrics, /openapi.json."""
    routes = Blueprint("operations", __name__)

    def enter() -> None:
        gate.enter()
        check_query(request)

    @routes.get("/healthz")
    @describes("Is the process alive?", {200: Reply("It is", messages.Alive)}, open_to_all=True)
    def healthz() -> Response:
        """Liveness alone: a server that waits for its model must not be killed for it."""
        return jsonify(status="alive")

    @routes.get("/readyz")
    @describes("Can it predict?", {200: Reply("It can", messages.Ready)}, 503, open_to_all=True)
    def readyz() -> Response:
        model = follower.current()
        return jsonify(status="ready", model=model_json(model))

    @routes.get("/ping")
    @describes(
        "MLflow's scoring protocol: can it predict?", {200: Reply("It can; an empty line")}, 503, open_to_all=True
    )
    def ping() -> Response:
        """MLflow's scoring protocol: an empty 200 where it can predict."""
        follower.current()
        return Response("\n", content_type="application/json")

    @routes.get("/v1/model")
    @describes("The model that answers", {200: Reply("Its state", messages.ModelState)}, 401, 422, 503)
    def model() -> Response:
        enter()
        loaded, state = follower.current(), follower.state()
        said = messages.ModelState(
            name=loaded.name,
            version=loaded.version,
            alias=loaded.alias,
            data=loaded.data,
            architecture=loaded.architecture,
            weights=loaded.weights,
            engine=loaded.engine_name,
            loaded_at=loaded.loaded_at.isoformat(),
            swaps=state.swaps,
            failed_swaps=state.failed_swaps,
            failure=_failure_json(state.failure),
            challenger=_challenger_json(state.challenger, router),
        )
        return jsonify(said)

    @routes.get("/metrics")
    @describes(
        "Figures for Prometheus",
        {200: Reply("Text exposition", media_type="text/plain", schema={"type": "string"})},
        *(401, 422),
    )
    def figures() -> Response:
        enter()
        return Response(metrics.exposition(), content_type=CONTENT_TYPE_LATEST)

    @routes.get("/openapi.json")
    @describes("This document", {200: Reply("OpenAPI 3.1", schema={"type": "object"})}, open_to_all=True)
    def interface() -> Response:
        return jsonify(describe(current_app))

    return routes


def _challenger_json(challenger: Challenger | None, router: Router) -> messages.Challenger | None:
    if challenger is None:
        return None
    traffic = challenger.traffic
    counts = router.state().counts.get(traffic.version, Counts()) if traffic else Counts()
    return messages.Challenger(
        version=traffic.version if traffic else None,
        mode=traffic.mode if traffic else None,
        share=traffic.share if traffic else None,
        loaded=challenger.model is not None,
        answered=counts.answered,
        mirrored=counts.mirrored,
        disagreed=counts.disagreed,
        failed=counts.failed,
        dropped=counts.dropped,
        failure=_failure_json(challenger.failure),
    )


def _failure_json(failure: Failure | None) -> messages.Failure | None:
    if failure is None:
        return None
    return messages.Failure(at=failure.at.isoformat(), version=failure.version, message=failure.message)
