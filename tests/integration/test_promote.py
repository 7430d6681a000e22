"""Promotion and rollback, end to end: real MLflow, real PostgreSQL, real ONNX files, a small generated dataset."""

import json
import multiprocessing
import os
import signal
import threading
import time
from datetime import UTC, datetime
from functools import partial
from html import unescape
from uuid import uuid4

import numpy as np
import pytest
from pydantic import SecretStr

from deploy.server.registry_source import RegistrySource
from ml.database import connect
from ml.datasets.store import load_split
from ml.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    DatasetNotFound,
    ModelInvalid,
    ModelNotFound,
    RegistryError,
    RegistryUnavailable,
)
from ml.evaluation import gate_report
from ml.evaluation.gate import Check
from ml.evaluation.robustness import robustness
from ml.monitoring.shadow_log import ShadowLog
from ml.registry import traffic
from ml.registry.aliases import MOVE_TAG
from ml.registry.versions import Registry
from ml.settings import Settings
from ml.traffic import Mirrored
from ml.workflows import exam, judging, promotion_lock
from ml.workflows import promote as workflow
from ml.workflows.engines import set_engine
from ml.workflows.promote import promote
from ml.workflows.rollback import rollback
from ml.workflows.verdicts import verdict_of
from tests.tiny_models import always, answering
from tests.tiny_versions import empty_registry, int8_files, register_tiny, small_dataset, take_alias

POLICY = """
[mechanical]
agreement_images = 10
agreement = 0.001
p95_latency_ms = 1000.0
size_mib = 10.0
[absolute]
accuracy = 0.05
calibration_error = 1.0
corrupted_accuracy = 0.0
corrupted_images = 10
[champion]
level = 0.05
power = 0.8
class_margin = 0.05
corrupted_margin = 1.0
calibration_margin = 1.0
[shadow]
failures = 0.0
disagreement_margin = 0.2
p95_latency_ms = 50.0
[int8]
wanted = true
confidence = 0.95
largest_accuracy_fall = 0.003
calibration_margin = 0.01
least_speedup = 0.0
agreement = 0.95
golden_agreement = 0.05
"""
"""For models that know twenty images a class and nothing else."""


def sound(settings, version, engine):
    """What a version that is in order answers to an inspection; the real one is tested in test_inspect_version.py."""
    return (Check("loads", "mechanical", holds=True, says="it does"),)


class Site:
    """A place to promote in: an empty registry, one dataset, and models of known merit on its test images."""

    def __init__(self, settings, folder):
        self.settings = settings
        self.folder = folder
        self.manifest = small_dataset(settings)
        self.test = load_split(settings.data_url, self.manifest.dataset_id, "test")
        self.registry = Registry(settings.tracking_uri)

    def right(self, n, test=None):
        """A model that has `n` of the 200 test images right, as many in each class."""
        test = test or self.test
        rank = np.empty(len(test.labels), dtype=int)
        for label in range(10):
            (here,) = np.nonzero(test.labels == label)
            rank[here] = np.arange(len(here)) * 10 + label
        return answering(test.images, np.where(rank < n, test.labels, (test.labels + 1) % 10))

    @property
    def good(self):
        """Has nine of ten test images right."""
        return self.right(180)

    @property
    def poor(self):
        """One answer to everything: exactly chance."""
        return always(0)

    def add(self, model, *, manifest=None, int8=None, **named):
        work = self.folder / str(len(list(self.folder.iterdir())))
        if int8:
            named["int8"] = int8_files(work, int8)
        return register_tiny(self.settings, manifest or self.manifest, work, model=model, **named).version

    def promote(self, **named):
        return promote(self.settings, inspect=sound, **named)

    def tolerate(self, fall):
        """Lets int8 cost more than the policy does: 200 images cannot show that less than 0.013 was lost."""
        changed = POLICY.replace("largest_accuracy_fall = 0.003", f"largest_accuracy_fall = {fall}")
        self.settings.gate_policy.write_text(changed.replace("calibration_margin = 0.01", "calibration_margin = 0.1"))

    def standing(self):
        found = {alias: self.registry.by_alias(alias) for alias in ("champion", "previous")}
        return tuple(None if version is None else version.version for version in found.values())


