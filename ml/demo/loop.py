"""`make demo`: ingest, train both models, promote, serve, watch clean and shifted traffic, ask for a retraining.

Every step goes through the running stack, as a user's would: DAG runs through Airflow's REST API, images through the
prediction server. Nothing is done in-process that Airflow or the server would do.
"""

import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ml.client import CifarClient
from ml.datasets.labels import CLASS_NAMES
from ml.datasets.store import load_split, read_manifest
from ml.demo.memory import PeakMemory
from ml.demo.report import Report, write_json
from ml.errors import ComponentFailed, SourceNotFound
from ml.evaluation.corruptions import corrupt
from ml.registry.versions import CHAMPION, Registry
from ml.settings import Settings
from ml.stack import local
from ml.stack.airflow_api import DagRun
from ml.stack.components import airflow_api, urls
from ml.stack.secret_store import load_or_create

logger = logging.getLogger(__name__)

INGEST, PROMOTE, MONITOR = "cifar10_ingest", "cifar10_promote", "cifar10_monitor"
TRAINERS = {"baseline": "cifar10_train_baseline", "vgg16": "cifar10_finetune_vgg16"}
DAG_IDS = (INGEST, *TRAINERS.values(), PROMOTE, MONITOR)

RECIPE = "demo"
TEST_LIMIT = 2000
WINDOW = 300
CORRUPTION, SEVERITY = "fog", 4
PATIENCE_S = 1800.0
SPEAK_EVERY_S = 5.0


def demo(settings: Settings) -> dict[str, Any]:
    """Runs the loop once, writes `var/demo.json` and returns its content. The stack is left running.

    Raises:
        CifarError: whatever went wrong, with the fix; a stack that the demo started is stopped again.
    """
    began = time.monotonic()
    _require_source(settings)
    signal.signal(signal.SIGTERM, _interrupt)
    started_here = local.status(settings)["state"] == "down"
    try:
        if started_here:
            logger.info("starting the stack; its logs lie in %s", settings.mlops_var_dir / "log")
            local.start_in_background(settings)
        # Only now: the stack has written the addresses that this process needs.
        running = local.settings_of_running(settings)
        with PeakMemory(running) as memory:
            report = _Loop(running).run()
    except BaseException:
        if started_here:
            logger.info("stopping the stack")
            local.down(settings)
        raise
    elapsed = time.monotonic() - began
    content = report.finished(seconds=elapsed, peak_memory_mb=memory.megabytes, urls=urls(settings))
    write_json(settings.mlops_var_dir / "demo.json", content)
    return content


