"""Runs: what was done, with what, on which data, and what came of it.

Owns the experiments and the writing of runs. A trained model becomes a version in `ml.registry.packaging`.
Writes of a run under way are repeated through an outage of up to two minutes; its beginning is not, so that a missing
MLflow is known before any work is done.
"""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun

from ml.addresses import public_url
from ml.errors import ModelNotFound, RegistryError, RegistryUnavailable, RunNotFound
from ml.registry.connection import BULK, PATIENCE_SECONDS, QUICK, Limits, asking, patiently
from ml.registry.provenance import as_tags
from ml.settings import PROJECT_ROOT, Settings

if TYPE_CHECKING:
    from ml.datasets.manifest import Manifest

logger = logging.getLogger(__name__)
T = TypeVar("T")

TRAINING_EXPERIMENT = "cifar10"
EXPLORATION_EXPERIMENT = "cifar10-exploration"
ORIGIN_TAG = "origin"
_ERROR_TAG = "error"

_PARAMS_A_BATCH, _METRICS_A_BATCH = 100, 1000  # MLflow's limits
_LONGEST_PARAM = 6000


class Run:
    """A run that is under way. Made by `run`; its methods may be called until the block ends.

    Every method raises RegistryUnavailable only after MLflow could not be asked for `patience_seconds`.
    """

    def __init__(self, settings: Settings, run_id: str, tags: Mapping[str, str], patience_seconds: float) -> None:
        self.id = run_id
        self.tags = tags
        self.tracking_uri = settings.tracking_uri
        self.patience_seconds = patience_seconds
        self._data_url = settings.data_url
        self.client = _client(settings.tracking_uri)

    def log_params(self, params: Mapping[str, object]) -> None:
        """Records settings. Nested mappings become dotted names. A name is written once: params do not change.

        The same value again is no change, so that a resumed run may say all of them once more.
        """
        flat = [Param(key, str(value)[:_LONGEST_PARAM]) for key, value in _flatten(params).items()]
        for start in range(0, len(flat), _PARAMS_A_BATCH):
            batch = flat[start : start + _PARAMS_A_BATCH]
            self._write("Logging parameters", partial(self.client.log_batch, self.id, params=batch))

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Records figures, at an epoch where `step` is given."""
        now = int(time.time() * 1000)
        entries = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        for start in range(0, len(entries), _METRICS_A_BATCH):
            batch = entries[start : start + _METRICS_A_BATCH]
            self._write("Logging metrics", partial(self.client.log_batch, self.id, metrics=batch))

    def steps_of(self, metric: str) -> set[int]:
        """The epochs at which this figure was recorded; of a resumed run, before it was cut off too."""
        found: list[Metric] = []
        self._write("Reading metrics", lambda: found.extend(self.client.get_metric_history(self.id, metric)))
        return {entry.step for entry in found}

    def log_tags(self, tags: Mapping[str, object]) -> None:
        """Adds tags, replacing those of the same key."""
        entries = [RunTag(key, str(value)) for key, value in tags.items()]
        self._write("Logging tags", lambda: self.client.log_batch(self.id, tags=entries))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Uploads a file, or a folder with all that is in it, under `folder` of the run's artifacts."""
        upload = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        self._write(f"Uploading {path.name}", partial(upload, self.id, str(path), folder), limits=BULK)

    def log_dict(self, content: Mapping[str, object], name: str) -> None:
        """Uploads a JSON file of that name."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_text(json.dumps(content, indent=2, default=str) + "\n")
            self.log_artifact(path)

    def log_dataset(self, manifest: "Manifest") -> None:
        """Records the dataset as the run's input: its id as the digest, its address, its counts; not its content."""
        dataset = Dataset(
            name=f"{manifest.data} {manifest.dataset_id}",
            digest=manifest.dataset_id,
            source_type="http",
            source=json.dumps({"url": f"{public_url(self._data_url)}/datasets/{manifest.dataset_id}"}),
            profile=json.dumps({"data": manifest.data, "counts": dict(manifest.counts)}),
        )
        given = DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])
        self._write("Logging the dataset", lambda: self.client.log_inputs(self.id, [given]))
        self.log_tags({"dataset_id": manifest.dataset_id, "data": manifest.data})

    def _write(self, what: str, call: Callable[[], object], *, limits: Limits = QUICK) -> None:
        def once() -> None:
            with asking(self.tracking_uri, limits):
                call()

        patiently(once, what=what, seconds=self.patience_seconds)


