"""Turns what a client sends into the pixels a model takes: uint8 (n, 32, 32, 3), RGB.

Owns the limits on an image and the meaning of every accepted form: encoded images and JSON. Limits are checked on the
header, before a pixel is decoded. Reading the request off the wire, and the limit on its length, is `deploy.server`'s.
"""

import base64
import binascii
import io
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, WebPImagePlugin  # noqa: F401 - registers WebP

from ml.datasets.labels import IMAGE_SIDE
from ml.errors import ImageTooLarge, ImageTypeUnsupported, ImageUndecodable, InputInvalid, RequestError

Image.preinit()  # loads the other decoders now: at the first image it would take 90 ms of that request

FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}
"""Accepted content types, and what Pillow calls them."""

MAX_PIXELS = 4_000_000
MAX_TOTAL_PIXELS = 16_000_000
"""Per request: one megabyte of well-compressed images could otherwise keep a core busy for seconds."""
MAX_IMAGES = 128
MAX_LISTS = 500_000
"""Lists and objects in one JSON body: two bytes on the wire can take ninety of memory. Enough for 128 images of 32x32
or one of 700x700."""
MAX_SCANS = 64
"""Of a JPEG file, where a real one has ten: empty scans are short and take the time of full ones, 4 s for 52 kB."""

# What Pillow's decoders raise on broken files, found by flipping bytes (tests/unit/test_decoding.py).
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, struct.error, zlib.error)


@dataclass(frozen=True)
class EncodedImage:
    """An image file as it came, and the content type it was declared to be (None: any accepted one)."""

    data: bytes
    content_type: str | None = None


def decode_images(files: Sequence[EncodedImage]) -> np.ndarray:
    """Decodes image files.

    Orientation follows EXIF, transparency lies on white, grey becomes RGB, 16 bits become 8, an animation is its first
    frame. What is not 32x32 is resized to it with antialiasing (bicubic); what is 32x32 keeps its exact pixels.

    Args:
        files: one or more.

    Returns:
        uint8 (n, 32, 32, 3).

    Raises:
        ImageUndecodable: not an image, or a broken one.
        ImageTypeUnsupported: an image of another type than PNG, JPEG and WebP, or than declared.
        ImageTooLarge: more pixels or images than allowed.
        InputInvalid: no image at all.
    """
    _check_count(len(files))
    if (
        len(files) == 1
        and files[0].content_type in ("image/png", None)
        and (pixels := plain_png(files[0].data)) is not None
    ):
        return pixels[None]
    opened = []
    for index, file in enumerate(files):
        with _naming(index, len(files)):
            opened.append(_open(file))
    total = sum(image.width * image.height for image in opened)
    if total > MAX_TOTAL_PIXELS:
        raise ImageTooLarge(
            f"The images have {total / 1e6:.1f} megapixels together.",
            fix=f"send at most {MAX_TOTAL_PIXELS // 1_000_000} megapixels in one request; 32x32 is all the model sees.",
        )
    rows = []
    for index, image in enumerate(opened):
        with _naming(index, len(files)):
            rows.append(_pixels(image))
    return np.stack(rows)


def parse_json(body: bytes) -> dict[str, object]:
    """The JSON object in a request's body.

    Raises:
        ImageUndecodable: when it is not JSON.
        InputInvalid: when it is JSON and not an object.
        ImageTooLarge: when it would take far more memory than its length.
    """
    if body.count(b"[") + body.count(b"{") > MAX_LISTS:
        raise ImageTooLarge(
            f"The JSON holds more than {MAX_LISTS} lists.", fix="send large images as PNG, JPEG or WebP files."
        )
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError) as error:
        # ValueError: also bytes that are no UTF-8, and integers of thousands of digits.
        raise ImageUndecodable(
            f"The body is not JSON: {str(error)[:200]}.", fix='send a JSON object such as {"image": "<base64>"}.'
        ) from error
    if not isinstance(parsed, dict):
        raise InputInvalid(
            f"The body is a JSON {_json_word(parsed)}, not an object.",
            fix='send {"image": ...}, {"images": [...]} or {"instances": [...]}.',
        )
    return parsed


def images_from_json(payload: dict[str, object]) -> np.ndarray:
    """Pixels from `{"image": "<base64>"}`, `{"images": ["<base64>", ...]}` or `{"instances": [HxWx3, ...]}`.

    Returns:
        uint8 (n, 32, 32, 3).

    Raises:
        InputInvalid: another form, shape, type or range.
        ImageUndecodable, ImageTypeUnsupported, ImageTooLarge: as `decode_images`.
    """
    key, value = _only(payload, ("image", "images", "instances"))
    if key == "instances":
        return images_from_arrays(value)
    encoded = [value] if key == "image" else value
    if not isinstance(encoded, list):
        raise InputInvalid(f'"images" is a JSON {_json_word(encoded)}.', fix="send a list of base64 strings.")
    _check_count(len(encoded))
    files = []
    for index, text in enumerate(encoded):
        with _naming(index, len(encoded)):
            files.append(_from_base64(text))
    return decode_images(files)


