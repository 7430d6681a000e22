"""The interface as OpenAPI 3.1. A test holds it against the app: every route is here, and real replies fit it."""

from typing import Any

from deploy.server.bodies import FIELD, MAX_BODY_BYTES
from ml.datasets.labels import CLASS_NAMES, NUM_CLASSES
from ml.serving.decoding import FORMATS, MAX_IMAGES, MAX_PIXELS

Json = dict[str, Any]

_UUID: Json = {"type": "string", "format": "uuid"}
_TIME: Json = {"type": "string", "format": "date-time"}
_PROBABILITY: Json = {"type": "number", "minimum": 0, "maximum": 1}
_BASE64: Json = {"type": "string", "contentEncoding": "base64"}
_LABEL: Json = {"type": "string", "enum": list(CLASS_NAMES)}
_PIXELS: Json = {
    "type": "array",
    "description": "height x width x 3, RGB, 0-255; resized to 32x32",
    "items": {
        "type": "array",
        "items": {
            "type": "array",
            "minItems": 3,
            "maxItems": 3,
            "items": {"type": "number", "minimum": 0, "maximum": 255},
        },
    },
}


def _object(required: Json, optional: Json | None = None) -> Json:
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **(optional or {})},
        "additionalProperties": False,
    }


def _list(items: Json) -> Json:
    return {"type": "array", "minItems": 1, "maxItems": MAX_IMAGES, "items": items}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


_DATA: Json = {"type": "string", "description": "what it learnt from: cifar-10, or SYNTHETIC", "examples": ["cifar-10"]}
_MODEL: Json = {
    "name": {"type": "string", "examples": ["cifar10-classifier"]},
    "version": {"type": "integer", "minimum": 1},
    "alias": {
        "type": "string",
        "description": "challenger where it is on trial, and this request was one of its share",
        "examples": ["champion"],
    },
    "data": _DATA,
}

_FAILURE: Json = {
    "oneOf": [
        {"type": "null"},
        _object({"at": _TIME, "version": {"type": ["integer", "null"]}, "message": {"type": "string"}}),
    ],
}


def _images(what: str) -> Json:
    return {"type": "integer", "minimum": 0, "description": f"images since the server started: {what}"}


_SCHEMAS: Json = {
    "Model": _object(_MODEL, {"weights": {"const": "RANDOM WEIGHTS", "description": "stands only where it is so"}}),
    "Prediction": _object(
        {
            "label": _LABEL,
            "class_id": {"type": "integer", "minimum": 0, "maximum": NUM_CLASSES - 1},
            "probability": _PROBABILITY,
            "probabilities": _object(dict.fromkeys(CLASS_NAMES, _PROBABILITY)),
        },
        {"image": {**_BASE64, "contentMediaType": "image/png", "description": "with ?include=image: what it saw"}},
    ),
    "Predictions": _object(
        {"request_id": _UUID, "model": _ref("Model"), "predictions": {"type": "array", "items": _ref("Prediction")}}
    ),
    "Images": {
        "oneOf": [
            _object({"image": {**_BASE64, "description": "a PNG, JPEG or WebP file, also as a data: URL"}}),
            _object({"images": _list(_BASE64)}),
            _object({"instances": _list(_PIXELS)}),
        ]
    },
    "MlflowInput": {
        "oneOf": [
            _object({name: _list(_PIXELS)}, {"params": {"type": ["object", "null"], "maxProperties": 0}})
            for name in ("instances", "inputs")
        ]
    },
    "MlflowPredictions": _object(
        {
            "predictions": {
                "type": "array",
                "items": {"type": "array", "minItems": NUM_CLASSES, "maxItems": NUM_CLASSES, "items": _PROBABILITY},
            }
        }
    ),
    "Feedback": _object(
        {"request_id": {**_UUID, "description": "of a reply of /v1/predict"}, "label": _LABEL},
        {"index": {"type": "integer", "minimum": 0, "default": 0, "description": "which of the reply's predictions"}},
    ),
    "FeedbackKept": _object({"request_id": _UUID, "index": {"type": "integer", "minimum": 0}, "label": _LABEL}),
    "ModelState": _object(
        {
            **_MODEL,
            "architecture": {"type": "string"},
            "weights": {"type": "string", "description": "what training started from"},
            "loaded_at": _TIME,
            "swaps": {"type": "integer", "minimum": 1},
            "failed_swaps": {"type": "integer", "minimum": 0},
            "failure": {
                "description": "what went wrong last and is not mended yet; the model above goes on serving",
                **_FAILURE,
            },
            "challenger": {
                "description": "the version that gets a share of the traffic; null where none does",
                "oneOf": [{"type": "null"}, _ref("Challenger")],
            },
        }
    ),
    "Challenger": _object(
        {
            "version": {"type": ["integer", "null"], "description": "null where what is set cannot be read"},
            "mode": {
                "enum": ["mirror", "canary", None],
                "description": "mirror: the champion answers, and it sees the same images; canary: it answers",
            },
            "share": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1, "description": "of requests"},
            "loaded": {"type": "boolean"},
            "answered": _images("of callers, which it answered"),
            "mirrored": _images("that it was shown unseen"),
            "disagreed": _images("of those, on which it said another class than the champion"),
            "failed": _images("on which it failed; the champion answered"),
            "dropped": _images("not mirrored, since too many waited"),
            "failure": {"description": "why it gets nothing, or what could not be asked since", **_FAILURE},
        }
    ),
    "Alive": _object({"status": {"const": "alive"}}),
    "Ready": _object({"status": {"const": "ready"}, "model": _ref("Model")}),
    "Problem": _object(
        {
            "type": {"type": "string", "format": "uri"},
            "title": {"type": "string"},
            "status": {"type": "integer", "minimum": 400, "maximum": 599},
            "detail": {"type": "string", "description": "what is wrong, and how to mend it"},
            "instance": {"type": "string", "format": "uri"},
            "request_id": _UUID,
        }
    ),
}

