"""The file of the prediction server's keys: names, SHA-256 hashes, limits; never a key.

A key is 256 random bits, which nobody guesses at any speed, so a fast hash is the right one: bcrypt and its like make
guessing dear where a secret can be guessed at all, and would cost every request a tenth of a second.
"""

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from ml.errors import ConfigurationError
from ml.files import write_whole

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class KeyRecord(BaseModel):
    """What the file keeps of one key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    """Of whoever holds it; stands in the log."""
    sha256: Sha256
    created: AwareDatetime
    limit: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Images per second; None: as PREDICTION_RATE_LIMIT says."""


class _KeyFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[KeyRecord, ...]


def digest_of(key: bytes) -> bytes:
    """The SHA-256 of a key: 32 bytes."""
    return hashlib.sha256(key).digest()


def read_keys(path: Path) -> tuple[KeyRecord, ...]:
    """Every key of the file, in the order in which they were added.

    Raises:
        ConfigurationError: it is missing, cannot be read, is not such a file, or names two keys alike.
    """
    how = "make it with `cifar10 keys add NAME`, or take PREDICTION_API_KEYS_FILE away."
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"The file of API keys {path} cannot be read: {error.strerror}.", fix=how) from error
    try:
        keys = _KeyFile.model_validate_json(content).keys
    except ValidationError as error:
        # Without the values: a key that somebody wrote there by mistake must not go into a log.
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()[:3])
        raise ConfigurationError(f"The file of API keys {path} is broken: {wrong}.", fix=how) from error
    for what in ("name", "sha256"):
        if len({getattr(key, what) for key in keys}) < len(keys):
            raise ConfigurationError(
                f"The file of API keys {path} holds two keys of one {what}.", fix="take one of them out."
            )
    return keys


def add_key(path: Path, name: str, limit: float | None = None) -> tuple[str, KeyRecord]:
    """Makes a key, and the file where there is none yet. The key itself is kept nowhere: hand it on.

    Raises:
        ConfigurationError: the name is taken or no name, the limit is none, or the file cannot be read or written.
    """
    key = f"cifar10_{secrets.token_urlsafe(32)}"
    try:
        record = KeyRecord(
            name=name,
            sha256=digest_of(key.encode()).hex(),
            created=datetime.now(UTC).replace(microsecond=0),
            limit=limit,
        )
    except ValidationError as error:
        wrong = "; ".join(f"{e['loc'][0]}={e['input']!r}: {e['msg']}" for e in error.errors())
        raise ConfigurationError(
            f"This cannot be a key: {wrong}.",
            fix="name it with letters, digits and . _ -, 64 at most; a limit is a number of images per second over 0.",
        ) from error
    with _changing(path):
        keys = read_keys(path) if path.exists() else ()
        if name in (known.name for known in keys):
            raise ConfigurationError(
                f"A key is named {name} already.", fix=f"choose another name, or first `cifar10 keys revoke {name}`."
            )
        _write(path, (*keys, record))
    return key, record


def revoke_key(path: Path, name: str) -> KeyRecord:
    """Takes a key out; servers refuse it within about a second.

    Raises:
        ConfigurationError: no key has this name, or the file cannot be read or written.
    """
    with _changing(path):
        keys = read_keys(path)
        found = next((key for key in keys if key.name == name), None)
        if found is None:
            known = ", ".join(key.name for key in keys) or "none"
            raise ConfigurationError(f"No key is named {name}. There are: {known}.", fix="name one of them.")
        _write(path, tuple(key for key in keys if key is not found))
    return found


def _write(path: Path, keys: tuple[KeyRecord, ...]) -> None:
    listed = {"keys": [key.model_dump(mode="json") for key in keys]}
    write_whole(path, json.dumps(listed, indent=2) + "\n", mode=0o600)


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    """One change at a time, by whatever process: each reads what the one before it wrote."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)
    except OSError as error:
        raise ConfigurationError(
            f"The file of API keys {path} cannot be written: {error.strerror}.",
            fix="run it as the account that owns the file, where its folder can be written.",
        ) from error
