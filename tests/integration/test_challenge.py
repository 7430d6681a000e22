"""Setting a challenger's traffic against a real MLflow, and how the server reads it there."""

from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import pytest
from mlflow import MlflowClient

from deploy.server.registry_source import RegistrySource
from ml.errors import ConfigurationError, ModelInvalid, ModelNotFound, RegistryError, RegistryUnavailable
from ml.registry import traffic
from ml.registry.versions import MODEL_NAME, ONNX_FILE, PENDING, TAG_DECISION, Registry, checksum_tag
from ml.traffic import Traffic
from ml.workflows.challenge import challenge, end_challenge
from tests.tiny_versions import empty_registry, take_alias

NOTHING = {"version": None, "mode": None, "share": None, "since": None}


@pytest.fixture
def here(settings, mlflow_uri):
    empty_registry(mlflow_uri)
    return settings.model_copy(update={"mlflow_tracking_uri": mlflow_uri})


def add_version(here, content):
    """One more version that waits for the gate, without files: whose they are is not what is tested here."""
    client = MlflowClient(here.tracking_uri, here.tracking_uri)
    tags = {TAG_DECISION: PENDING, checksum_tag(ONNX_FILE): content}
    client.create_model_version(MODEL_NAME, source="s3://nowhere/none", tags=tags)


@pytest.fixture
def registry(here):
    """Version 1 is the champion; 2 and 3 wait for the gate, and `challenger` is at 3, as a training leaves it."""
    MlflowClient(here.tracking_uri, here.tracking_uri).create_registered_model(MODEL_NAME)
    for content in ("a", "b", "c"):
        add_version(here, content)
    found = Registry(here.tracking_uri)
    found.set_alias("champion", 1)
    found.set_alias("challenger", 3)
    return found


def standing(registry):
    return registry.by_alias("challenger").version, traffic.read(registry)


# The tag


def test_traffic_is_written_read_replaced_and_taken_away(registry):
    assert traffic.read(registry) is None
    first = Traffic(2, "mirror", 0.25, datetime.now(UTC))
    traffic.write(registry, first)
    assert traffic.read(registry) == first
    second = Traffic(3, "canary", 1, datetime.now(UTC))
    traffic.write(registry, second)
    assert traffic.read(registry) == second
    for _ in range(2):
        traffic.clear(registry)
        assert traffic.read(registry) is None


def test_a_change_of_traffic_is_one_write(registry, monkeypatch):
    written = []
    monkeypatch.setattr(registry, "set_model_tag", lambda key, value: written.append(key))
    traffic.write(registry, Traffic(2, "mirror", 1, datetime.now(UTC)))
    assert written == [traffic.TRAFFIC_TAG]


@pytest.mark.parametrize(
    "written",
    [
        "?",
        "[]",
        "{}",
        '{"version": "2", "mode": "mirror", "share": 1, "since": "2026-11-23T00:00:00+00:00"}',
        '{"version": 2, "mode": "mirror", "share": 2, "since": "2026-11-23T00:00:00+00:00"}',
        '{"version": 2, "mode": "mirror", "share": 1, "since": "2026-11-23"}',
        '{"version": 2, "mode": "mirror", "share": 1, "since": 7}',
    ],
)
def test_a_tag_that_cannot_be_read_is_an_error_and_not_none(written):
    with pytest.raises(RegistryError, match=r"challenger\.traffic"):
        traffic.of_tags({traffic.TRAFFIC_TAG: written})


def test_without_a_registered_model_nothing_is_set_and_nothing_can_be(here):
    registry = Registry(here.tracking_uri)
    assert traffic.read(registry) is None
    traffic.clear(registry)
    with pytest.raises(ModelNotFound):
        traffic.write(registry, Traffic(1, "mirror", 1, datetime.now(UTC)))


def test_a_registry_that_is_away_is_could_not_ask(settings):
    registry = Registry(settings.tracking_uri)
    for ask in (traffic.read, traffic.clear):
        with pytest.raises(RegistryUnavailable):
            ask(registry)


# The command


def test_a_version_that_waits_may_be_mirrored(here, registry):
    before = datetime.now(UTC)
    said = challenge(here, 2, mode="mirror", share=0.5)
    version, set_ = standing(registry)
    assert version == 2
    assert said == asdict(set_) | {"since": set_.since.isoformat()}
    assert (set_.version, set_.mode, set_.share) == (2, "mirror", 0.5)
    assert before <= set_.since <= before + timedelta(seconds=30)
    assert challenge(here) == said
    assert end_challenge(here) == end_challenge(here) == challenge(here) == NOTHING
    assert standing(registry) == (2, None)


def test_without_a_version_the_present_challenger_is_meant(here, registry):
    assert challenge(here, mode="mirror", share=1)["version"] == 3
    take_alias(registry, "challenger")
    with pytest.raises(ModelNotFound, match="challenger"):
        challenge(here, mode="mirror", share=1)


def test_a_version_that_nobody_has_judged_answers_callers_only_where_that_is_said(here, registry):
    with pytest.raises(RegistryError, match="--unjudged"):
        challenge(here, 2, mode="canary", share=0.1)
    assert standing(registry) == (3, None)
    assert challenge(here, 2, mode="canary", share=0.1, unjudged=True)["mode"] == "canary"
    registry.set_tags(3, {TAG_DECISION: "promoted"})  # once a champion, for instance
    assert challenge(here, 3, mode="canary", share=0.1)["version"] == 3


