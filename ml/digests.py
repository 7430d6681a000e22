"""The digest of a file's content, by which it is told whether it is the file that is meant."""

import hashlib
from pathlib import Path


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file's content; `algorithm` is a name that hashlib knows."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()
