"""A search's trials: proposals within bounds, pruning, failures, and a study that survives a kill."""

import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.errors import RegistryUnavailable, StorageError, TrainingDiverged, TrainingError
from ml.training.recipe import parse_recipe
from ml.training.study import Outcome, Trial, open_study
from ml.training.sweep_space import Choices, Pruner, Range, Sweep

RECIPE = parse_recipe(
    {"name": "tiny", "architecture": "baseline", "stages": [{"name": "fit", "epochs": 4, "learning_rate": 0.01}]},
    origin="here",
)
RATE = "stages.fit.learning_rate"


def sweep_of(trials: int = 6, space: dict[str, Range | Choices] | None = None, **changes: object) -> Sweep:
    made = {
        "recipe": RECIPE,
        "trials": trials,
        "timeout_minutes": None,
        "seed": 1,
        "random_trials": 3,
        "pruner": Pruner(startup_trials=2, warmup_epochs=1),
        "space": space or {RATE: Range(low=0.0001, high=0.005, log=True)},
    }
    return Sweep(**{**made, **changes})  # type: ignore[arg-type]


def search(sweep: Sweep, folder: Path, work: Callable[[Trial], float]) -> list[Outcome]:
    told: list[Outcome] = []
    with open_study(sweep, "study", folder) as study:
        study.search(work, told.append)
    return told


def near(trial: Trial) -> float:
    """Best at the upper end of the range."""
    return float(trial.values[RATE]) / 0.005  # type: ignore[arg-type]


numbers = st.tuples(st.floats(0.001, 10), st.floats(0.001, 10)).filter(lambda ends: ends[0] < ends[1])
spaces = st.dictionaries(
    st.sampled_from(["a", "b.c", "d"]),
    numbers.map(lambda ends: Range(low=ends[0], high=ends[1]))
    | numbers.map(lambda ends: Range(low=ends[0], high=ends[1], log=True))
    | st.tuples(st.integers(-5, 5), st.integers(1, 5), st.integers(1, 4)).map(
        lambda s: Range(low=s[0], high=s[0] + s[1] * s[2], step=s[1])
    )
    | st.tuples(st.integers(0, 9), st.integers(1, 6)).map(
        lambda s: Range(low=s[0] / 10, high=s[0] / 10 + s[1] * 0.1, step=0.1)
    )
    | st.just(Choices(choices=("x", True, 1, 1.5, [8, 16], [8]))),
    min_size=1,
)


@settings(max_examples=15)
@given(spaces, st.integers(0, 99))
def test_every_proposal_lies_in_the_space(space: dict[str, Range | Choices], seed: int) -> None:
    proposed: list[Trial] = []

    def work(trial: Trial) -> float:
        proposed.append(trial)
        return float(trial.number % 3)

    sweep = sweep_of(8, space, seed=seed)
    # The recipe has none of these keys, and is not asked for them.
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sweep, "recipes_own_values", None)
        outcomes = search(sweep, Path(folder), work)
    assert len(proposed) == 8
    for trial in proposed:
        assert list(trial.values) == list(space)
        assert all(dimension.holds(trial.values[key]) for key, dimension in space.items())
    assert [outcome.values for outcome in outcomes] == [trial.values for trial in proposed]


def test_the_recipe_itself_is_the_first_trial_where_it_lies_in_the_space(tmp_path: Path) -> None:
    space: dict[str, Range | Choices] = {RATE: Range(low=0.001, high=0.1), "batch_size": Choices(choices=(32, 64))}
    first, second, *_ = search(sweep_of(3, space), tmp_path / "inside", lambda trial: 0.5)
    assert first.values == {RATE: 0.01, "batch_size": 64}
    assert second.values != first.values
    outside = search(sweep_of(3), tmp_path / "outside", near)
    assert 0.01 not in [outcome.values[RATE] for outcome in outside]


def test_a_trial_below_the_median_is_given_up_and_no_other(tmp_path: Path) -> None:
    values = iter([0.5, 0.6, 0.1, 0.7, 0.2, 0.65])

    def work(trial: Trial) -> float:
        value = next(values)
        for epoch in range(4):
            trial.report(value + epoch / 100, epoch)
        return value + 0.03

    outcomes = search(sweep_of(6), tmp_path, work)
    assert [outcome.state for outcome in outcomes] == [
        "complete",
        "complete",
        "pruned",
        "complete",
        "pruned",
        "complete",
    ]
    # The first epoch is one of warming up.
    assert [outcome.epochs for outcome in outcomes] == [4, 4, 2, 4, 2, 4]
    assert outcomes[2].value == pytest.approx(0.11)
    with open_study(sweep_of(6), "study", tmp_path) as study:
        best = study.best()
        assert best is not None
        assert (best.number, best.value, study.left) == (3, pytest.approx(0.73), 0)


