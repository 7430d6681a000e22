"""The follower, one look at a time, with a folder in the registry's place."""

import json
import logging
import shutil
import threading

import numpy as np
import pytest

from ml.errors import ModelInvalid, RegistryError, RegistryUnavailable, ServiceUnavailable, StorageError
from ml.serving.hot_swap import ChampionFollower
from ml.serving.testing import FolderSource
from tests.tiny_models import always, make_onnx

IMAGE = np.zeros((1, 32, 32, 3), np.uint8)


class Stage:
    """A folder that plays the registry, and a follower of it."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "registry").mkdir()
        self.source = FolderSource(folder / "registry")
        self.follower = self.another()

    def another(self, **options):
        return ChampionFollower(self.source, self.folder / "cache", **options)

    def crown(self, version, class_id=0, **words):
        self.source.crown(make_onnx(self.folder / f"{version}.onnx", **always(class_id)), version, **words)

    def crown_broken(self, version):
        path = self.folder / f"{version}.onnx"
        path.write_bytes(b"broken")
        self.source.crown(path, version)

    def leave(self):
        shutil.move(self.folder / "registry", self.folder / "away")

    def come_back(self):
        shutil.move(self.folder / "away", self.folder / "registry")


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def answers(follower):
    model = follower.current()
    return model.version, int(model.engine.predict(IMAGE).argmax())


def test_a_start_with_patience_waits_for_the_first_look_and_no_longer(stage, monkeypatch):
    stage.crown(3, 7)
    patient = stage.another(every=60)
    patient.start(patience=30)
    assert answers(patient) == (3, 7)
    patient.close()
    goes_on = threading.Event()
    monkeypatch.setattr(stage.source, "champion", lambda: goes_on.wait(30) and None)
    hurried = stage.another(every=60)
    hurried.start(patience=0.05)
    with pytest.raises(ServiceUnavailable, match="being loaded"):
        hurried.current()
    goes_on.set()
    hurried.close()


def test_before_the_first_look_it_is_loading(stage):
    with pytest.raises(ServiceUnavailable, match="being loaded"):
        stage.follower.current()


def test_a_champion_is_loaded_with_all_that_is_said_of_it(stage):
    stage.crown(3, 7, data="cifar-10", architecture="vgg16", weights="RANDOM WEIGHTS")
    stage.follower.poll()
    model = stage.follower.current()
    assert answers(stage.follower) == (3, 7)
    assert (model.name, model.alias, model.data) == ("cifar10-classifier", "champion", "cifar-10")
    assert (model.architecture, model.weights) == ("vgg16", "RANDOM WEIGHTS")
    assert stage.follower.state().swaps == 1


def test_the_same_champion_is_not_loaded_again(stage):
    stage.crown(1)
    loads = []
    follower = stage.another(load=lambda path: loads.append(path) or object())
    for _ in range(3):
        follower.poll()
    assert len(loads) == 1


def test_a_new_champion_takes_over_and_an_old_one_may_come_back(stage):
    for version, class_id in [(1, 4), (2, 5), (1, 4)]:
        stage.crown(version, class_id)
        stage.follower.poll()
        assert answers(stage.follower) == (version, class_id)
    assert stage.follower.state().swaps == 3


def test_a_registry_made_anew_counts_from_one_and_its_version_is_another_model(stage):
    stage.crown(1, 4)
    stage.follower.poll()
    stage.crown(1, 5)
    stage.follower.poll()
    assert answers(stage.follower) == (1, 5)


def test_another_form_of_the_same_version_is_a_swap_and_is_remembered(stage):
    stage.crown(1, 4)
    stage.follower.poll()
    assert stage.follower.current().engine_name == "fp32"
    stage.crown(1, 5, engine="int8")
    stage.follower.poll()
    assert answers(stage.follower) == (1, 5)
    assert (stage.follower.state().swaps, stage.follower.current().engine_name) == (2, "int8")
    stage.leave()
    late = stage.another()
    late.poll()
    assert late.current().engine_name == "int8"


def test_a_request_keeps_the_model_that_it_began_with(stage):
    stage.crown(1, 4)
    stage.follower.poll()
    mine = stage.follower.current()
    stage.crown(2, 5)
    stage.follower.poll()
    assert (mine.version, int(mine.engine.predict(IMAGE).argmax())) == (1, 4)


def test_a_broken_champion_leaves_the_old_one_and_is_reported(stage):
    stage.crown(1, 4)
    stage.follower.poll()
    stage.crown_broken(2)
    stage.follower.poll()
    assert answers(stage.follower) == (1, 4)
    state = stage.follower.state()
    assert (state.failed_swaps, state.failure.version) == (1, 2)
    assert "2.onnx" in state.failure.message
    assert str(stage.folder) not in state.failure.message


def test_a_broken_champion_is_not_loaded_at_every_look(stage):
    stage.crown_broken(1)
    for _ in range(5):
        stage.follower.poll()
    assert stage.follower.state().failed_swaps == 1
    eager = stage.another(again_after=0)
    for _ in range(5):
        eager.poll()
    assert eager.state().failed_swaps == 5


def test_a_good_champion_after_a_broken_one_clears_the_report(stage):
    stage.crown_broken(1)
    stage.follower.poll()
    stage.crown(2, 6)
    stage.follower.poll()
    assert answers(stage.follower) == (2, 6)
    assert stage.follower.state().failure is None


def test_going_back_to_the_serving_champion_clears_the_report(stage):
    stage.crown(1)
    stage.follower.poll()
    stage.crown_broken(2)
    stage.follower.poll()
    stage.crown(1)
    stage.follower.poll()
    assert stage.follower.state().failure is None
    assert stage.follower.state().swaps == 1


def test_a_registry_that_goes_away_stops_nothing(stage, caplog):
    caplog.set_level(logging.WARNING)
    stage.crown(1, 4)
    stage.follower.poll()
    stage.leave()
    for _ in range(3):
        stage.follower.poll()
    assert answers(stage.follower) == (1, 4)
    assert stage.follower.state().failure.message == "The model registry could not be asked."
    assert len(caplog.records) == 1  # told once, not at every look
    stage.come_back()
    stage.follower.poll()
    assert stage.follower.state().failure is None


def test_a_start_without_a_registry_serves_the_last_champion(stage):
    stage.crown(1, 4)
    stage.follower.poll()
    stage.leave()
    fresh = stage.another()
    fresh.poll()
    assert answers(fresh) == (1, 4)
    assert fresh.state().failure is not None
    stage.come_back()
    stage.crown(2, 5)
    fresh.poll()
    assert answers(fresh) == (2, 5)


def test_a_start_without_a_registry_and_without_a_memory_is_not_ready(stage):
    stage.leave()
    stage.follower.poll()
    with pytest.raises(ServiceUnavailable, match="registry could not be asked"):
        stage.follower.current()


@pytest.mark.parametrize("memory", ["", "{}", "[1]", '{"path": "/none.onnx"}', "model gone"])
def test_a_damaged_memory_is_no_champion(stage, memory):
    stage.crown(1, 4)
    stage.follower.poll()
    record = stage.folder / "cache" / "serving" / "last_champion.json"
    if memory == "model gone":
        (stage.folder / "1.onnx").unlink()
    else:
        record.write_text(memory)
    stage.leave()
    fresh = stage.another()
    fresh.poll()
    with pytest.raises(ServiceUnavailable):
        fresh.current()


def test_a_registry_that_has_no_champion_is_believed_over_the_memory(stage):
    stage.crown(1, 4)
    stage.follower.poll()
    (stage.folder / "registry" / "champion.json").unlink()
    fresh = stage.another()
    fresh.poll()
    with pytest.raises(ServiceUnavailable, match="cifar10 promote"):
        fresh.current()
    stage.follower.poll()
    assert answers(stage.follower) == (1, 4)  # who serves goes on
    assert "goes on serving" in stage.follower.state().failure.message


@pytest.mark.parametrize(
    ("error", "said", "asked_again"),
    [
        (RegistryUnavailable("MLflow at http://secret:5000 is away.", fix="-"), "could not be asked", True),
        (RegistryError("MLflow at http://secret:5000 refused.", fix="-"), "refused", False),
        (StorageError("/secret/cache is full.", fix="-"), "disk", False),
        (PermissionError("/secret/cache/model.onnx"), "disk", False),
        (ModelInvalid("model.onnx has another checksum.", fix="-"), "checksum", False),
    ],
)
def test_a_fetch_that_fails_is_told_in_public_words(stage, error, said, asked_again):
    stage.crown(1)
    fetches = []

    def fetch(champion):
        fetches.append(champion)
        raise error

    stage.source.fetch = fetch
    stage.follower.poll()
    stage.follower.poll()
    message = stage.follower.state().failure.message
    assert said in message
    assert "secret" not in message
    assert len(fetches) == (2 if asked_again else 1)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RegistryError("MLflow at http://secret:5000 refused.", fix="-"), "refused"),
        (OSError("/secret/cache"), "disk"),
    ],
)
def test_a_question_that_fails_in_whatever_way_is_told_and_leaves_the_old_model(stage, error, said):
    stage.crown(1, 4)
    stage.follower.poll()

    def champion():
        raise error

    answering, stage.source.champion = stage.source.champion, champion
    stage.follower.poll()
    assert answers(stage.follower) == (1, 4)
    message = stage.follower.state().failure.message
    assert said in message
    assert "secret" not in message
    stage.source.champion = answering
    stage.follower.poll()
    assert stage.follower.state().failure is None


def test_the_thread_outlives_an_error_that_nobody_foresaw(stage, caplog):
    stage.crown(1, 4)
    answering, failed, answered = stage.source.champion, threading.Event(), threading.Event()
    looks = []

    def champion():
        looks.append(stage.follower)
        if len(looks) < 3:
            raise ZeroDivisionError("secret")
        if len(looks) == 3:
            failed.set()
            assert answered.wait(10)
        return answering()

    stage.source.champion = champion
    follower = stage.follower = stage.another(every=0.01)
    follower.start()
    try:
        assert failed.wait(10), "the thread died"
        assert follower.state().failure.message == "The server could not look for its model; its log says why."
        assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError]  # once, with its place
        swapped, load = threading.Event(), follower._take
        follower._take = lambda *arguments: (load(*arguments), swapped.set())
        answered.set()
        assert swapped.wait(10)
        assert answers(follower) == (1, 4)
    finally:
        answered.set()
        follower.close()


def test_a_cache_that_cannot_be_written_does_not_stop_serving(stage, caplog):
    (stage.folder / "cache").write_text("a file where the folder should be")
    stage.crown(1, 4)
    stage.follower.poll()
    assert answers(stage.follower) == (1, 4)
    assert "cannot be remembered" in caplog.text


def test_the_memory_is_whole(stage):
    stage.crown(5)
    stage.follower.poll()
    record = json.loads((stage.folder / "cache" / "serving" / "last_champion.json").read_text())
    assert (record["version"], record["path"]) == (5, str(stage.folder / "5.onnx"))
