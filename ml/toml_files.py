"""Configuration files that people write: reading them, and naming what was probably meant by an unknown word."""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml.errors import ConfigurationError


def read_toml(path: Path) -> dict[str, Any]:
    """The file's plain values.

    Raises:
        ConfigurationError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error}.", fix="correct the path.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not TOML: {error}.", fix="correct the file.") from error


def nearest(word: str, known: Sequence[str]) -> str:
    """` (did you mean 'x'?)`, for the end of a sentence about an unknown word; empty where nothing is like it."""
    found = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