def images_from_arrays(instances: object) -> np.ndarray:
    """Pixels from nested lists of numbers: n images of height x width x 3, 0-255, which may differ in size.

    Fractions are rounded to the nearest of 0-255. Returns uint8 (n, 32, 32, 3).

    Raises:
        InputInvalid: ragged, another shape, not numbers, not finite, out of range, or empty.
        ImageTooLarge: more pixels or images than allowed.
    """
    if not isinstance(instances, list):
        raise InputInvalid(
            f"The instances are a JSON {_json_word(instances)}, not a list.",
            fix="send a list of images, each height x width x 3 numbers in 0-255.",
        )
    _check_count(len(instances))
    rows = []
    for index, instance in enumerate(instances):
        with _naming(index, len(instances)):
            rows.append(_from_numbers(instance))
    return np.stack(rows)


def images_from_mlflow(payload: dict[str, object]) -> np.ndarray:
    """Pixels from MLflow's scoring protocol: `{"instances": [...]}` or `{"inputs": [...]}`, HxWx3 numbers each.

    Raises:
        InputInvalid, ImageTooLarge: as `images_from_arrays`.
    """
    rest = {key: value for key, value in payload.items() if key != "params" or value}
    _, value = _only(rest, ("instances", "inputs"))
    return images_from_arrays(value)


def _only(payload: dict[str, object], accepted: tuple[str, ...]) -> tuple[str, object]:
    if len(payload) != 1 or next(iter(payload)) not in accepted:
        found = ", ".join(sorted(repr(str(key)[:40]) for key in payload)[:5]) or "nothing"
        names = " or ".join(f'"{name}"' for name in accepted)
        raise InputInvalid(f"The JSON object holds {found}.", fix=f"send exactly one of {names}.")
    return next(iter(payload.items()))


def _check_count(count: int) -> None:
    if count == 0:
        raise InputInvalid("The request holds no image.", fix="send at least one.")
    if count > MAX_IMAGES:
        raise ImageTooLarge(f"The request holds {count} images.", fix=f"send at most {MAX_IMAGES} in one request.")


@contextmanager
def _naming(index: int, count: int) -> Iterator[None]:
    """Says of an error which image of several it is about."""
    try:
        yield
    except RequestError as error:
        if count == 1:
            raise
        raise type(error)(f"Image {index}: {error.message}", fix=error.fix) from error


_PNG_HEAD = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", IMAGE_SIDE, IMAGE_SIDE, 8, 2, 0, 0, 0)
"""How a PNG of 32x32 begins that holds plain RGB and is not interlaced."""
_WITHOUT_EFFECT = {b"pHYs", b"tIME", b"tEXt", b"sBIT"}
"""Chunks beside the pixels that change nothing of them."""


def plain_png(data: bytes) -> np.ndarray | None:
    """The pixels of a PNG that needs nothing but to be unpacked; None of any other file, which is then looked at.

    That is what most callers of a model of 32x32 send, and reading it so takes a third of the time. Pillow's own
    decoder unpacks it; whatever is odd about the file is left to Pillow's reader and its errors.

    Returns:
        uint8 (32, 32, 3), as `decode_images` gives them.
    """
    if not data.startswith(_PNG_HEAD):
        return None
    packed, at = [], 8
    while (kind := data[at + 4 : at + 8]) != b"IEND":
        size = int.from_bytes(data[at : at + 4])
        following = at + 12 + size
        if following > len(data) or zlib.crc32(data[at + 4 : following - 4]) != int.from_bytes(
            data[following - 4 : following]
        ):
            return None
        if kind == b"IDAT":
            packed.append(data[at + 8 : following - 4])
        elif kind not in _WITHOUT_EFFECT and at > 8:
            return None
        at = following
    try:
        image = Image.frombytes("RGB", (IMAGE_SIDE, IMAGE_SIDE), b"".join(packed), "zip", "RGB", False)
    except _BROKEN:
        return None
    return np.asarray(image)