@pytest.fixture
def site(settings, mlflow_uri, tmp_path, monkeypatch):
    empty_registry(mlflow_uri)
    (tmp_path / "models").mkdir()
    (tmp_path / "gate.toml").write_text(POLICY)
    changes = {"mlflow_tracking_uri": mlflow_uri, "gate_policy": tmp_path / "gate.toml"}
    _made_quick(monkeypatch.setattr)
    return Site(settings.model_copy(update=changes), tmp_path / "models")


def _made_quick(replace):
    """Draws no report and corrupts in one way of 75; `test_the_evidence_...` has all of it."""
    replace(workflow, "as_html", lambda report: f"<p>{report.verdict.reason}</p>")
    replace(exam, "robustness", partial(robustness, corruptions=["fog"], severities=[3]))


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
        "reports": [],
        "n": 0,
    }

    first = site.add(site.right(120), validation_accuracy=0.4)
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
    assert (result["champion"]["test_accuracy"], result["previous"]["test_accuracy"]) == (0.9, 0.6)
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
        **dict.fromkeys(("test_accuracy", "precision", "recall", "loss", "report")),
        "n": 0,
        "engine": "fp32",
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
    second = site.add(site.right(150, test), manifest=other)
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
        promote(settings, inspect=sound)  # nobody answers at that address
    with pytest.raises(DatasetNotFound):
        promote(site.settings.model_copy(update={"mlops_data_url": (site.folder / "empty").as_uri()}), inspect=sound)
    away = site.settings.model_copy(update={"mlops_database_url": SecretStr("postgresql://x@127.0.0.1:9/x")})
    with pytest.raises(DatabaseUnavailable):
        promote(away, inspect=sound)
    assert site.standing() == (None, None)
    assert site.registry.by_version(version).decision == "pending"


def test_rollback_without_a_previous_champion_says_so(site):
    with pytest.raises(ModelNotFound, match="no previous"):
        rollback(site.settings)
    site.add(site.good)
    site.promote()
    with pytest.raises(ModelNotFound, match="no previous"):
        rollback(site.settings)


WRITES = ("attach", "set_tags", "set_alias", "set_model_tag", "delete_model_tag")


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


def by_promotion(site):
    site.promote()


def by_rollback(site):
    result = rollback(site.settings)
    assert result["rolled_back"] is True
    assert result["reason"].startswith("Rolled back from version 2 to version 1")


@pytest.mark.parametrize("come_next", [by_promotion, by_rollback])
def test_a_rollback_cut_short_at_any_write_is_finished_by_whatever_comes_next(site, come_next):
    first = site.add(site.right(120))
    site.promote()
    second = site.add(site.good)
    site.promote()
    for passing in range(0 if come_next is by_rollback else 2, 20):
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
    assert passing == 7, "traffic ended, move, two versions, previous, champion, move struck out"


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
    measuring, go_on = threading.Event(), threading.Event()
    measure = judging.measure_version

    def slowly(*arguments, **named):
        measuring.set()
        assert go_on.wait(60)
        return measure(*arguments, **named)

    monkeypatch.setattr(judging, "measure_version", slowly)
    results = {}
    threads = [threading.Thread(target=lambda k=k: results.update({k: site.promote()})) for k in ("first", "second")]
    threads[0].start()
    assert measuring.wait(60)
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
        cursor.execute("SELECT pg_try_advisory_lock(%s)", (promotion_lock.LOCK_KEY,))
        assert cursor.fetchone() == (True,)
    connection.close()


def test_a_lock_that_is_lost_moves_nothing(locked_site, monkeypatch):
    site = locked_site
    version = site.add(site.good)
    decide = judging.decide

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

    monkeypatch.setattr(judging, "decide", cut_off)
    with pytest.raises(DatabaseUnavailable, match="nothing was moved"):
        site.promote()
    assert site.standing() == (None, None)
    assert site.registry.by_version(version).decision == "pending"


