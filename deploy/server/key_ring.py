"""Which caller holds which key, by hash. The file of keys is read again when it has changed, without a restart."""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import SecretStr

from ml.errors import ConfigurationError
from ml.serving.api_keys import digest_of, read_keys

logger = logging.getLogger(__name__)

LOOK_EVERY_NS = 1_000_000_000
_HASHED = "sha256:"


class Caller(NamedTuple):
    """Who asks: the name of a key, or an address where no keys are asked."""

    name: str
    limit: float | None = None
    """Images per second; None: as the server's setting says."""


NOBODY = Caller("")
"""Whoever has not been looked at yet."""


class KeyRing:
    """The callers by the hash of their key; thread-safe.

    A look-up hashes what was sent and finds the hash in a dict. Its time may depend on how the two hashes compare, and
    that tells nothing: whoever sends a key cannot choose its hash, so that being near one of ours says nothing of how
    to come nearer.
    """

    def __init__(
        self, keys: Sequence[SecretStr], file: Path | None = None, *, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        """Reads the file.

        Args:
            keys: PREDICTION_API_KEYS; each the key itself or `sha256:` and its hash.
            file: as `ml.serving.api_keys` writes it.
            clock: nanoseconds.

        Raises:
            ConfigurationError: a hash is none, or the file cannot be read.
        """
        # Named by their place: a part of the hash would help to guess a key that is no random one.
        self._fixed = {
            _digest(key.get_secret_value(), place): Caller(f"PREDICTION_API_KEYS#{place}")
            for place, key in reversed(list(enumerate(keys, 1)))
        }
        self._file = file
        self._clock = clock
        self._lock = threading.Lock()
        self._told = False
        self._seen: object = None
        self._callers = self._fixed
        if file is not None:
            self._seen = _state_of(file)
            self._callers = self._fixed | _callers_of(file)
        self._next_look = clock() + LOOK_EVERY_NS

    @property
    def asks(self) -> bool:
        """Whether callers need a key. They do where a file is set, though it may hold none."""
        return self._file is not None or bool(self._fixed)

    def caller(self, key: bytes) -> Caller | None:
        """Who holds this key; None: nobody."""
        if self._file is not None and self._clock() >= self._next_look and self._lock.acquire(blocking=False):
            try:
                self._next_look = self._clock() + LOOK_EVERY_NS
                self._look(self._file)
            finally:
                self._lock.release()
        return self._callers.get(digest_of(key))

    def _look(self, file: Path) -> None:
        """Takes over what the file holds now. While it is missing or broken the last good keys stay, and that is said
        once.
        """
        try:
            state = _state_of(file)
            if state == self._seen and not self._told:
                return
            callers = _callers_of(file)
        except ConfigurationError as error:
            if not self._told:
                logger.error("The keys that were read last stay in force. %s", error)
            self._told = True
            return
        self._callers, self._seen, self._told = self._fixed | callers, state, False
        logger.info("The file of API keys was read again: it holds %d.", len(callers))


def _callers_of(file: Path) -> dict[bytes, Caller]:
    return {bytes.fromhex(key.sha256): Caller(key.name, key.limit) for key in read_keys(file)}


def _state_of(file: Path) -> tuple[int, int, int]:
    # The inode too: two changes within one tick of the file system's clock are two files, for each is renamed there.
    try:
        status = os.stat(file)  # noqa: PTH116 - a fifth of the time of Path.stat
    except OSError as error:
        raise ConfigurationError(
            f"The file of API keys {file} cannot be read: {error.strerror}.",
            fix="make it with `cifar10 keys add NAME`, or take PREDICTION_API_KEYS_FILE away.",
        ) from error
    return status.st_mtime_ns, status.st_ino, status.st_size


def _digest(key: str, place: int) -> bytes:
    if not key.startswith(_HASHED):
        return digest_of(key.encode())
    if not re.fullmatch("[0-9a-fA-F]{64}", key.removeprefix(_HASHED)):
        raise ConfigurationError(
            f"Entry {place} of PREDICTION_API_KEYS begins with {_HASHED} and is no hash.",
            fix=f"write {_HASHED} and 64 hexadecimal digits: printf %s KEY | sha256sum.",
        )
    return bytes.fromhex(key.removeprefix(_HASHED))
