"""Training: from a dataset's id and a recipe to a registered version, with everything it was made of in MLflow.

Loads, trains, exports, measures the exported file (not the Keras model: what is served is what is measured), keeps the
reference that monitoring will compare against and the golden images that an inspection will ask for, makes the int8
form with a reference and golden images of its own, writes the model card, and registers. Whether the version becomes
champion, and in which form it serves, is the gate's.
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from ml.datasets import store
from ml.datasets.manifest import Manifest, Split
from ml.errors import ConfigurationError, ModelInvalid, TrainingDiverged, TrainingError
from ml.evaluation import golden, model_card, plots
from ml.evaluation.metrics import Metrics, evaluate
from ml.evaluation.robustness import CORRUPTION_SEED, Robustness, robustness
from ml.evaluation.slices import Slice, by_brightness_and_contrast
from ml.models.vgg16_weights import Weights, resolve_weights
from ml.monitoring.image_statistics import image_statistics
from ml.monitoring.reference import write_reference
from ml.registry import packaging, tracking
from ml.registry.versions import GOLDEN_FILE, INT8, MODEL_NAME, REFERENCE_FILE, ModelVersion
from ml.serving.engine import Engine
from ml.settings import Settings
from ml.training import fit, runtime
from ml.training.checkpoint import Checkpoint, Position
from ml.training.export import ExportedModel, export
from ml.training.feature_cache import FeatureCache
from ml.training.quantization import quantize
from ml.training.recipe import Recipe, load_recipe, refuse_unless_it_fits
from ml.training.stages import StageHistory

logger = logging.getLogger(__name__)

Resume = Literal["no", "if there", "required"]

_REPRODUCE = "cifar10 reproduce"
"""The command of a recipe that is no file as it stands; the run's id follows."""


@dataclass(frozen=True)
class _Measured:
    """What the exported file says of the validation and the test images."""

    validation: Metrics
    test: Metrics
    slices: tuple[Slice, ...]
    """Of the test images."""
    golden: golden.Golden
    """Of the validation images."""
    reference_file: Path
    golden_file: Path


@dataclass(frozen=True)
class _Int8:
    """The int8 form, and what it says of the validation images."""

    files: packaging.Int8Files
    validation: Metrics
    seconds: float
    """For making it and for measuring it."""