def test_a_candidate_must_pass_its_mechanical_checks(site):
    limping = site.add(site.good, validation_accuracy=0.9)
    fine = site.add(site.right(150), validation_accuracy=0.5)
    slow = Check(
        "p95 latency", "mechanical", holds=False, says="300 ms, at most 100 ms wanted", figure=300.0, bound=100.0
    )
    result = promote(
        site.settings,
        inspect=lambda settings, version, engine: (slow,) if version == limping else sound(settings, version, engine),
    )
    assert (result["promoted"], site.standing()) == (True, (fine, None))
    assert "300 ms, at most 100 ms" in verdict_of(site.settings, limping)["reason"]
    assert verdict_of(site.settings, limping)["test_accuracy"] == 0.9, "measured all the same"


def test_an_inspection_that_could_not_ask_changes_nothing(site):
    def away(settings, version, engine):
        raise RegistryUnavailable("MLflow went away.", fix="wait")

    version = site.add(site.good)
    with pytest.raises(RegistryUnavailable):
        promote(site.settings, inspect=away)
    assert (site.standing(), site.registry.by_version(version).decision) == ((None, None), "pending")


def test_a_policy_that_cannot_be_used_stops_the_gate_before_it_judges(site):
    version = site.add(site.good)
    site.settings.gate_policy.write_text(POLICY.replace("class_margin", "clas_margin"))
    with pytest.raises(ConfigurationError, match="did you mean 'class_margin'"):
        site.promote()
    assert site.registry.by_version(version).decision == "pending"


def test_the_policys_bounds_decide(site):
    version = site.add(site.good)
    site.settings.gate_policy.write_text(POLICY.replace("accuracy = 0.05", "accuracy = 0.95"))
    result = site.promote()
    assert (result["promoted"], site.standing()) == (False, (None, None))
    assert "at least 0.95 wanted" in verdict_of(site.settings, version)["reason"]


def test_the_evidence_stands_on_the_version_before_it_serves(site, monkeypatch):
    monkeypatch.setattr(workflow, "as_html", gate_report.as_html)
    monkeypatch.setattr(exam, "robustness", robustness)
    champion = site.add(site.right(120))
    site.promote()
    winner, loser = site.add(site.good, validation_accuracy=0.9), site.add(site.right(125), validation_accuracy=0.5)
    result = site.promote()
    reports = {report["candidate"]["version"]: report for report in result["reports"]}
    assert reports.keys() == {winner, loser}
    for number, report in reports.items():
        version = site.registry.by_version(number)
        page = version.tags["gate.report"]
        assert json.loads(site.registry.read_attached(version, page.replace(".html", ".json"))) == report
        html = site.registry.read_attached(version, page).decode()
        assert version.tags["gate.reason"] in unescape(html)
        assert "<img" in html
        assert verdict_of(site.settings, number)["report"].startswith(site.settings.mlflow_public_url)
    checks = {check["name"]: check for check in reports[winner]["checks"]}
    assert checks.keys() >= {"loads", "accuracy", "calibration error", "accuracy under corruption"}
    assert checks["better than the champion"]["figure"] == pytest.approx(0.3)
    assert "60 gained, 0 lost" in checks["better than the champion"]["says"]
    assert str(champion) == site.registry.by_version(winner).tags["gate.against"]


def _promote_and_die(settings, writes):
    """Promotes in a process of its own, which is killed when it has written so often."""
    written = 0

    def counted(write):
        def call(*arguments):
            nonlocal written
            if written >= writes:
                os.kill(os.getpid(), signal.SIGKILL)
            written += 1
            return write(*arguments)

        return call

    for name in WRITES:
        setattr(Registry, name, counted(getattr(Registry, name)))
    _made_quick(setattr)
    promote(Settings.model_validate_json(settings), inspect=sound)


