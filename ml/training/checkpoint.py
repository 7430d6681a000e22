"""Checkpoints: where a training stands, after each epoch, in one file that is there whole or not at all.

What is kept is all that the next epoch depends on (weights, moving statistics, the state of the dropouts' random
generators, the optimizer's moments and step), so that a training that was cut off and resumed ends with the very
figures of one that was not.
"""

import fcntl
import hashlib
import io
import json
import logging
import platform
import resource
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ml.errors import StorageError, TrainingError
from ml.files import write_whole

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Position:
    """Where a training stands. Arrays are in the order of the variables they were read from."""

    run_id: str
    """What goes on when this is resumed: the MLflow run; empty where nothing records."""
    stage: int = 0
    """Index of the stage under way."""
    finished: list[dict[str, Any]] = field(default_factory=list)
    """A summary of each stage before it."""
    epochs: list[dict[str, float]] = field(default_factory=list)
    """Figures of this stage's epochs so far."""
    seconds: float = 0.0
    """Of this stage's training so far."""
    wall_seconds: float = 0.0
    """Of the processes that were cut off, until their last checkpoint."""
    peak_memory_mib: float = 0.0
    """The most that any of them held."""
    model: list[np.ndarray] = field(default_factory=list)
    optimizer: list[np.ndarray] = field(default_factory=list)
    best: list[np.ndarray] = field(default_factory=list)
    """Weights of this stage's best epoch, where the recipe keeps those."""


class Checkpoint:
    """One training's file, named by `identity`, what the training is made of. A file of another one is refused."""

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self.identity = dict(identity)
        name = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / f"{name}.npz"
        self._began = time.monotonic()

    @property
    def origin(self) -> str:
        """Names this training on this machine and in this folder, the same for each of its processes."""
        return f"{platform.node()}/{hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16]}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """For the length of a training, so that no second process trains the same beside it.

        Raises:
            TrainingError: one does.
            StorageError: the folder cannot be written.
        """
        lock = self.path.with_suffix(".lock")
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("w")
        except OSError as error:
            raise StorageError(
                f"{lock} could not be made: {error}.", fix="see that its folder may be written."
            ) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise TrainingError(
                    "Another process trains this recipe with this seed on this dataset right now.",
                    fix="wait until it ends, or give another --seed.",
                ) from error
            yield

    def save(self, position: Position) -> None:
        """Replaces what is there.

        Raises:
            StorageError: the folder cannot be written.
        """
        arrays = {
            f"{group}_{i:04d}": value
            for group in ("model", "optimizer", "best")
            for i, value in enumerate(getattr(position, group))
        }
        facts = {
            "identity": self.identity,
            **{key: getattr(position, key) for key in ("run_id", "stage", "finished", "epochs", "seconds")},
            "wall_seconds": self.wall_seconds(position),
            "peak_memory_mib": self.peak_memory_mib(position),
        }
        content = io.BytesIO()
        np.savez(content, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **arrays)
        try:
            write_whole(self.path, content.getvalue())
        except OSError as error:
            raise StorageError(
                f"The checkpoint {self.path} could not be written: {error}.", fix="free some space there."
            ) from error

    def wall_seconds(self, position: Position) -> float:
        """Of the whole training until now, the processes before this one included."""
        return position.wall_seconds + time.monotonic() - self._began

    def peak_memory_mib(self, position: Position) -> float:
        """The most memory that this process or one before it held."""
        return max(position.peak_memory_mib, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

    def load(self) -> Position | None:
        """What was saved last; None where nothing was.

        Raises:
            TrainingError: the file belongs to another training, or cannot be read.
        """
        try:
            with np.load(self.path, allow_pickle=False) as file:
                facts = json.loads(file["facts"].tobytes())
                groups: dict[str, list[np.ndarray]] = {"model": [], "optimizer": [], "best": []}
                for name in sorted(set(file.files) - {"facts"}):
                    groups[name.split("_")[0]].append(file[name])
            found = facts.pop("identity")
            position = Position(**facts, model=groups["model"], optimizer=groups["optimizer"], best=groups["best"])
        except FileNotFoundError:
            return None
        # What NumPy raises depends on where a file is torn, or on what lies there in its place.
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise TrainingError(
                f"The checkpoint {self.path} cannot be read: {error}.",
                fix="delete it, and train from the start (without --resume).",
            ) from error
        if found != self.identity:
            other = ", ".join(key for key in self.identity if found.get(key) != self.identity[key])
            raise TrainingError(
                f"The checkpoint {self.path} is of another training: its {other} differ.",
                fix="give what it was started with, or train from the start (without --resume).",
            )
        return position

    def clear(self) -> None:
        """Forgets it: the training is done, or begins anew."""
        self.path.unlink(missing_ok=True)


def read(variables: Sequence[Any]) -> list[np.ndarray]:
    """The values of Keras variables."""
    return [np.asarray(variable) for variable in variables]


def assign(variables: Sequence[Any], values: Sequence[np.ndarray]) -> None:
    """Gives Keras variables their values.

    Raises:
        TrainingError: there are not as many, or they have other shapes.
    """
    shapes = [tuple(variable.shape) for variable in variables]
    if shapes != [value.shape for value in values]:
        raise TrainingError(
            f"The checkpoint holds {len(values)} values that do not fit the {len(shapes)} variables of this model.",
            fix="train from the start (without --resume): the code that wrote it built another model.",
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
