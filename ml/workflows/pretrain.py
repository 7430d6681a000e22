"""Pretraining: VGG16's base from nothing on a dataset's own training split, saved as a file for `VGG16_WEIGHTS`.

It is what transfer learning can be shown with where ImageNet's weights cannot be had, and it says what it is: weights
that learned from the very images that fine-tuning sees, not knowledge from elsewhere.
"""

import logging
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from ml.datasets import store
from ml.digests import file_digest
from ml.errors import ConfigurationError, TrainingDiverged
from ml.evaluation import plots
from ml.models.vgg16_base import SUFFIX, save_base
from ml.registry import tracking
from ml.settings import PROJECT_ROOT, Settings
from ml.toml_files import read_toml
from ml.training import fit, runtime
from ml.training.checkpoint import Checkpoint
from ml.training.recipe import PRETRAINING_RECIPE, Vgg16BaseRecipe, parse_recipe, refuse_unless_it_fits
from ml.workflows.train import log_epoch, log_epochs_cut_off, log_request, where_to_start

logger = logging.getLogger(__name__)

EXPERIMENT = "cifar10-pretraining"


def read_recipe(path: Path) -> Vgg16BaseRecipe:
    """Reads and checks a pretraining's recipe.

    Raises:
        ConfigurationError: it cannot be read, cannot work, or is another architecture's.
    """
    recipe = parse_recipe(read_toml(path), origin=str(path))
    if not isinstance(recipe, Vgg16BaseRecipe):
        raise ConfigurationError(
            f"{path} is a recipe for {recipe.architecture}.", fix='pretrain by one with architecture = "vgg16_base".'
        )
    return recipe


def _command(recipe_file: Path, dataset_id: str) -> str:
    inside = recipe_file.is_relative_to(PROJECT_ROOT)
    name = recipe_file.relative_to(PROJECT_ROOT) if inside else recipe_file.name
    backend = "" if runtime.backend() == "tensorflow" else f"KERAS_BACKEND={runtime.backend()} "
    recipe = "" if recipe_file == PRETRAINING_RECIPE else f" --recipe {name}"
    return f"{backend}cifar10 pretrain{recipe} --dataset {dataset_id}"


def pretrain(
    settings: Settings, dataset_id: str, recipe_file: Path, output: Path | None = None, *, resume: bool = False
) -> dict[str, object]:
    """Trains the base and writes its weights; the run in MLflow's experiment `cifar10-pretraining` has both.

    Args:
        settings: where data and MLflow are.
        dataset_id: of a stored dataset; its training split is learned from, its validation split watched.
        recipe_file: TOML, of architecture `vgg16_base`.
        output: where the weights go, ending in .weights.h5; None is a name of the run's under var/weights.
        resume: go on from the checkpoint of this recipe and dataset.

    Returns:
        {"path", "sha256", "origin", "run_id", "dataset_id", "data", "validation_accuracy", "epochs", "seconds"}.

    Raises:
        ConfigurationError: the recipe or the path cannot work.
        DatasetNotFound, DatasetInvalid: there is no such dataset, or it was altered.
        TrainingDiverged: the loss became NaN.
        TrainingError: resumed without a checkpoint.
        StorageError: weights or a checkpoint could not be written.
        RegistryUnavailable: MLflow could not be asked.
    """
    recipe = read_recipe(recipe_file)
    if output is not None and not output.name.endswith(SUFFIX):
        raise ConfigurationError(f"{output} does not end in {SUFFIX}.", fix=f"choose a name that ends in {SUFFIX}.")
    manifest = store.read_manifest(settings.data_url, dataset_id)
    refuse_unless_it_fits(recipe, manifest.counts["train"])
    identity = fit.identity_of(recipe, dataset_id, None, runtime.backend(), "weights")
    checkpoint = Checkpoint(settings.checkpoints_dir, identity)
    tags = {"architecture": recipe.architecture, "recipe": recipe.name, "recipe.digest": recipe.digest}
    tags |= {"data": manifest.data, "keras.backend": runtime.backend(), "command": _command(recipe_file, dataset_id)}
    gpu = runtime.gpu()
    tags |= {"hardware.gpu": gpu} if gpu else {}
    name = f"pretrain-{recipe.name}"
    with ExitStack() as stack:
        stack.enter_context(checkpoint.held())
        position = where_to_start(checkpoint, "required" if resume else "no", recipe)
        run = stack.enter_context(
            tracking.run(
                settings,
                name,
                tags=tags,
                seed=recipe.seed,
                origin=checkpoint.origin,
                run_id=position.run_id or None,
                experiment=EXPERIMENT,
            )
        )
        position.run_id = run.id
        log_request(run, manifest, recipe)
        log_epochs_cut_off(run, recipe, position)
        train = store.load_split(settings.data_url, dataset_id, "train", recipe.train_limit)
        validation = store.load_split(settings.data_url, dataset_id, "validation", recipe.validation_limit)
        if not resume:
            checkpoint.clear()  # only now, as in a training
        run.log_params({"images.train": len(train.labels), "images.validation": len(validation.labels)})
        try:
            trained = fit.train(
                recipe,
                train,
                validation,
                on_epoch=partial(log_epoch, run),
                checkpoint=checkpoint,
                position=position,
            )
        except TrainingDiverged:
            checkpoint.clear()
            raise
        last = trained.stages[-1]
        accuracy = last.epochs[last.kept_epoch]["val_accuracy"]
        origin = f"pretrained on the training split of {manifest.data} {dataset_id}"
        path = output or settings.mlops_var_dir / "weights" / f"vgg16-{run.id[:12]}{SUFFIX}"
        save_base(trained.model, path, origin)
        sha256 = file_digest(path)
        seconds = checkpoint.wall_seconds(position)
        peak = checkpoint.peak_memory_mib(position)
        run.log_metrics({"validation_accuracy": accuracy, "wall_seconds": seconds, "peak_memory_mib": peak})
        run.log_tags({"weights.sha256": sha256, "weights.origin": origin})
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pretrain-"))
        curves = Path(folder) / "learning_curves.png"
        plots.learning_curves([(stage.name, stage.epochs) for stage in trained.stages], curves, name)
        run.log_artifact(curves, "plots")
        run.log_artifact(path, "weights")
        checkpoint.clear()
    logger.info("VGG16's base, validation accuracy %.4f: VGG16_WEIGHTS=%s uses it", accuracy, path)
    return {
        "path": str(path),
        "sha256": sha256,
        "origin": origin,
        "run_id": run.id,
        "dataset_id": dataset_id,
        "data": manifest.data,
        "validation_accuracy": accuracy,
        "epochs": sum(len(stage.epochs) for stage in trained.stages),
        "seconds": round(seconds, 1),
    }