def train(
    settings: Settings,
    architecture: str,
    dataset_id: str,
    recipe: Recipe,
    *,
    origin: str | None = None,
    resume: Resume = "no",
    tags: Mapping[str, str] | None = None,
    register: bool = True,
) -> dict[str, object]:
    """Trains one model and registers it as a candidate.

    After each epoch a checkpoint is written; a training that was cut off is resumed from there in the same MLflow run,
    and comes to the figures of one that was not.

    Args:
        settings: where data and MLflow are, and which weights VGG16 starts from.
        architecture: `baseline` or `vgg16`; must be the recipe's.
        dataset_id: of a stored dataset.
        recipe: `ml.training.recipe.load_recipe`, with overrides if any.
        origin: what asks for it, the same at every attempt; see `ml.registry.tracking.run`. None is this machine,
            where one process at a time makes this training.
        resume: `required`: go on from the checkpoint of this recipe, seed, dataset, weights and backend; `if there`
            is one; `no`: start anew and forget it.
        tags: more of them for the run.
        register: whether to make a candidate of it; else it is a run, and nothing else.

    Returns:
        {"architecture", "recipe", "name", "version" (both None unless registered), "run_id", "dataset_id", "data",
        "weights", "validation_accuracy", "test_accuracy", "precision", "recall", "loss" (of the test split, macro
        means), "test_n", "corrupted_accuracy" (None unless the recipe asks for it), "stages": [{"name", "epochs",
        "kept_epoch", "validation_accuracy", "seconds"}], "seconds"}.

    Raises:
        ConfigurationError: the recipe is another architecture's, or cannot work on this dataset.
        DatasetNotFound, DatasetInvalid: there is no such dataset, or it was altered.
        SourceError: VGG16's weights are not there, cannot be fetched, or are not VGG16's.
        TrainingDiverged: the loss became NaN; the run is marked failed and nothing is registered.
        TrainingError: a checkpoint is required and there is none, or it cannot be used.
        StorageError: a checkpoint or cached features could not be written.
        RegistryUnavailable: MLflow could not be asked.
    """
    if recipe.architecture != architecture:
        raise ConfigurationError(
            f"Recipe {recipe.name!r} is for {recipe.architecture}, not for {architecture}.",
            fix=f"load one of {architecture}'s recipes.",
        )
    manifest = store.read_manifest(settings.data_url, dataset_id)
    refuse_unless_it_fits(recipe, manifest.counts["train"])
    weights = _weights(settings, architecture)
    purpose = "candidate" if register else "run"
    identity = fit.identity_of(recipe, dataset_id, weights, runtime.backend(), purpose)
    checkpoint = Checkpoint(settings.checkpoints_dir, identity)
    all_tags = _tags(manifest, recipe, weights) | dict(tags or {})
    with ExitStack() as stack:
        stack.enter_context(checkpoint.held())
        position = where_to_start(checkpoint, resume, recipe)
        run = stack.enter_context(
            tracking.run(
                settings,
                f"{architecture}-{recipe.name}",
                tags=all_tags,
                seed=recipe.seed,
                origin=origin or checkpoint.origin,
                run_id=position.run_id or None,
            )
        )
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="train-")))
        features = settings.cache_dir / "features"
        if not register:
            # A run that only repeats another one makes its features itself, and what a killed one left goes first.
            features = settings.cache_dir / f"features-{checkpoint.path.stem}"
            shutil.rmtree(features, ignore_errors=True)
            stack.callback(shutil.rmtree, features, ignore_errors=True)
        position.run_id = run.id
        log_request(run, manifest, recipe)
        log_epochs_cut_off(run, recipe, position)
        splits = _load(settings, dataset_id, recipe)
        if resume == "no":
            # Only now: what was cut off is worth more than a training that cannot even begin.
            checkpoint.clear()
        run.log_params({f"images.{split}": len(content.labels) for split, content in splits.items()})
        try:
            trained = fit.train(
                recipe,
                splits["train"],
                splits["validation"],
                weights,
                on_epoch=partial(log_epoch, run),
                features=FeatureCache(features, int(settings.feature_cache_gib * 2**30)),
                checkpoint=checkpoint,
                position=position,
            )
        except TrainingDiverged:
            checkpoint.clear()  # resumed, it would diverge again
            raise
        exported = export(trained.model, folder / "model", splits["validation"].images[:256])
        measured = _measure(exported, splits, folder)
        validation, test = measured.validation, measured.test
        figures = {
            **{f"validation_{key}": value for key, value in validation.scalars().items()},
            **{f"test_{key}": value for key, value in test.scalars().items()},
        }
        corrupted = _measure_corrupted(settings, exported, dataset_id, recipe, run)
        under_corruption = _figures_of(corrupted)
        _log_evidence(
            run, trained.stages, validation, test, folder=folder / "evidence", title=f"{architecture}, {recipe.name}"
        )
        run.log_metrics(
            {
                **figures,
                **under_corruption,
                "fit_seconds": sum(stage.seconds for stage in trained.stages),
                "wall_seconds": checkpoint.wall_seconds(position),
                "peak_memory_mib": checkpoint.peak_memory_mib(position),
                "export_difference": exported.max_difference,
            }
        )
        version: ModelVersion | None = None
        if register:
            int8 = _make_int8(settings, exported, splits, recipe.seed, folder)
            of_int8 = {}
            if not isinstance(int8, str):
                # Its accuracy is the version's alone: a run that is made again registers nothing, and has no such form.
                of_int8 = {"int8_validation_accuracy": int8.validation.accuracy}
                run.log_metrics({"int8_seconds": int8.seconds})
            version = packaging.register(
                run,
                exported=exported,
                metrics=figures | of_int8,
                recipe=recipe.model_dump(mode="json"),
                manifest=manifest,
                weights=trained.weights,
                reference=measured.reference_file,
                golden=measured.golden_file,
                int8=int8 if isinstance(int8, str) else int8.files,
                card=_card(
                    run,
                    manifest,
                    recipe,
                    weights=trained.weights,
                    splits=splits,
                    measured=measured,
                    corrupted=corrupted,
                    int8=int8 if isinstance(int8, str) else int8.validation,
                ),
                input_example=splits["validation"].images[:2],
                data=manifest.data,
                architecture=architecture,
            )
        checkpoint.clear()
        return {
            "architecture": architecture,
            "recipe": recipe.name,
            "name": version.name if version else None,
            "version": version.version if version else None,
            "run_id": run.id,
            "dataset_id": dataset_id,
            "data": manifest.data,
            "weights": trained.weights,
            "validation_accuracy": validation.accuracy,
            "test_accuracy": test.accuracy,
            "precision": test.precision,
            "recall": test.recall,
            "loss": test.loss,
            "test_n": test.n,
            "corrupted_accuracy": under_corruption.get("test_corrupted_accuracy"),
            "stages": [_summary(stage) for stage in trained.stages],
            "seconds": round(trained.seconds, 1),
        }


