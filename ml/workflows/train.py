"""Training: from a dataset's id and a recipe to a registered version, with everything it was made of in MLflow.

Loads, trains, exports, measures the exported file (not the Keras model: what is served is what is measured), keeps the
reference that monitoring will compare against, and registers. Whether the version becomes champion is the gate's.
"""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ml.datasets import store
from ml.datasets.manifest import Manifest, Split
from ml.errors import ConfigurationError
from ml.evaluation import plots
from ml.evaluation.metrics import Metrics, evaluate
from ml.models.vgg16_weights import Weights, resolve_weights
from ml.monitoring.image_statistics import image_statistics
from ml.monitoring.reference import write_reference
from ml.registry import packaging, tracking
from ml.registry.versions import ModelVersion
from ml.serving.engine import Engine
from ml.settings import Settings
from ml.training import fit
from ml.training.export import ExportedModel, export
from ml.training.recipe import Recipe, load_recipe
from ml.training.stages import StageHistory

logger = logging.getLogger(__name__)


def train(
    settings: Settings, architecture: str, dataset_id: str, recipe: Recipe, *, origin: str | None = None
) -> dict[str, object]:
    """Trains one model and registers it as a candidate.

    Args:
        settings: where data and MLflow are, and which weights VGG16 starts from.
        architecture: `baseline` or `vgg16`; must be the recipe's.
        dataset_id: of a stored dataset.
        recipe: `ml.training.recipe.load_recipe`, with overrides if any.
        origin: what asks for it, the same at every attempt; see `ml.registry.tracking.run`.

    Returns:
        {"architecture", "recipe", "name", "version", "run_id", "dataset_id", "data", "weights",
        "validation_accuracy", "test_accuracy", "precision", "recall", "loss" (of the test split, macro means),
        "test_n", "stages": [{"name", "epochs", "best_epoch", "validation_accuracy", "seconds"}], "seconds"}.

    Raises:
        ConfigurationError: the recipe is another architecture's.
        DatasetNotFound, DatasetInvalid: there is no such dataset, or it was altered.
        SourceError: VGG16's weights are not there, cannot be fetched, or are not VGG16's.
        TrainingDiverged: the loss became NaN; the run is marked failed and nothing is registered.
        RegistryUnavailable: MLflow could not be asked.
    """
    if recipe.architecture != architecture:
        raise ConfigurationError(
            f"Recipe {recipe.name!r} is for {recipe.architecture}, not for {architecture}.",
            fix=f"load one of {architecture}'s recipes.",
        )
    manifest = store.read_manifest(settings.data_url, dataset_id)
    name, tags = f"{architecture}-{recipe.name}", _tags(manifest, recipe)
    with (
        tracking.run(settings, name, tags=tags, seed=recipe.seed, origin=origin) as run,
        tempfile.TemporaryDirectory(prefix="train-") as scratch,
    ):
        folder = Path(scratch)
        run.log_dataset(manifest)
        run.log_params(recipe.model_dump(mode="json"))
        run.log_dict(recipe.model_dump(mode="json"), "recipe.json")
        splits = _load(settings, dataset_id, recipe)
        run.log_params({f"images.{split}": len(content.labels) for split, content in splits.items()})
        weights = _weights(settings, architecture)
        trained = fit.train(
            recipe,
            splits["train"],
            splits["validation"],
            weights,
            on_epoch=lambda stage, epoch, figures: run.log_metrics(
                {f"{stage}/{key}": value for key, value in figures.items()}, step=epoch
            ),
        )
        run.log_tags({"weights": trained.weights, "weights.sha256": (weights.sha256 if weights else None) or "none"})
        exported = export(trained.model, folder / "model", splits["validation"].images[:256])
        validation, test, reference = _measure(exported, splits, folder)
        figures = {
            **{f"validation_{key}": value for key, value in validation.scalars().items()},
            **{f"test_{key}": value for key, value in test.scalars().items()},
        }
        run.log_metrics({**figures, "fit_seconds": trained.seconds, "export_difference": exported.max_difference})
        _log_evidence(
            run, trained.stages, validation, test, folder=folder / "evidence", title=f"{architecture}, {recipe.name}"
        )
        version: ModelVersion = packaging.register(
            run,
            exported=exported,
            metrics=figures,
            recipe=recipe.model_dump(mode="json"),
            manifest=manifest,
            weights=trained.weights,
            reference=reference,
            input_example=splits["validation"].images[:2],
            data=manifest.data,
            architecture=architecture,
        )
        return {
            "architecture": architecture,
            "recipe": recipe.name,
            "name": version.name,
            "version": version.version,
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
    origin: str | None = None,
) -> dict[str, object]:
    """`train` by a recipe's name, as `ml.workflows.training_choice.choose` gives it.

    A retraining adds its id to the recipe's seed: by the same seed on the same data it would only make the same model
    again. Tried again, it makes what it would have made before.

    Raises:
        ConfigurationError: there is no such recipe, or it cannot work.
        As `train`.
    """
    chosen = load_recipe(architecture, recipe)
    seeded = chosen.with_overrides(seed=chosen.seed + (retraining_id or 0))
    return train(settings, architecture, dataset_id, seeded, origin=origin)


def _tags(manifest: Manifest, recipe: Recipe) -> dict[str, str]:
    return {"architecture": recipe.architecture, "recipe": recipe.name, "data": manifest.data}


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


def _measure(exported: ExportedModel, splits: Mapping[str, Split], folder: Path) -> tuple[Metrics, Metrics, Path]:
    """Figures of the validation and the test split, and the file with the reference: the validation predictions."""
    engine = Engine(exported.onnx)
    validation, test = splits["validation"], splits["test"]
    logger.info("measuring on %d validation and %d test images", len(validation.labels), len(test.labels))
    expected = engine.predict(validation.images)
    reference = write_reference(
        folder / "reference.parquet", validation.labels, expected, image_statistics(validation.images)
    )
    on_validation = evaluate(validation.labels, expected)
    on_test = evaluate(test.labels, engine.predict(test.images))
    logger.info(
        "validation accuracy %.4f (n=%d), test accuracy %.4f (n=%d, 95 %% interval %.4f to %.4f)",
        *(on_validation.accuracy, on_validation.n),
        *(on_test.accuracy, on_test.n, on_test.accuracy_low, on_test.accuracy_high),
    )
    return on_validation, on_test, reference


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
        "best_epoch": stage.best_epoch,
        "validation_accuracy": stage.epochs[stage.best_epoch]["val_accuracy"],
        "seconds": round(stage.seconds, 1),
        "learning_rate": stage.learning_rate,
        "trainable_parameters": stage.trainable_parameters,
    }
