"""Reads images off the wire, in every form that the interface names. What the bytes mean is `ml.serving.decoding`'s."""

import numpy as np
from flask import Request
from werkzeug.exceptions import RequestEntityTooLarge

from ml.errors import ImageTypeUnsupported, InputInvalid
from ml.serving.decoding import FORMATS, EncodedImage, decode_images, images_from_json, parse_json

MAX_BODY_BYTES = 10_000_000
FIELD = "image"

_HOW = (
    f"send a raw body of type {', '.join(FORMATS)}, multipart/form-data with files in the field {FIELD!r}, "
    "or application/json."
)


def images_of(request: Request) -> np.ndarray:
    """The images of a /v1/predict request as uint8 (n, 32, 32, 3).

    Raises:
        RequestError: one of its classes, as `ml.serving.decoding` says.
        werkzeug.exceptions.RequestEntityTooLarge: when the body is over the limit.
    """
    kind = request.mimetype
    if kind in FORMATS:
        return decode_images([EncodedImage(_body(request), kind)])
    if kind == "application/json":
        return images_from_json(parse_json(_body(request)))
    if kind == "multipart/form-data":
        _body(request)  # the form is then parsed out of it
        return decode_images(_files(request))
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
        ImageUndecodable, InputInvalid: when it is no JSON, or no object.
    """
    if request.mimetype != "application/json":
        raise ImageTypeUnsupported(
            f"The content type is {request.mimetype[:80]!r}.", fix="send JSON with Content-Type: application/json."
        )
    return parse_json(_body(request))


def _body(request: Request) -> bytes:
    """The whole body. Werkzeug refuses one whose declared length is over the limit, but cuts off one that declares
    none (chunked) after `MAX_CONTENT_LENGTH` bytes without a word: the app sets that to one byte more than is allowed.
    """
    body: bytes = request.get_data()
    if len(body) > MAX_BODY_BYTES:
        raise RequestEntityTooLarge
    return body


def _files(request: Request) -> list[EncodedImage]:
    unknown = sorted({*request.files, *request.form} - {FIELD})
    if unknown or FIELD in request.form:
        named = f"a field {unknown[0][:40]!r}" if unknown else f"{FIELD!r} as text"
        raise InputInvalid(
            f"The form holds {named}.", fix=f"send files only, in the field {FIELD!r} (curl -F {FIELD}=@image.png)."
        )
    files = []
    for part in request.files.getlist(FIELD):
        # Programs that do not know a file's type say octet-stream; the file itself then says what it is.
        kind = part.mimetype or "application/octet-stream"
        if kind not in FORMATS and kind != "application/octet-stream":
            raise ImageTypeUnsupported(f"A file is declared as {kind[:80]!r}.", fix=f"send {', '.join(FORMATS)}.")
        files.append(EncodedImage(part.read(), kind if kind in FORMATS else None))
    return files
