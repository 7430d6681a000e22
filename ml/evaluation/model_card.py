"""The model card of a version, in Markdown (after Mitchell et al., "Model cards for model reporting", 2019), as a pure
function of what its training found.

Owns which sections there are, their order and their words. What decides whether to use the model comes first: MLflow
shows the beginning of the card as the version's description.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ml.datasets.labels import CLASS_NAMES, NUM_CLASSES
from ml.datasets.manifest import Manifest
from ml.evaluation.markdown import code, line, loud, table
from ml.evaluation.metrics import Metrics, wilson_interval
from ml.evaluation.robustness import Robustness
from ml.evaluation.slices import Slice

SECTIONS = ("Intended use", "Limits", "Data", "Metrics", "Slices", "Gate", "How it was made", "Recipe")
REAL_DATA, RANDOM_WEIGHTS = "cifar-10", "RANDOM WEIGHTS"

_CONFUSED = 5
"""Pairs of classes that are named."""
_NOTHING = "–"


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a card tells."""

    name: str
    """Of the registered model."""
    architecture: str
    manifest: Manifest
    """Of the dataset."""
    images: Mapping[str, int]
    """How many of each split were used."""
    weights: str
    """What it started from, as shown to users."""
    recipe: Mapping[str, object]
    """What it was trained with, JSON-able."""
    recipe_digest: str
    validation: Metrics
    test: Metrics
    slices: Sequence[Slice] = ()
    """Of the test images."""
    robustness: Robustness | None = None
    """On the test images under corruption; None where it was not measured."""
    golden: int = 0
    """How many classes have a golden image."""
    int8: Metrics | str = "it was not made"
    """Of the validation images by the int8 form; or why there is none."""
    made: Mapping[str, str] = field(default_factory=dict)
    """Command, commit, packages, machine, and what else there is to say, in that order."""


def render(facts: Facts) -> str:
    """The card: a title, warnings if any, and each of `SECTIONS` under a heading of its own."""
    bodies = (
        _INTENDED_USE,
        _limits(facts),
        _data(facts),
        _metrics(facts),
        _slices(facts),
        _GATE,
        _list({**facts.made, "Weights at the start": loud(line(facts.weights))}),
        _recipe(facts),
    )
    title = f"# {line(facts.name)}: {line(facts.architecture)}"
    parts = [title, *_warnings(facts)]
    for heading, body in zip(SECTIONS, bodies, strict=True):
        parts += [f"## {heading}", body]
    return "\n\n".join(parts) + "\n"


_INTENDED_USE = f"""\
Says which of the ten classes of CIFAR-10 a small photograph shows ({", ".join(CLASS_NAMES)}), with a
probability for each. Takes raw RGB pixels in 0-255, 32x32; preprocessing is inside the model. It is meant for teaching,
for comparing methods, and for exercising the pipeline that made it.

It is not meant for: images of people or decisions about them; anything where a wrong answer does harm (vehicles,
medicine, surveillance); images that may show none of the ten classes."""

_GATE = """\
This card is written before the gate judges. What it decided and why stands in the version's tags `gate.decision`
(`pending`, `promoted` or `refused`) and `gate.reason`; `cifar10 inspect VERSION` checks the files again."""


def _warnings(facts: Facts) -> list[str]:
    said = []
    if facts.manifest.data != REAL_DATA:
        said.append(
            f"> **{line(facts.manifest.data)}**: trained and measured on generated pictures. No figure here says "
            "anything of CIFAR-10."
        )
    if facts.weights == RANDOM_WEIGHTS:
        said.append(
            f"> **{RANDOM_WEIGHTS}**: started from nothing where pretrained weights belong. No figure here says "
            "anything of transfer learning."
        )
    return said


def _limits(facts: Facts) -> str:
    worst = min((item for item in facts.test.classes if item.support), key=lambda item: (item.recall, item.label))
    said = [
        "Anything that is not one of the ten classes is taken for one of them all the same.",
        "Other sizes are scaled to 32x32; images far from CIFAR-10's are answered with less accuracy than these "
        "figures say. Drift is watched for the version that serves, by its own reference.",
        f"The class that it misses most often is {worst.label}: recall {worst.recall:.4f} on the test split.",
        f"A probability is not a certainty: confidence lies {facts.test.calibration_error:.4f} off accuracy on average "
        "(calibration error).",
    ]
    if facts.robustness is None:
        said.append("How it holds under corruption (noise, blur, weather) was not measured at its training.")
    if facts.golden < NUM_CLASSES:
        said.append(
            f"**Of {NUM_CLASSES - facts.golden} of the ten classes it had no validation image right**: they have no "
            "golden image."
        )
    return "\n".join(f"- {text}" for text in said)


