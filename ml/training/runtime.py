"""How the backend runs in this process: seeds, threads, log noise. Nothing here knows of models or data."""

import gc
import logging
import os
from importlib import metadata

import keras

from ml.registry.provenance import hardware

logger = logging.getLogger(__name__)


def backend() -> str:
    """What Keras computes with in this process: `tensorflow` or `jax`."""
    return str(keras.backend.backend())


def computed_by() -> str:
    """Backend, versions and device: what may change a result in its last digits, and features kept on disk with it."""
    name, machine = backend(), hardware()
    device = gpu() or f"{machine['cpu']}, {machine['cores']} cores"
    return f"keras {keras.__version__}, {name} {metadata.version(name)}, {device}"


def gpu() -> str | None:
    """The accelerator that this process computes on, in its maker's words; None where there is only the processor."""
    if keras.backend.backend() == "jax":
        import jax  # noqa: PLC0415  # only where it is the backend

        names = {device.device_kind for device in jax.devices() if device.platform != "cpu"}
    else:
        import tensorflow as tf  # noqa: PLC0415

        found = tf.config.list_physical_devices("GPU")
        names = {tf.config.experimental.get_device_details(device).get("device_name", "GPU") for device in found}
    return ", ".join(sorted(names)) or None


def forget() -> None:
    """Lets go of what earlier trainings of this process left in Keras: for who trains many models one after the other.

    Nothing that is still to be used may have been made before it.
    """
    keras.backend.clear_session()
    gc.collect()  # models are circles of references


def prepare(seed: int) -> None:
    """Seeds Python, NumPy and the backend, and gives TensorFlow as many threads as this process has cores.

    Left alone, TensorFlow counts the machine's cores, not those that a container or `taskset` leaves to the process.
    Threads can only be set before TensorFlow's first operation; a later call keeps those that run.
    """
    keras.utils.set_random_seed(seed)
    if keras.backend.backend() != "tensorflow":
        return
    import tensorflow as tf  # noqa: PLC0415  # only where it is the backend

    tf.get_logger().setLevel(logging.ERROR)
    cores = len(os.sched_getaffinity(0))
    if tf.config.threading.get_intra_op_parallelism_threads() != cores:
        try:
            tf.config.threading.set_intra_op_parallelism_threads(cores)
            tf.config.threading.set_inter_op_parallelism_threads(cores)
        except RuntimeError:
            logger.debug("TensorFlow already runs; its threads stay as they are.")
