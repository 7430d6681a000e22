"""The routes that predict, and the one that takes what the image really showed."""

import base64
import io
from datetime import UTC, datetime
from typing import Final, Protocol
from uuid import UUID

import numpy as np
from flask import Blueprint, Response, jsonify, request
from PIL import Image

from deploy.server import messages
from deploy.server.access import Gate
from deploy.server.bodies import check_query, images_of, json_of
from deploy.server.metrics import ServerMetrics
from deploy.server.openapi import Reply, describes
from deploy.server.request_context import Stage, Visit, visit
from ml.datasets.labels import CLASS_NAMES
from ml.errors import InputInvalid
from ml.monitoring.batch_writer import LogState
from ml.monitoring.prediction_log import LoggedPrediction
from ml.serving.batcher import Answer
from ml.serving.decoding import images_from_mlflow
from ml.serving.hot_swap import LoadedModel
from ml.serving.router import Follower, Router

RANDOM_WEIGHTS: Final = "RANDOM WEIGHTS"


_QUERY = frozenset({"include"})


class Log(Protocol):
    """As `ml.monitoring.prediction_log.PredictionLog`."""

    def append(self, prediction: LoggedPrediction) -> bool:
        """Queues it; never waits and never fails."""

    def record_feedback(self, request_id: UUID, index: int, label: int) -> bool:
        """True where it is the first on that image. PredictionNotFound, DatabaseUnavailable."""

    def state(self) -> LogState:
        """Its counts."""


def blueprint(follower: Follower, router: Router, log: Log, gate: Gate, metrics: ServerMetrics) -> Blueprint:
    """POST /v1/predict, POST /v1/feedback, POST /invocations."""
    routes = Blueprint("predictions", __name__)
    routes.before_request(gate.enter_metered)

    def predict_and_log(here: Visit, images: np.ndarray) -> tuple[LoadedModel, np.ndarray]:
        gate.charge(here, len(images))
        with here.stage("predict") as predicting:
            model, answer = router.predict(here.request_id, images, here.caller.name)
        note_prediction(here, predicting, model, answer, images, log=log, metrics=metrics)
        return model, answer.probabilities

    @routes.post("/v1/predict")
    @describes(
        "Say what images show",
        {200: Reply("One prediction for each image, in their order", messages.Predictions)},
        *(400, 401, 413, 415, 422, 429, 500, 503),
        takes=messages.Images,
        takes_files=True,
        takes_request_id=True,
        query={"include": {"const": "image"}},
    )
    def predict() -> Response:
        with_image = _wants_image()
        follower.current()  # no use reading ten megabytes when nothing can answer
        here = visit()
        with here.stage("decode"):
            images = images_of(request)
        model, probabilities = predict_and_log(here, images)
        predictions = [prediction_json(row) for row in probabilities]
        if with_image:
            for prediction, image in zip(predictions, images, strict=True):
                prediction["image"] = _png(image)
        return jsonify(predictions_json(here, model, predictions))

    @routes.post("/invocations")
    @describes(
        "MLflow's scoring protocol",
        {200: Reply("Ten probabilities for each image", messages.MlflowPredictions)},
        *(400, 401, 413, 415, 422, 429, 500, 503),
        takes=messages.MlflowInput,
        takes_request_id=True,
    )
    def invocations() -> Response:
        check_query(request)
        follower.current()
        here = visit()
        with here.stage("decode"):
            images = images_from_mlflow(json_of(request))
        _, probabilities = predict_and_log(here, images)
        return jsonify(messages.MlflowPredictions(predictions=probabilities.tolist()))

    @routes.post("/v1/feedback")
    @describes(
        "Say what an image really shows; the latest word counts",
        {
            201: Reply("Kept", messages.FeedbackKept),
            200: Reply("Kept instead of what was said before", messages.FeedbackKept),
        },
        *(400, 401, 404, 413, 415, 422, 429, 500, 503),
        takes=messages.Feedback,
    )
    def feedback() -> tuple[Response, int]:
        check_query(request)
        request_id, index, label = _feedback_of(json_of(request))
        gate.charge(visit(), 1)
        created = log.record_feedback(request_id, index, CLASS_NAMES.index(label))
        said = messages.FeedbackKept(request_id=str(request_id), index=index, label=label)
        return jsonify(said), 201 if created else 200

    return routes


