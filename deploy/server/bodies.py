"""Reads images off the wire, in every form that the interface names. What the bytes mean is `ml.serving.decoding`'s."""

import io
from typing import IO

import numpy as np
from flask import Request
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.formparser import FormDataParser

from ml.errors import ImageTypeUnsupported, ImageUndecodable, InputInvalid
from ml.serving.decoding import FORMATS, MAX_IMAGES, EncodedImage, decode_images, images_from_json, parse_json

MAX_BODY_BYTES = 10_000_000
FIELD = "image"

_HOW = (
    f"send a raw body of type {', '.join(FORMATS)}, multipart/form-data with files in the field {FIELD!r}, "
    "or application/json."
)
_JSON = "application/json"
_FORM = "multipart/form-data"


def images_of(request: Request) -> np.ndarray:
    """The images of a /v1/predict request as uint8 (n, 32, 32, 3).

    Raises:
        RequestError: one of its classes, as `ml.serving.decoding` says.
        werkzeug.exceptions.RequestEntityTooLarge: when the body is over the limit.
    """
    kind = _content_type(request)
    if kind in FORMATS:
        return decode_images([EncodedImage(_body(request), kind)])
    if kind == _JSON:
        return images_from_json(parse_json(_body(request)))
    if kind == _FORM:
        return decode_images(_files(_body(request), request.mimetype_params))
    if kind == "application/x-www-form-urlencoded":
        raise ImageTypeUnsupported(
            "The body is declared as a web form, which is what curl does by itself.",
            fix="say what it is, for example curl -H 'Content-Type: image/png' --data-binary @image.png, "
            f"or curl -F {FIELD}=@image.png.",
        )
    raise ImageTypeUnsupported(f"The content type is {kind[:80]!r}." if kind else "There is no content type.", fix=_HOW)


def json_of(request: Request) -> dict[str, object]:
    """The JSON object of a request that must be one.

    Raises:
        ImageTypeUnsupported: when it is declared as something else.
        ImageUndecodable, InputInvalid, ImageTooLarge: when it is no JSON, no object, or too much of it.
    """
    kind = _content_type(request)
    if kind != _JSON:
        raise ImageTypeUnsupported(
            f"The content type is {kind[:80]!r}.", fix="send JSON with Content-Type: application/json."
        )
    return parse_json(_body(request))


def check_query(request: Request, known: frozenset[str] = frozenset()) -> None:
    """Refuses what would be ignored: parameters that are not known, or are given twice.

    Raises:
        InputInvalid: names the first of them.
    """
    if not request.environ.get("QUERY_STRING"):
        return
    for name, values in request.args.lists():
        if name not in known or len(values) > 1:
            says = "is not known" if name not in known else "is given twice"
            takes = f"the parameters are: {', '.join(sorted(known))}, each once." if known else "leave it out."
            raise InputInvalid(f"The query parameter {name[:40]!r} {says}.", fix=takes)


def _content_type(request: Request) -> str:
    """The media type, in small letters, once its parameters are seen to change nothing."""
    declared: str = request.environ.get("CONTENT_TYPE", "")
    if declared in FORMATS or declared == _JSON:
        return declared
    kind, parameters = request.mimetype, request.mimetype_params
    allowed = {_JSON: {"charset"}, _FORM: {"charset", "boundary"}}.get(kind, set())
    if kind in FORMATS or allowed:
        unknown = sorted(parameters.keys() - allowed)
        if unknown:
            raise ImageTypeUnsupported(
                f"The content type {kind} has a parameter {unknown[0][:40]!r}.", fix=f"send Content-Type: {kind}."
            )
        if parameters.get("charset", "utf-8").lower() not in ("utf-8", "utf8"):
            raise ImageTypeUnsupported(f"The charset is {parameters['charset'][:40]!r}.", fix="send UTF-8.")
    return kind


def _body(request: Request) -> bytes:
    """The whole body. Werkzeug refuses one whose declared length is over the limit, but cuts off one that declares
    none (chunked) after `MAX_CONTENT_LENGTH` bytes without a word: the app sets that to one byte more than is allowed.
    """
    coding: str = request.environ.get("HTTP_CONTENT_ENCODING", "identity")
    if coding.strip().lower() != "identity":
        raise ImageTypeUnsupported(
            f"The content encoding is {coding[:40]!r}.", fix="send the body as it is, without Content-Encoding."
        )
    body: bytes = request.get_data()
    if len(body) > MAX_BODY_BYTES:
        raise RequestEntityTooLarge
    return body


def _files(body: bytes, parameters: dict[str, str]) -> list[EncodedImage]:
    # Not request.files: that takes a form cut short for an empty one, and spools large files to a disk.
    parser = FormDataParser(_in_memory, silent=False, max_form_memory_size=100_000, max_form_parts=MAX_IMAGES + 1)
    try:
        _, form, files = parser.parse(io.BytesIO(body), _FORM, len(body), parameters)
    except ValueError as error:
        raise ImageUndecodable(
            "The form is not multipart/form-data, or is cut short.",
            fix=f"let a library write it: curl -F {FIELD}=@image.png.",
        ) from error
    unknown = sorted({name or "" for name in (*files, *form)} - {FIELD})  # werkzeug gives None where there is no name
    if unknown or FIELD in form:
        named = f"a field {unknown[0][:40]!r}" if unknown else f"{FIELD!r} as text"
        raise InputInvalid(
            f"The form holds {named}.", fix=f"send files only, in the field {FIELD!r} (curl -F {FIELD}=@image.png)."
        )
    images = []
    for part in files.getlist(FIELD):
        # Programs that do not know a file's type say octet-stream; the file itself then says what it is.
        kind = part.mimetype or "application/octet-stream"
        if kind not in FORMATS and kind != "application/octet-stream":
            raise ImageTypeUnsupported(f"A file is declared as {kind[:80]!r}.", fix=f"send {', '.join(FORMATS)}.")
        images.append(EncodedImage(part.read(), kind if kind in FORMATS else None))
    return images


def _in_memory(
    total_content_length: int | None,  # noqa: ARG001 - what werkzeug says of each file
    content_type: str | None,  # noqa: ARG001
    filename: str | None,  # noqa: ARG001
    content_length: int | None = None,  # noqa: ARG001
) -> IO[bytes]:
    return io.BytesIO()
