"""The model card: every section, the figures it was given, and Markdown that no value can break."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from scipy.stats import binomtest

from ml.datasets.labels import CLASS_NAMES
from ml.datasets.manifest import Dropped, Manifest
from ml.evaluation.markdown import code, line, table
from ml.evaluation.metrics import evaluate
from ml.evaluation.model_card import SECTIONS, Facts, render
from ml.evaluation.robustness import Robustness
from ml.evaluation.slices import Slice

MANIFEST = Manifest(
    dataset_id="ds-0123456789ab",
    format_version=1,
    data="cifar-10",
    source="https://example.org/cifar.tar.gz",
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
    counts={"train": 900, "validation": 100, "test": 200},
    class_histogram={},
    dropped=Dropped(duplicates=3, overlaps=2, conflicts=1),
    checksums={},
    source_checksums={},
)


def measured(n: int, seed: int):
    rng = np.random.default_rng(seed)
    return evaluate(rng.integers(0, 10, n), rng.dirichlet(np.ones(10), n))


VALIDATION, TEST = measured(100, 1), measured(200, 2)
FACTS = Facts(
    name="cifar10-classifier",
    architecture="baseline",
    manifest=MANIFEST,
    images={"train": 500, "validation": 100, "test": 200},
    weights="from scratch",
    recipe={"name": "report", "seed": 7, "stages": [{"name": "fit", "epochs": 3}]},
    recipe_digest="0a1b2c",
    validation=VALIDATION,
    test=TEST,
    slices=(Slice("brightness, lowest third", 0.1, 0.4, 67, 0.5, 0.38, 0.62),),
    robustness=Robustness(50, 0.6, 0.55, 0.65, {"fog": 0.61, "jpeg_compression": 0.59}, {("fog", 1): 0.6}, np.ones(50)),
    golden=10,
    made={"Command": "`cifar10 train baseline`", "Commit": "`abc`"},
)


def section(card: str, heading: str) -> str:
    return re.split(r"^## ", card.split(f"\n## {heading}\n")[1], flags=re.MULTILINE)[0]


def tables(card: str) -> list[list[list[str]]]:
    """Cells of each table, split as GitHub's Markdown does: at every bar that no backslash escapes."""
    found, rows = [], []
    for text in [*card.splitlines(), ""]:
        if text.startswith("| "):
            # The first piece is what stands before the first bar.
            rows.append([cell.strip() for cell in re.findall(r"((?:\\.|[^|\\])*)\|", text)][1:])
        elif rows:
            found.append(rows)
            rows = []
    return found


def test_every_section_is_there_once_and_in_order():
    found = re.findall(r"^## (.*)$", render(FACTS), flags=re.MULTILINE)
    assert tuple(found) == SECTIONS


def test_the_figures_are_those_that_were_given():
    figures = {row[0]: row[1:] for row in tables(section(render(FACTS), "Metrics"))[0]}
    for column, found in enumerate((VALIDATION, TEST)):
        low, high = found.accuracy_low, found.accuracy_high
        assert figures["accuracy"][column] == f"{found.accuracy:.4f} [{low:.4f}, {high:.4f}]"
        named = ("loss", found.loss), ("precision", found.precision), ("recall", found.recall), ("F1", found.f1)
        for name, value in (*named, ("calibration error", found.calibration_error)):
            assert figures[name][column] == f"{value:.4f}"
        assert figures["images"][column] == str(found.n)


def test_slices_are_classes_confusions_parts_and_corruptions_of_the_test_split():
    by_class, confused, parts, corrupted = tables(section(render(FACTS), "Slices"))
    assert [row[0] for row in by_class[2:]] == list(CLASS_NAMES)
    for index, row in enumerate(by_class[2:]):
        item, hits = TEST.classes[index], TEST.confusion[index][index]
        interval = binomtest(hits, item.support).proportion_ci(0.95, method="wilson")
        recall = f"{item.recall:.4f} [{interval.low:.4f}, {interval.high:.4f}]"
        assert row[1:] == [f"{item.precision:.4f}", recall, f"{item.f1:.4f}", str(item.support)]
    confusion = np.array(TEST.confusion)
    np.fill_diagonal(confusion, 0)
    most = np.sort(confusion, axis=None)[::-1][:5]
    for row, count in zip(confused[2:], most, strict=True):
        true, taken = CLASS_NAMES.index(row[0]), CLASS_NAMES.index(row[1])
        assert confusion[true, taken] == count
        assert row[2] == f"{count} of {TEST.classes[true].support}"
    assert parts[2] == ["brightness, lowest third", "0.100 to 0.400", "0.5000 [0.3800, 0.6200]", "67"]
    assert corrupted[2:] == [
        ["mean over all", "0.6000 [0.5500, 0.6500]"],
        ["fog", "0.6100"],
        ["jpeg_compression", "0.5900"],
    ]