def note_prediction(
    here: Visit,
    predicting: Stage,
    model: LoadedModel,
    answer: Answer,
    images: np.ndarray,
    *,
    log: Log,
    metrics: ServerMetrics,
) -> None:
    """Keeps what was predicted, before its caller is told: in the log, in the figures, and in the request's stages."""
    probabilities = answer.probabilities
    here.images = len(images)
    predicting.attributes = {"cifar10.model.version": model.version, "cifar10.batch.size": answer.batch}
    metrics.predicted(probabilities.argmax(axis=1).tolist(), model.version, answer.batch)
    # Within the stage before: of its time, that in line and that in the engine.
    computing = predicting.started + predicting.seconds - answer.computed
    here.add_stage("queue", computing - answer.waited, answer.waited)
    here.add_stage("engine", computing, answer.computed)
    with here.stage("log"):
        log.append(
            LoggedPrediction(
                request_id=here.request_id,
                created_at=datetime.now(UTC),
                model_name=model.name,
                model_version=model.version,
                probabilities=probabilities,
                images=images,
            )
        )


def model_json(model: LoadedModel) -> messages.Model:
    """How a reply names the model. That it never learnt from real weights is said where it is so."""
    said = messages.Model(name=model.name, version=model.version, alias=model.alias, data=model.data)
    if model.weights == RANDOM_WEIGHTS:
        said["weights"] = RANDOM_WEIGHTS
    return said


def predictions_json(here: Visit, model: LoadedModel, predictions: list[messages.Prediction]) -> messages.Predictions:
    """The whole reply of /v1/predict."""
    return messages.Predictions(request_id=here.said_id, model=model_json(model), predictions=predictions)


def prediction_json(probabilities: np.ndarray) -> messages.Prediction:
    """One image's answer; `probabilities` is float32 (10,)."""
    # Seven digits are what a float32 holds.
    rounded = [round(p, 7) for p in probabilities.tolist()]
    class_id = int(probabilities.argmax())
    return {
        "label": CLASS_NAMES[class_id],
        "class_id": class_id,
        "probability": rounded[class_id],
        "probabilities": dict(zip(CLASS_NAMES, rounded, strict=True)),
    }


def _wants_image() -> bool:
    check_query(request, _QUERY)
    wanted = request.args.get("include") if request.environ.get("QUERY_STRING") else None
    if wanted not in (None, "image"):
        raise InputInvalid(f"?include={wanted[:40]} is not known.", fix="leave it out, or send ?include=image.")
    return wanted is not None


def _png(image: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _feedback_of(payload: dict[str, object]) -> tuple[UUID, int, str]:
    unknown = sorted(set(payload) - {"request_id", "index", "label"})
    if unknown:
        raise InputInvalid(f"{unknown[0][:40]!r} is not known.", fix='send "request_id", "index" and "label".')
    request_id, index, label = payload.get("request_id"), payload.get("index", 0), payload.get("label")
    try:
        identity = UUID(request_id) if isinstance(request_id, str) else None
    except ValueError:
        identity = None
    if identity is None:
        raise InputInvalid("request_id is not a UUID.", fix="send the request_id of a reply of /v1/predict.")
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise InputInvalid("index is not a whole number from 0.", fix="send the prediction's position in its reply.")
    if not isinstance(label, str) or label not in CLASS_NAMES:
        said = f"The label {label[:40]!r}" if isinstance(label, str) else "The label"
        raise InputInvalid(f"{said} is none of the ten classes.", fix=f"send one of {', '.join(CLASS_NAMES)}.")
    return identity, index, label
