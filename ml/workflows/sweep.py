"""A search for better hyperparameters: from a recipe's file with a space to the best recipe that was found in it.

Trials are trained and judged on the validation split alone: nothing is registered, and the test split is never read.
The search is a run of MLflow with a child run for each trial, and a study on disk that a killed search goes on from.
"""

import csv
import io
import logging
import re
import shlex
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import tomli_w

from ml.datasets import store
from ml.datasets.manifest import Manifest, Split
from ml.errors import ConfigurationError, RegistryError, TrainingError
from ml.files import write_whole
from ml.registry import tracking
from ml.settings import Settings
from ml.training.recipe import Recipe, refuse_unless_it_fits
from ml.training.study import Outcome, Pruned, State, Study, Trial, open_study
from ml.training.sweep_space import Sweep, edges, flat, load_sweep, spoken
from ml.workflows.training_choice import use_backend

logger = logging.getLogger(__name__)

EXPERIMENT = "cifar10-sweeps"
OBJECTIVE = "validation_accuracy"
"""A trial's value: the best of its last stage's epochs. As a metric it has the epochs of all stages as its steps."""

OnEpoch = Callable[[str, int, Mapping[str, float]], None]
Fit = Callable[[Recipe, OnEpoch], None]
"""Trains by a recipe and tells each epoch's figures, as `ml.training.fit.train` does."""
MakeFit = Callable[[Settings, Manifest, Sweep], tuple[Fit, str]]
"""Loads what all trials share; returns how one is trained, and what it starts from."""

_RUN, _FINISHED, _WEIGHTS = "run_id", "finished_run_id", "weights"


def sweep(
    settings: Settings,
    path: Path,
    *,
    dataset_id: str | None = None,
    trials: int | None = None,
    make_fit: MakeFit | None = None,
) -> dict[str, Any]:
    """Searches until the sweep's trials are done; run again, goes on where it was.

    Args:
        settings: where data, MLflow and the study are, and which weights VGG16 starts from.
        path: of a recipe's file with a `[sweep]` table; see `ml.training.sweep_space`.
        dataset_id: of a stored dataset; None is the newest.
        trials: instead of the file's; more than before prolongs a search that is done.
        make_fit: how trials are trained; None is `ml.training.fit`, imported only after all that can be refused was.

    Returns:
        {"study", "trials" (brought to an end) = "complete" + "pruned" + "failed", "interrupted" (cut off by the end of
        their process, counted by themselves), "best": {"trial", "value", "overrides"}, "recipe_path", "run_id"}.

    Raises:
        ConfigurationError: the file or the backend cannot be used; or this study's trials started from other weights.
        DatasetNotFound, DatasetInvalid: there is no such dataset, or it was altered.
        TrainingError: another process searches in this study; or not one trial was completed.
        SourceError: VGG16's weights are not there, cannot be fetched, or are not VGG16's.
        StorageError: data or the study cannot be read or written.
        RegistryUnavailable: MLflow could not be asked.
    """
    asked = load_sweep(path).with_trials(trials)
    manifest = store.read_manifest(settings.data_url, dataset_id or store.latest_dataset_id(settings.data_url))
    if make_fit is None:
        use_backend(settings.keras_backend)
    _refuse_unless_all_fit(asked, manifest)
    recipe = asked.recipe
    name = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', recipe.name)}-{asked.digest(manifest.dataset_id)}"
    with open_study(asked, name, settings.mlops_var_dir / "sweeps" / name) as study:
        finished = study.recall(_FINISHED)
        if not study.left and finished is not None and study.best() is not None:
            logger.info("%s is done; ask for more trials to prolong it", name)
            _write_best(study, asked)
            return _result(study, asked, finished)
        with ExitStack() as stack:
            run = _parent(stack, settings, study, asked, manifest)
            run.log_tags({"command": shlex.join(_command(path, manifest.dataset_id, trials))})
            if study.left:
                fit, weights = (make_fit or _make_fit)(settings, manifest, asked)
                _refuse_other_weights(study, weights)
                started = {"weights": weights, "keras.backend": settings.keras_backend}
                run.log_tags(started)
                shared = {**_tags(asked, manifest, study), **started, "mlflow.parentRunId": run.id}
                study.search(
                    lambda trial: _try(settings, asked, manifest, trial, fit, tags=shared),
                    after=lambda outcome: _tell(run, study, outcome),
                )
            _log_evidence(run, study, asked)
            result = _result(study, asked, run.id)
        study.remember(_FINISHED, run.id)
        return result


def _refuse_unless_all_fit(asked: Sweep, manifest: Manifest) -> None:
    images = min(asked.recipe.train_limit or manifest.counts["train"], manifest.counts["train"])
    for values in edges(asked.space):
        refuse_unless_it_fits(asked.recipe_for(values), images)


