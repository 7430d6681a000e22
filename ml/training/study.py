"""A search's trials: proposing the next one, giving up bad ones, and keeping all of them through a kill.

Owns Optuna, the study's file and the loop over trials; what a trial does is the caller's. Imports no TensorFlow.
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from ml.errors import ConfigurationError, StorageError, TrainingError
from ml.training.sweep_space import Choices, Range, Sweep, Value, spoken

logger = logging.getLogger(__name__)

State = Literal["complete", "pruned", "failed", "interrupted"]

_JOURNAL, _LOCK = "study.journal", "lock"
_ERROR, _CUT_OFF, _FACTS = "error", "cut_off", "fact."


class Pruned(Exception):
    """The trial is not worth its remaining epochs. Not an error: it passes from `Trial.report` to `Study.search`."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    number: int
    """From 0, in the order in which they began."""
    state: State
    """`failed` by an error of its own; `interrupted` by the end of its process, which says nothing of its values."""
    value: float | None
    """Of a complete trial: what its work returned. Of a pruned one: the last that it reported."""
    values: Mapping[str, Value]
    """What was tried, by the recipe's dotted keys."""
    epochs: int
    """How many it reported."""
    seconds: float
    error: str
    facts: Mapping[str, str]
    """What its work noted."""


class Trial:
    """One trial under way, as its work sees it."""

    def __init__(self, trial: optuna.Trial, values: Mapping[str, Value]) -> None:
        self._trial = trial
        self.number = trial.number
        self.values = values

    def report(self, value: float, step: int) -> None:
        """Tells how it stands after an epoch.

        Args:
            value: higher is better.
            step: epochs so far, of all stages, from 0; never falls.

        Raises:
            Pruned: the trial is to be given up.
        """
        self._trial.report(value, step)
        if self._trial.should_prune():
            raise Pruned

    def note(self, **facts: str) -> None:
        """Keeps facts with the trial, for its outcome."""
        for name, fact in facts.items():
            self._trial.set_user_attr(_FACTS + name, fact)


class Study:
    """The trials of one sweep. Made by `open_study`."""

    def __init__(self, name: str, folder: Path, sweep: Sweep, study: optuna.Study) -> None:
        self.name = name
        self.folder = folder
        self._sweep = sweep
        self._study = study
        self._distributions = {key: _distribution(dimension) for key, dimension in sweep.space.items()}

    def outcomes(self) -> list[Outcome]:
        """Every trial that ended, in the order of their numbers."""
        ended = [trial for trial in self._study.get_trials(deepcopy=False) if trial.state.is_finished()]
        return [self._outcome(trial) for trial in ended]

    def best(self) -> Outcome | None:
        """The complete trial of the highest value, the first where several have it; None where none is complete."""
        complete = [outcome for outcome in self.outcomes() if outcome.state == "complete"]
        return max(complete, key=lambda outcome: outcome.value or 0.0, default=None)

    @property
    def left(self) -> int:
        """How many trials are still to be brought to an end. An interrupted one was not."""
        return max(0, self._sweep.trials - sum(outcome.state != "interrupted" for outcome in self.outcomes()))

    def remember(self, name: str, value: str) -> None:
        """Keeps a fact with the study."""
        self._study.set_user_attr(name, value)

    def recall(self, name: str) -> str | None:
        """What `remember` kept under that name; None where it kept nothing."""
        return self._study.user_attrs.get(name)

    def search(self, work: Callable[[Trial], float], after: Callable[[Outcome], None]) -> None:
        """Runs trials until none is left, or the sweep's time is over; then the one under way is still finished.

        Args:
            work: does a trial and returns its value, higher is better. Pruned, TrainingError and ConfigurationError end
                the trial; any other exception ends the search as well, and the trial counts as interrupted.
            after: told of each trial that ended.
        """
        minutes = self._sweep.timeout_minutes
        until = time.monotonic() + (minutes * 60 if minutes is not None else float("inf"))
        while self.left and time.monotonic() < until:
            after(self._run(work))
        if self.left:
            logger.info("%s: the time is over, with %d trials left; run it again to go on", self.name, self.left)

    def _run(self, work: Callable[[Trial], float]) -> Outcome:
        asked = self._ask()
        trial = Trial(asked, self._values(asked.params))
        logger.info("%s: trial %d (%d left): %s", self.name, trial.number, self.left, spoken(trial.values))
        try:
            value = work(trial)
        except Pruned:
            told = self._study.tell(asked, state=TrialState.PRUNED)
        except (TrainingError, ConfigurationError) as error:
            asked.set_user_attr(_ERROR, f"{type(error).__name__}: {error}")
            told = self._study.tell(asked, state=TrialState.FAIL)
        except BaseException as error:
            asked.set_user_attr(_CUT_OFF, f"{type(error).__name__}: {error}")
            self._study.tell(asked, state=TrialState.FAIL)
            raise
        else:
            told = self._study.tell(asked, value)
        return self._outcome(told)

    def _ask(self) -> optuna.Trial:
        # A sampler keeps its place in its random numbers in memory alone: one that is seeded once would, in a process
        # that goes on with a study, propose the first trials again. So each trial has a seed of its own, and what is
        # proposed follows from the sweep's seed and the trials before it, however often the search was broken off.
        number = len(self._study.get_trials(deepcopy=False))
        seed = int(np.random.SeedSequence([self._sweep.seed, number]).generate_state(1)[0])
        self._study.sampler = optuna.samplers.TPESampler(n_startup_trials=self._sweep.random_trials, seed=seed)
        return self._study.ask(self._distributions)

    def begin(self) -> None:
        """Makes the study ready for its next trial: ends those that a killed process left open, and puts the recipe's
        own values first, if they lie in the space, so that the best is never worse than what there was.
        """
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            logger.warning("%s: trial %d was cut off in the middle; marking it failed", self.name, trial.number)
            self._study.tell(trial.number, state=TrialState.FAIL)
        own = self._sweep.recipes_own_values
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        tried = [outcome.values for outcome in self.outcomes() if outcome.state != "interrupted"]
        if own is not None and not waiting and own not in tried:
            self._study.enqueue_trial({key: self._stored(key, value) for key, value in own.items()})

    def _outcome(self, trial: FrozenTrial) -> Outcome:
        attributes = trial.user_attrs
        states: dict[TrialState, State] = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}
        cut_off = attributes.get(_CUT_OFF, "Its process ended without a word.")
        # A trial that failed by itself says by what: one that failed and does not was cut off.
        error = attributes.get(_ERROR, "" if trial.state in states else cut_off)
        return Outcome(
            number=trial.number,
            state=states.get(trial.state, "failed" if _ERROR in attributes else "interrupted"),
            value=trial.value,
            values=self._values(trial.params),
            epochs=len(trial.intermediate_values),
            seconds=trial.duration.total_seconds() if trial.duration else 0.0,
            error=error,
            facts={key.removeprefix(_FACTS): fact for key, fact in attributes.items() if key.startswith(_FACTS)},
        )

    def _values(self, params: Mapping[str, Any]) -> dict[str, Value]:
        """Optuna's parameters as the recipe's values, in the order of the space."""
        return {key: _plain(params[key], kind) for key, kind in self._sweep.space.items() if key in params}

    def _stored(self, key: str, value: Value) -> Any:
        return json.dumps(value) if isinstance(self._sweep.space[key], Choices) else value


@contextmanager
def open_study(sweep: Sweep, name: str, folder: Path) -> Iterator[Study]:
    """The study of that name, with all trials that earlier processes made; nobody else may have it open.

    Args:
        sweep: the same as those trials were made with, but for the number of trials and the time.
        name: of the study.
        folder: its own; made if missing.

    Raises:
        TrainingError: another process searches in this folder.
        StorageError: the folder cannot be written, or the study in it cannot be read.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error}.", fix="correct MLOPS_VAR_DIR.") from error
    try:
        _take(lock, folder)
        study = Study(name, folder, sweep, _load(sweep, name, folder / _JOURNAL))
        study.begin()
        yield study
    finally:
        os.close(lock)


def _take(lock: int, folder: Path) -> None:
    try:
        # The kernel lets go of it when the process ends, however that ends.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TrainingError(
            f"Another process is searching in {folder}.", fix="wait for it to end, or stop it; then run this again."
        ) from error


def _load(sweep: Sweep, name: str, journal: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the steps are told here
    pruner = optuna.pruners.MedianPruner(
        n_startup_trials=sweep.pruner.startup_trials, n_warmup_steps=sweep.pruner.warmup_epochs
    )
    try:
        _clear_after_a_kill(journal)
        storage = JournalStorage(JournalFileBackend(str(journal)))
        return optuna.create_study(
            study_name=name, storage=storage, direction="maximize", pruner=pruner, load_if_exists=True
        )
    except OSError as error:
        raise StorageError(f"{journal} cannot be read or written: {error}.", fix="see to its disk.") from error
    except (ValueError, KeyError) as error:
        raise StorageError(
            f"{journal} is not what a search wrote: {error}.",
            fix=f"put it back from a backup, or remove {journal.parent} to search from the beginning.",
        ) from error


def _clear_after_a_kill(journal: Path) -> None:
    """What a process killed in the middle of a write leaves: Optuna's lock, which others would wait on for half a
    minute, and a line without its end, behind which Optuna would write on. Nobody else is at work here: see `_LOCK`.
    """
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if not journal.exists():
        return
    content = journal.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(journal, whole)


def _plain(stored: Any, dimension: Range | Choices) -> Value:
    if isinstance(dimension, Choices):
        return json.loads(stored)
    return _round(stored) if dimension.step is not None and isinstance(stored, float) else stored


def _round(number: float) -> float:
    """Steps of 0.1 add up to 0.30000000000000004."""
    return float(f"{number:.12g}")


def _distribution(dimension: Range | Choices) -> BaseDistribution:
    if isinstance(dimension, Choices):
        return CategoricalDistribution(dimension.labels)
    low, high, log, step = dimension.low, dimension.high, dimension.log, dimension.step
    if dimension.whole:
        return IntDistribution(int(low), int(high), log=log, step=1 if step is None else int(step))
    if step is not None:
        return FloatDistribution(_round(low), _round(high), step=_round(step))
    return FloatDistribution(low, high, log=log)
