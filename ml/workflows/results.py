"""Results: from the training runs in MLflow to the page docs/results.md. What the page says is `results_page`'s."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ml.errors import ConfigurationError, StorageError
from ml.evaluation import results_page
from ml.evaluation.metrics import ClassMetrics, Metrics
from ml.evaluation.results_page import Evidence, Pretrained, Stage, Trained
from ml.evaluation.robustness import Robustness
from ml.files import write_whole
from ml.registry.runs import HISTORY, METRICS, RECIPE, ROBUSTNESS, Runs, TrainingRun
from ml.registry.tracking import TRAINING_EXPERIMENT
from ml.settings import PROJECT_ROOT, Settings
from ml.training.recipe import available_recipes, load_recipe, parse_recipe

logger = logging.getLogger(__name__)

PRETRAINING_EXPERIMENT = "cifar10-pretraining"
"""As in `ml.workflows.pretrain`, whose import takes ten seconds."""
PAGE = PROJECT_ROOT / "docs" / "results.md"


def results(
    settings: Settings,
    output: Path = PAGE,
    *,
    experiment: str = TRAINING_EXPERIMENT,
    pretraining_experiment: str = PRETRAINING_EXPERIMENT,
) -> dict[str, object]:
    """Writes the page from every finished training run that MLflow has of an experiment.

    Returns:
        {"path": of the page, "rows": [`ml.evaluation.results_page.Row.summary` of each row of its tables],
        "missing": [{"architecture", "recipe", "weights"}], "targets": [{"architecture", "recipe", "bound", "reached",
        "verdict"}]}.

    Raises:
        ConfigurationError: a recipe of recipes/ that was run cannot be used.
        RegistryUnavailable: MLflow could not be asked; the page stays as it is.
        StorageError: the page could not be written.
    """
    runs = Runs(settings.tracking_uri, experiment)
    pretraining = Runs(settings.tracking_uri, pretraining_experiment).finished()
    grouped = results_page.group(_of_present_form(runs, trained(run)) for run in runs.finished())
    rows = [replace(row, is_current=_is_current(row.newest)) for row in grouped]
    shown = results_page.main_rows(rows)
    rows = [replace(row, evidence=_evidence(runs, row.newest.run_id)) if row in shown else row for row in rows]
    try:
        write_whole(output, results_page.render(rows, [pretrained(run) for run in pretraining]))
    except OSError as error:
        raise StorageError(
            f"The page {output} could not be written: {error}.", fix="give another file with --output."
        ) from error
    logger.info("wrote %s: %d rows of %d groups of runs", output, len(shown), len(rows))
    judged = [(target, *results_page.judge(target, rows)) for target in results_page.TARGETS]
    return {
        "path": str(output),
        "rows": [row.summary() for row in results_page.main_rows(rows)],
        "missing": [
            {"architecture": architecture, "recipe": recipe, "weights": weights}
            for architecture, recipe, weights in results_page.missing(rows)
        ],
        "targets": [
            {
                "architecture": target.architecture,
                "recipe": "best",
                "bound": target.bound,
                "reached": reached,
                "verdict": verdict,
            }
            for target, reached, verdict in judged
        ],
    }


def trained(run: TrainingRun) -> Trained:
    """What a run's tags, params and metrics say, in the page's words."""
    tags, metrics = run.tags, run.metrics
    return Trained(
        run_id=run.run_id,
        started_at=run.started_at,
        architecture=run.architecture,
        recipe=run.recipe,
        digest=tags.get("recipe.digest", ""),
        seed=tags.get("seed", ""),
        weights=tags.get("weights", ""),
        data=tags.get("data", ""),
        dataset_id=tags.get("dataset_id", ""),
        backend=tags.get("keras.backend", ""),
        test_accuracy=metrics.get("test_accuracy"),
        images=_images(run),
        hardware=_hardware(tags),
        wall_seconds=metrics.get("wall_seconds"),
        peak_memory_mib=metrics.get("peak_memory_mib"),
        git_sha=tags.get("git.sha", ""),
        git_dirty=tags.get("git.dirty", ""),
        command=tags.get("command", ""),
        gpu=tags.get("hardware.gpu", ""),
        resumed=int(tags.get("resumed", "0")),
        reproduces=tags.get("reproduces", ""),
        reproduction=tags.get("reproduction", ""),
    )


def _images(run: TrainingRun) -> dict[str, int]:
    found = {split: run.params.get(f"images.{split}", "") for split in ("train", "validation", "test")}
    return {split: int(n) for split, n in found.items() if n.isdecimal()}


def _hardware(tags: Mapping[str, str]) -> str:
    """`<processor>, <n> cores, <n> GiB`, and whatever else the run says of its machine, such as a GPU."""
    known = {key.removeprefix("hardware."): value for key, value in tags.items() if key.startswith("hardware.")}
    units = {"cpu": "{}", "cores": "{} cores", "memory_gib": "{} GiB"}
    usual = [form.format(known[key]) for key, form in units.items() if key in known]
    return ", ".join(usual + [f"{key} {value}" for key, value in sorted(known.items()) if key not in units])


def pretrained(run: TrainingRun) -> Pretrained:
    """As `trained`, of a run that made weights to start from."""
    return Pretrained(
        run_id=run.run_id,
        started_at=run.started_at,
        recipe=run.recipe,
        data=run.tags.get("data", ""),
        dataset_id=run.tags.get("dataset_id", ""),
        validation_accuracy=run.metrics.get("validation_accuracy"),
        wall_seconds=run.metrics.get("wall_seconds"),
        sha256=run.tags.get("weights.sha256", ""),
        command=run.tags.get("command", ""),
        seed=run.tags.get("seed", ""),
        images=_images(run),
        hardware=_hardware(run.tags),
        peak_memory_mib=run.metrics.get("peak_memory_mib"),
        git_sha=run.tags.get("git.sha", ""),
    )


def _is_current(run: Trained) -> bool | None:
    if run.recipe not in available_recipes(run.architecture):
        return None
    return load_recipe(run.architecture, run.recipe).digest == run.digest


def _of_present_form(runs: Runs, run: Trained) -> Trained:
    """With the digest that its recipe has today: a key that recipes have gained since changes all digests, and not what
    was done. Where the recipe cannot be read as one of today's, as it is."""
    if run.recipe in results_page.LEFT_OUT or _is_current(run) is not False:
        return run
    content = runs.document(run.run_id, RECIPE)
    try:
        return run if content is None else replace(run, digest=parse_recipe(content, origin=RECIPE).digest)
    except ConfigurationError:
        return run


