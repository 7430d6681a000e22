"""What a run of the scenario took: a stopwatch, figures, targets; a table for people, JSON for programs."""

import json
import operator
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ml.files import write_whole
from ml.registry.provenance import code_state, hardware

OPERATORS = {"<=": operator.le, ">=": operator.ge}


class Record:
    """Filled step by step; what an earlier part of a run has written is gone on with."""

    def __init__(self, path: Path, *, versions: dict[str, str], goes_on: bool) -> None:
        self._path = path
        self._console = Console(width=110, highlight=False)
        earlier = json.loads(path.read_text()) if goes_on and path.exists() else {}
        self.steps: list[dict[str, Any]] = earlier.get("steps", [])
        self.figures: dict[str, Any] = earlier.get("figures", {})
        self.targets: list[dict[str, Any]] = earlier.get("targets", [])
        self._versions = versions

    @property
    def seconds(self) -> list[float]:
        """Of each step so far."""
        return [step["seconds"] for step in self.steps]

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times a step and says so; one that fails is not a time of anything."""
        began = time.monotonic()
        yield
        self.took(name, time.monotonic() - began)

    def took(self, name: str, seconds: float) -> None:
        self.steps = [step for step in self.steps if step["name"] != name]
        self.steps.append({"name": name, "seconds": round(seconds, 1)})
        self._console.print(f"\n{seconds:8.1f} s  {name}", end="")

    def figure(self, name: str, value: Any) -> None:
        self.figures[name] = value
        self._console.print(f"\n            {name}: {value}", end="")

    def target(self, name: str, value: float, op: str, bound: float) -> None:
        """Notes a figure with the bound that was asked for; whether all hold is the last step's to say."""
        holds = OPERATORS[op](value, bound)
        self.targets = [target for target in self.targets if target["name"] != name]
        self.targets.append({"name": name, "value": round(value, 1), "op": op, "bound": bound, "holds": holds})

    def write(self) -> None:
        content = {
            "date": datetime.now(UTC).date().isoformat(),
            "git_sha": code_state(Path(__file__).parents[2]).sha,
            "hardware": hardware(),
            "versions": self._versions,
            "steps": self.steps,
            "figures": self.figures,
            "targets": self.targets,
        }
        write_whole(self._path, json.dumps(content, indent=2) + "\n")

    def show(self) -> None:
        steps = Table("step", "seconds", title="\nWhat took how long")
        for step in self.steps:
            steps.add_row(step["name"], f"{step['seconds']:.1f}")
        targets = Table("target", "value", "bound", "", title="\nWhat was asked for")
        for target in self.targets:
            bound = f"{target['op']} {target['bound']:g}"
            targets.add_row(target["name"], f"{target['value']:g}", bound, "holds" if target["holds"] else "MISSED")
        self._console.print(steps, targets)
        for name, value in self.figures.items():
            self._console.print(f"  {name}: {value}", soft_wrap=True)
        self._console.print(f"  all of it: {self._path}", soft_wrap=True)