def _parent(stack: ExitStack, settings: Settings, study: Study, asked: Sweep, manifest: Manifest) -> tracking.Run:
    """The search's run: the one that a killed search left open, else a new one. It ends with the stack."""

    def begin(run_id: str | None) -> tracking.Run:
        return stack.enter_context(
            tracking.run(
                settings,
                f"sweep-{asked.recipe.name}",
                tags=_tags(asked, manifest, study),
                seed=asked.seed,
                experiment=EXPERIMENT,
                run_id=run_id,
            )
        )

    known, finished = study.recall(_RUN), study.recall(_FINISHED)
    if known is None or known == finished:
        run = begin(None)
        if known is not None:
            run.log_tags({"sweep.prolongs": known})
    else:
        try:
            run = begin(known)
        except RegistryError as error:  # the registry's answer is no; that it could not be asked is another error
            logger.warning("The search's run cannot be gone on with, so it gets a new one: %s", error.message)
            run = begin(None)
    study.remember(_RUN, run.id)
    run.log_dataset(manifest)
    run.log_tags({"sweep.trials": asked.trials})
    run.log_params(flat(asked.recipe))
    run.log_params({f"space.{key}": kind.model_dump_json(exclude_none=True) for key, kind in asked.space.items()})
    run.log_params({"sweep.pruner": asked.pruner.model_dump(), "sweep.random_trials": asked.random_trials})
    return run


def _command(path: Path, dataset_id: str, trials: int | None) -> list[str]:
    more = [] if trials is None else ["--trials", str(trials)]
    return ["cifar10", "sweep", str(path), "--dataset", dataset_id, *more]


def _tags(asked: Sweep, manifest: Manifest, study: Study) -> dict[str, str]:
    return {
        "architecture": asked.recipe.architecture,
        "recipe": asked.recipe.name,
        "dataset_id": manifest.dataset_id,
        "data": manifest.data,
        "sweep.study": study.name,
    }


def _try(
    settings: Settings, asked: Sweep, manifest: Manifest, trial: Trial, fit: Fit, *, tags: Mapping[str, str]
) -> float:
    """Does a trial as a run of its own; returns its best validation accuracy of the last stage.

    Raises:
        Pruned: the trial was given up. Its run is FINISHED with the tag `pruned`, not KILLED: that is what becomes of a
            run whose process was stopped, and here all went as it should.
        TrainingDiverged, ConfigurationError: its values make no model; the run is FAILED.
    """
    given_up: Pruned | None = None
    reached: dict[str, float] = {}
    with tracking.run(
        settings,
        f"{asked.recipe.name}-trial-{trial.number}",
        tags={**tags, "sweep.trial": str(trial.number)},
        seed=asked.recipe.seed,
        # One trial at a time: a run of this study's that is still open is one whose process was killed.
        origin=f"sweep/{tags['sweep.study']}/trial",
        experiment=EXPERIMENT,
    ) as run:
        trial.note(run_id=run.id)
        run.log_dataset(manifest)
        try:
            recipe = asked.recipe_for(trial.values)
            run.log_params(flat(recipe))
            before = {
                stage.name: sum(other.epochs for other in recipe.stages[:i]) for i, stage in enumerate(recipe.stages)
            }

            def on_epoch(stage: str, epoch: int, figures: Mapping[str, float]) -> None:
                run.log_metrics({f"{stage}/{key}": value for key, value in figures.items()}, step=epoch)
                value = figures["val_accuracy"]
                reached[stage] = max(value, reached.get(stage, 0.0))
                run.log_metrics({OBJECTIVE: value}, step=before[stage] + epoch)
                trial.report(value, before[stage] + epoch)

            fit(recipe, on_epoch)
        except Pruned as pruned:
            given_up = pruned
            run.log_tags({"sweep.state": "pruned", "pruned": "true"})
        except (TrainingError, ConfigurationError):
            run.log_tags({"sweep.state": "failed"})
            raise
        else:
            run.log_tags({"sweep.state": "complete"})
            run.log_metrics({f"best_{OBJECTIVE}": reached[recipe.stages[-1].name]})
    if given_up is not None:
        raise given_up
    return reached[recipe.stages[-1].name]


def _tell(run: tracking.Run, study: Study, outcome: Outcome) -> None:
    best = study.best()
    counts = _counts(study)
    figures = {f"trials_{state}": float(count) for state, count in counts.items()}
    if outcome.state == "complete" and outcome.value is not None:
        figures[OBJECTIVE] = outcome.value
    if best is not None and best.value is not None:
        figures[f"best_{OBJECTIVE}"] = best.value
    run.log_metrics(figures, step=outcome.number)
    logger.info(
        "%s: trial %d %s%s%s",
        *(study.name, outcome.number, outcome.state),
        f" with {outcome.value:.4f} after {outcome.epochs} epochs"
        if outcome.value is not None
        else f": {outcome.error}",
        f"; best is {best.value:.4f} of trial {best.number}" if best is not None else "",
    )


