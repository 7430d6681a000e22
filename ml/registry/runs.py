"""Training runs as MLflow recorded them: for reading back what came of them. Writing them is `ml.registry.tracking`'s.

"MLflow has no such thing" is None, an empty list or RunNotFound; "MLflow could not be asked" is RegistryUnavailable.
"""

import json
import logging
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun

from ml.addresses import public_url
from ml.errors import ModelNotFound, RegistryError, RunNotFound
from ml.registry.connection import BULK, asking
from ml.registry.tracking import TRAINING_EXPERIMENT

logger = logging.getLogger(__name__)

FINISHED = "FINISHED"
RECIPE, METRICS, ROBUSTNESS, HISTORY = "recipe.json", "metrics.json", "robustness.json", "history.json"
"""Names of the JSON files that a training leaves."""

Curve = tuple[tuple[int, float], ...]
"""(epoch, value), by epoch; the last value where an epoch was run again after an interruption."""


@dataclass(frozen=True)
class TrainingRun:
    """One run, as it stood when it was asked for."""

    run_id: str
    name: str
    status: str
    """MLflow's: RUNNING, FINISHED, FAILED, KILLED or SCHEDULED."""
    started_at: datetime
    params: Mapping[str, str] = field(repr=False)
    tags: Mapping[str, str] = field(repr=False)
    metrics: Mapping[str, float] = field(repr=False)
    """The last value of each."""

    @property
    def architecture(self) -> str:
        """`baseline` or `vgg16`; empty where the run does not say."""
        return self.tags.get("architecture", "")

    @property
    def recipe(self) -> str:
        """The recipe's name; empty where the run does not say."""
        return self.tags.get("recipe", "")


class Runs:
    """The training runs of one MLflow server. Holds no state.

    Every method raises RegistryUnavailable where MLflow could not be asked; that says nothing of what it would have
    answered.
    """

    def __init__(self, tracking_uri: str, experiment: str = TRAINING_EXPERIMENT) -> None:
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        with asking(tracking_uri):
            self._client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)

    def finished(self, *, architecture: str | None = None, recipes: Iterable[str] | None = None) -> list[TrainingRun]:
        """The finished runs, newest first; of one architecture, of some recipes, where given. Empty if there is none.

        Raises:
            RegistryUnavailable: MLflow could not be asked.
        """
        experiment_id = self._experiment_id()
        if experiment_id is None:
            return []
        wanted = None if recipes is None else set(recipes)
        found: list[TrainingRun] = []
        token: str | None = None
        while True:
            with asking(self.tracking_uri):
                page = self._client.search_runs(
                    [experiment_id],
                    f"attributes.status = '{FINISHED}'",
                    max_results=500,
                    order_by=["attributes.start_time DESC"],
                    page_token=token,
                )
            found += [_training_run(item) for item in page]
            token = page.token
            if not token:
                break
        # Compared here: MLflow's filters cannot quote every name.
        return [
            run
            for run in found
            if architecture in (None, run.architecture) and (wanted is None or run.recipe in wanted)
        ]

    def by_id(self, run_id: str) -> TrainingRun:
        """One training run, whatever its state.

        Raises:
            RunNotFound: there is none of that id, it was deleted, or it is of another experiment.
            RegistryError: MLflow takes it for no id at all.
            RegistryUnavailable: MLflow could not be asked.
        """
        experiment_id = self._experiment_id()
        try:
            with asking(self.tracking_uri):
                found = self._client.get_run(run_id)
        except ModelNotFound as error:
            raise self._no_run(run_id, "has no run") from error
        if found.info.experiment_id != experiment_id or found.info.lifecycle_stage == "deleted":
            raise self._no_run(run_id, f"has deleted, or has in another experiment than {self.experiment}, the run")
        return _training_run(found)

    def curves(self, run: TrainingRun) -> dict[str, Curve]:
        """Every value of every metric of a run, one request for each metric.

        Raises:
            RegistryUnavailable: MLflow could not be asked.
        """
        curves: dict[str, Curve] = {}
        for key in sorted(run.metrics):
            with asking(self.tracking_uri):
                points = self._client.get_metric_history(run.run_id, key)
            # By time within an epoch: an epoch that was run again counts as it was run last.
            ordered = sorted(points, key=lambda point: (point.step, point.timestamp))
            curves[key] = tuple({int(point.step): float(point.value) for point in ordered}.items())
        return curves

    def document(self, run_id: str, name: str) -> dict[str, Any] | None:
        """A JSON file that the run left at the top of its artifacts; None where MLflow answered that there is none.

        Raises:
            RegistryError: what lies there is no JSON object.
            RegistryUnavailable: MLflow could not be asked, or could not hand it out.
        """
        # Listed first: MLflow reports a file that is missing and a server that is away alike.
        with asking(self.tracking_uri):
            there = {item.path for item in self._client.list_artifacts(run_id)}
        if name not in there:
            return None
        with tempfile.TemporaryDirectory(prefix="run-") as folder:
            with asking(self.tracking_uri, BULK):
                path = Path(self._client.download_artifacts(run_id, name, folder))
            text = path.read_text(encoding="utf-8", errors="replace")
        try:
            content = json.loads(text)
        except json.JSONDecodeError:
            content = None
        if not isinstance(content, dict):
            raise RegistryError(
                f"{name} of run {run_id} in MLflow at {public_url(self.tracking_uri)} is not a JSON object.",
                fix="it was not written by `cifar10 train`, or was altered: delete that run in MLflow, and train anew.",
            )
        return content

    def _experiment_id(self) -> str | None:
        with asking(self.tracking_uri):
            found = self._client.get_experiment_by_name(self.experiment)
        return None if found is None else str(found.experiment_id)

    def _no_run(self, run_id: str, what: str) -> RunNotFound:
        return RunNotFound(
            f"MLflow at {public_url(self.tracking_uri)} {what} {run_id}.",
            fix="take the id of a training run: `cifar10 results --json` and the MLflow UI name them.",
        )


def _training_run(item: MlflowRun) -> TrainingRun:
    return TrainingRun(
        run_id=item.info.run_id,
        name=item.info.run_name or "",
        status=item.info.status,
        started_at=datetime.fromtimestamp(item.info.start_time / 1000, UTC),
        params=dict(item.data.params),
        tags=dict(item.data.tags),
        metrics=dict(item.data.metrics),
    )
