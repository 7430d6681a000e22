"""The page of results, docs/results.md, as a pure function of what the runs recorded.

Owns which rows there must be, what the original report claims, the targets and their verdicts, and the words. Where the
records come from is `ml.workflows.results`'.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from statistics import fmean
from typing import Any

from ml.evaluation.markdown import loud, table
from ml.evaluation.metrics import Metrics
from ml.evaluation.robustness import Robustness

REAL_DATA, IMAGENET, FROM_SCRATCH = "cifar-10", "imagenet", "from scratch"

EXPECTED: tuple[tuple[str, str, str], ...] = (
    ("baseline", "report", FROM_SCRATCH),
    ("baseline", "best", FROM_SCRATCH),
    ("vgg16", "report_frozen", IMAGENET),
    ("vgg16", "report", IMAGENET),
    ("vgg16", "best", IMAGENET),
)
"""Architecture, recipe and weights of the rows that the page must have."""
LEFT_OUT = frozenset({"demo"})
"""Recipes whose purpose is to end soon, not to be good."""

CLAIMS: Mapping[tuple[str, str], str] = {
    ("baseline", "report"): "83.66 % train, 81.99 % validation",
    ("vgg16", "report_frozen"): "64 % train, 60 % test",
    ("vgg16", "report"): "accuracy 0.92, loss 0.8002",
}
"""What the original report says, by architecture and recipe; it has no recipe `best`."""

_NOTHING = "–"


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on the test accuracy of a model's recipe `best`, on CIFAR-10 and with these weights."""

    architecture: str
    bound: float
    weights: str


TARGETS = (Target("baseline", 0.90, FROM_SCRATCH), Target("vgg16", 0.95, IMAGENET))


@dataclass(frozen=True, slots=True)
class Stage:
    """The epoch that a stage of a training kept. `epoch` counts from 1; accuracies are None where not recorded."""

    name: str
    epochs: int
    epoch: int
    train_accuracy: float | None
    validation_accuracy: float | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one run measured, in full. None where it did not."""

    test: Metrics | None = None
    robustness: Robustness | None = None
    stages: tuple[Stage, ...] = ()


@dataclass(frozen=True, slots=True)
class Trained:
    """One finished training run. Texts are empty, and figures None, where the run does not say."""

    run_id: str
    started_at: datetime
    architecture: str
    recipe: str
    digest: str
    """Of all the recipe but its seed."""
    seed: str
    weights: str
    data: str
    dataset_id: str
    backend: str
    test_accuracy: float | None
    images: Mapping[str, int]
    """How many of each split were used."""
    hardware: str
    wall_seconds: float | None
    peak_memory_mib: float | None
    git_sha: str
    git_dirty: str
    """`true`, `false` or `unknown`."""
    command: str
    gpu: str = ""
    """The accelerator that it computed on; empty where there was none."""
    resumed: int = 0
    """How often it went on after an interruption."""
    reproduces: str = ""
    """The run that this one does again; such a run is no further seed."""
    reproduction: str = ""
    """Of such a run: `same`, `differs`, or empty where nobody compared."""


@dataclass(frozen=True, slots=True)
class Pretrained:
    """One finished run that made weights to start from. Empty and None as in `Trained`."""

    run_id: str
    started_at: datetime
    recipe: str
    data: str
    dataset_id: str
    validation_accuracy: float | None
    wall_seconds: float | None
    sha256: str
    """Of the weights' file, by which the runs that started from it are found."""
    command: str
    seed: str = ""
    images: Mapping[str, int] = field(default_factory=dict)
    hardware: str = ""
    peak_memory_mib: float | None = None
    git_sha: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """Runs that differ in nothing but their seed, newest first, and the evidence of the newest."""

    runs: tuple[Trained, ...]
    evidence: Evidence = Evidence()
    is_current: bool | None = True
    """Whether the recipe of that name, as it is now, is what these runs were made by: it may have changed since, or
    been overridden. None where there is no recipe of that name."""
    reproductions: tuple[Trained, ...] = ()

    @property
    def newest(self) -> Trained:
        """The run whose figures stand in the tables."""
        return self.runs[0]

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Test accuracy of each seed, of its newest run that has one, newest first."""
        newest: dict[str, float] = {}
        for run in self.runs:
            if run.test_accuracy is not None:
                newest.setdefault(run.seed, run.test_accuracy)
        return tuple(newest.values())

    @property
    def seeds(self) -> tuple[str, ...]:
        """The seeds, newest first, each once."""
        return tuple(dict.fromkeys(run.seed for run in self.runs))

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON."""
        run, test, robustness = self.newest, self.evidence.test, self.evidence.robustness
        return {
            "architecture": run.architecture,
            "recipe": run.recipe,
            "recipe_digest": run.digest,
            "recipe_is_current": self.is_current,
            "weights": run.weights,
            "data": run.data,
            "dataset_id": run.dataset_id,
            "backend": run.backend,
            "run_id": run.run_id,
            "command": run.command,
            "git_sha": run.git_sha,
            "git_dirty": run.git_dirty,
            "test": None if test is None else {**test.scalars()},
            "robustness": None
            if robustness is None
            else {key: value for key, value in robustness.as_dict().items() if key != "cells"},
            "runs": [
                {"run_id": item.run_id, "seed": item.seed, "test_accuracy": item.test_accuracy} for item in self.runs
            ],
            "reproductions": [{"run_id": item.run_id, "result": item.reproduction} for item in self.reproductions],
        }