def _counts(study: Study) -> dict[str, int]:
    states = [outcome.state for outcome in study.outcomes()]
    return {state: states.count(state) for state in get_args(State)}


def _best(study: Study) -> Outcome:
    best = study.best()
    if best is None:
        failed = [outcome.error for outcome in study.outcomes() if outcome.state == "failed"]
        raise TrainingError(
            f"Not one trial of {study.name} was completed{': the last failed with ' + failed[-1] if failed else ''}.",
            fix="narrow the space to what can be trained, or raise the number of trials or the time.",
        )
    return best


def _recipe_path(study: Study, asked: Sweep) -> Path:
    return study.folder / f"{_best_name(asked)}.toml"


def _best_name(asked: Sweep) -> str:
    """Of the best recipe: it is not the one that the search began with."""
    return f"{asked.recipe.name}-best"


def _write_best(study: Study, asked: Sweep) -> dict[str, Any]:
    """Writes the best recipe's file, a recipe as those of recipes/ are; returns its plain values."""
    best = _best(study)
    plain = asked.recipe_for({**best.values, "name": _best_name(asked)}).model_dump(mode="json", exclude_none=True)
    heading = (
        f"# Best of {_counts(study)['complete']} completed trials of {study.name}: trial {best.number}, validation "
        f"accuracy {best.value:.4f}.\n# {spoken(best.values)}\n"
    )
    write_whole(_recipe_path(study, asked), heading + tomli_w.dumps(plain))
    return plain


def _log_evidence(run: tracking.Run, study: Study, asked: Sweep) -> None:
    """Writes the trials' table and the best recipe's file, and uploads both."""
    table = study.folder / "trials.csv"
    write_whole(table, _table(study.outcomes(), asked))
    run.log_artifact(table)
    best = _best(study)
    run.log_dict(_write_best(study, asked), "recipe.json")
    run.log_artifact(_recipe_path(study, asked), "best")
    run.log_tags({"best.trial": best.number, "best.run_id": best.facts.get("run_id", "")})


def _table(outcomes: list[Outcome], asked: Sweep) -> str:
    """CSV: a row for each trial."""
    content = io.StringIO()
    rows = csv.writer(content, lineterminator="\n")
    rows.writerow(["trial", "state", OBJECTIVE, "epochs", "seconds", *asked.space, "run_id", "error"])
    for outcome in outcomes:
        values = [outcome.values.get(key, "") for key in asked.space]
        rows.writerow(
            [
                *(outcome.number, outcome.state, outcome.value, outcome.epochs, round(outcome.seconds, 1)),
                *(*values, outcome.facts.get("run_id", ""), outcome.error),
            ]
        )
    return content.getvalue()


def _result(study: Study, asked: Sweep, run_id: str) -> dict[str, Any]:
    best, counts = _best(study), _counts(study)
    return {
        "study": study.name,
        "trials": sum(counts.values()) - counts["interrupted"],
        **counts,
        "best": {"trial": best.number, "value": best.value, "overrides": dict(best.values)},
        "recipe_path": str(_recipe_path(study, asked)),
        "run_id": run_id,
    }


def _refuse_other_weights(study: Study, weights: str) -> None:
    before = study.recall(_WEIGHTS)
    if before is None:
        study.remember(_WEIGHTS, weights)
    elif before != weights:
        raise ConfigurationError(
            f"The trials of {study.name} began with {before}, and now VGG16_WEIGHTS gives {weights}.",
            fix=f"set VGG16_WEIGHTS to what it was, or remove {study.folder} to search from the beginning.",
        )


def _make_fit(settings: Settings, manifest: Manifest, asked: Sweep) -> tuple[Fit, str]:
    # TensorFlow takes ten seconds to import.
    from ml.models.vgg16_weights import resolve_weights  # noqa: PLC0415
    from ml.training.feature_cache import FeatureCache  # noqa: PLC0415
    from ml.training.fit import train  # noqa: PLC0415
    from ml.training.runtime import forget  # noqa: PLC0415

    recipe = asked.recipe
    weights, label = None, "from scratch"
    if recipe.architecture == "vgg16":
        weights = resolve_weights(settings.vgg16_weights, settings.mlops_allow_stand_in, settings.cache_dir)
        label = weights.label
    learned: Split = store.load_split(settings.data_url, manifest.dataset_id, "train", recipe.train_limit)
    judged = store.load_split(settings.data_url, manifest.dataset_id, "validation", recipe.validation_limit)

    # What a frozen front gives is the same in many trials.
    features = FeatureCache(settings.cache_dir / "features", int(settings.feature_cache_gib * 2**30))

    def fit(recipe: Recipe, on_epoch: OnEpoch) -> None:
        forget()  # else trials slow down as they go on
        train(recipe, learned, judged, weights, on_epoch=on_epoch, features=features)

    return fit, label