_PROBLEMS = {
    400: "The body cannot be decoded",
    401: "The key is missing or wrong",
    404: "No such prediction",
    413: f"More than {MAX_BODY_BYTES // 1_000_000} MB, {MAX_PIXELS // 1_000_000} megapixels or {MAX_IMAGES} images",
    415: "A content type that is not taken, or that the body is not of",
    422: "A shape, range or label that is not valid",
    500: "The server failed",
    503: "Not available at the moment: try again after Retry-After seconds",
}


def _json_body(schema: str) -> Json:
    return {"application/json": {"schema": _ref(schema)}}


def _problems(*statuses: int) -> Json:
    return {
        str(status): {
            "description": _PROBLEMS[status],
            "content": {"application/problem+json": {"schema": _ref("Problem")}},
            **({"headers": {"Retry-After": {"schema": {"type": "integer"}}}} if status == 503 else {}),
        }
        for status in statuses
    }


def _operation(summary: str, done: Json, *problems: int, open_to_all: bool = False, **more: Any) -> Json:
    return {
        "summary": summary,
        **more,
        "responses": {**done, **_problems(*problems)},
        **({"security": []} if open_to_all else {}),
    }


def _answer(description: str, schema: str) -> Json:
    return {"description": description, "content": _json_body(schema)}


def _text(description: str, kind: str) -> Json:
    return {"200": {"description": description, "content": {kind: {"schema": {"type": "string"}}}}}


_REQUEST_ID: Json = {
    "name": "X-Request-ID",
    "in": "header",
    "description": "a UUID of the caller's own, which makes a repeat safe: the same id is logged once",
    "schema": _UUID,
}
_FILES: Json = {
    "multipart/form-data": {"schema": _object({FIELD: _list({"type": "string", "contentMediaType": "image/*"})})}
}


def _paths() -> Json:
    raw: Json = {kind: {"schema": {}} for kind in FORMATS}
    include = {"name": "include", "in": "query", "schema": {"const": "image"}}
    return {
        "/v1/predict": {
            "post": _operation(
                "Say what images show",
                {"200": _answer("One prediction for each image, in their order", "Predictions")},
                *(400, 401, 413, 415, 422, 500, 503),
                parameters=[_REQUEST_ID, include],
                requestBody={"required": True, "content": {**raw, **_FILES, **_json_body("Images")}},
            )
        },
        "/v1/feedback": {
            "post": _operation(
                "Say what an image really shows; the latest word counts",
                {
                    "201": _answer("Kept", "FeedbackKept"),
                    "200": _answer("Kept instead of what was said before", "FeedbackKept"),
                },
                *(400, 401, 404, 413, 415, 422, 503),
                requestBody={"required": True, "content": _json_body("Feedback")},
            )
        },
        "/invocations": {
            "post": _operation(
                "MLflow's scoring protocol",
                {"200": _answer("Ten probabilities for each image", "MlflowPredictions")},
                *(400, 401, 413, 415, 422, 500, 503),
                parameters=[_REQUEST_ID],
                requestBody={"required": True, "content": _json_body("MlflowInput")},
            )
        },
        "/v1/model": {
            "get": _operation("The model that answers", {"200": _answer("Its state", "ModelState")}, 401, 503)
        },
        "/metrics": {"get": _operation("Figures for Prometheus", _text("Text exposition", "text/plain"), 401)},
        "/healthz": {"get": _operation("Is the process alive?", {"200": _answer("It is", "Alive")}, open_to_all=True)},
        "/readyz": {"get": _operation("Can it predict?", {"200": _answer("It can", "Ready")}, 503, open_to_all=True)},
        "/ping": {
            "get": _operation(
                "MLflow's scoring protocol: can it predict?",
                {"200": {"description": "It can; an empty line", "content": {"application/json": {}}}},
                503,
                open_to_all=True,
            )
        },
        "/openapi.json": {
            "get": _operation(
                "This document",
                {
                    "200": {
                        "description": "OpenAPI 3.1",
                        "content": {"application/json": {"schema": {"type": "object"}}},
                    }
                },
                open_to_all=True,
            )
        },
        "/": {"get": _operation("A page to try it", _text("HTML", "text/html"), open_to_all=True)},
        "/static/{filename}": {
            "get": _operation(
                "The page's files",
                _text("A file", "text/css"),
                404,
                open_to_all=True,
                parameters=[{"name": "filename", "in": "path", "required": True, "schema": {"type": "string"}}],
            )
        },
    }


def describe() -> Json:
    """The whole document, JSON-able."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "CIFAR-10 prediction server",
            "version": "1",
            "description": "Says which of ten classes an image shows, and which model says so. Callers need a key "
            "where the server has any; without keys it answers its own machine alone.",
        },
        "security": [{"bearer": []}, {"header": []}],
        "paths": _paths(),
        "components": {
            "schemas": _SCHEMAS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }
