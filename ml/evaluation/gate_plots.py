"""Draws the gate's evidence: PNG bytes from figures, for a light and a dark page. The same figures give the same bytes.

Figures are made without pyplot: no global state, so that tasks may draw at the same time.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ml.evaluation.comparison import Comparison, Difference
from ml.evaluation.metrics import CALIBRATION_BINS, ReliabilityBin
from ml.evaluation.significance import power_of

_DPI = 160
_WIDTH = 6.4  # inches
_CURVE_POINTS = 200


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; the background is the page's card."""

    background: str
    text: str
    grid: str
    candidate: str
    champion: str
    worse: str


LIGHT = Theme("#ffffff", "#1f2933", "#d9dee4", "#2f6f9f", "#8a4b00", "#b3261e")
DARK = Theme("#1b222b", "#e4e8ed", "#36414d", "#6bb1e0", "#ffd591", "#ff8a7a")


def forest(comparison: Comparison, level: float, class_margin: float, theme: Theme = LIGHT) -> bytes:
    """Differences against the champion with their intervals: overall, then each class, with the classes' margin.

    A cross in another colour is what the tests show to be worse at `level`.
    """
    overall = comparison.accuracy
    rows: list[tuple[str, Difference, bool]] = [("overall", overall, overall.value < 0 and comparison.p_value <= level)]
    rows += [(each.label, each.recall, each.fallen_p <= level) for each in comparison.classes]
    figure = _figure(theme, 0.9 + 0.34 * len(rows))
    axes = figure.subplots()
    for row, (_, found, worse) in enumerate(rows):
        colour, width, size = theme.worse if worse else theme.candidate, 1.8, 6
        if row == 0:
            width, size = 3, 8
        axes.plot([found.low, found.high], [row, row], color=colour, linewidth=width)
        axes.plot(found.value, row, "X" if worse else "o" if row else "D", color=colour, markersize=size)
    axes.axvline(0, color=theme.text, linewidth=1)
    if len(rows) > 1:
        axes.plot([-class_margin] * 2, [0.5, len(rows) - 0.5], color=theme.worse, linestyle="--", linewidth=1.2)
    axes.axhline(0.5, color=theme.grid, linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(
        f"accuracy, and each class's recall, less those of version {comparison.champion} (dashed: -{class_margin:g})",
        color=theme.text,
    )
    _dress(axes, theme)
    return _png(figure)


def reliability_diagram(
    candidate: Sequence[ReliabilityBin], champion: Sequence[ReliabilityBin], theme: Theme = LIGHT
) -> bytes:
    """Accuracy by confidence, and below how many images have it, a panel for each model; `champion` may be empty."""
    models = [("candidate", candidate, theme.candidate), ("champion", champion, theme.champion)]
    models = [model for model in models if model[1]]
    figure = _figure(theme, 4.2)
    panels = figure.subplots(2, len(models), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1))
    for column, (name, bins, colour) in enumerate(models):
        above, below = panels[:, column]
        confidence = [each.confidence for each in bins]
        accuracy = np.array([each.accuracy for each in bins])
        reach = [accuracy - [each.accuracy_low for each in bins], [each.accuracy_high for each in bins] - accuracy]
        above.plot([0, 1], [0, 1], color=theme.text, linestyle="--", linewidth=1)
        above.errorbar(
            confidence, accuracy, yerr=np.maximum(reach, 0), fmt="o", color=colour, markersize=5, linewidth=1.5
        )
        above.set(xlim=(0, 1), ylim=(0, 1))
        above.set_title(name, loc="left", fontsize=10, color=theme.text)
        below.bar(
            [each.low for each in bins], [each.n for each in bins], 0.9 / CALIBRATION_BINS, align="edge", color=colour
        )
        below.set_xlabel("confidence", color=theme.text)
        for axes in (above, below):
            _dress(axes, theme)
    panels[0, 0].set_ylabel("accuracy (dashed: as confident)", color=theme.text)
    panels[1, 0].set_ylabel("images", color=theme.text)
    return _png(figure)


def power_curve(comparison: Comparison, level: float, power: float, theme: Theme = LIGHT) -> bytes:
    """The probability with which the test finds a true difference, by its size; the stated power is marked."""
    n, disagreement, seen = comparison.pairs.n, comparison.pairs.disagreement, comparison.smallest_seen
    largest = min(disagreement, 2.5 * seen)
    differences = np.linspace(0, largest, _CURVE_POINTS)
    figure = _figure(theme, 3)
    axes = figure.subplots()
    axes.plot(differences, [power_of(float(d), n, disagreement, level) for d in differences], color=theme.candidate)
    axes.plot([0, seen, seen], [power, power, 0], color=theme.text, linestyle="--", linewidth=1)
    axes.set(xlim=(0, largest), ylim=(0, 1.02))
    axes.set_xlabel("true difference in accuracy", color=theme.text)
    axes.set_ylabel("probability of being seen", color=theme.text)
    _dress(axes, theme)
    return _png(figure)


def _figure(theme: Theme, height: float) -> Figure:
    return Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained", facecolor=theme.background)


def _dress(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.background)
    axes.tick_params(colors=theme.text, labelsize=9, length=0)
    axes.spines[:].set_visible(False)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)


def _png(figure: Figure) -> bytes:
    with io.BytesIO() as out:
        figure.savefig(out, format="png", metadata={"Software": None})
        return out.getvalue()
