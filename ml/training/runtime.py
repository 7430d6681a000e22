"""How TensorFlow runs in this process: seeds, threads, log noise. Nothing here knows of models or data."""

import logging
import os

import keras
import tensorflow as tf

logger = logging.getLogger(__name__)


def prepare(seed: int) -> None:
    """Seeds Python, NumPy and TensorFlow, and gives TensorFlow as many threads as this process has cores.

    Left alone, TensorFlow counts the machine's cores, not those that a container or `taskset` leaves to the process.
    Threads can only be set before TensorFlow's first operation; a later call keeps those that run.
    """
    tf.get_logger().setLevel(logging.ERROR)
    keras.utils.set_random_seed(seed)
    cores = len(os.sched_getaffinity(0))
    if tf.config.threading.get_intra_op_parallelism_threads() != cores:
        try:
            tf.config.threading.set_intra_op_parallelism_threads(cores)
            tf.config.threading.set_inter_op_parallelism_threads(cores)
        except RuntimeError:
            logger.debug("TensorFlow already runs; its threads stay as they are.")