def train_by_name(
    settings: Settings,
    architecture: str,
    *,
    dataset_id: str,
    recipe: str,
    retraining_id: int | None = None,
    seed: int | None = None,
    origin: str | None = None,
    resume: Resume = "no",
) -> dict[str, object]:
    """`train` by a recipe's name, as `ml.workflows.training_choice.choose` gives it; `seed` None is the recipe's.

    A retraining adds its id to the recipe's seed: by the same seed on the same data it would only make the same model
    again. Tried again, it makes what it would have made before.

    Raises:
        ConfigurationError: there is no such recipe, or it cannot work.
        As `train`.
    """
    chosen = load_recipe(architecture, recipe)
    seeded = chosen.with_overrides({"seed": (chosen.seed if seed is None else seed) + (retraining_id or 0)})
    return train(settings, architecture, dataset_id, seeded, origin=origin, resume=resume)


def _tags(manifest: Manifest, recipe: Recipe, weights: Weights | None) -> dict[str, str]:
    gpu = runtime.gpu()
    return {
        **({"hardware.gpu": gpu} if gpu else {}),
        "architecture": recipe.architecture,
        "recipe": recipe.name,
        "recipe.digest": recipe.digest,
        "data": manifest.data,
        "weights": weights.label if weights else "from scratch",
        "weights.sha256": (weights.sha256 if weights else None) or "none",
        "keras.backend": runtime.backend(),
        "command": _command(recipe, manifest.dataset_id, weights),
    }


def _command(recipe: Recipe, dataset_id: str, weights: Weights | None) -> str:
    """What a person types for this training; a recipe that is no file as it stands has no such line."""
    try:
        written = load_recipe(recipe.architecture, recipe.name)
    except ConfigurationError:
        return _REPRODUCE
    if written.digest != recipe.digest:
        return _REPRODUCE
    settings = [] if runtime.backend() == "tensorflow" else [f"KERAS_BACKEND={runtime.backend()}"]
    if weights is not None:
        # Of a file its name alone: where it lies on this machine helps nobody elsewhere.
        which = weights.path.name if weights.kind == "file" and weights.path else weights.kind
        settings.append(f"VGG16_WEIGHTS={which}")
    seed = [] if recipe.seed == written.seed else [f"--seed {recipe.seed}"]
    asked = f"cifar10 train {recipe.architecture} --recipe {recipe.name} --dataset {dataset_id}"
    return " ".join([*settings, asked, *seed])


def where_to_start(checkpoint: Checkpoint, resume: Resume, recipe: Recipe) -> Position:
    """Where a training begins: at its checkpoint, or at the start. With `no` a checkpoint is left as it is.

    Raises:
        TrainingError: one is required and there is none, or it cannot be used.
    """
    fresh = Position(run_id="")
    if resume == "no":
        if checkpoint.path.exists():
            logger.info("not resuming the training that was cut off (--resume would); its checkpoint will be replaced")
        return fresh
    position = checkpoint.load()
    if position is None and resume == "required":
        dataset_id = checkpoint.identity["dataset"]
        raise TrainingError(
            f"There is no checkpoint of recipe {recipe.name!r} (seed {recipe.seed}) on {dataset_id} to resume from.",
            fix="train from the start, or name the recipe, seed, dataset and weights of the training that was cut off.",
        )
    return position or fresh


def log_request(run: tracking.Run, manifest: Manifest, recipe: Recipe) -> None:
    """Records what is trained on, and how."""
    run.log_dataset(manifest)
    content = recipe.model_dump(mode="json")
    run.log_dict(content, "recipe.json")
    stages = {stage.pop("name"): stage for stage in content.pop("stages")}
    run.log_params({**content, "stages": stages})