def _require_source(settings: Settings) -> None:
    """Says at once what would otherwise be found out minutes later."""
    source = settings.cifar10_source
    if source not in ("auto", "synthetic") and "://" not in source and not Path(source).exists():
        raise SourceNotFound(
            f"CIFAR10_SOURCE is {source}, and nothing lies there.",
            fix="name the tar.gz or its folder, or leave CIFAR10_SOURCE out.",
        )


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class _Loop:
    """One pass through the loop on a running stack."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._airflow = airflow_api(settings, load_or_create(settings.mlops_var_dir))
        self._client = CifarClient(urls(settings)["predictions"], settings.own_api_key)
        self._report = Report()
        self._said = ""
        self._said_at = 0.0

    def run(self) -> Report:
        """All steps in their order."""
        self._await_dags()
        self._await_quiet()
        self._known = {dag_id: {run.run_id for run in self._airflow.runs(dag_id)} for dag_id in DAG_IDS}

        # Only these runs may fall back to generated data and random weights; the stack goes on without.
        conf: dict[str, Any] = {
            "source": self._settings.cifar10_source,
            "weights": self._settings.vgg16_weights,
            "allow_stand_in": True,
            "recipe": RECIPE,
            "test_limit": TEST_LIMIT,
            "new_lineage": not self._has_real_champion(),
        }
        ingestion = self._airflow.trigger(INGEST, conf)
        # Its first task announces the dataset, which starts both trainings; export and exploration go on beside them.
        self._until(lambda: self._airflow.tasks(ingestion).get("ingest") == "success", "the dataset", [ingestion])
        dataset_id = self._airflow.result(ingestion, "ingest")["dataset_id"]
        self._describe_dataset(dataset_id)
        self._require_lineage(conf)

        trainings = {name: self._await_new(dag_id) for name, dag_id in TRAINERS.items()}
        self._finish(list(trainings.values()))
        self._await_promotions({name: self._airflow.result(run, "train") for name, run in trainings.items()})
        self._finish([ingestion])

        test = load_split(self._settings.data_url, dataset_id, "test", limit=2 * WINDOW, seed=1)
        order = np.random.default_rng(1).permutation(len(test.labels))
        clean, shifted = order[:WINDOW], order[WINDOW:]
        logger.info("sending %d test images as they are", len(clean))
        self._report.prediction = self._send(test.images[clean], test.labels[clean])
        self._report.drift["clean"] = self._watch(expected="stable")
        logger.info("sending %d test images in %s of severity %d", len(shifted), CORRUPTION, SEVERITY)
        self._send(corrupt(test.images[shifted], CORRUPTION, SEVERITY, seed=1), test.labels[shifted])
        self._report.drift["shifted"] = self._watch(expected="drift") | {"corruption": CORRUPTION, "severity": SEVERITY}
        return self._report

    # --- steps -----------------------------------------------------------------------------------------------------

    def _await_dags(self) -> None:
        def all_read() -> bool:
            if errors := self._airflow.import_errors():
                raise ComponentFailed(f"Airflow could not read a DAG: {errors[0]}", fix="mend that file.")
            return set(DAG_IDS) <= set(self._airflow.dag_ids())

        self._until(all_read, "Airflow to read the DAGs", [])
        for dag_id, is_paused in self._airflow.dag_ids().items():
            if is_paused and dag_id in DAG_IDS:
                self._airflow.unpause(dag_id)

    def _await_quiet(self) -> None:
        """Waits for the runs of before (a retraining, an aborted demo): they would be taken for this demo's."""

        def unfinished() -> list[str]:
            return [dag_id for dag_id in DAG_IDS for run in self._airflow.runs(dag_id) if not run.ended]

        if waiting := unfinished():
            logger.info("waiting for earlier runs to end: %s", ", ".join(waiting))
            self._until(lambda: not unfinished(), "earlier runs to end", [])

    def _has_real_champion(self) -> bool:
        champion = Registry(self._settings.tracking_uri).by_alias(CHAMPION)
        return champion is not None and champion.data != "SYNTHETIC"

    def _require_lineage(self, conf: dict[str, Any]) -> None:
        if self._report.dataset["data"] == "SYNTHETIC" and not conf["new_lineage"]:
            raise ComponentFailed(
                "The champion here was trained on real CIFAR-10, and a model of generated images must not replace it.",
                fix="set CIFAR10_SOURCE to the real archive, or use another folder: MLOPS_VAR_DIR=/tmp/demo make demo.",
            )

    def _describe_dataset(self, dataset_id: str) -> None:
        manifest = read_manifest(self._settings.data_url, dataset_id)
        self._report.dataset = {
            "id": dataset_id,
            "source": manifest.source,
            "data": manifest.data,
            "train": manifest.counts["train"] + manifest.counts["validation"],
            "test": manifest.counts["test"],
        }
        logger.info("dataset %s: %s, %s", dataset_id, manifest.data, manifest.counts)
        if manifest.data == "SYNTHETIC":
            logger.warning(
                "SYNTHETIC: these are generated images; every figure below is about them, not about CIFAR-10. "
                "For the real ones set CIFAR10_SOURCE to its tar.gz, or let this machine reach the download."
            )

    def _await_promotions(self, trained: dict[str, dict[str, Any]]) -> None:
        judged: dict[int, dict[str, Any]] = {}
        counted: set[str] = set()
        champion: dict[str, Any] = {}

        def all_judged() -> bool:
            for run in reversed(self._new_runs(PROMOTE)):
                if run.ended and run.run_id not in counted:
                    self._airflow.require_success(run)
                    counted.add(run.run_id)
                    self._report.dag_runs.append(run)
                    result = self._airflow.result(run, "promote")
                    logger.info("%s", result["reason"])
                    champion.update(result["champion"] or {})
                    judged.update({candidate["version"]: candidate for candidate in result["candidates"]})
            return all(model["version"] in judged for model in trained.values())

        self._until(all_judged, "the gate's verdicts", self._new_runs(PROMOTE))
        for name, model in trained.items():
            verdict = judged[model["version"]]
            figures = {key: verdict[key] for key in ("test_accuracy", "precision", "recall", "loss", "n")}
            self._report.models.append(
                {"name": name, "version": model["version"], "weights": model["weights"], **figures}
            )
        self._report.champion = {"name": champion["architecture"], "version": champion["version"]}

        def is_served() -> bool:
            return self._client.ready() and self._client.model()["version"] == champion["version"]

        self._until(is_served, "the server to follow the champion", [])

    def _send(self, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Sends images and tells the right labels; returns what the server said of the first."""
        self._known[MONITOR] = {run.run_id for run in self._airflow.runs(MONITOR) if run.ended}
        predictions = self._client.predict(images)
        for prediction, label in zip(predictions, labels, strict=True):
            self._client.feedback(prediction, CLASS_NAMES[label])
        first = predictions[0]
        return {
            "request_id": first.request_id,
            "label": first.label,
            "class_id": first.class_id,
            "probability": first.probability,
            "probabilities": first.probabilities,
            "truth": CLASS_NAMES[labels[0]],
            "model": {"name": first.model_name, "version": first.model_version, "data": first.data},
        }

    def _watch(self, expected: str) -> dict[str, Any]:
        run = self._airflow.trigger(MONITOR, {"min_predictions": WINDOW // 2, "recipe": RECIPE})
        # At a full hour the scheduled run may have come first and judged these predictions.
        runs = {run.run_id: run for run in [run, *self._new_runs(MONITOR)]}
        self._finish(list(runs.values()))
        result = max((self._airflow.result(run, "monitor") for run in runs.values()), key=lambda found: found["n"])
        logger.info("monitor: %s, p = %s; %s", result["verdict"], result["p_value"], result["retraining"]["reason"])
        if (result["verdict"], result["n"]) != (expected, WINDOW):
            # By design a clean window is called drift as often as MONITOR_FALSE_ALARM_RATE says.
            logger.warning("expected %s on %d predictions: see the report", expected, WINDOW)
        self._report.retraining = result["retraining"]
        if result["retraining"]["due"]:
            trainer = TRAINERS[result["retraining"]["architecture"]]
            run_id = f"retraining__{result['retraining']['retraining_id']}"
            retraining = self._await_run(trainer, lambda run: run.run_id == run_id)
            self._report.retraining |= {"dag_id": retraining.dag_id, "run_id": retraining.run_id}
        return {
            "verdict": result["verdict"],
            "p_value": result["p_value"],
            "n": result["n"],
            "drifted_columns": result["drifted_columns"],
            "live_accuracy": result["live_accuracy"],
            "estimated_accuracy": result["estimated_accuracy"],
            "report": (result["report"] or {}).get("html"),
        }

    # --- waiting ---------------------------------------------------------------------------------------------------

    def _new_runs(self, dag_id: str) -> list[DagRun]:
        """The runs that this demo has caused and not yet seen to their end, newest first."""
        return [run for run in self._airflow.runs(dag_id) if run.run_id not in self._known[dag_id]]

    def _await_new(self, dag_id: str) -> DagRun:
        return self._await_run(dag_id, lambda run: run.run_id not in self._known[dag_id])

    def _await_run(self, dag_id: str, is_wanted: Callable[[DagRun], bool]) -> DagRun:
        found: list[DagRun] = []

        def appeared() -> bool:
            found[:] = filter(is_wanted, self._airflow.runs(dag_id))
            return bool(found)

        self._until(appeared, f"{dag_id} to start", [])
        return found[0]

    def _finish(self, runs: list[DagRun]) -> None:
        """Waits for runs to end well and keeps them for the report."""
        latest = {run.run_id: run for run in runs}

        def all_ended() -> bool:
            for run in list(latest.values()):
                if not run.ended:
                    latest[run.run_id] = now = self._airflow.run(run)
                    if now.ended:
                        self._airflow.require_success(now)
                        logger.info("%s succeeded after %.0f s", now.dag_id, now.seconds or 0)
            return all(run.ended for run in latest.values())

        self._until(all_ended, " and ".join(run.dag_id for run in runs), runs)
        for run in latest.values():
            self._report.dag_runs.append(run)
            self._known[run.dag_id].add(run.run_id)

    def _until(self, done: Callable[[], bool], what: str, runs: list[DagRun]) -> None:
        """Asks until `done`; passes on what the tasks of `runs` log meanwhile, and gives up when one has failed."""
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            if time.monotonic() > deadline:
                raise ComponentFailed(f"Waited {PATIENCE_S:.0f} s for {what}.", fix="see the run in the Airflow UI.")
            for run in runs:
                self._pass_on(run)
                now = self._airflow.run(run)
                if now.state == "failed":
                    self._airflow.require_success(now)
            time.sleep(1)

    def _pass_on(self, run: DagRun) -> None:
        if time.monotonic() - self._said_at < SPEAK_EVERY_S:
            return
        words = self._airflow.last_words(run)
        if words and words != self._said:
            self._said, self._said_at = words, time.monotonic()
            logger.info("%s: %s", run.dag_id, words)