@contextmanager
def run(
    settings: Settings,
    name: str,
    *,
    tags: Mapping[str, str] | None = None,
    seed: int | None = None,
    origin: str | None = None,
    experiment: str = TRAINING_EXPERIMENT,
    run_id: str | None = None,
    patience_seconds: float = PATIENCE_SECONDS,
) -> Iterator[Run]:
    """A run for the length of the block: FINISHED at its end, FAILED by an exception in it, KILLED by Ctrl-C.

    It carries the code's commit, package versions, hardware, `seed` and `origin` as tags, besides `tags`.

    `origin` names what asked for it and asks for one run at a time: runs of the same origin that are still RUNNING are
    those of earlier attempts whose process was killed, and are marked KILLED first. Without one, nothing is marked.

    `run_id` goes on with a run that was begun and not finished, under the name that it has: it is RUNNING again. Its
    tags stay; what is otherwise now (another commit, another machine) is added as `resumed.<tag>`, how often it was
    resumed as `resumed`, and what ended it before as `resumed.after`.

    Raises:
        RegistryUnavailable: MLflow could not be asked at the start, or stayed away for `patience_seconds` at the end.
        RunNotFound: this experiment has no run of that `run_id`.
        RegistryError: MLflow refuses the run; or the run of that `run_id` is finished.
    """
    all_tags = {
        **as_tags(PROJECT_ROOT, settings.mlops_git_sha),
        **({} if seed is None else {"seed": str(seed)}),
        **({} if origin is None else {ORIGIN_TAG: origin}),
        **(tags or {}),
    }
    client = _client(settings.tracking_uri)
    experiment_id = _experiment(client, settings.tracking_uri, experiment)
    before = None if run_id is None else _unfinished(client, settings.tracking_uri, experiment_id, run_id)
    if origin is not None:
        _end_lost_runs(client, settings.tracking_uri, experiment_id, origin, spared=run_id)
    if before is None:
        with asking(settings.tracking_uri):
            run_id = client.create_run(experiment_id, tags=all_tags, run_name=name).info.run_id
    else:
        all_tags = _resume(client, settings.tracking_uri, before, all_tags)
        run_id, name = before.info.run_id, before.info.run_name
    logger.info(
        "MLflow run %s (%s)%s in experiment %s at %s",
        *(name, run_id, " resumed" if before else "", experiment, public_url(settings.tracking_uri)),
    )
    current = Run(settings, run_id, all_tags, patience_seconds)
    try:
        yield current
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        try:
            # The block's own error matters more than a run that stays open: no waiting for an MLflow that is away.
            with asking(settings.tracking_uri):
                client.set_tag(run_id, _ERROR_TAG, str(error)[:5000] or type(error).__name__)
                client.set_terminated(run_id, status)
        except (RegistryUnavailable, RegistryError) as unmarked:
            logger.warning("Run %s could not be marked %s: %s", run_id, status, unmarked)
        raise
    current._write("Ending the run", lambda: client.set_terminated(run_id, "FINISHED"))


def log_exploration(settings: Settings, dataset_id: str, folder: Path, params: Mapping[str, object]) -> str:
    """Uploads an exploration (its pictures and page) as a run of its own experiment; returns the run's id.

    A dataset never changes, so its exploration is logged once: a finished run of it is returned as it is.

    Raises:
        RegistryUnavailable: MLflow could not be asked.
    """
    client = _client(settings.tracking_uri)
    experiment_id = _experiment(client, settings.tracking_uri, EXPLORATION_EXPERIMENT)
    with asking(settings.tracking_uri):
        done = client.search_runs(
            [experiment_id], f"params.dataset_id = '{dataset_id}' and attributes.status = 'FINISHED'", max_results=1
        )
    if done:
        return str(done[0].info.run_id)
    with run(
        settings, f"explore-{dataset_id}", tags={"dataset_id": dataset_id}, experiment=EXPLORATION_EXPERIMENT
    ) as current:
        current.log_params({"dataset_id": dataset_id, **params})
        current.log_artifact(folder)
        return current.id


