"""Turns a trained, exported model into a version of the registered model.

Owns what a version holds and which tags it bears. The files' layout and their way back are `ml.registry.versions`'s;
what the card says is `ml.evaluation.model_card`'s.
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import mlflow.pyfunc
import numpy as np
from mlflow.entities import LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion as MlflowVersion
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

from ml.datasets.labels import IMAGE_SHAPE, NUM_CLASSES
from ml.digests import file_digest
from ml.errors import ModelInvalid, RegistryError
from ml.registry import versions
from ml.registry.connection import BULK, asking, patiently
from ml.registry.tracking import Run
from ml.registry.versions import ModelVersion, Registry

if TYPE_CHECKING:
    from ml.datasets.manifest import Manifest

logger = logging.getLogger(__name__)

LONGEST_DESCRIPTION = 5000
"""Characters that MLflow's database keeps of a version's description; PostgreSQL refuses more."""
_MODEL_CODE = Path(__file__).with_name("pyfunc_model.py")


class ExportedFiles(Protocol):
    """The two forms of one trained model (`ml.training.export.ExportedModel` is one)."""

    @property
    def keras(self) -> Path:
        """The Keras file."""

    @property
    def onnx(self) -> Path:
        """The ONNX file: one input (n, 32, 32, 3), raw 0-255 RGB; one output (n, 10), probabilities."""


@dataclass(frozen=True, slots=True)
class Int8Files:
    """The int8 form of the model, and what it says itself of held-out images."""

    onnx: Path
    reference: Path
    golden: Path


def register(
    run: Run,
    *,
    exported: ExportedFiles,
    metrics: Mapping[str, float],
    recipe: Mapping[str, object],
    manifest: "Manifest",
    weights: str,
    reference: Path,
    golden: Path,
    int8: Int8Files | str,
    card: str,
    input_example: np.ndarray,
    data: str,
    architecture: str,
) -> ModelVersion:
    """Makes one version of `cifar10-classifier` from a run, points `challenger` at it, and returns it.

    The version is an MLflow pyfunc model (so `mlflow models serve` works) that serves the ONNX file; the Keras file,
    the reference, the golden images, the int8 form and the model card lie beside it, and the version's description is
    the card as far as MLflow has room for it. It waits for the gate: tag gate.decision = pending.

    Args:
        run: the run that trained it, still open.
        exported: paths of the Keras file and the ONNX file. What is in them is not looked at: `metrics` were measured
            on them, which only a model that answers with probabilities allows.
        metrics: flat figures of this model; must hold `validation_accuracy`, by which the gate picks among candidates.
            Each becomes a tag metric.<name>.
        recipe: what it was trained with; `name` of it becomes a tag.
        manifest: the dataset that it was trained on.
        weights: what it started from, as shown to users (`imagenet`, `RANDOM WEIGHTS`, ...).
        reference: reference.parquet of `ml.monitoring.reference`.
        golden: golden.npz of `ml.evaluation.golden`.
        int8: the form that may serve in float32's place; or why there is none, which becomes the tag `int8`.
        card: what it is, in Markdown (`ml.evaluation.model_card`).
        input_example: a few images, uint8 or float32 (n, 32, 32, 3).
        data: `cifar-10` or `SYNTHETIC`, as shown to users.
        architecture: `baseline` or `vgg16`.

    Raises:
        ModelInvalid: a file is missing, or validation_accuracy is missing or not finite. Nothing is registered then.
        RegistryUnavailable: MLflow stayed away for two minutes. No version appears half-made: it is created last.
    """
    started = time.perf_counter()
    of_int8 = {} if isinstance(int8, str) else _by_name(int8)
    _check(metrics, (exported.onnx, exported.keras, reference, golden, *of_int8.values()))
    with tempfile.TemporaryDirectory(prefix="register-") as work:
        sources = {
            versions.ONNX_FILE: exported.onnx,
            versions.KERAS_FILE: exported.keras,
            versions.REFERENCE_FILE: reference,
            versions.GOLDEN_FILE: golden,
            **of_int8,
        }
        staged = _stage(sources, card, Path(work) / "files")
        tags = {
            versions.TAG_ARCHITECTURE: architecture,
            versions.TAG_DATASET: manifest.dataset_id,
            versions.TAG_DATA: data,
            versions.TAG_WEIGHTS: weights,
            "recipe": str(recipe.get("name", "")),
            "git_sha": run.tags.get("git.sha", "unknown"),
            versions.TAG_DECISION: versions.PENDING,
            versions.TAG_INT8: int8 if isinstance(int8, str) else versions.MADE,
            **{versions.metric_tag(name): repr(float(value)) for name, value in metrics.items()},
            **{versions.checksum_tag(name): file_digest(Path(path)) for name, path in staged.items()},
        }
        # A training that was cut off after this, and resumed, comes here a second time with the same model.
        created = _registered(run, tags[versions.checksum_tag(versions.ONNX_FILE)]) or _create(
            run,
            artifacts=staged,
            input_example=input_example,
            architecture=architecture,
            tags=tags,
            description=description(card),
            folder=Path(work) / "model",
        )
    registry = Registry(run.tracking_uri)
    number = int(created.version)
    patiently(
        lambda: registry.set_alias(versions.CHALLENGER, number),
        what="Pointing challenger at the new version",
        seconds=run.patience_seconds,
    )
    version = patiently(
        lambda: registry.by_version(number), what="Reading the new version", seconds=run.patience_seconds
    )
    logger.info(
        "Registered %s version %d (%s) in %.1f s", version.name, number, architecture, time.perf_counter() - started
    )
    return version


def description(card: str) -> str:
    """The card as the version's description: whole sections from its beginning, as many as MLflow has room for."""
    if len(card) <= LONGEST_DESCRIPTION:
        return card
    more = f"\n\nMore stands in the file artifacts/{versions.CARD_FILE} of this version.\n"
    room = card[: LONGEST_DESCRIPTION - len(more)]
    end = room.rfind("\n## ")
    return (room[:end] if end > 0 else room).rstrip() + more