def _data(facts: Facts) -> str:
    manifest = facts.manifest
    dropped = manifest.dropped
    counts = table(
        ("split", "images", "used"),
        [(name, str(count), str(facts.images.get(name, _NOTHING))) for name, count in manifest.counts.items()],
    )
    about = _list(
        {
            "Data": loud(line(manifest.data)),
            "Dataset": code(manifest.dataset_id),
            "Source": line(manifest.source),
            "Left out": f"{dropped.duplicates} duplicates, {dropped.overlaps} images that are in the test part too, "
            f"{dropped.conflicts} with contradicting labels",
        }
    )
    split = (
        "The source's own test part is the test split. Train and validation are told apart by each image's hash, so "
        "that an image never changes sides. Where the recipe keeps the best epoch, validation chose it; the test split "
        "chose nothing, and was measured when the training was over, on the exported file that is served."
    )
    return "\n\n".join([about, counts, split])


def _metrics(facts: Facts) -> str:
    def column(found: Metrics) -> list[str]:
        accuracy = f"{found.accuracy:.4f} [{found.accuracy_low:.4f}, {found.accuracy_high:.4f}]"
        figures = (found.loss, found.precision, found.recall, found.f1, found.calibration_error)
        return [accuracy, *(f"{value:.4f}" for value in figures), str(found.n)]

    names = ("accuracy", "loss", "precision", "recall", "F1", "calibration error", "images")
    lines = list(zip(names, column(facts.validation), column(facts.test), strict=True))
    notes = (
        "Of the ONNX file. In brackets: 95 % interval (Wilson). Loss is the mean cross-entropy in nats. Precision, "
        "recall and F1 are means over the ten classes. The calibration error is the expected one of Guo et al. 2017."
    )
    return f"{notes}\n\n{table(('figure', 'validation', 'test'), lines)}\n\n{_int8(facts)}"


def _int8(facts: Facts) -> str:
    found = facts.int8
    if isinstance(found, str):
        return f"These are figures in float32. It has no int8 form: {line(found).rstrip('.')}."
    return (
        f"These are figures in float32. Its int8 form (static, per channel, calibrated on training images) has a "
        f"validation accuracy of {found.accuracy:.4f} [{found.accuracy_low:.4f}, {found.accuracy_high:.4f}] and a "
        f"calibration error of {found.calibration_error:.4f} there. Which of the two serves is the gate's choice: tag "
        "`engine`, with its reason in `engine.reason`."
    )


def _slices(facts: Facts) -> str:
    parts = ["On the test split. In brackets: 95 % interval (Wilson).", _class_table(facts.test)]
    confused = _confused_table(facts.test)
    parts.append(confused or "No test image was taken for another class.")
    if facts.slices:
        parts.append(_slice_table(facts.slices))
    if facts.robustness is None:
        parts.append("Accuracy under corruption was not measured at its training.")
    else:
        parts.append(_corruption_table(facts.robustness))
    return "\n\n".join(parts)


def _class_table(found: Metrics) -> str:
    lines = []
    for index, item in enumerate(found.classes):
        recall = _NOTHING
        if item.support:
            low, high = wilson_interval(found.confusion[index][index], item.support)
            recall = f"{item.recall:.4f} [{low:.4f}, {high:.4f}]"
        lines.append((item.label, f"{item.precision:.4f}", recall, f"{item.f1:.4f}", str(item.support)))
    return table(("class", "precision", "recall", "F1", "images"), lines)


def _confused_table(found: Metrics) -> str:
    pairs = [
        (count, true, taken)
        for true, row in enumerate(found.confusion)
        for taken, count in enumerate(row)
        if true != taken and count > 0
    ]
    most = sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:_CONFUSED]
    lines = [
        (CLASS_NAMES[true], CLASS_NAMES[taken], f"{count} of {found.classes[true].support}")
        for count, true, taken in most
    ]
    return table(("most confused: is", "taken for", "images"), lines) if lines else ""


def _slice_table(slices: Sequence[Slice]) -> str:
    lines = [
        (
            item.name,
            f"{item.least:.3f} to {item.most:.3f}",
            f"{item.accuracy:.4f} [{item.accuracy_low:.4f}, {item.accuracy_high:.4f}]",
            str(item.n),
        )
        for item in slices
    ]
    return table(("part of the images", "range", "accuracy", "images"), lines)


def _corruption_table(found: Robustness) -> str:
    mean = f"{found.mean_accuracy:.4f} [{found.mean_accuracy_low:.4f}, {found.mean_accuracy_high:.4f}]"
    lines = [("mean over all", mean), *((name, f"{value:.4f}") for name, value in found.by_corruption.items())]
    return table((f"corruption ({found.n} images each)", "mean accuracy over its severities"), lines)


def _recipe(facts: Facts) -> str:
    # No line of JSON text can begin with a fence: every one of an object begins with a brace, a quote or a bracket.
    content = json.dumps(dict(facts.recipe), indent=2, default=str)
    about = f"{code(str(facts.recipe.get('name', '')))}, digest {code(facts.recipe_digest)} (of all but the seed)."
    return f"{about}\n\n```json\n{content}\n```"


def _list(items: Mapping[str, str]) -> str:
    return "\n".join(f"- {line(name)}: {line(value)}" for name, value in items.items())
