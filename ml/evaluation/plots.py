"""Pictures of a training, as PNG files. Figures are built without pyplot, so no global state and no display."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ml.datasets.labels import CLASS_NAMES
from ml.evaluation.metrics import Metrics


def learning_curves(stages: Sequence[tuple[str, Sequence[Mapping[str, float]]]], path: Path, title: str) -> Path:
    """Loss and accuracy, training and validation, over all epochs; a line marks where a stage begins.

    Args:
        stages: (name, figures of each epoch: loss, accuracy, val_loss, val_accuracy), in order.
        path: the PNG to write; its folder exists.
        title: above the plots.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    epochs = [epoch for _, stage in stages for epoch in stage]
    numbers = np.arange(1, len(epochs) + 1)
    for axes, key, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), ("cross-entropy", "accuracy"), strict=True):
        axes.plot(numbers, [epoch[key] for epoch in epochs], "o-", label="training")
        axes.plot(numbers, [epoch[f"val_{key}"] for epoch in epochs], "s--", label="validation")
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        start = 0
        for stage, own in stages if len(stages) > 1 else ():
            axes.axvline(start + 0.5, color="grey", linewidth=1)
            axes.annotate(stage, (start + 0.55, 1.0), xycoords=("data", "axes fraction"), va="top", color="grey")
            start += len(own)
        axes.legend()
    return _write(figure, path)


def confusion_matrix(metrics: Metrics, path: Path, title: str) -> Path:
    """Counts, coloured by the share of the true class. `path` is the PNG to write; its folder exists."""
    counts = np.asarray(metrics.confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=colour)
    ticks = range(len(CLASS_NAMES))
    axes.set_xticks(ticks, CLASS_NAMES, rotation=45, ha="right")
    axes.set_yticks(ticks, CLASS_NAMES)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    return _write(figure, path)


def _write(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure).print_png(path)
    return path
