"""Promotion and rollback, end to end: real MLflow, real PostgreSQL, real ONNX files, a small generated dataset."""

import threading
from collections.abc import Mapping

import numpy as np
import pytest
from pydantic import SecretStr

from ml.database import connect
from ml.datasets.store import load_split
from ml.errors import DatabaseUnavailable, DatasetNotFound, ModelNotFound, RegistryError, RegistryUnavailable
from ml.registry.aliases import MOVE_TAG
from ml.registry.versions import Registry
from ml.workflows import promote as workflow
from ml.workflows.promote import promote, rollback, verdict_of
from tests.tiny_models import always, nearest_mean
from tests.tiny_versions import empty_registry, register_tiny, small_dataset, take_alias


class Site:
    """A place to promote in: an empty registry, one dataset, and models of known merit on its test images."""

    def __init__(self, settings, folder):
        self.settings = settings
        self.folder = folder
        self.manifest = small_dataset(settings)
        self.test = load_split(settings.data_url, self.manifest.dataset_id, "test")
        self.registry = Registry(settings.tracking_uri)

    @property
    def good(self) -> Mapping[str, np.ndarray]:
        """Knows its test images: above chance."""
        return nearest_mean(self.test.images, self.test.labels)

    @property
    def poor(self) -> Mapping[str, np.ndarray]:
        """One answer to everything: exactly chance."""
        return always(0)

    def add(self, model, *, manifest=None, **named):
        work = self.folder / str(len(list(self.folder.iterdir())))
        return register_tiny(self.settings, manifest or self.manifest, work, model=model, **named).version

    def promote(self, **named):
        return promote(self.settings, **named)

    def standing(self):
        found = {alias: self.registry.by_alias(alias) for alias in ("champion", "previous")}
        return tuple(None if version is None else version.version for version in found.values())


@pytest.fixture
def site(settings, mlflow_uri, tmp_path):
    empty_registry(mlflow_uri)
    (tmp_path / "models").mkdir()
    return Site(settings.model_copy(update={"mlflow_tracking_uri": mlflow_uri}), tmp_path / "models")


@pytest.fixture
def locked_site(site, postgres):
    """With a database, so that promotions queue."""
    url = postgres.new_database("promotions")
    site.settings = site.settings.model_copy(update={"mlops_database_url": SecretStr(url)})
    return site


def test_from_no_champion_to_a_better_one_and_back(site):
    assert site.promote() == {
        "promoted": False,
        "reason": "Nothing to judge: no version waits for a verdict.",
        "dataset_id": None,
        "champion": None,
        "previous": None,
        "candidates": [],
        "n": 0,
    }

    first = site.add(nearest_mean(site.test.images[:100], site.test.labels[:100]), validation_accuracy=0.4)
    result = site.promote()
    assert (result["promoted"], site.standing()) == (True, (first, None)), result["reason"]
    assert result["champion"]["version"] == first
    assert result["n"] == 200

    poor = site.add(site.poor, validation_accuracy=0.9)
    result = site.promote()
    assert (result["promoted"], site.standing()) == (False, (first, None))
    (judged,) = result["candidates"]
    assert (judged["version"], judged["decision"], judged["test_accuracy"], judged["n"]) == (poor, "refused", 0.1, 200)

    second = site.add(site.good, validation_accuracy=0.5, architecture="vgg16")
    result = site.promote()
    assert (result["promoted"], site.standing()) == (True, (second, first)), result["reason"]
    assert result["champion"]["architecture"] == "vgg16"
    assert result["champion"]["test_accuracy"] > result["previous"]["test_accuracy"] > 0.1
    tags = site.registry.by_version(second).tags
    assert tags["gate.decision"] == "promoted"
    assert tags["gate.reason"] == result["reason"]
    assert (tags["gate.n"], tags["gate.against"]) == ("200", str(first))
    assert float(tags["gate.test_accuracy"]) == result["champion"]["test_accuracy"]
    assert site.registry.by_version(poor).tags["gate.decision"] == "refused"
    assert site.promote()["promoted"] is False, "a second run had something to judge"

    back = rollback(site.settings)
    assert (back["rolled_back"], site.standing()) == (True, (first, second))
    assert f"to version {first}" in back["reason"]
    assert site.registry.by_version(second).tags["rollback.reason"] == back["reason"]
    rollback(site.settings)
    assert site.standing() == (second, first)