def group(runs: Iterable[Trained]) -> list[Row]:
    """Puts runs of one recipe, weights, dataset and backend together, without their evidence.

    Rows come in the order of EXPECTED, then the others by name; within a model CIFAR-10 first, then the newest first.
    A run that reproduces another is no further seed: it is kept beside the row of the run that it reproduces.
    """
    newest_first = sorted(runs, key=lambda run: run.started_at, reverse=True)
    groups: dict[tuple[str, ...], list[Trained]] = {}
    for run in newest_first:
        if run.reproduces == "" and run.recipe not in LEFT_OUT:
            key = (run.architecture, run.recipe, run.weights, run.data, run.dataset_id, run.backend, run.digest)
            groups.setdefault(key, []).append(run)
    rows = [
        Row(
            tuple(members),
            reproductions=tuple(run for run in newest_first if run.reproduces in {member.run_id for member in members}),
        )
        for members in groups.values()
    ]
    order = {(architecture, recipe): place for place, (architecture, recipe, _) in enumerate(EXPECTED)}

    def place(row: Row) -> tuple[object, ...]:
        model = (row.newest.architecture, row.newest.recipe)
        return (order.get(model, len(order)), model, row.newest.data != REAL_DATA, -row.newest.started_at.timestamp())

    return sorted(rows, key=place)


def main_rows(rows: Sequence[Row]) -> list[Row]:
    """Those of the tables: of a present recipe as it is now; as it was last, where nothing was run since it changed.

    Per weights and data, so that a run on other data never takes the place of one on CIFAR-10.
    """
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.is_current is not None:
            run = row.newest
            kinds.setdefault((run.architecture, run.recipe, run.weights, run.data), []).append(row)
    chosen = []
    for alike in kinds.values():
        current = [row for row in alike if row.is_current]
        chosen += current or [max(alike, key=lambda row: row.newest.started_at)]
    return [row for row in rows if row in chosen]


