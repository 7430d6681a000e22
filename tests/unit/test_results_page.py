"""The page of results from records made by hand: what it says, and what it must not hide."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from ml.evaluation.metrics import evaluate
from ml.evaluation.results_page import (
    EXPECTED,
    TARGETS,
    Evidence,
    Pretrained,
    Stage,
    Trained,
    group,
    judge,
    main_rows,
    missing,
    render,
)
from ml.evaluation.robustness import Robustness

BASELINE, VGG16 = TARGETS
BEGAN = datetime(2025, 3, 1, tzinfo=UTC)


def measured(hits, n=1000):
    """Metrics of a model that is right `hits` times in `n`."""
    labels = np.arange(n) % 10
    predicted = np.where(np.arange(n) < hits, labels, (labels + 1) % 10)
    return evaluate(labels, np.eye(10)[predicted])


ROBUST = Robustness(
    n=200,
    mean_accuracy=0.61,
    mean_accuracy_low=0.58,
    mean_accuracy_high=0.64,
    by_corruption={"fog": 0.7, "frost": 0.52},
    cells={("fog", 1): 0.7, ("frost", 1): 0.52},
)
EVIDENCE = Evidence(measured(910), ROBUST, (Stage("fit", 16, 15, 0.93, 0.915),))


def run(number=1, **changes):
    usual = {
        "run_id": f"{number:032x}",
        "started_at": BEGAN + timedelta(days=number),
        "architecture": "baseline",
        "recipe": "best",
        "digest": "0123456789ab",
        "seed": "20",
        "weights": "from scratch",
        "data": "cifar-10",
        "dataset_id": "ds-0123456789ab",
        "backend": "tensorflow",
        "test_accuracy": 0.91,
        "images": {"train": 45000, "validation": 5000, "test": 10000},
        "hardware": "A processor, 2 cores, 8.0 GiB",
        "wall_seconds": 7250.0,
        "peak_memory_mib": 2345.6,
        "git_sha": "0123456789abcdef0123",
        "git_dirty": "false",
        "command": "cifar10 train baseline --recipe best",
    }
    return Trained(**(usual | changes))


def vgg16(number=1, **changes):
    return run(number, **({"architecture": "vgg16", "weights": "imagenet"} | changes))


def rows_of(*runs, evidence=EVIDENCE):
    return [replace(row, evidence=evidence) for row in group(runs)]


def section(page, title):
    """The text under a heading, to the next of the same level."""
    level = title.split(" ")[0]
    rest = page.split(f"\n{title}\n", 1)[1]
    return rest.split(f"\n{level} ", 1)[0]


def cells(page, title, start):
    """The cells of the only line of that section's table which starts so."""
    (line,) = [line for line in section(page, title).splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_a_page_without_runs_says_what_to_run():
    page = render([])
    assert "written by `cifar10 results`" in page
    assert "not by hand" in page
    assert "test split had no part in choosing" in page
    for architecture, recipe, setting in (
        ("baseline", "report", ""),
        ("baseline", "best", ""),
        ("vgg16", "report", "VGG16_WEIGHTS=imagenet "),
        ("vgg16", "best", "VGG16_WEIGHTS=imagenet "),
    ):
        assert f"`{setting}cifar10 train {architecture} --recipe {recipe}`" in section(page, "## Test split")
    assert "83.66 % train, 81.99 % validation" in page
    assert "accuracy 0.92, loss 0.8002" in page
    assert section(page, "## Targets").count("not run") == 2


def test_a_row_has_every_figure_and_what_it_was_made_with():
    page = render(rows_of(run()))
    _, claim, accuracy, loss, precision, recall, calibration, corrupted, n = cells(
        page, "## Test split", "baseline `best`"
    )
    test = EVIDENCE.test
    assert claim == "–"
    assert accuracy == f"0.9100 [{test.accuracy_low:.4f}, {test.accuracy_high:.4f}]"
    assert [loss, precision, recall] == [f"{value:.4f}" for value in (test.loss, test.precision, test.recall)]
    assert (calibration, n) == (f"{test.calibration_error:.4f}", "1000")
    assert corrupted == "0.6100 [0.5800, 0.6400] (2 cells of 200 images)"
    assert cells(page, "## Training and validation", "baseline `best`")[1:5] == ["fit", "15 of 16", "0.9300", "0.9150"]
    detail = section(page, "### baseline `best`")
    for words in (
        "- Command: `cifar10 train baseline --recipe best`",
        f"- Run: `{1:032x}` in MLflow, of 2025-03-02, seed 20",
        "- Data: cifar-10, dataset `ds-0123456789ab` (train 45000, validation 5000, test 10000 images)",
        "- Weights at the start: from scratch",
        "- Code: commit `0123456789ab`\n",
        "- Hardware: A processor, 2 cores, 8.0 GiB",
        "- Wall time: 2 h 1 min",
        "- Peak memory: 2,346 MiB",
        "| frost | 0.5200 |",
    ):
        assert words in detail
    assert detail.count("| 100 |") == 10  # a line per class
    for item in test.classes:
        assert f"| {item.label} | {item.precision:.4f} | {item.recall:.4f} |" in detail


def test_every_table_has_as_many_cells_in_each_line_as_in_its_header():
    page = render(rows_of(run(command="cifar10 train | tee log"), vgg16(recipe="report"), run(3, recipe="odd")))
    for table in (block for block in page.split("\n\n") if block.startswith("| ")):
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1, table


def test_runs_that_differ_in_their_seed_alone_are_one_row_of_the_newest():
    rows = rows_of(
        run(1, seed="20", test_accuracy=0.90),
        run(3, seed="22", test_accuracy=0.92),
        run(2, seed="21", test_accuracy=0.88),
    )
    (row,) = rows
    assert row.newest.seed == "22"
    assert cells(render(rows), "## Seeds", "baseline `best`")[1:] == ["3", "22, 21, 20", "0.9000", "0.8800 to 0.9200"]
    assert judge(BASELINE, rows) == ("0.9000 (mean of 3 seeds, 0.8800 to 0.9200, n = 1000)", "holds")
    assert [item["seed"] for item in row.summary()["runs"]] == ["22", "21", "20"]
    assert json.loads(json.dumps(row.summary()))["test"]["accuracy"] == pytest.approx(0.91)


@pytest.mark.parametrize("changes", [{"digest": "b" * 12}, {"dataset_id": "ds-1"}, {"backend": "jax"}, {"data": "X"}])
def test_runs_that_differ_in_more_than_their_seed_are_rows_of_their_own(changes):
    assert len(group([run(1), run(2, **changes)])) == 2


def test_a_reproduction_is_no_further_seed_and_stands_with_what_it_reproduces():
    first = run(1)
    rows = rows_of(first, run(2, reproduces=first.run_id, reproduction="same", test_accuracy=0.1))
    (row,) = rows
    assert row.accuracies == (0.91,)
    assert f"Run again as `{2:032x}`: every figure was the same" in render(rows)
    differing = rows_of(first, run(2, reproduces=first.run_id, reproduction="differs"))
    assert "**figures differ**" in render(differing)
    assert row.summary()["reproductions"] == [{"run_id": f"{2:032x}", "result": "same"}]


def test_a_target_that_is_missed_is_said_to_be_missed():
    assert judge(BASELINE, rows_of(run(test_accuracy=0.8999))) == ("0.8999 (one run, n = 1000)", "does not hold")
    assert judge(VGG16, rows_of(vgg16(test_accuracy=0.96)))[1] == "holds"
    assert "does not hold" in section(render(rows_of(run(test_accuracy=0.2))), "## Targets")


def test_other_weights_and_other_data_never_reach_a_target():
    reached, verdict = judge(VGG16, rows_of(vgg16(weights="RANDOM WEIGHTS", test_accuracy=0.99)))
    assert reached == "–"
    assert verdict.startswith("not run: needs ImageNet weights; this row used **RANDOM WEIGHTS**")
    assert "VGG16_WEIGHTS=imagenet cifar10 train vgg16 --recipe best" in verdict
    labelled = judge(VGG16, rows_of(vgg16(weights="file sha256:0123456789ab", test_accuracy=0.99)))
    assert "this row used file sha256:0123456789ab" in labelled[1]
    generated = judge(BASELINE, rows_of(run(data="SYNTHETIC", test_accuracy=1.0)))
    assert generated[1].startswith("not run: needs CIFAR-10; this row used **SYNTHETIC** data")
    # Nor does another recipe, however good.
    assert judge(BASELINE, rows_of(run(recipe="report", test_accuracy=0.99)))[1].startswith("not run")


def test_random_weights_and_generated_data_are_said_in_capitals_and_fill_no_expected_row():
    rows = rows_of(vgg16(weights="RANDOM WEIGHTS"), run(data="SYNTHETIC"))
    page = render(rows)
    assert "vgg16 `best`, **RANDOM WEIGHTS**" in section(page, "## Test split")
    assert "baseline `best`, **SYNTHETIC** data" in section(page, "## Test split")
    assert "say nothing of transfer learning" in page
    assert "say nothing of CIFAR-10" in page
    assert len(missing(rows)) == len(EXPECTED)
    assert section(page, "## Test split").count("**not run yet**") == len(EXPECTED)
    clean = render(rows_of(run()))
    assert "SYNTHETIC" not in clean
    assert "RANDOM WEIGHTS" not in clean


def test_a_run_of_uncommitted_code_is_marked():
    detail = section(render(rows_of(run(git_dirty="true"))), "### baseline `best`")
    assert "commit `0123456789ab`, **with changes that were not committed**" in detail
    assert "not known whether" in render(rows_of(run(git_dirty="unknown")))


def test_what_was_not_recorded_is_said_so():
    bare = run(
        digest="", seed="", backend="", test_accuracy=None, images={}, hardware="", wall_seconds=None,
        peak_memory_mib=None, git_sha="", git_dirty="", command="", resumed=2,
    )  # fmt: skip
    rows = rows_of(bare, evidence=Evidence())
    page = render(rows)
    assert "not measured" in section(page, "## Test split")
    assert section(page, "### baseline `best`").count("not recorded") >= 8
    assert "Interrupted: resumed 2 times" in page
    assert judge(BASELINE, rows)[1].startswith("not run")


def test_demo_runs_are_left_out_and_other_names_stand_apart():
    rows = [replace(row, is_current=None) for row in rows_of(run(1, recipe="demo"), run(3, recipe="mine"))]
    page = render(rows + rows_of(run(4), run(5, recipe="laptop")))
    assert "`demo`" not in page
    assert "`mine`" in section(page, "## Other runs")
    assert "`mine`" not in section(page, "## Test split")
    assert "`laptop`" in section(page, "## Test split")  # nobody expects it, and it is a recipe that there is
    assert "another form" not in page


def test_pretraining_is_listed_with_the_digest_that_its_weights_go_by():
    done = Pretrained(
        "f" * 32, BEGAN, "vgg16", "SYNTHETIC", "ds-1", 0.8123, 3700.0, "abcdef0123456789" * 4, "cifar10 pretrain",
        seed="20", images={"train": 1500}, hardware="a machine", peak_memory_mib=2345.6, git_sha="0123456789abcdef",
    )  # fmt: skip
    line = cells(render([], [done]), "## Pretraining", "`vgg16`")
    data, images, seed, accuracy, seconds, memory, digest, sha, command, run_id = line[1:]
    assert (data, accuracy, seconds, digest) == ("**SYNTHETIC** `ds-1`", "0.8123", "62 min", "`abcdef012345`")
    assert (images, seed, memory, sha) == ("1500", "20", "2,346 MiB", "`0123456789ab`")
    assert "made on: a machine." in render([], [done])
    assert (command, run_id) == ("`cifar10 pretrain`", f"`{'f' * 32}`")
    assert "## Pretraining" not in render([])


def test_a_recipe_that_was_no_file_is_trained_again_by_its_run():
    page = render(rows_of(run(command="cifar10 reproduce")))
    assert f"- Command: `cifar10 reproduce {1:032x}`" in page


def test_a_changed_recipe_gives_way_to_the_present_one_and_is_marked_where_there_is_no_other():
    old, new = rows_of(run(2, digest="old", test_accuracy=0.99), run(1, digest="new"))
    assert (old.newest.digest, new.newest.digest) == ("old", "new")
    changed = replace(old, is_current=False)
    assert main_rows([changed, new]) == [new]
    page = render([changed, new])
    assert "baseline `best`, another form of the recipe" in section(page, "## Other runs")
    assert judge(BASELINE, [changed, new])[0].startswith("0.9100")
    alone = render([changed])
    assert "baseline `best`, another form of the recipe" in section(alone, "## Test split")
    assert "**not the recipe as it is now" in alone
    # However good, it fills no expected row and reaches no target.
    assert ("baseline", "best", "from scratch") in missing([changed])
    assert judge(BASELINE, [changed]) == (
        "–",
        "not run: needs the recipe as it is now; this row used another form of it (old); "
        "`cifar10 train baseline --recipe best`",
    )
    # Of several earlier forms, the one that was run last.
    older = replace(new, is_current=False)
    assert main_rows([changed, older]) == [changed]


def test_rows_come_in_the_order_that_is_expected():
    given = [vgg16(1), vgg16(2, recipe="report"), run(3, data="SYNTHETIC"), run(4), run(5, recipe="report")]
    found = [(row.newest.architecture, row.newest.recipe, row.newest.data) for row in group(given)]
    assert found == [
        ("baseline", "report", "cifar-10"),
        ("baseline", "best", "cifar-10"),
        ("baseline", "best", "SYNTHETIC"),
        ("vgg16", "report", "cifar-10"),
        ("vgg16", "best", "cifar-10"),
    ]