def log_epoch(run: tracking.Run, stage: str, epoch: int, figures: Mapping[str, float]) -> None:
    """Records an epoch's figures."""
    run.log_metrics({f"{stage}/{key}": value for key, value in figures.items()}, step=epoch)


def log_epochs_cut_off(run: tracking.Run, recipe: Recipe, position: Position) -> None:
    """Records what the checkpoint knows and MLflow does not: the process ended between the two."""
    if position.epochs:
        stage, epochs = recipe.stages[position.stage].name, position.epochs
    elif position.finished:
        stage, epochs = position.finished[-1]["name"], position.finished[-1]["epochs"]
    else:
        return
    known = run.steps_of(f"{stage}/loss")
    for epoch, figures in enumerate(epochs):
        if epoch not in known:
            log_epoch(run, stage, epoch, figures)


def _measure_corrupted(
    settings: Settings, exported: ExportedModel, dataset_id: str, recipe: Recipe, run: tracking.Run
) -> Robustness | None:
    """Accuracy on CIFAR-10-C, on as many test images per cell as the recipe says; None where it says none."""
    if recipe.corrupted_limit is None:
        return None
    few = store.load_split(settings.data_url, dataset_id, "test", recipe.corrupted_limit)
    found = robustness(Engine(exported.onnx).predict, few.images, few.labels, seed=CORRUPTION_SEED)
    run.log_dict(found.as_dict(), "robustness.json")
    logger.info("CIFAR-10-C: mean accuracy %.4f on %d images a cell", found.mean_accuracy, len(few.labels))
    return found


def _figures_of(found: Robustness | None) -> dict[str, float]:
    if found is None:
        return {}
    return {
        "test_corrupted_accuracy": found.mean_accuracy,
        "test_corrupted_accuracy_low": found.mean_accuracy_low,
        "test_corrupted_accuracy_high": found.mean_accuracy_high,
    }


def _load(settings: Settings, dataset_id: str, recipe: Recipe) -> dict[str, Split]:
    # One seed for all recipes' subsets: candidates must be judged on the same validation images.
    return {
        "train": store.load_split(settings.data_url, dataset_id, "train", recipe.train_limit),
        "validation": store.load_split(settings.data_url, dataset_id, "validation", recipe.validation_limit),
        "test": store.load_split(settings.data_url, dataset_id, "test", recipe.test_limit),
    }


def _weights(settings: Settings, architecture: str) -> Weights | None:
    if architecture != "vgg16":
        return None
    return resolve_weights(settings.vgg16_weights, settings.mlops_allow_stand_in, settings.cache_dir)


def _measure(exported: ExportedModel, splits: Mapping[str, Split], folder: Path) -> _Measured:
    """Figures of both splits. Writes the reference, all validation predictions, and the golden images into `folder`."""
    engine = Engine(exported.onnx)
    validation, test = splits["validation"], splits["test"]
    logger.info("measuring on %d validation and %d test images", len(validation.labels), len(test.labels))
    expected = engine.predict(validation.images)
    reference_file = write_reference(
        folder / REFERENCE_FILE, validation.labels, expected, image_statistics(validation.images)
    )
    chosen = golden.choose(validation.images, validation.labels, expected)
    if chosen.missing:
        logger.warning("not one validation image was right of: %s", ", ".join(chosen.missing))
    given = engine.predict(test.images)
    on_validation, on_test = evaluate(validation.labels, expected), evaluate(test.labels, given)
    logger.info(
        "validation accuracy %.4f (n=%d), test accuracy %.4f (n=%d, 95 %% interval %.4f to %.4f)",
        *(on_validation.accuracy, on_validation.n),
        *(on_test.accuracy, on_test.n, on_test.accuracy_low, on_test.accuracy_high),
    )
    return _Measured(
        on_validation,
        on_test,
        by_brightness_and_contrast(test.images, test.labels, given),
        chosen,
        reference_file,
        golden.write_golden(folder / GOLDEN_FILE, chosen),
    )


