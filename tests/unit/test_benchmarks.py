"""What benchmarks write: its shape, targets that tell the truth, and rounds that pair what is compared."""

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks import training
from benchmarks.result import Result, Spread, Target, write
from benchmarks.training import QUICK, Plan, run

OPERATORS = {">=": lambda value, bound: value >= bound, "<=": lambda value, bound: value <= bound}


@pytest.mark.parametrize(
    ("value", "op", "bound", "holds"),
    [(8.0, ">=", 8, True), (7.99, ">=", 8, False), (0.1, "<=", 0.1, True), (0.2, "<=", 0.1, False)],
)
def test_a_target_holds_as_its_operator_says(value, op, bound, holds):
    assert Target("t", value, op, bound).holds is holds


def test_what_is_no_number_keeps_no_bound():
    assert not Target("t", math.nan, ">=", 0).holds
    assert not Target("t", math.nan, "<=", 0).holds


def test_the_file_has_the_shape_that_is_relied_on(tmp_path):
    result = Result("x", 3, {"rate": Spread.of([3.0, 1.0, 2.0])}, (Target("t", 2, ">=", 1),), data="SYNTHETIC")
    write(result, tmp_path / "new" / "x.json")
    written = json.loads((tmp_path / "new" / "x.json").read_text())
    assert set(written) >= {"name", "date", "git_sha", "hardware", "versions", "n", "figures", "targets"}
    assert written["figures"]["rate"] == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}
    assert written["targets"] == [{"name": "t", "value": 2, "op": ">=", "bound": 1, "holds": True}]
    assert written["data"] == "SYNTHETIC"


class Told:
    """Contenders that answer at once: ours at 1000 images a second, Keras at 100, the prefix at 500."""

    running = 0

    def __init__(self, name: str, job: Mapping[str, Any]) -> None:
        self.name, self._job, self._answered = name, job, 0
        Told.running += 1

    def sample(self) -> dict[str, Any]:
        job, n = self._job, self._answered
        self._answered += 1
        if job["kind"].startswith("accuracy"):
            (stage,) = job["recipe"]["stages"]
            step = 0.01 * job["recipe"]["seed"]
            # Better in the first epoch, worse in the next: over all epochs it would come to nothing.
            sign = 0.004 if job["kind"] == "accuracy_plain" else 0
            accuracies = [0.5 + step + 0.1 * epoch + sign * (-1) ** epoch for epoch in range(stage["epochs"])]
            cached = None if job.get("end_to_end") else "block4_pool"
            return {"accuracies": accuracies, "losses": accuracies, "cached_from": cached}
        sample = {"kind": "fit", "first": n == 0, "images_per_second": 100.0, "between_batches": 200.0, "xla": False}
        if job["kind"] == "ours":
            chunks = job["chunks"] if job["recipe"]["architecture"] == "vgg16" else 0
            frozen = n < chunks
            sample |= {"kind": "extraction" if frozen else "fit", "first": n in (0, chunks)}
            sample["images_per_second"] = 500.0 if frozen else 1000.0
        return {**sample, "peak_memory_mib": 1000.0}

    def go_on(self) -> None:
        pass

    def then(self, job: Mapping[str, Any]) -> dict[str, Any]:
        self._job, self._answered = job, 0
        return self.sample()

    def end(self) -> None:
        Told.running -= 1


@pytest.mark.parametrize("plan", [QUICK, training.FULL])
def test_every_target_stands_in_the_result_and_says_the_truth(plan: Plan, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "Contender", Told)
    result = run(plan, tmp_path, "SYNTHETIC")
    path = tmp_path / "training.json"
    write(result, path)
    written = json.loads(path.read_text())
    vgg16, baseline, accuracy, same = written["targets"]
    for target in written["targets"]:
        assert target["holds"] is OPERATORS[target["op"]](target["value"], target["bound"])
    # Ten epochs share an extraction: 1 / (1/1000 + 1/(10 * 500)) = 833 images a second.
    assert vgg16["value"] == pytest.approx(1000 / 1.2 / 100)
    assert (vgg16["op"], vgg16["bound"], baseline["bound"]) == (">=", 8, 1.3)
    assert baseline["value"] == pytest.approx(10)
    assert accuracy["value"] == pytest.approx(0.004)
    assert (accuracy["bound"], same["value"], same["bound"]) == (0.03, 0, 0.01)
    figures = written["figures"]
    assert figures["vgg16_stage_2"]["ours"]["tail_alone"]["median"] == 1000
    assert figures["vgg16_stage_2"]["ratio_without_keras_wait"]["median"] == pytest.approx(1000 / 1.2 / 200)
    assert figures["vgg16_stage_2"]["keras_fit"]["images_per_second"]["n"] == plan.vgg16_rounds
    assert figures["baseline"]["keras_fit"]["images_per_second"]["n"] == plan.baseline_rounds
    assert figures["growth"]["vgg16_stage_2"]["ours"]["extraction"] == 500
    assert figures["growth"]["baseline"]["ours"]["images_per_second"] == 1000
    assert written["n"] == plan.vgg16_rounds
    assert Told.running == 0, "a contender was left running"


def test_quick_never_writes_over_the_results(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training", "--quick"])
    with pytest.raises(SystemExit):
        training.main()
    assert "--output" in capsys.readouterr().err
