"""What every benchmark writes: its figures, its targets, and where all of it was measured.

Owns the shape of `benchmarks/results/<name>.json`; how a figure comes about is each benchmark's.
"""

import json
import operator
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from ml.files import write_whole
from ml.registry.provenance import code_state, hardware, package_versions
from ml.settings import PROJECT_ROOT

RESULTS_DIR = PROJECT_ROOT / "benchmarks" / "results"

_OPERATORS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True, slots=True)
class Target:
    """A bound, and the value that was measured."""

    name: str
    value: float
    op: Literal[">=", "<="]
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the value keeps the bound; NaN keeps none."""
        return bool(_OPERATORS[self.op](self.value, self.bound))


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated measurements of one figure."""

    median: float
    min: float
    max: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True, slots=True)
class Result:
    """A benchmark's outcome.

    `n` is the number of repeated measurements behind the targets; `data` says whose images, `cifar-10` or `SYNTHETIC`.
    """

    name: str
    n: int
    figures: Mapping[str, object]
    targets: Sequence[Target]
    data: str

    def as_dict(self) -> dict[str, object]:
        """As it is written, with the time, the code, the packages and the machine of this process."""
        code = code_state(PROJECT_ROOT)
        return {
            "name": self.name,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "git_sha": code.sha,
            "git_dirty": code.dirty,
            "hardware": hardware(),
            "versions": package_versions(),
            "data": self.data,
            "n": self.n,
            "figures": dict(self.figures),
            "targets": [asdict(target) | {"holds": target.holds} for target in self.targets],
        }


def write(result: Result, path: Path) -> None:
    """Writes the result as JSON, whole or not at all, spreads as objects.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(result.as_dict(), indent=1, default=_plain) + "\n")


def _plain(value: object) -> object:
    if isinstance(value, Spread):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} is no figure")
