"""The file of API keys, and the ring that reads it again while the server runs."""

import hashlib
import json
import logging
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import SecretStr

from deploy.server import key_ring
from deploy.server.key_ring import LOOK_EVERY_NS, Caller, KeyRing
from ml.errors import ConfigurationError
from ml.serving.api_keys import add_key, read_keys, revoke_key


class Clock:
    now = 0

    def __call__(self):
        return self.now

    def tick(self):
        self.now += LOOK_EVERY_NS


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys" / "api.json"


@pytest.fixture
def clock():
    return Clock()


def test_the_file_holds_hashes_and_no_key_and_is_its_owners_alone(path):
    key, record = add_key(path, "alice", 12.5)
    assert key not in path.read_text()
    assert record.sha256 == hashlib.sha256(key.encode()).hexdigest()
    assert read_keys(path) == (record,)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(key) >= 43  # 256 bits in base64


def test_a_key_is_revoked_by_name_and_the_others_stay(path):
    for name in ("alice", "bob"):
        add_key(path, name)
    revoke_key(path, "alice")
    assert [key.name for key in read_keys(path)] == ["bob"]
    with pytest.raises(ConfigurationError, match="There are: bob"):
        revoke_key(path, "alice")


@pytest.mark.parametrize(("name", "limit"), [("", None), ("a b", None), ("x" * 65, None), ("#1", None), ("a", 0)])
def test_what_is_no_name_and_no_limit_is_refused_and_nothing_is_written(path, name, limit):
    with pytest.raises(ConfigurationError, match="cannot be a key"):
        add_key(path, name, limit)
    assert not path.exists()


def test_a_name_is_given_once(path):
    add_key(path, "alice")
    with pytest.raises(ConfigurationError, match="revoke alice"):
        add_key(path, "alice")


def test_changes_at_the_same_time_are_all_kept(path):
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: add_key(path, f"caller-{i}"), range(24)))
    assert {key.name for key in read_keys(path)} == {f"caller-{i}" for i in range(24)}


def record(name, key="k", **more):
    sha256 = hashlib.sha256(key.encode()).hexdigest()
    return {"name": name, "sha256": sha256, "created": "2026-01-01T00:00:00Z", **more}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"keys": 3}',
        json.dumps({"keys": [record("a", note="x")]}),
        json.dumps({"keys": [record("a"), record("b")]}),
        json.dumps({"keys": [record("a"), record("a", "other")]}),
        json.dumps({"keys": [record("a", sha256="cifar10_the-key-itself")]}),
        json.dumps({"keys": [record("a", limit=-1)]}),
    ],
    ids=["empty", "cut", "list", "number", "more", "one key twice", "one name twice", "a key in the clear", "limit"],
)
def test_a_broken_file_is_told_without_what_stands_in_it(path, content):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ConfigurationError, match="file of API keys") as caught:
        read_keys(path)
    assert "the-key-itself" not in str(caught.value)


# The ring


def test_keys_of_the_setting_are_known_plain_and_hashed_and_kept_as_hashes_alone():
    hashed = "sha256:" + hashlib.sha256(b"second").hexdigest()
    ring = KeyRing([SecretStr("first"), SecretStr(hashed)])
    assert ring.asks
    assert ring.caller(b"first") == Caller("PREDICTION_API_KEYS#1")
    assert ring.caller(b"second") == Caller("PREDICTION_API_KEYS#2")
    assert ring.caller(b"third") is ring.caller(hashed.encode()) is None
    assert "first" not in repr(vars(ring))


def test_a_hash_that_is_none_is_named_by_its_place_and_not_shown():
    with pytest.raises(ConfigurationError, match="Entry 2") as caught:
        KeyRing([SecretStr("first"), SecretStr("sha256:secret")])
    assert "secret" not in str(caught.value)


def test_without_the_file_that_is_set_it_does_not_start(path):
    with pytest.raises(ConfigurationError, match="cannot be read"):
        KeyRing([], path)


def test_a_file_without_keys_opens_to_nobody(path):
    add_key(path, "alice")
    revoke_key(path, "alice")
    ring = KeyRing([], path)
    assert ring.asks
    assert ring.caller(b"") is None


def test_keys_come_and_go_without_a_restart_within_a_second(path, clock):
    first, _ = add_key(path, "alice", 3)
    ring = KeyRing([SecretStr("fixed")], path, clock=clock)
    second, _ = add_key(path, "bob")
    revoke_key(path, "alice")
    assert ring.caller(first.encode()) == Caller("alice", 3)
    assert ring.caller(second.encode()) is None
    clock.tick()
    assert ring.caller(first.encode()) is None
    assert ring.caller(second.encode()) == Caller("bob")
    assert ring.caller(b"fixed") is not None


@pytest.mark.parametrize("harm", ["missing", "broken", "no permission"])
def test_a_file_that_went_bad_keeps_the_last_good_keys_and_is_told_once(path, clock, caplog, harm):
    caplog.set_level(logging.INFO)
    key, _ = add_key(path, "alice")
    ring = KeyRing([], path, clock=clock)
    good = path.read_text()
    if harm == "missing":
        path.unlink()
    elif harm == "broken":
        path.write_text(good[:-10])
    else:  # a folder cannot be read as a file, not even by root
        path.unlink()
        path.mkdir()
    for _ in range(5):
        clock.tick()
        assert ring.caller(key.encode()) == Caller("alice")
    assert len(caplog.records) == 1
    assert "stay in force" in caplog.text
    assert key not in caplog.text
    if path.is_dir():
        path.rmdir()
    path.write_text('{"keys": []}')
    clock.tick()
    assert ring.caller(key.encode()) is None
    assert "read again: it holds 0" in caplog.text


def test_the_file_is_looked_at_once_a_second_however_many_ask(path, clock, monkeypatch):
    key, _ = add_key(path, "alice")
    ring = KeyRing([], path, clock=clock)
    looks = []
    monkeypatch.setattr(key_ring, "_state_of", looks.append)
    for _ in range(3):
        clock.tick()
        for _ in range(100):
            ring.caller(key.encode())
    assert len(looks) == 3