def test_a_promotion_that_is_killed_between_any_two_writes_is_finished_by_the_next(site):
    champion = site.add(site.right(120))
    site.promote()
    loser = site.add(site.poor, validation_accuracy=0.1)
    winner = site.add(site.good, validation_accuracy=0.9, int8=site.right(179))
    site.tolerate(0.05)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["ml.workflows.promote"])
    for writes in range(20):
        process = processes.Process(target=_promote_and_die, args=(site.settings.model_dump_json(), writes))
        process.start()
        process.join(120)
        assert site.standing()[0] in (champion, winner)
        if site.standing()[0] == winner:
            assert site.registry.by_version(winner).tags["engine"] == "int8", "it serves before its form is chosen"
        if process.exitcode == 0:
            break  # as many writes as a whole promotion has
        assert process.exitcode == -signal.SIGKILL
        result = site.promote()
        assert (result["promoted"], site.standing()) == (True, (winner, champion)), f"killed after {writes} writes"
        assert site.registry.model_tag(MOVE_TAG) is None
        verdicts = {version: verdict_of(site.settings, version) for version in (winner, loser)}
        decisions = {version: verdict["decision"] for version, verdict in verdicts.items()}
        assert decisions == {winner: "promoted", loser: "refused"}, f"killed after {writes} writes"
        assert {verdict["n"] for verdict in verdicts.values()} == {200}
        assert verdicts[winner] in result["candidates"]
        assert (verdicts[winner]["engine"], verdicts[winner]["test_accuracy"]) == ("int8", 0.895)
        for version in (winner, loser):
            tags = site.registry.by_version(version).tags
            page = site.registry.read_attached(site.registry.by_version(version), tags["gate.report"])
            assert tags["gate.reason"] in page.decode(), f"killed after {writes} writes: another judgement's report"
        # As it was before.
        site.registry.set_alias("champion", champion)
        take_alias(site.registry, "previous")
        for version in (winner, loser):
            site.registry.set_tags(version, {"gate.decision": "pending", "engine": "fp32"})
    assert writes == 8, "the loser's report and tags; the winner's report, the move, tags, two aliases, move struck out"


def test_int8_serves_where_it_costs_little_and_whatever_is_judged_is_of_that_form(site):
    first = site.add(site.right(120))
    site.promote()
    site.tolerate(0.05)
    inspected = {}

    def inspect(settings, version, engine):
        inspected[version] = engine
        return sound(settings, version, engine)

    version = site.add(site.good, int8=site.right(179))
    result = promote(site.settings, inspect=inspect)
    assert (result["promoted"], site.standing()) == (True, (version, first)), result["reason"]
    assert inspected == {version: "int8"}
    assert result["champion"]["test_accuracy"] == 0.895, "it was measured in another form than it serves"
    (report,) = result["reports"]
    assert report["comparison"]["accuracy"]["value"] == pytest.approx(0.295)
    assert report["engine"]["comparison"]["pairs"] == {"n": 200, "gained": 0, "lost": 1}
    tags = site.registry.by_version(version).tags
    assert (tags["engine"], tags["engine.reason"]) == ("int8", report["engine"]["reason"])
    assert site.registry.by_version(first).tags["engine"] == "fp32"

    source = RegistrySource(site.settings.tracking_uri, site.folder / "server", ask_again_seconds=0)
    champion = source.champion()
    assert (champion.version, champion.engine) == (version, "int8")
    assert champion.fingerprint == tags["sha256.model.int8.onnx"]
    assert source.fetch(champion).name == "model.int8.onnx"
    # Its rival is now judged against what it says in int8.
    site.add(site.good)
    (report,) = site.promote()["reports"]
    assert report["champion_measured"]["metrics"]["accuracy"] == 0.895

    set_engine(site.settings, version, "fp32")
    another = source.champion()
    assert (another.version, another.engine, another.fingerprint) == (version, "fp32", tags["sha256.model.onnx"])
    assert another.identity != champion.identity, "the servers would not swap"
    assert source.fetch(another).name == "model.onnx"
    assert set_engine(site.settings, version, "int8")["engine"] == "int8"
    assert source.champion() == champion


