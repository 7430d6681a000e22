"""Which model answers, and what is mirrored, without HTTP and without a registry."""

import threading
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID, uuid4

import numpy as np
import pytest

from ml.errors import ModelInvalid, ServiceUnavailable
from ml.serving.hot_swap import Challenger, FollowerState, LoadedModel
from ml.serving.router import Counts, Router
from ml.traffic import Traffic

NOW = datetime(2026, 11, 23, tzinfo=UTC)


class Always:
    """Answers one class; `fails` raises instead, `held` makes it wait until that is set."""

    def __init__(self, class_id, fails=None, held=None):
        self.answer = np.eye(10, dtype=np.float32)[class_id]
        self.fails = fails
        self.held = held
        self.seen = []

    def predict(self, images, *, alone=True):
        if self.held is not None:
            assert self.held.wait(20)
        self.seen.append(images)
        if self.fails is not None:
            raise self.fails
        return np.tile(self.answer, (len(images), 1))


class Follower:
    def __init__(self, champion, challenger=None, mode="mirror", share=1.0):
        self._state = FollowerState(model(champion, 1), None, 1, 0)
        if challenger is not None:
            traffic = Traffic(2, mode, share, NOW)
            self._state = replace(self._state, challenger=Challenger(traffic, model(challenger, 2), None))

    def current(self):
        if self._state.model is None:
            raise ServiceUnavailable("No model.", fix="wait.")
        return self._state.model

    def state(self):
        return self._state


def model(engine, version):
    alias = "champion" if version == 1 else "challenger"
    return LoadedModel(engine, "cifar10-classifier", version, alias, "SYNTHETIC", "baseline", "none", NOW)


def images(n=1):
    return np.zeros((n, 32, 32, 3), np.uint8)


def routed(follower, **options):
    kept = []
    return Router(follower, record=kept.append, **options), kept


def answered_by(router, n=1, request_id=None):
    answering, answer = router.predict(request_id or uuid4(), images(n))
    assert answer.probabilities.shape == (n, 10)
    return answering.version, int(answer.probabilities[0].argmax())


def test_without_a_challenger_the_champion_answers_and_nothing_is_kept():
    router, kept = routed(Follower(Always(3)))
    assert answered_by(router) == (1, 3)
    assert router.state().counts == {}
    assert kept == []


def test_a_canary_answers_its_share_and_always_the_same_requests():
    router, _ = routed(Follower(Always(3), Always(5), "canary", 0.3))
    requests = [UUID(int=k) for k in range(1000)]
    first = [answered_by(router, request_id=request) for request in requests]
    assert set(first) == {(1, 3), (2, 5)}
    assert 200 < first.count((2, 5)) < 400  # seven standard deviations
    assert [answered_by(router, request_id=request) for request in requests] == first
    assert router.state().counts[2] == Counts(answered=2 * first.count((2, 5)))


@pytest.mark.parametrize("error", [ModelInvalid("It answers NaN.", fix="-"), MemoryError()])
def test_where_the_canary_fails_the_champion_answers(error, caplog):
    router, kept = routed(Follower(Always(3), Always(5, fails=error), "canary"))
    assert [answered_by(router, n=2) for _ in range(5)] == [(1, 3)] * 5
    assert router.state().counts[2] == Counts(failed=10)
    assert len(caplog.records) == 1
    assert kept == []


def test_a_mirrored_request_is_answered_by_the_champion_and_seen_by_both():
    champion, challenger = Always(3), Always(5)
    router, kept = routed(Follower(champion, challenger))
    router.start()
    request = uuid4()
    assert answered_by(router, n=4, request_id=request) == (1, 3)
    assert router.flush()
    (one,) = kept
    assert (one.request_id, one.champion_version, one.challenger_version) == (request, 1, 2)
    assert one.champion_classes.tolist() == [3] * 4
    np.testing.assert_array_equal(one.probabilities, np.tile(challenger.answer, (4, 1)))
    assert min(one.champion_ms, one.challenger_ms) > 0
    assert one.failure is None
    np.testing.assert_array_equal(challenger.seen[0], champion.seen[0])
    assert router.state().counts[2] == Counts(mirrored=4, disagreed=4)
    router.close()


@pytest.mark.parametrize(
    ("error", "said"), [(ModelInvalid("It answers NaN.", fix="-"), "NaN"), (ZeroDivisionError("0"), "ZeroDivision")]
)
def test_where_the_challenger_fails_on_a_mirrored_request_that_is_what_is_kept(error, said):
    router, kept = routed(Follower(Always(3), Always(5, fails=error)))
    router.start()
    assert answered_by(router, n=2) == (1, 3)
    assert router.flush()
    assert said in kept[0].failure
    assert (kept[0].probabilities, kept[0].challenger_ms) == (None, None)
    assert router.state().counts[2] == Counts(mirrored=2, failed=2)
    router.close()


def test_a_slow_challenger_holds_up_nobody_and_what_does_not_fit_is_counted():
    held = threading.Event()
    router, kept = routed(Follower(Always(3), Always(3, held=held)), capacity=10)
    router.start()
    assert [answered_by(router, n=3) for _ in range(6)] == [(1, 3)] * 6
    assert router.state().queued == 9
    assert router.state().counts[2] == Counts(dropped=9)
    held.set()
    assert router.flush()
    assert len(kept) == 3
    assert router.state().counts[2] == Counts(mirrored=9, dropped=9)
    assert router.state().queued == 0
    router.close()


def test_closing_mirrors_what_waits_and_takes_nothing_more():
    router, kept = routed(Follower(Always(3), Always(5)))
    for _ in range(20):
        answered_by(router)
    router.start()
    router.close()
    assert len(kept) == 20
    assert answered_by(router) == (1, 3)
    assert router.state().counts[2] == Counts(mirrored=20, disagreed=20, dropped=1)
    assert not any(thread.name == "mirror" and thread.is_alive() for thread in threading.enumerate())


@pytest.mark.parametrize("started", [True, False])
def test_closing_does_not_wait_for_a_challenger_that_does_not_answer(started):
    held = threading.Event()
    router, kept = routed(Follower(Always(3), Always(5, held=held)))
    if started:
        router.start()
    for _ in range(5):
        answered_by(router)
    closing = threading.Thread(target=router.close, args=(0.1,))
    closing.start()
    closing.join(5)
    assert not closing.is_alive()
    state = router.state()
    assert state.queued + state.counts.get(2, Counts()).dropped == 5  # a batch may be under way
    assert kept == []
    held.set()


def test_a_receiver_that_fails_does_not_end_the_mirroring(caplog):
    kept = []

    def record(mirrored):
        kept.append(mirrored)
        raise ZeroDivisionError

    router = Router(Follower(Always(3), Always(5)), record=record)
    router.start()
    for _ in range(3):
        answered_by(router)
    assert router.flush()
    assert len(kept) == 3
    assert caplog.text.count("was not kept") == 3
    router.close()


def test_without_a_champion_nothing_is_answered_not_even_by_a_canary():
    follower = Follower(Always(3), Always(5), "canary")
    follower._state = replace(follower._state, model=None)
    with pytest.raises(ServiceUnavailable):
        Router(follower).predict(uuid4(), images())


@pytest.mark.parametrize("missing", ["model", "traffic"])
def test_a_challenger_that_is_not_whole_gets_nothing(missing):
    follower = Follower(Always(3), Always(5), "canary")
    follower._state = replace(follower._state, challenger=replace(follower._state.challenger, **{missing: None}))
    assert answered_by(Router(follower)) == (1, 3)