def test_figures_are_those_of_scikit_learn_on_the_same_images(site):
    from sklearn.metrics import accuracy_score, log_loss, precision_score, recall_score

    from ml.serving.engine import Engine

    version = site.add(site.good)
    (judged,) = site.promote()["candidates"]
    onnx = site.registry.fetch(version, site.settings.cache_dir) / "artifacts/model.onnx"
    probabilities = Engine(onnx).predict(site.test.images)
    labels, answers = site.test.labels, probabilities.argmax(axis=1)
    macro = {"average": "macro", "zero_division": 0}
    assert judged["test_accuracy"] == pytest.approx(accuracy_score(labels, answers))
    assert judged["precision"] == pytest.approx(precision_score(labels, answers, **macro))
    assert judged["recall"] == pytest.approx(recall_score(labels, answers, **macro))
    assert judged["loss"] == pytest.approx(log_loss(labels, probabilities, labels=range(10)), rel=1e-4)


def test_the_verdict_on_a_version_can_be_read_at_any_time(site):
    version = site.add(site.good, validation_accuracy=0.5)
    waiting = verdict_of(site.settings, version)
    assert waiting == {
        "version": version,
        "architecture": "baseline",
        "dataset_id": site.manifest.dataset_id,
        "decision": "pending",
        "reason": "",
        "validation_accuracy": 0.5,
        **dict.fromkeys(("test_accuracy", "precision", "recall", "loss")),
        "n": 0,
    }
    (judged,) = site.promote()["candidates"]
    assert judged == verdict_of(site.settings, version)
    assert (judged["decision"], judged["n"]) == ("promoted", 200)
    assert None not in judged.values()
    with pytest.raises(ModelNotFound):
        verdict_of(site.settings, 99)


def test_figures_of_an_earlier_look_do_not_stand_beside_a_later_verdict(site):
    champion = site.add(site.good)
    site.promote()
    right = site.registry.by_version(champion).tags["sha256.model.onnx"]
    site.registry.set_tags(champion, {"sha256.model.onnx": "0" * 64})
    version = site.add(site.good)
    (waiting,) = site.promote()["candidates"]
    assert (waiting["decision"], waiting["n"]) == ("pending", 200)
    site.registry.set_tags(champion, {"sha256.model.onnx": right})
    site.registry.set_tags(version, {"sha256.model.onnx": "0" * 64})
    (refused,) = site.promote()["candidates"]
    assert (refused["decision"], refused["test_accuracy"], refused["n"]) == ("refused", None, 0)


def test_a_tie_keeps_the_champion(site):
    first = site.add(site.good)
    site.promote()
    site.add(site.good, validation_accuracy=0.99)
    result = site.promote()
    assert (result["promoted"], site.standing()) == (False, (first, None))
    assert "tie" in result["reason"]


def test_the_newest_candidates_dataset_is_judged_and_no_other(site):
    other = small_dataset(site.settings, seed=9)
    old = site.add(site.good)
    new = site.add(site.good, manifest=other)
    result = site.promote(test_limit=50)
    assert result["dataset_id"] == other.dataset_id
    assert [judged["version"] for judged in result["candidates"]] == [new]
    assert (result["n"], site.registry.by_version(old).decision) == (50, "pending")


def test_a_champion_of_another_dataset_is_succeeded_only_as_a_new_lineage(site):
    other = small_dataset(site.settings, seed=9)
    test = load_split(site.settings.data_url, other.dataset_id, "test")
    first = site.add(site.good)
    site.promote()
    second = site.add(nearest_mean(test.images, test.labels), manifest=other)
    result = site.promote()
    assert (result["promoted"], site.standing()) == (False, (first, None))
    assert "--new-lineage" in result["reason"]
    assert site.registry.by_version(second).tags["gate.reason"] == result["reason"]
    assert site.promote(new_lineage=True)["promoted"] is True
    assert site.standing() == (second, first)


