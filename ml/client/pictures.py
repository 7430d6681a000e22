"""What a caller has (arrays, paths, bytes) as the bytes that are sent. Files are read when their turn comes."""

import io
import mimetypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from ml.errors import ImageNotFound, ImageUnreadable, InputInvalid, RequestError

Image = Path | str | bytes
"""The path of a PNG, JPEG or WebP file, or its bytes."""

Images = np.ndarray | Iterable[Image]
"""Images, or an array of them: uint8 (n, height, width, 3), RGB in 0-255."""

_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass(frozen=True)
class Picture:
    """The bytes of one image file, and its path where it has one."""

    data: bytes
    path: str | None = None

    @property
    def content_type(self) -> str | None:
        """By the file's first bytes, else by its name; None where neither says it: the server then looks itself."""
        for signature, kind in _SIGNATURES.items():
            if self.data.startswith(signature):
                return kind
        if self.data[:4] == b"RIFF" and self.data[8:12] == b"WEBP":
            return "image/webp"
        guessed = mimetypes.guess_type(self.path)[0] if self.path else None
        return guessed if guessed and guessed.startswith("image/") else None


def pictures_of(images: Images) -> Iterator[Picture | RequestError]:
    """Each image as it will be sent; where a file cannot be read, the error that says so, in its place.

    Raises:
        InputInvalid: an array of another type or shape, at once.
    """
    if isinstance(images, np.ndarray):
        _check(images)
        return (_encoded(image) for image in images)
    if isinstance(images, str | bytes | Path):
        images = [images]  # one alone: nobody means the characters of a path
    return (Picture(image) if isinstance(image, bytes) else _read(image) for image in images)


def _read(path: Path | str) -> Picture | RequestError:
    try:
        return Picture(Path(path).read_bytes(), str(path))
    except FileNotFoundError:
        return ImageNotFound(f"{path}: there is no such file.", fix="see that the path is right.")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        why = error.strerror if isinstance(error, OSError) else error
        return ImageUnreadable(f"{path} cannot be read: {why}.", fix="give an image file that this user may read.")


def _encoded(image: np.ndarray) -> Picture:
    stream = io.BytesIO()
    Pillow.fromarray(image).save(stream, "PNG", compress_level=1)
    return Picture(stream.getvalue())


def _check(images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise InputInvalid(
            f"The array is {images.dtype} of shape {images.shape}, not uint8 of shape (n, height, width, 3).",
            fix="send pixels in 0-255 as images.astype('uint8'), and one image alone as image[None].",
        )
