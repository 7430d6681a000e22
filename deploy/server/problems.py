"""Errors as clients see them: `application/problem+json` (RFC 9457) with a `detail` that says the fix.

Owns which error gets which status. A detail never holds a path, an address or a trace: what only an operator can mend
is told in general words here and in full in the log, under the same request id.
"""

import logging
from http import HTTPStatus

from flask import Flask, Response, json
from werkzeug.exceptions import HTTPException

from deploy.server.request_context import visit
from ml.errors import (
    CifarError,
    DatabaseUnavailable,
    ImageTooLarge,
    ImageTypeUnsupported,
    ImageUndecodable,
    InputInvalid,
    ModelInvalid,
    PredictionNotFound,
    ServiceUnavailable,
)
from ml.serving.batcher import Overloaded
from ml.serving.decoding import MAX_IMAGES

logger = logging.getLogger(__name__)

CONTENT_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 2


class NotAuthorised(CifarError):
    """No key, a wrong key, or, where no keys are set, a caller that is not on this machine."""


class RateLimited(CifarError):
    """A caller asks for more images per second than it may have."""

    def __init__(self, message: str, *, fix: str, retry_after: int) -> None:
        super().__init__(message, fix=fix)
        self.retry_after = retry_after


# class: (status, title); the nearest base class counts.
_KINDS: dict[type[CifarError], tuple[int, str]] = {
    ImageUndecodable: (400, "The body cannot be decoded"),
    NotAuthorised: (401, "Not authorised"),
    PredictionNotFound: (404, "No such prediction"),
    ImageTooLarge: (413, "Too large"),
    ImageTypeUnsupported: (415, "Type not supported"),
    InputInvalid: (422, "Input not valid"),
    RateLimited: (429, "Too many images"),
    ServiceUnavailable: (503, "Not available at the moment"),
    CifarError: (500, "The server failed"),
}

_GENERAL = "The server failed on this request. Send it again; if that fails too, tell the operator the request_id."

_HTTP_FIXES = {
    400: "Send a well-formed HTTP request; /openapi.json describes every route.",
    404: "There is nothing at this address; /openapi.json lists every route.",
    405: "This route takes another method: see the Allow header, and /openapi.json.",
    413: f"The body is too large: send at most {{limit}} MB, and at most {MAX_IMAGES} images in a form.",
    415: "This route does not take that content type; /openapi.json says which it takes.",
}


def document(status: int, title: str, detail: str, *, kind: str, request_id: str) -> dict[str, object]:
    """A problem document, whichever part of the server it comes from."""
    return {
        "type": f"urn:cifar10:problem:{kind}",
        "title": title,
        "status": status,
        "detail": detail,
        "instance": f"urn:uuid:{request_id}",
        "request_id": request_id,
    }


def problem(status: int, title: str, detail: str, *, kind: str) -> Response:
    """A problem document as a response."""
    body = document(status, title, detail, kind=kind, request_id=visit().said_id)
    response = Response(json.dumps(body), status, content_type=CONTENT_TYPE)
    if status == 503:
        response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if status == 401:
        response.headers["WWW-Authenticate"] = 'Bearer realm="cifar10"'
    return response


def register(app: Flask) -> None:
    """Makes every error of `app` a problem document, those of Flask itself included."""
    app.register_error_handler(CifarError, _from_ours)
    app.register_error_handler(HTTPException, lambda error: _from_http(error, app.config["MAX_CONTENT_LENGTH"]))


def _from_ours(error: CifarError) -> Response:
    kind = next(base for base in type(error).__mro__ if base in _KINDS)
    status, title = _KINDS[kind]
    detail = str(error)
    if status == 500 or isinstance(error, ModelInvalid):
        logger.error("A request failed: %s", error, exc_info=error)
        detail = _GENERAL
    elif isinstance(error, DatabaseUnavailable):
        logger.warning("%s", error)
        detail = "The prediction log cannot be reached, so nothing was kept. Send it again in a few seconds."
    response = problem(status, title, detail, kind=_dashed(kind.__name__))
    if isinstance(error, (RateLimited, Overloaded)):
        response.headers["Retry-After"] = str(error.retry_after)
    return response


def _from_http(error: HTTPException, limit: int) -> Response:
    status = error.code or 500
    phrase = HTTPStatus(status).phrase
    detail = _HTTP_FIXES.get(status, phrase).format(limit=limit // 1_000_000) if status < 500 else _GENERAL
    response = problem(status, phrase, detail, kind=phrase.lower().replace(" ", "-"))
    allowed = getattr(error, "valid_methods", None)
    if allowed:
        response.headers["Allow"] = ", ".join(sorted(allowed))
    return response


def _dashed(name: str) -> str:
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")