def test_a_candidate_that_cannot_be_measured_is_refused_and_a_sound_one_promoted(site):
    broken = site.add(site.good, validation_accuracy=0.98)
    site.registry.set_tags(broken, {"sha256.model.onnx": "0" * 64})
    # Well-behaved on the blank images that it is looked at with before; infinite, so NaN, on real ones.
    overflowing = np.zeros((3072, 10))
    overflowing[:, 0] = 3e38
    nan = site.add({"weights": overflowing}, validation_accuracy=0.99)
    sound = site.add(site.good, validation_accuracy=0.5)
    result = site.promote()
    assert (result["promoted"], site.standing()) == (True, (sound, None)), result["reason"]
    judged = {item["version"]: item for item in result["candidates"]}
    assert "SHA-256" in judged[broken]["reason"]
    assert judged[broken]["test_accuracy"] is None
    assert judged[nan]["decision"] == "refused"


def test_a_champion_that_cannot_be_measured_lets_candidates_wait(site):
    first = site.add(site.good)
    site.promote()
    site.registry.set_tags(first, {"sha256.model.onnx": "0" * 64})
    second = site.add(site.good)
    result = site.promote()
    assert (result["promoted"], site.standing()) == (False, (first, None))
    assert site.registry.by_version(second).decision == "pending"


def test_could_not_ask_is_an_error_and_changes_nothing(site, settings):
    version = site.add(site.good)
    with pytest.raises(RegistryUnavailable):
        promote(settings)  # nobody answers at that address
    with pytest.raises(DatasetNotFound):
        promote(site.settings.model_copy(update={"mlops_data_url": (site.folder / "empty").as_uri()}))
    away = site.settings.model_copy(update={"mlops_database_url": SecretStr("postgresql://x@127.0.0.1:9/x")})
    with pytest.raises(DatabaseUnavailable):
        promote(away)
    assert site.standing() == (None, None)
    assert site.registry.by_version(version).decision == "pending"


def test_rollback_without_a_previous_champion_says_so(site):
    with pytest.raises(ModelNotFound, match="no previous"):
        rollback(site.settings)
    site.add(site.good)
    site.promote()
    with pytest.raises(ModelNotFound, match="no previous"):
        rollback(site.settings)


WRITES = ("set_tags", "set_alias", "set_model_tag", "delete_model_tag")


class Outage:
    """Lets so many writes to the registry pass and fails from the next one on."""

    def __init__(self, patch, passing: int) -> None:
        self.written = 0
        for name in WRITES:
            patch.setattr(Registry, name, self._counted(getattr(Registry, name), passing))

    def _counted(self, write, passing):
        def counted(*arguments):
            if self.written >= passing:
                raise RegistryUnavailable("MLflow went away.", fix="wait")
            self.written += 1
            return write(*arguments)

        return counted


def test_a_promotion_cut_short_at_any_write_ends_right_when_run_again(site):
    champion = site.add(nearest_mean(site.test.images[:100], site.test.labels[:100]))
    site.promote()
    loser = site.add(site.poor, validation_accuracy=0.1)
    winner = site.add(site.good, validation_accuracy=0.9)
    for passing in range(20):
        with pytest.MonkeyPatch.context() as patch:
            Outage(patch, passing)
            try:
                site.promote()
            except RegistryUnavailable:
                served = site.standing()[0]
                assert served in (champion, winner)
            else:
                break  # as many writes as a whole promotion has
        result = site.promote()
        assert (result["promoted"], site.standing()) == (True, (winner, champion)), f"after {passing} writes"
        assert site.registry.model_tag(MOVE_TAG) is None
        verdicts = {version: verdict_of(site.settings, version) for version in (winner, loser)}
        decisions = {version: verdict["decision"] for version, verdict in verdicts.items()}
        assert decisions == {winner: "promoted", loser: "refused"}, f"after {passing} writes"
        assert {verdict["n"] for verdict in verdicts.values()} == {200}
        assert verdicts[winner] in result["candidates"]
        # As it was before.
        site.registry.set_alias("champion", champion)
        take_alias(site.registry, "previous")
        for version in (winner, loser):
            site.registry.set_tags(version, {"gate.decision": "pending"})
    assert passing == 6, "loser, move, winner, previous, champion, move struck out"