def test_a_class_without_images_and_a_model_without_mistakes_are_told():
    labels = np.arange(9)
    perfect = evaluate(labels, np.eye(10)[labels])
    text = section(render(replace(FACTS, test=perfect, robustness=None)), "Slices")
    assert tables(text)[0][-1] == ["truck", "0.0000", "–", "0.0000", "0"]
    assert "No test image was taken for another class." in text
    assert "was not measured" in text


def test_the_class_that_is_missed_most_is_a_limit():
    labels = np.repeat([0, 1, 2], [4, 3, 3])  # none of the others, which say nothing
    predicted = np.array([0, 0, 0, 0, 1, 2, 3, 2, 2, 3])
    found = section(render(replace(FACTS, test=evaluate(labels, np.eye(10)[predicted]))), "Limits")
    assert "automobile: recall 0.3333" in found


def test_data_recipe_and_making_are_told_in_full():
    card = render(FACTS)
    data = section(card, "Data")
    for told in ("`ds-0123456789ab`", "https://example.org/cifar.tar.gz", "3 duplicates", "cifar-10"):
        assert told in data
    assert tables(data)[0][2:] == [["train", "900", "500"], ["validation", "100", "100"], ["test", "200", "200"]]
    recipe = section(card, "Recipe")
    assert "`0a1b2c`" in recipe
    assert json.loads(recipe.split("```json\n")[1].split("\n```")[0]) == FACTS.recipe
    made = section(card, "How it was made")
    assert "- Command: `cifar10 train baseline`\n- Commit: `abc`\n- Weights at the start: from scratch" in made
    assert "gate.decision" in section(card, "Gate")


def test_what_says_nothing_of_cifar10_is_loud():
    assert "SYNTHETIC" not in render(FACTS)
    assert "RANDOM WEIGHTS" not in render(FACTS)
    stand_in = replace(FACTS, manifest=MANIFEST.model_copy(update={"data": "SYNTHETIC"}), weights="RANDOM WEIGHTS")
    head = render(stand_in).split("\n## ")[0]
    assert "> **SYNTHETIC**" in head
    assert "> **RANDOM WEIGHTS**" in head
    limits = section(render(replace(stand_in, golden=7, robustness=None)), "Limits")
    assert "**Of 3 of the ten classes" in limits
    assert "was not measured" in limits


ODD = "a|b\\|c\n## Data\n| x |\r\n```\n`d`"


def test_odd_values_break_neither_table_nor_section_nor_code():
    odd = replace(
        FACTS,
        architecture=ODD,
        manifest=MANIFEST.model_copy(update={"source": ODD, "dataset_id": ODD}),
        weights=ODD,
        recipe={"name": ODD, ODD: [ODD]},
        recipe_digest=ODD,
        slices=(replace(FACTS.slices[0], name=ODD),),
        robustness=replace(FACTS.robustness, by_corruption={ODD: 0.5}),
        made={ODD: ODD},
    )
    card = render(odd)
    assert tuple(re.findall(r"^## (.*)$", card, flags=re.MULTILINE)) == SECTIONS
    assert len(re.findall(r"^ {0,3}```", card, flags=re.MULTILINE)) == 2
    assert json.loads(card.split("```json\n")[1].rsplit("\n```", 1)[0]) == odd.recipe
    shapes = [{len(row) for row in rows} for rows in tables(card)]
    assert shapes == [{3}, {3}, {5}, {3}, {4}, {2}]


@pytest.mark.parametrize("value", ["a|b", "a\\", "\\|", "a\nb", ODD, ""])
def test_a_table_keeps_its_cells(value):
    ((head, rule, row),) = tables(table(("one", "two"), [(value, value)]))
    assert (len(head), rule, len(row)) == (2, ["---"] * 2, 2)
    assert re.sub(r"\\(.)", r"\1", row[0]) == line(value)


def test_code_is_closed_where_it_ends():
    assert code("a `b`\nc") == "`a 'b' c`"
    assert code("") == "` `"
