"""The follower and the challenger, one look at a time, with a folder in the registry's place."""

import logging
import shutil

import numpy as np
import pytest

from ml.errors import RegistryError, RegistryUnavailable, StorageError
from ml.serving.engine import ServingEngine
from ml.serving.hot_swap import ChampionFollower
from ml.serving.testing import FolderSource
from tests.tiny_models import always, make_onnx

IMAGE = np.zeros((1, 32, 32, 3), np.uint8)


class Stage:
    """Version 1 is the champion and loaded; a follower of it, which counts what it loads."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "registry").mkdir()
        self.source = FolderSource(folder / "registry")
        self.source.crown(self.model(1), 1)
        self.loaded = []
        self.follower = self.another()
        self.follower.poll()

    def another(self, **options):
        return ChampionFollower(self.source, self.folder / "cache", load=self.load, **options)

    def load(self, path):
        self.loaded.append(int(path.stem))
        return ServingEngine(path, cores=1)

    def model(self, version):
        return make_onnx(self.folder / f"{version}.onnx", **always(version))

    def broken(self, version):
        path = self.folder / f"{version}.onnx"
        path.write_bytes(b"broken")
        return path

    def name(self, version, path=None):
        self.source.name_challenger(path or self.model(version), version)

    def send(self, version, mode="mirror", share=0.5):
        self.source.send(version, mode, share)

    def look(self):
        """One look; the champion must be there after it, whatever the challenger does."""
        self.follower.poll()
        assert self.follower.current().version == 1
        assert self.follower.state().failure is None
        return self.follower.state().challenger


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def test_a_challenger_without_traffic_is_not_loaded(stage):
    stage.name(2)
    assert stage.look() is None
    assert stage.loaded == [1]


def test_traffic_without_a_challenger_loads_nothing(stage):
    stage.send(2)
    assert stage.look() is None


def test_traffic_for_the_challenger_loads_it_once_beside_the_champion(stage):
    stage.name(2)
    stage.send(2, "canary", 0.25)
    for _ in range(3):
        challenger = stage.look()
    assert stage.loaded == [1, 2]
    assert (challenger.traffic.version, challenger.traffic.mode, challenger.traffic.share) == (2, "canary", 0.25)
    assert (challenger.model.version, challenger.model.alias, challenger.failure) == (2, "challenger", None)
    assert challenger.model.engine.predict(IMAGE).argmax() == 2
    assert stage.follower.current().engine.predict(IMAGE).argmax() == 1
    assert stage.follower.state().swaps == 1  # of champions


def test_another_share_or_mode_is_taken_up_without_loading_again(stage):
    stage.name(2)
    stage.send(2, "mirror", 1)
    before = stage.look()
    stage.send(2, "canary", 0.1)
    after = stage.look()
    assert (after.traffic.mode, after.traffic.share) == ("canary", 0.1)
    assert after.model is before.model


def test_it_is_let_go_when_its_traffic_ends(stage):
    stage.name(2)
    stage.send(2)
    stage.look()
    stage.source.end_traffic()
    assert stage.look() is None
    stage.send(2)
    assert stage.look().model.version == 2


def test_a_newer_challenger_gets_no_traffic(stage):
    stage.name(2)
    stage.send(2)
    assert stage.look().model.version == 2
    stage.name(3)  # as a training does, with the traffic still set
    assert stage.look() is None
    assert 3 not in stage.loaded
    stage.send(3)
    assert stage.look().model.version == 3


def test_a_challenger_that_becomes_the_champion_is_one_no_more(stage):
    stage.name(2)
    stage.send(2)
    stage.look()
    stage.source.crown(stage.folder / "2.onnx", 2)
    stage.follower.poll()
    assert stage.follower.current().version == 2
    assert stage.follower.state().challenger is None
    stage.source.crown(stage.folder / "1.onnx", 1)  # back, and the traffic was never taken away
    stage.follower.poll()
    assert stage.look().model.version == 2


def test_a_champion_that_cannot_be_loaded_is_not_shown_traffic_either(stage):
    path = stage.broken(2)
    stage.source.crown(path, 2)
    stage.name(2, path)
    stage.send(2)
    stage.follower.poll()
    assert stage.follower.current().version == 1
    assert stage.follower.state().challenger is None


def test_one_that_cannot_be_loaded_is_told_and_gets_nothing(stage, caplog):
    stage.name(2, stage.broken(2))
    stage.send(2)
    for _ in range(4):
        challenger = stage.look()
    assert challenger.model is None
    assert challenger.traffic.version == challenger.failure.version == 2
    assert "2.onnx" in challenger.failure.message
    assert str(stage.folder) not in challenger.failure.message
    assert stage.loaded == [1, 2]  # not at every look
    assert stage.follower.state().failed_challengers == 1
    assert stage.follower.state().failed_swaps == 0
    assert len([record for record in caplog.records if "Challenger" in record.message]) == 1
    stage.source.end_traffic()
    assert stage.look() is None
    stage.send(2)
    assert "2.onnx" in stage.look().failure.message  # known from before


def test_a_broken_one_after_a_good_one_takes_its_traffic_and_does_not_leave_it_the_other(stage):
    stage.name(2)
    stage.send(2)
    stage.look()
    stage.name(3, stage.broken(3))
    stage.send(3)
    assert stage.look().model is None
    stage.name(2)
    stage.send(2)
    assert stage.look().model.version == 2
    stage.name(3, stage.folder / "3.onnx")
    stage.send(3)
    assert stage.look().model is None


def test_one_that_failed_is_tried_again_after_a_while(stage):
    stage.follower = stage.another(again_after=0)
    stage.name(2, stage.broken(2))
    stage.send(2)
    stage.look()
    stage.model(2)
    assert stage.look().model.version == 2


@pytest.mark.parametrize(
    "error",
    [
        RegistryUnavailable("MLflow at http://secret:5000 is away.", fix="-"),
        StorageError("/secret/cache is full.", fix="-"),
        ZeroDivisionError("secret"),
    ],
)
def test_a_load_that_fails_in_whatever_way_leaves_the_champion_alone(stage, error):
    fetch = stage.source.fetch

    def fails_for_2(champion):
        if champion.version == 2:
            raise error
        return fetch(champion)

    stage.source.fetch = fails_for_2
    stage.name(2)
    stage.send(2)
    for _ in range(3):
        challenger = stage.look()
    assert stage.follower.state().failed_challengers == 1  # a champion's change would wait behind each try
    assert challenger.model is None
    assert "secret" not in challenger.failure.message


@pytest.mark.parametrize("written", ["", "[]", "{}", '{"version": 2, "mode": "mirror", "share": 7, "since": "2026"}'])
def test_traffic_that_cannot_be_read_is_no_traffic_and_is_told(stage, written):
    stage.name(2)
    stage.send(2)
    assert stage.look().model is not None
    (stage.folder / "registry" / "traffic.json").write_text(written)
    challenger = stage.look()
    assert (challenger.traffic, challenger.model) == (None, None)
    assert challenger.failure.message == "The challenger's traffic cannot be read."
    stage.send(2)
    assert stage.look().failure is None


def test_while_the_registry_is_away_the_challenger_goes_on(stage):
    stage.name(2)
    stage.send(2, "canary", 0.3)
    known = stage.look()
    shutil.move(stage.folder / "registry", stage.folder / "away")
    stage.follower.poll()
    assert stage.follower.state().failure is not None
    assert stage.follower.state().challenger == known


def test_where_only_the_challenger_cannot_be_asked_for_it_goes_on_and_that_is_told(stage, caplog):
    caplog.set_level(logging.WARNING)
    stage.name(2)
    stage.send(2)
    known = stage.look()
    answering = stage.source.challenger

    def away():
        raise RegistryUnavailable("MLflow at http://secret:5000 is away.", fix="-")

    stage.source.challenger = away
    for _ in range(3):
        challenger = stage.look()
    assert (challenger.model, challenger.traffic) == (known.model, known.traffic)
    assert challenger.failure.message == "The model registry could not be asked."
    assert len(caplog.records) == 1
    stage.source.challenger = answering
    assert stage.look() == known


def test_a_question_that_is_refused_ends_the_traffic(stage):
    stage.name(2)
    stage.send(2)
    stage.look()

    def refused():
        raise RegistryError("MLflow at http://secret:5000 refused.", fix="-")

    stage.source.challenger = refused
    assert stage.look().model is None