def mark(settings: Settings, run_id: str, tags: Mapping[str, object]) -> None:
    """Adds tags to a run that has ended, replacing those of the same key.

    Raises:
        RegistryUnavailable: MLflow stayed away for two minutes.
        RegistryError: MLflow refuses, or has no such run.
    """
    Run(settings, run_id, {}, PATIENCE_SECONDS).log_tags(tags)


def _unfinished(client: MlflowClient, tracking_uri: str, experiment_id: str, run_id: str) -> MlflowRun:
    """The run of that id as it stands, if it can be gone on with."""
    anew = "train it anew (without --resume)."
    try:
        with asking(tracking_uri):
            found = client.get_run(run_id)
    except ModelNotFound as error:
        raise RunNotFound(f"MLflow at {public_url(tracking_uri)} has no run {run_id} to resume.", fix=anew) from error
    if found.info.experiment_id != experiment_id or found.info.lifecycle_stage == "deleted":
        raise RunNotFound(f"Run {run_id} was deleted, or is of another experiment: it cannot be resumed.", fix=anew)
    if found.info.status == "FINISHED":
        raise RegistryError(f"Run {run_id} is finished: there is nothing to resume.", fix=anew)
    return found


def _resume(client: MlflowClient, tracking_uri: str, before: MlflowRun, tags: Mapping[str, str]) -> dict[str, str]:
    """Makes the run RUNNING again; returns its tags as they then are."""
    known = dict(before.data.tags)
    ended_by = known.pop(_ERROR_TAG, "Its process ended without a word.")
    changed = {key: value for key, value in tags.items() if known.get(key, value) != value}
    added = {
        **{key: value for key, value in tags.items() if key not in known},
        **{f"resumed.{key}": value for key, value in changed.items()},
        "resumed": str(int(known.get("resumed", "0")) + 1),
        "resumed.after": ended_by,
    }
    with asking(tracking_uri):
        client.update_run(before.info.run_id, status="RUNNING")
        client.log_batch(before.info.run_id, tags=[RunTag(key, value) for key, value in added.items()])
        if _ERROR_TAG in before.data.tags:
            client.delete_tag(before.info.run_id, _ERROR_TAG)
    return {**known, **added}


def _end_lost_runs(
    client: MlflowClient, tracking_uri: str, experiment_id: str, origin: str, *, spared: str | None
) -> None:
    with asking(tracking_uri):
        running = client.search_runs([experiment_id], "attributes.status = 'RUNNING'")
        # Compared here: MLflow's filters cannot quote every name.
        same = (found for found in running if found.data.tags.get(ORIGIN_TAG) == origin)
        for lost in (found for found in same if found.info.run_id != spared):
            logger.warning("Run %s of %s was cut off; marking it KILLED", lost.info.run_id, origin)
            client.set_tag(lost.info.run_id, _ERROR_TAG, "Its process ended without a word; another attempt followed.")
            client.set_terminated(lost.info.run_id, "KILLED")


def _client(tracking_uri: str) -> MlflowClient:
    with asking(tracking_uri):
        return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def _experiment(client: MlflowClient, tracking_uri: str, name: str) -> str:
    def find() -> str | None:
        with asking(tracking_uri):
            found = client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "deleted":
            raise RegistryError(
                f"The experiment {name!r} has been deleted in MLflow at {public_url(tracking_uri)}.",
                fix=f"restore it: `mlflow experiments restore --experiment-id {found.experiment_id}`.",
            )
        return None if found is None else str(found.experiment_id)

    experiment_id = find()
    if experiment_id is not None:
        return experiment_id
    try:
        with asking(tracking_uri):
            return str(client.create_experiment(name))
    except RegistryError:
        # Another run may have made it in between.
        experiment_id = find()
        if experiment_id is None:
            raise
        return experiment_id


def _flatten(params: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
