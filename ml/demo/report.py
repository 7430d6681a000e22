"""What the demo tells at its end: `var/demo.json` for programs, a table for people."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ml.files import write_whole
from ml.stack.airflow_api import DagRun


@dataclass
class Report:
    """Filled step by step; the fields are those of `demo.json`."""

    dataset: dict[str, Any] = field(default_factory=dict)
    models: list[dict[str, Any]] = field(default_factory=list)
    champion: dict[str, Any] = field(default_factory=dict)
    prediction: dict[str, Any] = field(default_factory=dict)
    drift: dict[str, dict[str, Any]] = field(default_factory=dict)
    retraining: dict[str, Any] = field(default_factory=dict)
    dag_runs: list[DagRun] = field(default_factory=list)

    def finished(self, *, seconds: float, peak_memory_mb: float, urls: dict[str, str]) -> dict[str, Any]:
        """The content of `demo.json`."""
        return {
            "seconds": round(seconds, 1),
            "peak_memory_mb": round(peak_memory_mb),
            "dataset": self.dataset,
            "models": self.models,
            "champion": self.champion,
            "prediction": self.prediction,
            "drift": self.drift,
            "retraining": self.retraining,
            "dag_runs": [
                {"dag_id": run.dag_id, "state": run.state, "seconds": run.seconds and round(run.seconds, 1)}
                for run in self.dag_runs
            ],
            "urls": urls,
        }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes the file whole or not at all."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def print_table(content: dict[str, Any]) -> None:
    """Shows the result to a person."""
    console = Console()
    if not console.is_terminal:
        # A log has no width; eighty columns would cut the table to pieces.
        console = Console(width=130)
    dataset = content["dataset"]
    console.print(
        f"\n[bold]The loop ran in {content['seconds']:.0f} s[/] (peak memory {content['peak_memory_mb']} MB) on "
        f"[bold]{dataset['data']}[/]: {dataset['train']} training and {dataset['test']} test images, {dataset['id']}"
    )
    models = Table("model", "version", "weights", "test accuracy", "precision", "recall", "loss", "test images", "")
    for model in content["models"]:
        is_champion = model["version"] == content["champion"]["version"]
        figures = [f"{model[key]:.4f}" for key in ("test_accuracy", "precision", "recall", "loss")]
        mark = "champion" if is_champion else ""
        models.add_row(model["name"], str(model["version"]), model["weights"], *figures, str(model["n"]), mark)
    console.print(models)
    drift = Table("window", "verdict", "p-value", "predictions", "live accuracy", "estimated without labels")
    for name, window in content["drift"].items():
        live = "" if window["live_accuracy"] is None else f"{window['live_accuracy']:.3f}"
        shown = f"{name}: {window['corruption']} {window['severity']}" if "corruption" in window else name
        p_value = "" if window["p_value"] is None else f"{window['p_value']:.2g}"
        estimated = "" if window["estimated_accuracy"] is None else f"{window['estimated_accuracy']:.3f}"
        drift.add_row(shown, window["verdict"], p_value, str(window["n"]), live, estimated)
    console.print(drift)
    for name, window in content["drift"].items():
        console.print(f"  report of the {name} window: {window['report']}", markup=False, soft_wrap=True)
    retraining = content["retraining"]
    state = f"{retraining['dag_id']} was started" if retraining["due"] else "none was started"
    console.print(f"Retraining: {state}; {retraining['reason']}", markup=False)
    console.print("\n[bold]Have a look[/] (the stack runs on; `make down` stops it)")
    for name, url in content["urls"].items():
        note = "   user admin; the password is airflow_admin in var/secrets.json" if name == "airflow" else ""
        console.print(f"  {name:12} {url}{note}", soft_wrap=True)
    console.print()