def missing(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """The expected rows that no run on CIFAR-10, by the recipe as it is now, fills: architecture, recipe, weights."""
    there = {
        (row.newest.architecture, row.newest.recipe, row.newest.weights)
        for row in rows
        if row.newest.data == REAL_DATA and row.is_current
    }
    return [expected for expected in EXPECTED if expected not in there]


def judge(target: Target, rows: Sequence[Row]) -> tuple[str, str]:
    """What was reached (text) and the verdict: `holds`, `does not hold`, or `not run` with the reason.

    Judged is the mean over the seeds. A run on other data, with other weights or by another form of the recipe never
    counts: the target stays what it is, and is said not to have been run.
    """
    of_recipe = [row for row in rows if (row.newest.architecture, row.newest.recipe) == (target.architecture, "best")]
    fitting = [row for row in of_recipe if row.accuracies and not _unfit(target, row)]
    if not fitting:
        reasons = [reason for row in of_recipe for reason in _unfit(target, row)]
        command = f"`{_command(target.architecture, 'best', target.weights)}`"
        return _NOTHING, "not run: " + "; ".join([*dict.fromkeys(reasons), command])
    row = max(fitting, key=lambda row: row.newest.started_at)
    reached = fmean(row.accuracies)
    runs = len(row.accuracies)
    spread = f"mean of {runs} seeds, {min(row.accuracies):.4f} to {max(row.accuracies):.4f}" if runs > 1 else "one run"
    test = row.evidence.test
    n = f", n = {test.n}" if test else ""
    return f"{reached:.4f} ({spread}{n})", "holds" if reached >= target.bound else "does not hold"


def _unfit(target: Target, row: Row) -> list[str]:
    """Why a row says nothing of the target; empty where it does."""
    run, reasons = row.newest, []
    if run.weights != target.weights:
        needed = "ImageNet weights" if target.weights == IMAGENET else f"weights: {target.weights}"
        reasons.append(f"needs {needed}; this row used {loud(run.weights)}")
    if run.data != REAL_DATA:
        reasons.append(f"needs CIFAR-10; this row used {loud(run.data)} data")
    if not row.is_current:
        reasons.append(f"needs the recipe as it is now; this row used another form of it ({run.digest or 'unknown'})")
    return reasons


def render(rows: Sequence[Row], pretraining: Sequence[Pretrained] = ()) -> str:
    """The page, in Markdown.

    Args:
        rows: of `group`, each with its evidence and whether its recipe is current.
        pretraining: in the order in which they are to stand.
    """
    main = main_rows(rows)
    others = [row for row in rows if row not in main]
    parts = [
        _HEADER,
        *_warnings(rows),
        "## Targets",
        _targets(rows),
        _surroundings(rows, pretraining),
        "## Test split",
        _TEST_NOTES,
        _test_table(main),
        "## Training and validation",
        _STAGE_NOTES,
        _stage_table(main),
        "## Seeds",
        "Runs that differ in nothing but their seed. The tables above show the newest of them.",
        _seed_table(main),
    ]
    if pretraining:
        parts += [
            "## Pretraining",
            "Weights that VGG16 was given to start from, in place of ImageNet's. A run that did names their digest.",
            _pretraining_table(pretraining),
        ]
    if others:
        parts += [
            "## Other runs",
            "Recipes that are no files, and other forms of those above: what was overridden, or has changed since.",
            _short_table(others),
        ]
    parts.append("## Each row in detail")
    for row in main:
        parts += _detail(row)
    return "\n\n".join(parts) + "\n"


_HEADER = """# Results

This page is written by `cifar10 results` from the runs in MLflow, not by hand; run that again after a training.

The test split had no part in choosing: the epoch that is kept, an early stop and the trials of a search go by the
validation split, and the test split is measured once per run, on the exported file that is served. In brackets stands
the 95 % interval."""

_TEST_NOTES = """\
Accuracy has Wilson's interval. Loss is the mean cross-entropy in nats. Precision and recall are means over the ten
classes. The calibration error is the expected one of Guo et al. 2017, in 15 bins. Under corruption: the mean over the
cells, each one of the fifteen corruptions of Hendrycks & Dietterich 2019 at one of five severities, with CIFAR-10-C's
parameters, on as many test images as the cell says; the interval counts images, not cells. The corrupted images are our
own (`ml/evaluation/corruptions`), with frost drawn and not photographed: compare models by them, not with the paper."""

_STAGE_NOTES = """\
Of the epoch that each stage kept. The train accuracy is what the model scored while it learned from that epoch, with
whatever augmentation and dropout the recipe asks for, so it may lie below that of the validation split."""


def _warnings(rows: Sequence[Row]) -> list[str]:
    said = []
    if any(row.newest.data != REAL_DATA for row in rows):
        said.append("**SYNTHETIC** data are generated pictures: figures on them say nothing of CIFAR-10.")
    if any(row.newest.weights == "RANDOM WEIGHTS" for row in rows):
        said.append("**RANDOM WEIGHTS**: VGG16 started from nothing; its figures say nothing of transfer learning.")
    return said


def _targets(rows: Sequence[Row]) -> str:
    lines = []
    for target in TARGETS:
        reached, verdict = judge(target, rows)
        weights = " with ImageNet weights" if target.weights == IMAGENET else ""
        lines.append((f"{target.architecture} `best`{weights}: test accuracy ≥ {target.bound:.2f}", reached, verdict))
    return _table(("target", "reached", "verdict"), lines)


def _surroundings(rows: Sequence[Row], pretraining: Sequence[Pretrained]) -> str:
    """What the runs of this page had, and so what it cannot show."""
    everything: list[Trained | Pretrained] = [*(run for row in rows for run in row.runs), *pretraining]
    hardware = sorted({run.hardware for run in everything if run.hardware})
    weights = {run.weights for row in rows for run in row.runs if run.architecture == "vgg16"}
    said = [f"All runs of this page were made on: {'; '.join(hardware)}."] if hardware else []
    if rows and not any(run.gpu for row in rows for run in row.runs):
        not_run = not any((row.newest.architecture, row.newest.recipe) == ("vgg16", "best") for row in rows)
        said.append(
            "None of them had an accelerator"
            + ("; `vgg16 best`, which is made for one, was not run." if not_run else ".")
        )
    if weights and IMAGENET not in weights:
        said.append("ImageNet's weights could not be had: rows of VGG16 say what they started from instead.")
    return " ".join(said) or "There are no runs yet."


def _test_table(rows: Sequence[Row]) -> str:
    header = (
        *("model", "claimed by the original report", "test accuracy", "loss", "precision", "recall"),
        *("calibration error", "accuracy under corruption", "test images"),
    )
    lines: list[Sequence[str]] = []
    for row in rows:
        test, corrupted = row.evidence.test, row.evidence.robustness
        figures = [_NOTHING] * 5 if test is None else [
            f"{test.accuracy:.4f} [{test.accuracy_low:.4f}, {test.accuracy_high:.4f}]",
            *(f"{value:.4f}" for value in (test.loss, test.precision, test.recall, test.calibration_error)),
        ]  # fmt: skip
        under = "not measured" if corrupted is None else (
            f"{corrupted.mean_accuracy:.4f} [{corrupted.mean_accuracy_low:.4f}, {corrupted.mean_accuracy_high:.4f}] "
            f"({len(corrupted.cells)} cells of {corrupted.n} images)"
        )  # fmt: skip
        lines.append((_label(row), _claim(row), *figures, under, str(test.n) if test else _NOTHING))
    for architecture, recipe, weights in missing(rows):
        name = f"{architecture} `{recipe}`" + (" with ImageNet weights" if weights == IMAGENET else "")
        claim = CLAIMS.get((architecture, recipe), _NOTHING)
        command = f"**not run yet**: `{_command(architecture, recipe, weights)}`"
        lines.append((name, claim, command, *[_NOTHING] * 6))
    return _table(header, lines)


def _stage_table(rows: Sequence[Row]) -> str:
    lines = [
        (
            *(_label(row), stage.name, f"{stage.epoch} of {stage.epochs}"),
            *(_figure(stage.train_accuracy), _figure(stage.validation_accuracy), _claim(row)),
        )
        for row in rows
        for stage in row.evidence.stages
    ]
    header = ("model", "stage", "kept epoch", "train accuracy", "validation accuracy", "claimed by the original report")
    return _table(header, lines)


def _seed_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        found = row.accuracies
        spread = [f"{fmean(found):.4f}", f"{min(found):.4f} to {max(found):.4f}"] if found else [_NOTHING] * 2
        lines.append((_label(row), str(len(row.runs)), ", ".join(row.seeds), *spread))
    return _table(("model", "runs", "seeds", "mean test accuracy", "lowest to highest"), lines)


def _short_table(rows: Sequence[Row]) -> str:
    lines = [
        (
            *(_label(row), row.newest.digest or _NOTHING, str(len(row.runs))),
            *(_figure(row.newest.test_accuracy), f"`{row.newest.run_id}`"),
        )
        for row in rows
    ]
    return _table(("model", "recipe's digest", "runs", "test accuracy of the newest", "its run"), lines)


def _pretraining_table(runs: Sequence[Pretrained]) -> str:
    header = (
        *("recipe", "data", "training images", "seed", "validation accuracy", "wall time", "peak memory"),
        *("weights, SHA-256", "commit", "command", "run"),
    )
    lines = [
        (
            *(f"`{run.recipe}`", f"{loud(run.data)} `{run.dataset_id}`", str(run.images.get("train", _NOTHING))),
            *(run.seed or _NOTHING, _figure(run.validation_accuracy), _duration(run.wall_seconds)),
            _NOTHING if run.peak_memory_mib is None else f"{run.peak_memory_mib:,.0f} MiB",
            *(f"`{run.sha256[:12]}`", f"`{run.git_sha[:12]}`", f"`{run.command}`", f"`{run.run_id}`"),
        )
        for run in runs
    ]
    return _table(header, lines)


def _detail(row: Row) -> list[str]:
    run, test, corrupted = row.newest, row.evidence.test, row.evidence.robustness
    counts = ", ".join(f"{split} {n}" for split, n in run.images.items()) or "not recorded"
    facts = {
        "Command": f"`{_typed(run)}`" if run.command else "not recorded",
        "Run": f"`{run.run_id}` in MLflow, of {run.started_at:%Y-%m-%d}, seed {run.seed or 'not recorded'}",
        "Data": f"{loud(run.data)}, dataset `{run.dataset_id}` ({counts} images)",
        "Weights at the start": loud(run.weights),
        "Recipe": f"`{run.recipe}`, digest `{run.digest or 'not recorded'}`"
        + (
            " (**not the recipe as it is now: it has changed since, or was overridden**)"
            if row.is_current is False
            else ""
        ),
        "Code": _code(run),
        "Hardware": run.hardware or "not recorded",
        "Backend": run.backend or "not recorded",
        "Wall time": _duration(run.wall_seconds),
        "Peak memory": "not recorded" if run.peak_memory_mib is None else f"{run.peak_memory_mib:,.0f} MiB",
    }
    if run.resumed:
        facts["Interrupted"] = f"resumed {run.resumed} time{'s' if run.resumed > 1 else ''}"
    for again in row.reproductions:
        outcome = {"same": "every figure was the same", "differs": "**figures differ**"}
        facts[f"Run again as `{again.run_id}`"] = outcome.get(again.reproduction, "not compared")
    parts = [f"### {_label(row)}", "\n".join(f"- {name}: {value}" for name, value in facts.items())]
    if test is not None:
        lines = [
            (item.label, f"{item.precision:.4f}", f"{item.recall:.4f}", f"{item.f1:.4f}", str(item.support))
            for item in test.classes
        ]
        parts.append(_table(("class", "precision", "recall", "F1", "test images"), lines))
    if corrupted is not None:
        by_name = [(name, f"{accuracy:.4f}") for name, accuracy in corrupted.by_corruption.items()]
        parts.append(_table(("corruption", "mean accuracy over its severities"), by_name))
    return parts


def _label(row: Row) -> str:
    """A row's name: what is not as the expected row would have it is said."""
    run = row.newest
    usual = next((weights for *model, weights in EXPECTED if model == [run.architecture, run.recipe]), FROM_SCRATCH)
    words = [f"{run.architecture} `{run.recipe}`"]
    if run.weights != usual or usual == IMAGENET:
        words.append("ImageNet weights" if run.weights == IMAGENET else loud(run.weights))
    if run.data != REAL_DATA:
        words.append(f"{loud(run.data)} data")
    if row.is_current is False:
        words.append("another form of the recipe")
    return ", ".join(words)


def _claim(row: Row) -> str:
    return CLAIMS.get((row.newest.architecture, row.newest.recipe), _NOTHING)


def _code(run: Trained) -> str:
    mark = {"true": ", **with changes that were not committed**", "false": ""}
    dirty = mark.get(run.git_dirty, ", not known whether with changes")
    return f"commit `{run.git_sha[:12]}`{dirty}" if run.git_sha else "not recorded"


def _command(architecture: str, recipe: str, weights: str) -> str:
    setting = "VGG16_WEIGHTS=imagenet " if weights == IMAGENET else ""
    return f"{setting}cifar10 train {architecture} --recipe {recipe}"


def _typed(run: Trained) -> str:
    """A recipe that was no file has no command of its own: its run is what it can be trained again by."""
    return f"{run.command} {run.run_id}" if run.command.endswith(" reproduce") else run.command


def _figure(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.4f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not recorded"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return "No run yet."
    return table(header, lines)
