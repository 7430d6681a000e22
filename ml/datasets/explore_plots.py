"""Draws an exploration: PNG bytes from numbers, for a light and a dark page.

Figures are made without pyplot: no global state, so that tasks may draw at the same time.
"""

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ml.datasets.explore import CHANNELS, Exploration
from ml.datasets.labels import CLASS_NAMES, IMAGE_SIDE
from ml.datasets.splits import SPLIT_NAMES

_DPI = 160


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; the background is the page's card."""

    name: str
    background: str
    text: str
    grid: str
    bar: str
    channels: tuple[str, str, str]


LIGHT = Theme("light", "#ffffff", "#1f2933", "#d9dee4", "#2f6f9f", ("#c0392b", "#1e8449", "#2457c5"))
DARK = Theme("dark", "#1b222b", "#e4e8ed", "#36414d", "#6bb1e0", ("#ff8a7a", "#6fd695", "#8ab0ff"))


def class_distribution(exploration: Exploration, theme: Theme = LIGHT) -> bytes:
    """Images per class, a panel for each split, with the even share as a dashed line."""
    figure = _figure(theme, 10, 3.6)
    panels = figure.subplots(1, len(SPLIT_NAMES), sharey=True)
    for axes, split in zip(panels, SPLIT_NAMES, strict=True):
        statistics = exploration.statistics[split]
        axes.barh(CLASS_NAMES, statistics.class_counts, color=theme.bar, height=0.72)
        axes.axvline(statistics.count / len(CLASS_NAMES), color=theme.text, linestyle="--", linewidth=1)
        axes.set_title(f"{split}: {statistics.count:,} images", loc="left", fontsize=10, color=theme.text)
        _dress(axes, theme, "x")
    panels[0].invert_yaxis()
    panels[1].set_xlabel("images (dashed: an even share)", color=theme.text)
    return _png(figure)


def channel_histograms(exploration: Exploration, theme: Theme = LIGHT) -> bytes:
    """How often each pixel value occurs in the train split, a line for each channel."""
    figure = _figure(theme, 10, 3.2)
    axes = figure.subplots()
    histogram = exploration.statistics["train"].channel_histogram
    share = 100 * histogram / histogram.sum(axis=1, keepdims=True)
    for name, values, colour, style in zip(CHANNELS, share, theme.channels, ("-", "--", "-."), strict=True):
        axes.plot(values, color=colour, linestyle=style, linewidth=1.6, label=name)
    # The heaps at 0 and 255 (clipped light) would flatten everything between them.
    axes.set_ylim(0, 1.25 * float(np.quantile(share, 0.99)))
    axes.set_xlim(0, 255)
    axes.set_xlabel("pixel value", color=theme.text)
    axes.set_ylabel("% of pixels", color=theme.text)
    axes.legend(frameon=False, labelcolor=theme.text, ncols=3, loc="upper right")
    _dress(axes, theme, "y")
    return _png(figure)


def preview_grid(exploration: Exploration) -> bytes:
    """The first train images of each class, a row for each."""
    return _image_rows([strip(images) for images in exploration.previews], "first images of the train split")


def mean_images(exploration: Exploration) -> bytes:
    """The mean image of each class of the train split."""
    figure = _figure(LIGHT, 10, 2.9)
    panels = figure.subplots(2, 5)
    means = exploration.statistics["train"].mean_images
    for axes, name, image in zip(panels.flat, CLASS_NAMES, means, strict=True):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
    return _png(figure)


def strip(images: np.ndarray) -> np.ndarray:
    """Images (k, 32, 32, 3) side by side with a white gap of two pixels: uint8 (32, 34k - 2, 3); k may be 0."""
    width = IMAGE_SIDE + 2
    row = np.full((IMAGE_SIDE, max(width * len(images) - 2, 1), 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        row[:, index * width : index * width + IMAGE_SIDE] = image
    return row


def image_png(image: np.ndarray, scale: int = 1) -> bytes:
    """An RGB image, uint8 (h, w, 3), as PNG, each pixel `scale` pixels wide."""
    picture = Image.fromarray(image)
    with io.BytesIO() as out:
        picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(out, "PNG")
        return out.getvalue()


def _image_rows(rows: list[np.ndarray], title: str) -> bytes:
    figure = _figure(LIGHT, 8, 7)
    figure.suptitle(title, fontsize=10)
    for axes, name, row in zip(figure.subplots(len(rows), 1), CLASS_NAMES, rows, strict=True):
        axes.imshow(row, interpolation="nearest")
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_anchor("W")
    return _png(figure)


def _figure(theme: Theme, width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor=theme.background)


def _dress(axes: Axes, theme: Theme, grid: Literal["x", "y"]) -> None:
    axes.set_facecolor(theme.background)
    axes.tick_params(colors=theme.text, labelsize=9, length=0)
    axes.spines[:].set_visible(False)
    axes.grid(axis=grid, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)


def _png(figure: Figure) -> bytes:
    with io.BytesIO() as out:
        figure.savefig(out, format="png")
        return out.getvalue()