def _open(file: EncodedImage) -> Image.Image:
    if not file.data:
        raise ImageUndecodable("The image is empty.", fix="send the bytes of a PNG, JPEG or WebP file.")
    if file.data.startswith(b"\xff\xd8") and file.data.count(b"\xff\xda") > MAX_SCANS:
        raise ImageTooLarge(
            f"The JPEG file has more than {MAX_SCANS} scans.", fix="save it as a baseline JPEG, or as PNG."
        )
    try:
        image = Image.open(io.BytesIO(file.data), formats=list(FORMATS.values()))
    except Image.DecompressionBombError as error:
        raise _too_many_pixels("far too many pixels") from error
    except UnidentifiedImageError as error:
        other = _other_type(file.data)
        if other:
            raise ImageTypeUnsupported(
                f"The image is a {other} file.", fix="convert it to PNG, JPEG or WebP."
            ) from error
        raise _undecodable("is not an image that can be read") from error
    except _BROKEN as error:
        raise _undecodable("is broken") from error
    if image.width * image.height > MAX_PIXELS:
        raise _too_many_pixels(f"{image.width}x{image.height} pixels")
    if file.content_type is not None and FORMATS[file.content_type] != image.format:
        raise ImageTypeUnsupported(
            f"The image is declared as {file.content_type} and is a {image.format} file.",
            fix=f"declare it as {next(t for t, f in FORMATS.items() if f == image.format)}.",
        )
    return image


def _pixels(image: Image.Image) -> np.ndarray:
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion clips instead of scaling
            grey = np.asarray(upright).astype(np.uint32) >> 8
            upright = Image.fromarray(np.minimum(grey, 255).astype(np.uint8))
        if upright.has_transparency_data:
            layer = upright.convert("RGBA")
            white = Image.new("RGBA", layer.size, "white")
            upright = Image.alpha_composite(white, layer)
        rgb = upright.convert("RGB")
    except Image.DecompressionBombError as error:
        raise _too_many_pixels("far too many pixels") from error
    except _BROKEN as error:
        raise _undecodable("is broken or cut short") from error
    return _to_side(rgb)


def _to_side(rgb: Image.Image) -> np.ndarray:
    side = (IMAGE_SIDE, IMAGE_SIDE)
    return np.asarray(rgb if rgb.size == side else rgb.resize(side, Image.Resampling.BICUBIC))


def _from_base64(text: object) -> EncodedImage:
    if not isinstance(text, str):
        raise InputInvalid(f"The image is a JSON {_json_word(text)}.", fix="send it as a base64 string.")
    content_type = None
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        content_type = head.removeprefix("data:").partition(";")[0].lower()
        if content_type not in FORMATS:
            raise ImageTypeUnsupported(
                f"The data URL says {content_type[:40]!r}.", fix=f"send one of {', '.join(FORMATS)}."
            )
    try:
        return EncodedImage(base64.b64decode(text, validate=True), content_type)
    except (binascii.Error, ValueError) as error:
        raise ImageUndecodable(
            "The image is not base64.", fix="encode the file's bytes with standard base64, without line breaks."
        ) from error


def _from_numbers(instance: object) -> np.ndarray:
    how = "send height x width x 3 numbers in 0-255, all rows of one length."
    try:
        array = np.asarray(instance)
    except ValueError as error:  # ragged, or nested too deeply
        raise InputInvalid("The rows of the instance differ in length.", fix=how) from error
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise InputInvalid(f"The instance has the shape {array.shape}.", fix=how)
    if array.dtype.kind not in "iuf":
        raise InputInvalid("The instance holds something else than numbers.", fix=how)
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise _too_many_pixels(f"{array.shape[1]}x{array.shape[0]} pixels")
    # Written so that NaN, which compares as false, is refused too.
    if not (array.min() >= 0 and array.max() <= 255):
        raise InputInvalid(f"The instance holds values from {array.min()} to {array.max()}.", fix=how)
    return _to_side(Image.fromarray(np.rint(array).astype(np.uint8)))


def _other_type(data: bytes) -> str | None:
    """The name of a few well-known image types that are not accepted, for a better answer than 'broken'."""
    starts = {b"GIF8": "GIF", b"BM": "BMP", b"II*\x00": "TIFF", b"MM\x00*": "TIFF", b"\x00\x00\x01\x00": "ICO"}
    if data[4:8] == b"ftyp":
        return "AVIF or HEIC"
    if data.lstrip()[:4] in (b"<svg", b"<?xm"):
        return "SVG"
    return next((name for start, name in starts.items() if data.startswith(start)), None)


def _undecodable(what: str) -> ImageUndecodable:
    return ImageUndecodable(f"The image {what}.", fix="send the bytes of a whole PNG, JPEG or WebP file.")


def _too_many_pixels(what: str) -> ImageTooLarge:
    return ImageTooLarge(
        f"The image has {what}.",
        fix=f"scale it to at most {MAX_PIXELS // 1_000_000} megapixels; 32x32 is all the model sees.",
    )


def _json_word(value: object) -> str:
    words = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "list"}
    return words.get(type(value), "object")
