"""Weather: brightness, fog, snow and frost. Images are floats in 0..1 (n, h, w, 3).

Frost is laid on from photographs in CIFAR-10-C. They are not ours to hand on, so these are made: see `_frosted_panes`.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from ml.evaluation.corruptions.blur import smear, zoom_matrix
from ml.evaluation.corruptions.draws import Draws

_BRIGHTNESS = (0.05, 0.1, 0.15, 0.2, 0.3)
_FOG = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))  # amount, decay of the fractal's wobble
# Mean and deviation of the flakes' noise, zoom, threshold, radius and sigma of their fall, weight of the clear image.
_SNOW = (
    (0.1, 0.2, 1.0, 0.6, 8, 3, 0.95),
    (0.1, 0.2, 1.0, 0.5, 10, 4, 0.9),
    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
    (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
)
_FROST = ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))  # weights of the image and of the frost
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601

_PANES, _PANE_SIDE = 5, 256
_CRYSTALS = 20  # on a pane: they overlap, and leave gaps


def brightness(images: np.ndarray, level: int, _rng: np.random.Generator) -> np.ndarray:
    """Raises V of HSV: all three channels by the ratio of the new V to the old, so that hue and saturation stay."""
    value = images.max(axis=-1, keepdims=True)
    raised = np.clip(value + _BRIGHTNESS[level], 0, 1)
    # A black pixel has no hue: it becomes grey.
    return np.where(value > 0, images * (raised / np.where(value > 0, value, 1)), raised)


def fog(images: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Adds a plasma fractal per image and scales back to the image's own maximum, so that fog veils and greys."""
    amount, decay = _FOG[level]
    n, height, width, _ = images.shape
    side = 1 << (max(height, width) - 1).bit_length()
    veil = plasma(n, side, decay, rng)[:, :height, :width, None]
    brightest = images.max(axis=(1, 2, 3), keepdims=True)
    return (images + amount * veil) * brightest / (brightest + amount)


def plasma(n: int, side: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """n fractal maps (n, side, side) in 0..1, by the diamond-square algorithm on a torus (Fournier et al. 1982)."""
    maps = np.zeros((n, side, side))
    step, wobble = side, 100.0

    def around(mean: np.ndarray) -> np.ndarray:
        return mean + wobble * rng.uniform(-wobble, wobble, size=mean.shape)

    while step >= 2:
        half = step // 2
        corners = maps[:, ::step, ::step]
        # Square step: the middle of each square, from its four corners.
        square = corners + np.roll(corners, -1, axis=1)
        square = square + np.roll(square, -1, axis=2)
        centres = around(square / 4)
        maps[:, half::step, half::step] = centres
        # Diamond step: the middle of each edge, from the two corners and the two centres beside it.
        maps[:, half::step, ::step] = around(
            (corners + np.roll(corners, -1, axis=1) + centres + np.roll(centres, 1, axis=2)) / 4
        )
        maps[:, ::step, half::step] = around(
            (corners + np.roll(corners, -1, axis=2) + centres + np.roll(centres, 1, axis=1)) / 4
        )
        step, wobble = half, wobble / decay
    maps -= maps.min(axis=(1, 2), keepdims=True)
    highest = maps.max(axis=(1, 2), keepdims=True)
    return maps / np.where(highest > 0, highest, 1)


def snow(images: np.ndarray, level: int, draws: Draws) -> np.ndarray:
    """Lays flakes over an image that is whitened first: those of a noise field above a threshold, smeared as they fall.

    The flakes are laid on twice, the second time turned by half, as the original does.
    """
    mean, deviation, factor, threshold, radius, sigma, clear = _SNOW[level]
    _, height, width, _ = images.shape
    field = draws.normal(mean, deviation, height, width)
    down, right = (zoom_matrix(size, factor).astype(np.float32) for size in (height, width))
    field = down @ field @ right.T
    flakes = np.where(field < threshold, 0, np.clip(field, 0, 1))[..., None]
    flakes = smear(flakes, radius, sigma, draws.uniform(-135, -45))
    grey = (images @ np.array(_LUMA, dtype=np.float32))[..., None]
    whitened = clear * images + (1 - clear) * np.maximum(images, grey * 1.5 + 0.5)
    return whitened + flakes + flakes[:, ::-1, ::-1]


def frost(images: np.ndarray, level: int, draws: Draws) -> np.ndarray:
    """Adds a random piece of a frosted pane to the dimmed image, with the paper's weights.

    The pane is procedural, not one of the paper's photographs, so figures under frost compare among models measured
    here, and not with published ones.
    """
    dimmed, amount = _FROST[level]
    _, height, width, _ = images.shape
    panes = _frosted_panes()
    pane = draws.integers(_PANES, 1, 1)
    top, left = (draws.integers(max(1, _PANE_SIDE - size), 1, 1) for size in (height, width))
    rows, columns = (top + np.arange(height)[:, None]) % _PANE_SIDE, (left + np.arange(width)) % _PANE_SIDE
    return dimmed * images + amount * panes[pane, rows, columns]


@lru_cache(maxsize=1)
def _frosted_panes() -> np.ndarray:
    """Windows with frost on them: float32 (5, 256, 256, 3) in 0..1, the same ones always, as photographs are.

    A veil of fine ice, a plasma fractal, and on it six-armed crystals whose branches branch; bluish where it is thin
    and white where it is thick.
    """
    rng = np.random.default_rng(2019)
    veil = plasma(_PANES, _PANE_SIDE, 1.9, rng)
    ice = np.stack([_crystals(rng) for _ in range(_PANES)])
    thickness = np.clip(0.5 * veil + 0.75 * ice * (0.4 + 0.6 * veil), 0, 1)
    return (thickness[..., None] ** np.array([1.3, 1.0, 0.8])).astype(np.float32)


def _crystals(rng: np.random.Generator) -> np.ndarray:
    """Six-armed dendrites, drawn as lines at twice the size against their steps: float (side, side) in 0..1."""
    side = 2 * _PANE_SIDE
    x, y, length = rng.uniform(0, side, _CRYSTALS), rng.uniform(0, side, _CRYSTALS), rng.uniform(60, 200, _CRYSTALS)
    angle = (rng.uniform(0, 60, _CRYSTALS)[:, None] + 60 * np.arange(6)).ravel()
    x, y, length = (np.repeat(of_crystal, 6) for of_crystal in (x, y, length))
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    for thickness, shade in ((5, 255), (4, 205), (2, 155)):
        dx, dy = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
        for line in np.stack([x, y, x + length * dx, y + length * dy], axis=-1):
            draw.line(line.tolist(), fill=shade, width=thickness)
        # Branches leave to both sides at 60 degrees, as those of ice do, and shorten towards the tip.
        along = np.linspace(0.15, 0.9, 6)
        x, y = ((start[:, None] + along * (length * d)[:, None]) for start, d in ((x, dx), (y, dy)))
        length = length[:, None] * (1 - along) * rng.uniform(0.3, 0.6, x.shape)
        x, y, length = (np.concatenate([of_arm.ravel()] * 2) for of_arm in (x, y, length))
        angle = np.concatenate([np.repeat(angle, len(along)) + turn for turn in (60, -60)])
        long_enough = length > 3
        x, y, length, angle = x[long_enough], y[long_enough], length[long_enough], angle[long_enough]
    return np.asarray(image.resize((_PANE_SIDE, _PANE_SIDE), Image.Resampling.BOX)) / 255