def test_int8_that_may_cost_too_much_serves_nobody_and_cannot_be_chosen_by_hand_either(site):
    version = site.add(site.good, int8=site.right(179))
    assert site.promote()["champion"]["test_accuracy"] == 0.9
    tags = site.registry.by_version(version).tags
    assert tags["engine"] == "fp32"
    assert "1 lost" in tags["engine.reason"]
    with pytest.raises(ModelInvalid, match="1 lost"):
        set_engine(site.settings, version, "int8")
    assert site.registry.by_version(version).tags == tags
    with pytest.raises(ConfigurationError):
        set_engine(site.settings, version, "int4")


def test_an_int8_form_that_cannot_be_used_leaves_float32(site):
    site.tolerate(0.05)
    broken = site.add(site.right(120), int8=site.good, validation_accuracy=0.3)
    site.registry.set_tags(broken, {"sha256.model.int8.onnx": "0" * 64})
    overflowing = np.zeros((3072, 10))
    overflowing[:, 0] = 3e38  # NaN on real images
    nan = site.add(site.right(150), int8={"weights": overflowing}, validation_accuracy=0.4)
    without = site.add(site.right(150), validation_accuracy=0.2)
    sound = site.add(site.good, int8=site.good, validation_accuracy=0.9)
    site.promote()
    tags = {version: site.registry.by_version(version).tags for version in (broken, nan, without, sound)}
    chosen = {version: found["engine"] for version, found in tags.items()}
    assert chosen == {broken: "fp32", nan: "fp32", without: "fp32", sound: "int8"}
    assert "SHA-256" in tags[broken]["engine.reason"]
    assert "NaN" in tags[nan]["engine.reason"]
    assert "a tiny model has none" in tags[without]["engine.reason"]
    text = site.settings.gate_policy.read_text()
    site.settings.gate_policy.write_text(text.replace("wanted = true", "wanted = false"))
    version = site.add(site.right(195), int8=site.right(195))
    assert site.promote()["champion"]["version"] == version
    assert "wants no int8" in site.registry.by_version(version).tags["engine.reason"]


@pytest.fixture
def shadowed_site(site, database_url):
    """With the predictions database, a champion, and a better candidate: gives the site and the two."""
    site.settings = site.settings.model_copy(update={"mlops_database_url": SecretStr(database_url)})
    champion = site.add(site.right(120))
    site.promote()
    return site, champion, site.add(site.good)


class Mirror:
    """Stands for the server: mirrors images as soon as it is told to, and keeps what came out."""

    def __init__(self, site, champion, images, *, differ=0, failure=None, milliseconds=5.0):
        self.site, self.champion, self.images = site, champion, images
        self.differ, self.failure, self.milliseconds = differ, failure, milliseconds
        self.seen = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self):
        deadline = time.monotonic() + 60
        while self.seen is None and time.monotonic() < deadline:
            self.seen = traffic.read(self.site.registry)
            time.sleep(0.05)
        log = ShadowLog(self.site.settings.database_url, self.site.settings.spool_dir)
        log.start()
        for number in range(self.images):
            answer = np.eye(10)[[1 if number < self.differ else 0]]
            log.append(
                Mirrored(
                    request_id=uuid4(),
                    created_at=datetime.now(UTC),
                    champion_version=self.champion,
                    challenger_version=self.seen.version,
                    champion_classes=np.array([0]),
                    probabilities=None if self.failure else answer,
                    champion_ms=4.0,
                    challenger_ms=None if self.failure else self.milliseconds,
                    failure=self.failure,
                )
            )
        assert log.flush(30)
        log.close()