def by_promotion(site):
    site.promote()


def by_rollback(site):
    result = rollback(site.settings)
    assert result["rolled_back"] is True
    assert result["reason"].startswith("Rolled back from version 2 to version 1")


@pytest.mark.parametrize("come_next", [by_promotion, by_rollback])
def test_a_rollback_cut_short_at_any_write_is_finished_by_whatever_comes_next(site, come_next):
    first = site.add(nearest_mean(site.test.images[:100], site.test.labels[:100]))
    site.promote()
    second = site.add(site.good)
    site.promote()
    for passing in range(0 if come_next is by_rollback else 1, 20):
        with pytest.MonkeyPatch.context() as patch:
            Outage(patch, passing)
            try:
                rollback(site.settings)
            except RegistryUnavailable:
                pass
            else:
                break
        come_next(site)
        assert site.standing() == (first, second), f"after {passing} writes"
        site.registry.set_alias("champion", second)
        site.registry.set_alias("previous", first)
    assert passing == 6, "move, two versions, previous, champion, move struck out"


def test_a_move_that_somebody_overtook_by_hand_is_dropped(site):
    first, second, third = (site.add(site.good, validation_accuracy=v) for v in (0.9, 0.5, 0.4))
    site.promote()
    assert site.standing() == (first, None)
    site.registry.set_model_tag(
        MOVE_TAG, f'{{"champion": {second}, "previous": {first}, "before": {first}, "evidence": {{}}}}'
    )
    site.registry.set_alias("champion", third)
    site.promote()
    assert site.standing() == (third, None)
    assert site.registry.model_tag(MOVE_TAG) is None


def test_of_two_promotions_at_once_the_second_waits_and_judges_afresh(locked_site, monkeypatch):
    site = locked_site
    version = site.add(site.good)
    judging, go_on = threading.Event(), threading.Event()
    measure = workflow._measure

    def slowly(*arguments):
        judging.set()
        assert go_on.wait(60)
        return measure(*arguments)

    monkeypatch.setattr(workflow, "_measure", slowly)
    results = {}
    threads = [threading.Thread(target=lambda k=k: results.update({k: site.promote()})) for k in ("first", "second")]
    threads[0].start()
    assert judging.wait(60)
    threads[1].start()
    with pytest.raises(RegistryError, match="under way"):
        site.promote(lock_wait_seconds=0.2)
    assert results == {}, "a promotion ended although the first still judges"
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert results["first"]["promoted"] is True
    assert results["second"]["promoted"] is False
    assert "Nothing to judge" in results["second"]["reason"]
    assert site.standing() == (version, None)


def test_the_lock_is_free_after_a_promotion_and_after_a_failed_one(locked_site, monkeypatch):
    site = locked_site
    site.promote()
    monkeypatch.setattr(workflow, "Registry", lambda _: Registry("http://127.0.0.1:9"))
    with pytest.raises(RegistryUnavailable):
        site.promote()
    connection = connect(site.settings.database_url)
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_lock(%s)", (workflow.LOCK_KEY,))
        assert cursor.fetchone() == (True,)
    connection.close()


def test_a_lock_that_is_lost_moves_nothing(locked_site, monkeypatch):
    site = locked_site
    version = site.add(site.good)
    decide = workflow.decide

    def cut_off(*arguments, **named):
        """What a restart of PostgreSQL does, after the measuring and before the moving."""
        other = connect(site.settings.database_url)
        other.autocommit = True
        with other.cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = current_user "
                "AND pid <> pg_backend_pid()"
            )
        other.close()
        return decide(*arguments, **named)

    monkeypatch.setattr(workflow, "decide", cut_off)
    with pytest.raises(DatabaseUnavailable, match="nothing was moved"):
        site.promote()
    assert site.standing() == (None, None)
    assert site.registry.by_version(version).decision == "pending"