def _evidence(runs: Runs, run_id: str) -> Evidence:
    metrics, robustness, history = (runs.document(run_id, name) for name in (METRICS, ROBUSTNESS, HISTORY))
    try:
        return Evidence(
            test=None if metrics is None else _metrics(metrics["test"]),
            robustness=None if robustness is None else _robustness(robustness),
            stages=() if history is None else _stages(history),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        # Of an earlier version of this program: no reason to have no page.
        logger.warning("run %s: its figures cannot be read (%s: %s)", run_id, type(error).__name__, error)
        return Evidence()


def _metrics(content: Mapping[str, Any]) -> Metrics:
    classes = tuple(ClassMetrics(**item) for item in content["classes"])
    confusion = tuple(tuple(row) for row in content["confusion"])
    return Metrics(**{**content, "classes": classes, "confusion": confusion})


def _robustness(content: Mapping[str, Any]) -> Robustness:
    cells = {
        (name, int(severity)): accuracy
        for name, severities in content["cells"].items()
        for severity, accuracy in severities.items()
    }
    return Robustness(**{**content, "cells": cells})


def _stages(history: Mapping[str, Any]) -> tuple[Stage, ...]:
    found = []
    for stage in history["stages"]:
        kept = stage["figures"][stage["kept_epoch"]]
        found.append(
            Stage(
                name=stage["name"],
                epochs=len(stage["figures"]),
                epoch=stage["kept_epoch"] + 1,
                train_accuracy=kept.get("accuracy"),
                validation_accuracy=kept.get("val_accuracy"),
            )
        )
    return tuple(found)
