"""The interface as OpenAPI 3.1, made of the app itself: its routes, what stands beside each, and `messages`' types.

Tests hold real replies against it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from flask import Flask
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue
from pydantic_core import core_schema

from deploy.server import messages
from deploy.server.bodies import MAX_BODY_BYTES
from ml.serving.decoding import FORMATS, MAX_IMAGES, MAX_PIXELS

Json = dict[str, Any]
View = TypeVar("View", bound=Callable[..., Any])

_JSON = "application/json"
_PROBLEMS = {
    400: "The body cannot be decoded",
    401: "The key is missing or wrong",
    404: "There is no such thing",
    413: f"More than {MAX_BODY_BYTES // 1_000_000} MB, {MAX_PIXELS // 1_000_000} megapixels or {MAX_IMAGES} images",
    415: "A content type or encoding that is not taken, or that the body is not of",
    422: "A shape, range, label or query parameter that is not valid",
    429: "More images per second than this caller may have: try again after Retry-After seconds",
    500: "The server failed",
    503: "Not available at the moment: try again after Retry-After seconds",
}
_RETRIED = (429, 503)


@dataclass(frozen=True)
class Reply:
    """What a route answers when all is well: a type of `messages`, or another media type, or nothing at all."""

    description: str
    message: Any = None
    media_type: str = _JSON
    schema: Json | None = None


@dataclass(frozen=True)
class Operation:
    """What `describes` keeps of a view."""

    summary: str
    replies: Mapping[int, Reply]
    problems: tuple[int, ...]
    takes: Any
    takes_files: bool
    takes_request_id: bool
    query: Mapping[str, Json] = field(default_factory=dict)
    open_to_all: bool = False


def describes(
    summary: str,
    replies: Mapping[int, Reply],
    *problems: int,
    takes: Any = None,
    takes_files: bool = False,
    takes_request_id: bool = False,
    query: Mapping[str, Json] | None = None,
    open_to_all: bool = False,
) -> Callable[[View], View]:
    """Beside a route: what the document says of it.

    Args:
        summary: one line.
        replies: by status, where all is well.
        problems: the statuses of its errors.
        takes: the type of its JSON body, of `messages`; None: it takes no body.
        takes_files: whether it takes image files too, as they are and as a form.
        takes_request_id: whether X-Request-ID makes a repeat safe.
        query: its query parameters, each with its schema.
        open_to_all: whether it needs no key.
    """
    operation = Operation(summary, replies, problems, takes, takes_files, takes_request_id, query or {}, open_to_all)

    def keep(view: View) -> View:
        view.operation = operation  # type: ignore[attr-defined]
        return view

    return keep


def describe_static(app: Flask) -> None:
    """Describes Flask's own route for files."""
    replies = {200: Reply("A file", media_type="text/css", schema={"type": "string"})}
    describes("The page's files", replies, 404, open_to_all=True)(app.view_functions["static"])


def describe(app: Flask) -> Json:
    """The whole document of an app, JSON-able.

    Raises:
        LookupError: a route has nothing beside it.
    """
    paths: Json = {}
    for rule in app.url_map.iter_rules():
        operation = getattr(app.view_functions[rule.endpoint], "operation", None)
        if operation is None:
            raise LookupError(f"The route {rule.rule} is not described. Fix: put @describes(...) on its view.")
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        described = _operation(operation, sorted(rule.arguments))
        paths.setdefault(path, {}).update(
            {method.lower(): described for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}}
        )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "CIFAR-10 prediction server",
            "version": "1",
            "description": "Says which of ten classes an image shows, and which model says so. Callers need a key "
            "where the server has any; without keys it answers its own machine alone.",
        },
        "security": [{"bearer": []}, {"header": []}],
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": _schemas()[1],
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


def _operation(operation: Operation, arguments: list[str]) -> Json:
    parameters = [
        *({"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in arguments),
        *([_REQUEST_ID] if operation.takes_request_id else []),
        *({"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()),
    ]
    return {
        "summary": operation.summary,
        **({"parameters": parameters} if parameters else {}),
        **({"requestBody": _request_body(operation)} if operation.takes else {}),
        "responses": {
            **{str(status): _reply(reply) for status, reply in operation.replies.items()},
            **{str(status): _problem(status) for status in operation.problems},
        },
        **({"security": []} if operation.open_to_all else {}),
    }


def _request_body(operation: Operation) -> Json:
    files: Json = {}
    if operation.takes_files:
        files = {kind: {"schema": {}} for kind in FORMATS}
        files["multipart/form-data"] = {"schema": _schema_of(messages.Form)}
    return {"required": True, "content": {**files, _JSON: {"schema": _schema_of(operation.takes)}}}


def _reply(reply: Reply) -> Json:
    schema = reply.schema if reply.message is None else _schema_of(reply.message)
    return {
        "description": reply.description,
        "content": {reply.media_type: {} if schema is None else {"schema": schema}},
    }


def _problem(status: int) -> Json:
    retried = {"headers": {"Retry-After": {"schema": {"type": "integer", "minimum": 1}}}}
    return {
        "description": _PROBLEMS[status],
        "content": {"application/problem+json": {"schema": _schema_of(messages.Problem)}},
        **(retried if status in _RETRIED else {}),
    }


def _schema_of(message: Any) -> Json:
    return _schemas()[0][message.__name__]


class _Plain(GenerateJsonSchema):
    """Closed objects, without the titles that only repeat a field's name."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 - the base class's signature
        """Never."""
        return False

    def typed_dict_schema(self, schema: core_schema.TypedDictSchema) -> JsonSchemaValue:
        """Closed, as every message is, and named by its component alone."""
        made = super().typed_dict_schema(schema)
        made.pop("title", None)
        return {**made, "additionalProperties": False}


_TAKEN = (messages.Images, messages.MlflowInput, messages.Feedback, messages.Form)
_SAID = (
    messages.Predictions,
    messages.MlflowPredictions,
    messages.FeedbackKept,
    messages.ModelState,
    messages.Alive,
    messages.Ready,
    messages.Problem,
)


@cache
def _schemas() -> tuple[dict[str, Json], Json]:
    """References to each message by its name, and what they refer to. They are the same for every app."""
    kinds: list[tuple[Any, JsonSchemaMode]] = [
        *((message, "validation") for message in _TAKEN),
        *((message, "serialization") for message in _SAID),
    ]
    inputs = [(message.__name__, mode, TypeAdapter(message)) for message, mode in kinds]
    references, definitions = TypeAdapter.json_schemas(
        inputs, ref_template="#/components/schemas/{model}", schema_generator=_Plain
    )
    return {name: schema for (name, _), schema in references.items()}, definitions["$defs"]


_REQUEST_ID: Json = {
    "name": "X-Request-ID",
    "in": "header",
    "description": "a UUID of the caller's own, which makes a repeat safe: the same id is logged once; a fresh UUID "
    "takes the place of any other text",
    "schema": {"type": "string"},
}