@pytest.mark.parametrize("mode", ["mirror", "canary"])
def test_a_version_that_the_gate_refused_gets_no_traffic(here, registry, mode):
    registry.set_tags(2, {TAG_DECISION: "refused", "gate.reason": "It is no better than version 1."})
    with pytest.raises(RegistryError, match="no better than version 1"):
        challenge(here, 2, mode=mode, share=1, unjudged=True)
    assert standing(registry) == (3, None)


def test_the_champion_is_no_challenger_and_without_one_there_is_no_traffic(here, registry):
    with pytest.raises(RegistryError, match="is the champion"):
        challenge(here, 1, mode="mirror", share=1)
    take_alias(registry, "champion")
    with pytest.raises(RegistryError, match="no champion"):
        challenge(here, 2, mode="mirror", share=1)
    assert standing(registry) == (3, None)


def test_a_version_that_is_not_there_is_not_found(here, registry):
    with pytest.raises(ModelNotFound):
        challenge(here, 9, mode="mirror", share=1)
    assert standing(registry) == (3, None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": 2},
        {"mode": "mirror"},
        {"share": 0.5},
        {"version": 2, "mode": "mirror", "share": 0},
        {"version": 2, "mode": "mirror", "share": 1.5},
        {"version": 2, "mode": "mirror", "share": float("nan")},
    ],
)
def test_what_does_not_go_together_is_refused_before_anybody_is_asked(settings, wrong):
    with pytest.raises(ConfigurationError):
        challenge(settings, **wrong)


# The server's source


def test_the_server_reads_both_in_one_question_once_it_knows_the_versions(here, registry, tmp_path, monkeypatch):
    source = RegistrySource(here.tracking_uri, tmp_path / "cache")
    asked = []
    for name in ("get_registered_model", "get_model_version", "get_model_version_by_alias"):
        answer = getattr(MlflowClient, name)
        monkeypatch.setattr(
            MlflowClient, name, lambda *given, name=name, answer=answer: (asked.append(name), answer(*given))[1]
        )
    look = lambda: (asked.clear(), source.champion(), source.challenger())[1:]  # noqa: E731
    champion, challenger = look()
    assert (champion.version, challenger) == (1, None)
    assert champion.fingerprint
    assert asked == ["get_registered_model", "get_model_version"]
    look()
    assert asked == ["get_registered_model"]
    set_ = Traffic(2, "mirror", 1, datetime.now(UTC))
    traffic.write(registry, set_)
    champion, (challenger, wanted) = look()
    assert (champion.version, challenger.version, wanted) == (
        1,
        3,
        set_,
    )  # that it is not for 3 is the follower's to see
    registry.set_alias("challenger", 2)
    assert look()[1][0].version == 2
    look()
    assert asked == ["get_registered_model"]


def test_the_form_that_serves_is_learnt_with_the_alias_with_new_traffic_and_after_a_while(here, registry, tmp_path):
    source = RegistrySource(here.tracking_uri, tmp_path / "cache", ask_again_seconds=1000)
    traffic.write(registry, Traffic(3, "mirror", 1, datetime.now(UTC)))
    assert (source.champion().engine, source.challenger()[0].engine) == ("fp32", "fp32")
    for version in (1, 3):
        registry.set_tags(version, {"engine": "int8", "sha256.model.int8.onnx": "int8"})
    assert (source.champion().engine, source.challenger()[0].engine) == ("fp32", "fp32"), "it asked at once"
    traffic.write(registry, Traffic(3, "mirror", 1, datetime.now(UTC)))
    assert (source.champion().engine, source.challenger()[0].engine) == ("fp32", "int8")
    registry.set_alias("champion", 3)
    crowned = source.champion()
    assert (crowned.version, crowned.engine, crowned.fingerprint) == (3, "int8", "int8")
    registry.set_tags(3, {"engine": "fp32"})
    source._ask_again_seconds = 0
    assert source.champion().engine == "fp32"
    registry.set_tags(3, {"engine": "int4"})
    with pytest.raises(ModelInvalid, match="int4"):
        source.champion()


def test_a_challengers_file_is_not_waited_for_as_long_as_a_champions(here, registry, tmp_path, monkeypatch):
    source = RegistrySource(here.tracking_uri, tmp_path / "cache")
    traffic.write(registry, Traffic(3, "mirror", 1, datetime.now(UTC)))
    champion, (challenger, _) = source.champion(), source.challenger()
    waited = []
    monkeypatch.setattr(
        source._registry, "fetch", lambda *_, limits: (waited.append(limits.timeout_seconds), tmp_path)[1]
    )
    source.fetch(champion)
    source.fetch(challenger)
    assert waited == [60, 5]


def test_a_registry_that_was_made_anew_is_asked_anew(here, registry, tmp_path):
    source = RegistrySource(here.tracking_uri, tmp_path / "cache")
    before = source.champion()
    empty_registry(here.tracking_uri)
    assert source.champion() is None
    assert source.challenger() is None
    MlflowClient(here.tracking_uri, here.tracking_uri).create_registered_model(MODEL_NAME)
    add_version(here, "another")
    registry.set_alias("champion", 1)
    after = source.champion()
    assert (before.version, after.version) == (1, 1)
    assert before.identity != after.identity


def test_an_unreadable_tag_leaves_the_champion_known(here, registry, tmp_path):
    registry.set_model_tag(traffic.TRAFFIC_TAG, "?")
    source = RegistrySource(here.tracking_uri, tmp_path / "cache")
    assert source.champion().version == 1
    with pytest.raises(RegistryError, match="--off"):
        source.challenger()