def _make_int8(
    settings: Settings, exported: ExportedModel, splits: Mapping[str, Split], seed: int, folder: Path
) -> _Int8 | str:
    """The int8 form; or why there is none: a model without one is a candidate all the same."""
    wanted = settings.int8_calibration_images
    if wanted == 0:
        return "the setting INT8_CALIBRATION_IMAGES asks for none"
    began = time.monotonic()
    images, validation = splits["train"].images, splits["validation"]
    chosen = np.random.default_rng(seed).choice(len(images), min(wanted, len(images)), replace=False)
    try:
        onnx = quantize(exported.onnx, folder / INT8.onnx, images[np.sort(chosen)])
        given = Engine(onnx).predict(validation.images)
    except ModelInvalid as error:
        logger.warning("No int8 form is registered with this model: %s", error)
        return error.message
    found = evaluate(validation.labels, given)
    files = packaging.Int8Files(
        onnx,
        write_reference(folder / INT8.reference, validation.labels, given, image_statistics(validation.images)),
        golden.write_golden(folder / INT8.golden, golden.choose(validation.images, validation.labels, given)),
    )
    seconds = round(time.monotonic() - began, 1)
    logger.info("int8: validation accuracy %.4f (n=%d), made in %.1f s", found.accuracy, found.n, seconds)
    return _Int8(files, found, seconds)


def _card(
    run: tracking.Run,
    manifest: Manifest,
    recipe: Recipe,
    *,
    weights: str,
    splits: Mapping[str, Split],
    measured: _Measured,
    corrupted: Robustness | None,
    int8: Metrics | str,
) -> str:
    return model_card.render(
        model_card.Facts(
            name=MODEL_NAME,
            architecture=recipe.architecture,
            manifest=manifest,
            images={name: len(split.labels) for name, split in splits.items()},
            weights=weights,
            recipe=recipe.model_dump(mode="json"),
            recipe_digest=recipe.digest,
            validation=measured.validation,
            test=measured.test,
            slices=measured.slices,
            robustness=corrupted,
            golden=len(measured.golden.labels),
            int8=int8,
            made=_how_made(run),
        )
    )


def _how_made(run: tracking.Run) -> dict[str, str]:
    """For people; the run in MLflow has all of it, and more."""
    tags = run.tags
    command = tags["command"]
    changed = {"true": ", with changes that were not committed", "false": ""}
    packages = [f"{key.removeprefix('version.')} {value}" for key, value in tags.items() if key.startswith("version.")]
    return {
        # A recipe that is no file has no command of its own: its run is what it can be made again by.
        "Command": f"`{command} {run.id}`" if command == _REPRODUCE else f"`{command}`",
        "MLflow run": f"`{run.id}`",
        "Commit": f"`{tags['git.sha']}`" + changed.get(tags["git.dirty"], ", not known whether with changes"),
        "Computed by": f"Keras on {tags['keras.backend']}, Python {tags['python']}",
        "Packages": ", ".join(packages),
        "Machine": f"{tags['hardware.cpu']}, {tags['hardware.cores']} cores"
        + (f", {tags['hardware.gpu']}" if "hardware.gpu" in tags else ""),
    }


def _log_evidence(
    run: tracking.Run,
    stages: tuple[StageHistory, ...],
    validation: Metrics,
    test: Metrics,
    *,
    folder: Path,
    title: str,
) -> None:
    folder.mkdir()
    plots.learning_curves([(stage.name, stage.epochs) for stage in stages], folder / "learning_curves.png", title)
    plots.confusion_matrix(validation, folder / "confusion_validation.png", f"{title}: validation, n={validation.n}")
    plots.confusion_matrix(test, folder / "confusion_test.png", f"{title}: test, n={test.n}")
    run.log_artifact(folder, "plots")
    run.log_dict({"validation": validation.as_dict(), "test": test.as_dict()}, "metrics.json")
    run.log_dict({"stages": [_summary(stage) | {"figures": stage.epochs} for stage in stages]}, "history.json")


def _summary(stage: StageHistory) -> dict[str, object]:
    return {
        "name": stage.name,
        "epochs": len(stage.epochs),
        "kept_epoch": stage.kept_epoch,
        "validation_accuracy": stage.epochs[stage.kept_epoch]["val_accuracy"],
        "seconds": round(stage.seconds, 1),
        "learning_rate": stage.learning_rate,
        "trainable_parameters": stage.trainable_parameters,
        "cached_from": stage.cached_from,
    }
