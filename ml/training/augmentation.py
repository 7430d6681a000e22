"""Augmentation on uint8 images, as a pure function of the images and a random generator. When, is for `batches`."""

import numpy as np


def augment(images: np.ndarray, rng: np.random.Generator, *, flip: bool, shift: int) -> np.ndarray:
    """A new batch in which each image is mirrored with probability 1/2 and moved by up to `shift` pixels each way.

    What moves in at an edge is the image's own reflection (as in the CIFAR-10 recipes since Lee et al. 2015, who pad
    by 4 with zeros; reflection keeps the pixel statistics).

    Args:
        images: uint8 (n, h, w, 3); left as it is.
        rng: where the choices come from; the same state gives the same batch.
        flip: whether to mirror left and right.
        shift: 0 for none, else below h and w.

    Returns:
        uint8 (n, h, w, 3).
    """
    out = images.copy()
    if flip:
        mirrored = rng.random(len(out)) < 0.5
        out[mirrored] = out[mirrored, :, ::-1]
    if shift:
        n, height, width, _ = out.shape
        padded = np.pad(out, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="reflect")
        top, left = rng.integers(0, 2 * shift + 1, size=(2, n))
        rows = top[:, None, None] + np.arange(height)[None, :, None]
        columns = left[:, None, None] + np.arange(width)[None, None, :]
        out = padded[np.arange(n)[:, None, None], rows, columns]
    return out