def test_a_trial_that_fails_by_itself_is_a_failed_trial_and_not_the_end(tmp_path: Path) -> None:
    def work(trial: Trial) -> float:
        trial.note(run_id=f"run-{trial.number}")
        if trial.number == 1:
            raise TrainingDiverged("The loss became nan.", fix="lower the rate.")
        return near(trial)

    outcomes = search(sweep_of(4), tmp_path, work)
    assert [outcome.state for outcome in outcomes] == ["complete", "failed", "complete", "complete"]
    assert "The loss became nan" in outcomes[1].error
    assert [outcome.facts for outcome in outcomes] == [{"run_id": f"run-{i}"} for i in range(4)]


def test_what_is_not_the_trials_own_error_ends_the_search_and_costs_no_trial(tmp_path: Path) -> None:
    def away(trial: Trial) -> float:
        if trial.number == 2:
            raise RegistryUnavailable("MLflow is away.", fix="start it.")
        return near(trial)

    with pytest.raises(RegistryUnavailable):
        search(sweep_of(5), tmp_path, away)
    assert [outcome.number for outcome in search(sweep_of(5), tmp_path, near)] == [3, 4, 5]
    with open_study(sweep_of(5), "study", tmp_path) as study:
        lost = study.outcomes()[2]
        assert (lost.state, study.left) == ("interrupted", 0)
        assert "MLflow is away" in lost.error


def test_more_trials_prolong_a_search_and_no_time_begins_none(tmp_path: Path) -> None:
    assert len(search(sweep_of(2), tmp_path, near)) == 2
    assert search(sweep_of(2), tmp_path, near) == []
    assert search(sweep_of(5, timeout_minutes=1e-9), tmp_path, near) == []
    assert [outcome.number for outcome in search(sweep_of(5), tmp_path, near)] == [2, 3, 4]


def test_what_is_proposed_does_not_depend_on_interruptions(tmp_path: Path) -> None:
    through = search(sweep_of(7), tmp_path / "through", near)
    piecewise = [outcome for n in (2, 3, 6, 7) for outcome in search(sweep_of(n), tmp_path / "pieces", near)]
    assert [outcome.values for outcome in piecewise] == [outcome.values for outcome in through]
    assert len({outcome.values[RATE] for outcome in through}) == 7
    other = search(sweep_of(7, seed=2), tmp_path / "other", near)
    assert {outcome.values[RATE] for outcome in other}.isdisjoint({outcome.values[RATE] for outcome in through})


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.unit.test_study import near, search, sweep_of

def work(trial):
    trial.report(0.5, 0)
    if trial.number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return near(trial)

search(sweep_of(5), Path(sys.argv[1]), work)
"""


def killed_in_its_third_trial(folder: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder)], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_killed_search_goes_on_and_its_open_trial_is_marked(tmp_path: Path) -> None:
    killed_in_its_third_trial(tmp_path)
    # As if it had been killed in the middle of a write.
    with (tmp_path / "study.journal").open("ab") as journal:
        journal.write(b'{"op_code": 6, "wor')
    (tmp_path / "study.journal.lock").symlink_to("study.journal")
    assert [outcome.number for outcome in search(sweep_of(5), tmp_path, near)] == [3, 4, 5]
    with open_study(sweep_of(5), "study", tmp_path) as study:
        states = [outcome.state for outcome in study.outcomes()]
        assert states == ["complete", "complete", "interrupted", "complete", "complete", "complete"]
        assert "without a word" in study.outcomes()[2].error
        assert study.recall("anything") is None
        study.remember("anything", "kept")
    with open_study(sweep_of(5), "study", tmp_path) as study:
        assert study.recall("anything") == "kept"


def test_two_processes_cannot_search_in_one_study(tmp_path: Path) -> None:
    with (
        open_study(sweep_of(), "study", tmp_path),
        pytest.raises(TrainingError, match="Another process"),
        open_study(sweep_of(), "study", tmp_path),
    ):
        pass
    with open_study(sweep_of(), "study", tmp_path) as study:
        assert study.outcomes() == []


def test_a_damaged_study_and_a_folder_that_cannot_be_written_are_said(tmp_path: Path) -> None:
    search(sweep_of(2), tmp_path / "damaged", near)
    journal = tmp_path / "damaged" / "study.journal"
    journal.write_bytes(b"\x00torn\n" + journal.read_bytes())
    with pytest.raises(StorageError, match="not what a search wrote"), open_study(sweep_of(), "study", journal.parent):
        pass
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match="cannot be written"),
        open_study(sweep_of(), "study", tmp_path / "file" / "study"),
    ):
        pass