def _by_name(int8: Int8Files) -> dict[str, Path]:
    form = versions.INT8
    return {form.onnx: int8.onnx, form.reference: int8.reference, form.golden: int8.golden}


def _check(metrics: Mapping[str, float], files: Iterable[Path]) -> None:
    fix = "nothing was registered; train again."
    for path in files:
        if not path.is_file():
            raise ModelInvalid(f"A version needs the file {path}, which is not there.", fix=fix)
    accuracy = metrics.get(versions.VALIDATION_ACCURACY)
    if accuracy is None or not 0 <= accuracy <= 1:
        raise ModelInvalid(f"A version needs a {versions.VALIDATION_ACCURACY} in 0-1, not {accuracy!r}.", fix=fix)


def _stage(sources: Mapping[str, Path], card: str, folder: Path) -> dict[str, str]:
    """Puts the files under their fixed names, which MLflow keeps."""
    folder.mkdir(parents=True)
    staged = {}
    for name, source in sources.items():
        shutil.copyfile(source, folder / name)
        staged[name] = str(folder / name)
    (folder / versions.CARD_FILE).write_text(card)
    staged[versions.CARD_FILE] = str(folder / versions.CARD_FILE)
    return staged


def _registered(run: Run, onnx_checksum: str) -> MlflowVersion | None:
    """The version that this run has registered already of the very same ONNX file; None where there is none."""

    def find() -> MlflowVersion | None:
        with asking(run.tracking_uri):
            for item in run.client.search_model_versions(f"run_id = '{run.id}'"):
                if item.tags.get(versions.checksum_tag(versions.ONNX_FILE)) == onnx_checksum:
                    return item
        return None

    return patiently(find, what="Looking for the run's version", seconds=run.patience_seconds)


def _create(
    run: Run,
    *,
    artifacts: Mapping[str, str],
    input_example: np.ndarray,
    architecture: str,
    tags: Mapping[str, str],
    description: str,
    folder: Path,
) -> MlflowVersion:
    """Uploads the model and creates the version, in steps each of which may be repeated."""

    # Not mlflow.pyfunc.log_model: it works on the process-wide tracking address and run, repeats nothing after an
    # outage, and starts the model in a scoring server to validate the example.
    def logged_model() -> str:
        with asking(run.tracking_uri):
            info = run.client.get_run(run.id).info
            model = run.client.create_logged_model(
                info.experiment_id, name=architecture, source_run_id=run.id, tags={"architecture": architecture}
            )
            return str(model.model_id)

    model_id = patiently(logged_model, what="Announcing the model", seconds=run.patience_seconds)
    with asking(run.tracking_uri):
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(_MODEL_CODE),
            artifacts=dict(artifacts),
            signature=ModelSignature(
                inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, *IMAGE_SHAPE))]),
                outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, NUM_CLASSES))]),
            ),
            input_example=np.asarray(input_example[:2], dtype=np.float32),
            # Given, or MLflow would load the model in a process of its own to find out.
            pip_requirements=[f"{name}=={metadata.version(name)}" for name in ("mlflow", "onnxruntime", "numpy")],
            mlflow_model=Model(run_id=run.id, model_uuid=model_id, model_id=model_id),
        )

    def upload() -> None:
        with asking(run.tracking_uri, BULK):
            run.client.log_model_artifacts(model_id, str(folder))
            run.client.finalize_logged_model(model_id, "READY")
            run.client.log_outputs(run.id, [LoggedModelOutput(model_id, step=0)])

    patiently(upload, what="Uploading the model", seconds=run.patience_seconds)

    def version() -> MlflowVersion:
        with asking(run.tracking_uri):
            try:
                run.client.create_registered_model(versions.MODEL_NAME)
            except mlflow.MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            # The answer to an earlier attempt may have been lost after the version was made.
            for item in run.client.search_model_versions(f"run_id = '{run.id}'"):
                if item.tags.get(versions.TAG_LOGGED_MODEL) == model_id:
                    return item
            return run.client.create_model_version(
                versions.MODEL_NAME,
                f"models:/{model_id}",
                run_id=run.id,
                tags={**tags, versions.TAG_LOGGED_MODEL: model_id},
                description=description,
                model_id=model_id,
                await_creation_for=0,
            )

    created = patiently(version, what="Creating the version", seconds=run.patience_seconds)
    if created.status not in ("READY", "PENDING_REGISTRATION"):
        raise RegistryError(
            f"MLflow could not register the model: {created.status_message or created.status}.",
            fix="see the log of the MLflow server, then train again.",
        )
    return created
