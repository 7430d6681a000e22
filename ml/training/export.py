"""Writes a trained model as Keras and as ONNX, and proves on images that the two are one model.

The ONNX graph takes one float32 tensor (batch, 32, 32, 3) of raw RGB 0-255, batch of any size, and gives float32
(batch, 10). A caller with uint8 images casts them; the scaling is in the graph.
"""

import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import onnx
import onnxruntime

from ml.datasets.labels import IMAGE_SHAPE, NUM_CLASSES
from ml.errors import ModelInvalid, StorageError
from ml.training.onnx_graph import onnx_graph

logger = logging.getLogger(__name__)

KERAS_FILE, ONNX_FILE = "model.keras", "model.onnx"
TOLERANCE = 1e-4
"""Largest allowed difference of a probability. Both compute in float32, in another order of sums."""


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """Two files of the same model, and how far their probabilities lie apart at most."""

    keras: Path
    onnx: Path
    max_difference: float
    compared: int


def export(model: keras.Model, folder: Path, images: np.ndarray) -> ExportedModel:
    """Writes `folder`/model.keras and `folder`/model.onnx: both, or neither.

    Args:
        model: raw RGB 0-255 (n, 32, 32, 3) -> (n, 10) probabilities.
        folder: made if missing.
        images: uint8 (n, 32, 32, 3), on which the two files are compared; black, white and 62 of noise are added.

    Raises:
        ModelInvalid: the two disagree by 1e-4 or more, or are not probabilities.
        StorageError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as name:
            draft = Path(name)
            # A model without optimizer: its moments are twice the size of the weights, and nobody resumes from them.
            bare = keras.Model(model.inputs, model.outputs, name=model.name)
            bare.save(draft / KERAS_FILE)
            onnx.save_model(onnx_graph(bare), draft / ONNX_FILE)
            difference, compared = compare(draft / KERAS_FILE, draft / ONNX_FILE, images)
            for file in (KERAS_FILE, ONNX_FILE):
                shutil.move(draft / file, folder / file)
    except OSError as error:
        raise StorageError(
            f"The model could not be written to {folder}: {error}.", fix="free some space there, or choose a folder."
        ) from error
    logger.info("exported %s: Keras and ONNX differ by at most %.1e on %d images", model.name, difference, compared)
    return ExportedModel(folder / KERAS_FILE, folder / ONNX_FILE, difference, compared)


def compare(keras_path: Path, onnx_path: Path, images: np.ndarray) -> tuple[float, int]:
    """Predicts the same images with both files, and black, white and noise besides.

    Returns:
        The largest absolute difference of a probability, and the number of images compared.

    Raises:
        ModelInvalid: as `export`.
    """
    probes = np.concatenate([images.astype(np.float32), _extremes()])
    from_keras, from_onnx = answers_of_keras(keras_path, probes), _answers_of_onnx(onnx_path, probes)
    difference = float(np.abs(from_keras - from_onnx).max())
    if not difference < TOLERANCE:  # NaN must fail, too
        raise ModelInvalid(
            f"Keras and ONNX disagree: probabilities differ by up to {difference:.2e}, allowed is {TOLERANCE:.0e}.",
            fix="do not register this model; look for the layer that ml/training/onnx_graph.py computes otherwise.",
        )
    if np.abs(from_onnx.sum(axis=1) - 1).max() > 1e-3:
        raise ModelInvalid("The outputs do not add up to 1.", fix="the model must end in softmax.")
    return difference, len(probes)


def answers_of_keras(keras_path: Path, images: np.ndarray) -> np.ndarray:
    """Loads a Keras file as a stranger would (in safe mode) and predicts.

    Args:
        keras_path: the file.
        images: float32 (n, 32, 32, 3), raw RGB in 0-255, n >= 1.

    Returns:
        What it gives, float32 (n, 10); not looked at any further.

    Raises:
        ModelInvalid: the file cannot be used, or gives another shape.
    """
    try:
        answers = np.asarray(
            keras.saving.load_model(keras_path, compile=False).predict(images, batch_size=64, verbose=0)
        )
    except Exception as error:
        # Keras has no exceptions of its own: of a broken file it raises whatever the broken part raises.
        said = (str(error).strip().splitlines() or [""])[0][:300].replace(str(keras_path), keras_path.name)
        raise ModelInvalid(
            f"Keras cannot use {keras_path.name} ({type(error).__name__}: {said}).", fix="train the model anew."
        ) from error
    if answers.shape != (len(images), NUM_CLASSES):
        raise ModelInvalid(f"The Keras file gives {answers.shape}.", fix="it must give (batch, 10) for any batch.")
    return answers


def _answers_of_onnx(onnx_path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(onnx_path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    answers = np.concatenate(
        [session.run(None, {given.name: images[i : i + 64]})[0] for i in range(0, len(images), 64)]
    )
    # Alone as well: a batch size fixed by mistake would show here.
    alone = session.run(None, {given.name: images[:1]})[0]
    if answers.shape != (len(images), NUM_CLASSES) or alone.shape != (1, NUM_CLASSES):
        raise ModelInvalid(f"The ONNX file gives {answers.shape}.", fix="it must give (batch, 10) for any batch.")
    return answers


def _extremes() -> np.ndarray:
    """Images at the borders of the range, where scaling errors show: black, white, noise (float32, 0-255)."""
    noise = np.random.default_rng(0).integers(0, 256, (62, *IMAGE_SHAPE))
    return np.concatenate([np.zeros((1, *IMAGE_SHAPE)), np.full((1, *IMAGE_SHAPE), 255), noise]).astype(np.float32)
