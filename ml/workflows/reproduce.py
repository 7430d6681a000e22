"""Reproduction: trains a finished run again by what MLflow kept of it, and compares every figure.

Owns what must be the same before, and what counts as the same after. Imports neither TensorFlow nor the training: the
caller hands both in, after `original` has refused what can be refused at once.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from ml.datasets import store
from ml.errors import ConfigurationError, NotReproduced, RegistryError
from ml.registry.provenance import as_tags
from ml.registry.runs import FINISHED, RECIPE, Curve, Runs, TrainingRun
from ml.registry.tracking import mark
from ml.settings import PROJECT_ROOT, Settings
from ml.training.recipe import Recipe, parse_recipe

logger = logging.getLogger(__name__)

TAG_REPRODUCES, TAG_OUTCOME = "reproduces", "reproduction"
"""On the run that is trained again: which run it does again, and `same` or `differs`."""

_TIMES_AND_MEMORY = ("seconds", "per_second", "_mib")
"""How the metrics end that are the machine's business, not the model's."""
_SURROUNDINGS = ("git.sha", "git.dirty", "python", "platform", "keras.backend", "weights", "weights.sha256")
_NAMED = 5  # differences in an error's message; the log has all of them


class Train(Protocol):
    """As `ml.workflows.train.train`."""

    def __call__(
        self,
        settings: Settings,
        architecture: str,
        dataset_id: str,
        recipe: Recipe,
        *,
        resume: Literal["required", "no"],
        tags: Mapping[str, str] | None,
        register: bool,
    ) -> Mapping[str, object]:
        """Trains; the answer has `run_id`."""


class FoundWeights(Protocol):
    """As `ml.models.vgg16_weights.Weights`."""

    @property
    def sha256(self) -> str | None:
        """Of the file; None for random weights."""

    @property
    def label(self) -> str:
        """What people are told."""


class ResolveWeights(Protocol):
    """As `ml.models.vgg16_weights.resolve_weights`."""

    def __call__(self, setting: str, allow_stand_in: bool, cache_dir: Path) -> FoundWeights:
        """Finds the weights that VGG16_WEIGHTS asks for."""


@dataclass(frozen=True, slots=True)
class Original:
    """A finished run that can be trained again: its recipe and its data are there."""

    run: TrainingRun
    recipe: Recipe
    dataset_id: str


def original(settings: Settings, run_id: str) -> Original:
    """Finds the run and all that it needs, but for weights.

    Raises:
        RunNotFound: there is no training run of that id.
        RegistryError: it is not finished, or MLflow has not all that is needed to train it again.
        ConfigurationError: its recipe cannot be used by this version of the program.
        DatasetNotFound, DatasetInvalid: its dataset is not here, or was altered.
        RegistryUnavailable: MLflow could not be asked.
    """
    runs = Runs(settings.tracking_uri)
    run = runs.by_id(run_id)
    other = "take another run: `cifar10 results --json` and the MLflow UI name them."
    if run.status != FINISHED:
        raise RegistryError(f"Run {run_id} is {run.status}, and only a finished one can be compared with.", fix=other)
    content = runs.document(run_id, RECIPE)
    lacking = [tag for tag in ("architecture", "dataset_id") if not run.tags.get(tag)]
    if content is None or lacking:
        what = f"the tag {lacking[0]}" if lacking else f"the file {RECIPE}"
        raise RegistryError(f"Run {run_id} lacks {what}: it is not known what it was trained by.", fix=other)
    recipe = parse_recipe(content, origin=f"{RECIPE} of run {run_id}")
    manifest = store.read_manifest(settings.data_url, run.tags["dataset_id"])
    return Original(run, recipe, manifest.dataset_id)


def reproduce(
    settings: Settings, original: Original, *, train: Train, resolve_weights: ResolveWeights, resume: bool = False
) -> dict[str, object]:
    """Trains the run again, registers nothing, and compares; `resume` goes on with one that was cut off.

    Compared are all metrics but times and memory: the last value and, where there are several, that of each epoch,
    digit for digit. Surroundings that differ (packages, hardware, commit) are told and do not count.

    Returns:
        {"same": true, "run_id", "reproduction_run_id", "compared": number of values, "differences": [],
        "environment": [{"what", "was", "is"}]}.

    Raises:
        NotReproduced: a figure differs; names the first, and what else differs. The log has all of them.
        ConfigurationError: VGG16_WEIGHTS names other weights than the run started from.
        SourceError: VGG16's weights are not there.
        As `ml.workflows.train.train`.
    """
    run = original.run
    if original.recipe.architecture == "vgg16":
        _refuse_other_weights(
            run, resolve_weights(settings.vgg16_weights, settings.mlops_allow_stand_in, settings.cache_dir)
        )
    backend = run.tags.get("keras.backend", settings.keras_backend)
    if backend != settings.keras_backend:
        raise ConfigurationError(
            f"Run {run.run_id} was computed by {backend}, and KERAS_BACKEND is {settings.keras_backend}: its figures "
            "would differ.",
            fix=f"set KERAS_BACKEND={backend}.",
        )
    now = {**as_tags(PROJECT_ROOT, settings.mlops_git_sha), "keras.backend": settings.keras_backend}
    for found in differences_of_surroundings(run.tags, {**run.tags, **now}):
        logger.warning("%s was %s and is %s: the figures may differ", found["what"], found["was"], found["is"])
    done = train(
        settings,
        original.recipe.architecture,
        original.dataset_id,
        original.recipe,
        resume="required" if resume else "no",
        tags={TAG_REPRODUCES: run.run_id},
        register=False,
    )
    runs = Runs(settings.tracking_uri)
    again = runs.by_id(str(done["run_id"]))
    was, now_is = runs.curves(run), runs.curves(again)
    differing = differences(was, now_is)
    # Resumed, it may have been begun to repeat another run of the very same training.
    outcome = {TAG_REPRODUCES: run.run_id, TAG_OUTCOME: "differs" if differing else "same"}
    mark(settings, again.run_id, outcome)
    environment = differences_of_surroundings(run.tags, again.tags)
    if differing:
        for item in differing:
            logger.warning("%s was %s and is %s", item["metric"], item["was"], item["is"])
        raise _not_reproduced(run.run_id, again.run_id, differing, environment)
    return {
        "same": True,
        "run_id": run.run_id,
        "reproduction_run_id": again.run_id,
        "compared": sum(len(curve) for key, curve in was.items() if _is_a_figure(key)),
        "differences": differing,
        "environment": environment,
    }


def differences(was: Mapping[str, Curve], now: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """Every figure that is not the same, digit for digit: [{"metric", "was", "is"}], None where there is none.

    A metric with one value has its name, one with several `<name>, epoch <n>`, n from 0. Two that are no number (NaN)
    are the same.
    """
    found: list[dict[str, Any]] = []
    for key in sorted(filter(_is_a_figure, {*was, *now})):
        before, after = dict(was.get(key, ())), dict(now.get(key, ()))
        steps = sorted({*before, *after})
        for step in steps:
            values = before.get(step), after.get(step)
            if repr(values[0]) != repr(values[1]):
                name = key if len(steps) == 1 else f"{key}, epoch {step}"
                found.append({"metric": name, "was": values[0], "is": values[1]})
    return found


def differences_of_surroundings(was: Mapping[str, str], now: Mapping[str, str]) -> list[dict[str, str]]:
    """What was otherwise than it is now, of packages, hardware, code, backend and weights: [{"what", "was", "is"}]."""
    keys = sorted(key for key in {*was, *now} if key in _SURROUNDINGS or key.startswith(("version.", "hardware.")))
    both = [(key, was.get(key, "not recorded"), now.get(key, "not recorded")) for key in keys]
    return [{"what": key, "was": before, "is": after} for key, before, after in both if before != after]


def _is_a_figure(metric: str) -> bool:
    return not metric.endswith(_TIMES_AND_MEMORY) and not metric.startswith("system/")


def _refuse_other_weights(run: TrainingRun, found: FoundWeights) -> None:
    label, sha256 = run.tags.get("weights", ""), run.tags.get("weights.sha256", "none")
    if sha256 == (found.sha256 or "none"):
        return
    if sha256 == "none":
        fix = "set VGG16_WEIGHTS=random."
    elif label == "imagenet":
        fix = "set VGG16_WEIGHTS=imagenet."
    else:
        fix = f"set VGG16_WEIGHTS to the file whose SHA-256 is {sha256}."
    raise ConfigurationError(
        f"Run {run.run_id} started from {label or 'weights'} (SHA-256 {sha256}), and VGG16_WEIGHTS now names "
        f"{found.label} (SHA-256 {found.sha256 or 'none'}).",
        fix=fix,
    )


def _not_reproduced(
    run_id: str, again: str, differing: list[dict[str, Any]], environment: list[dict[str, str]]
) -> NotReproduced:
    figures = "; ".join(f"{item['metric']} was {item['was']} and is {item['is']}" for item in differing[:_NAMED])
    more = f"; and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
    around = ", ".join(f"{item['what']} ({item['was']}, now {item['is']})" for item in environment[:_NAMED])
    return NotReproduced(
        f"Run {run_id} came out otherwise as {again}: {figures}{more}.",
        fix=f"make the surroundings what they were, then try again: {around}."
        if around
        else "the packages, the hardware and the code are the same: something draws without the seed, or threads add "
        "up in another order. Compare the first epoch that differs.",
    )