def test_a_winner_serves_only_after_it_has_seen_so_many_mirrored_images(shadowed_site):
    site, champion, winner = shadowed_site
    with Mirror(site, champion, 30, differ=6) as mirror:
        result = site.promote(after_shadow=30, shadow_wait_seconds=60)
    assert (result["promoted"], site.standing()) == (True, (winner, champion)), result["reason"]
    assert (mirror.seen.version, mirror.seen.mode, mirror.seen.share) == (winner, "mirror", 1.0)
    assert site.registry.by_alias("challenger").version == winner
    assert traffic.read(site.registry) is None, "the mirroring goes on"
    (report,) = result["reports"]
    checks = {check["name"]: check for check in report["checks"] if check["group"] == "shadow"}
    assert checks["disagreement on mirrored requests"]["figure"] == pytest.approx(0.2)
    assert checks["p95 latency on mirrored requests"]["figure"] == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("how", "why"),
    [({"failure": "it broke"}, "failed"), ({"milliseconds": 51.0}, "at most 50 ms"), ({"differ": 30}, "exceed")],
)
def test_a_winner_that_does_badly_on_mirrored_images_is_refused(shadowed_site, how, why):
    site, champion, winner = shadowed_site
    with Mirror(site, champion, 30, **how):
        result = site.promote(after_shadow=30, shadow_wait_seconds=60)
    assert (result["promoted"], site.standing()) == (False, (champion, None))
    assert why in verdict_of(site.settings, winner)["reason"]
    assert verdict_of(site.settings, winner)["decision"] == "refused"
    assert traffic.read(site.registry) is None


def test_a_winner_that_has_not_seen_enough_waits_and_the_next_call_goes_on_counting(shadowed_site):
    site, champion, winner = shadowed_site
    with Mirror(site, champion, 20):
        result = site.promote(after_shadow=30, shadow_wait_seconds=3)
    assert (result["promoted"], site.standing()) == (False, (champion, None))
    assert "seen 20 of 30" in result["reason"]
    assert verdict_of(site.settings, winner)["decision"] == "pending"
    since = traffic.read(site.registry).since
    with Mirror(site, champion, 10) as mirror:
        assert site.promote(after_shadow=30, shadow_wait_seconds=60)["promoted"] is True
    assert mirror.seen.since == since
    assert site.standing() == (winner, champion)


def test_a_winner_is_mirrored_in_the_form_in_which_it_would_serve(shadowed_site):
    site, _, _ = shadowed_site
    best = site.add(site.right(195), int8=site.right(194), validation_accuracy=0.9)
    site.promote(after_shadow=30, shadow_wait_seconds=0)
    assert site.registry.by_version(best).tags["engine"] == "fp32"
    since = traffic.read(site.registry).since
    site.tolerate(0.05)
    site.promote(after_shadow=30, shadow_wait_seconds=0)
    assert site.registry.by_version(best).tags["engine"] == "int8"
    now = traffic.read(site.registry)
    assert (now.version, now.since > since) == (best, True), "what float32 saw counts for int8"
    site.promote(after_shadow=30, shadow_wait_seconds=0)
    assert traffic.read(site.registry) == now


def test_a_rollback_need_not_wait_for_a_shadow_and_overtakes_it(shadowed_site):
    site, first, second = shadowed_site
    assert site.promote()["promoted"] is True
    third = site.add(site.right(200))
    results = {}
    waiting = threading.Thread(
        target=lambda: results.update(site.promote(after_shadow=30, shadow_wait_seconds=4)), daemon=True
    )
    waiting.start()
    deadline = time.monotonic() + 60
    while traffic.read(site.registry) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while verdict_of(site.settings, third)["reason"] == "":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert rollback(site.settings, lock_wait_seconds=5)["champion"]["version"] == first
    waiting.join(60)
    assert results["promoted"] is False
    assert f"no longer version {second}" in results["reason"]
    assert site.standing() == (first, second)
    assert traffic.read(site.registry) is None, "a rollback ends what was mirrored"
    assert verdict_of(site.settings, third)["decision"] == "pending"


def test_without_a_champion_nobody_can_be_shadowed_and_nothing_is_waited_for(shadowed_site):
    site, _, winner = shadowed_site
    take_alias(site.registry, "champion")
    assert site.promote(after_shadow=1000)["promoted"] is True
    assert site.standing()[0] == winner


def test_to_wait_for_mirrored_images_takes_a_database(site):
    with pytest.raises(ConfigurationError, match="database"):
        site.promote(after_shadow=10)
