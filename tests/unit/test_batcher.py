"""Requests predicted together: who is next, with whom, how long anybody waits, and what is refused."""

import threading
import time
import weakref
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.errors import CifarError, ModelInvalid
from ml.serving.batcher import LONGEST_BATCH, Batcher, Overloaded


def images(n, first=0):
    """Images that tell which they are by their first two bytes."""
    made = np.zeros((n, 32, 32, 3), np.uint8)
    numbers = np.arange(first, first + n)
    made[:, 0, 0, 0], made[:, 0, 0, 1] = numbers % 256, numbers // 256
    return made


def numbers_of(given):
    return given[:, 0, 0, 0].astype(int) + 256 * given[:, 0, 0, 1].astype(int)


def flat(batches):
    return list(chain.from_iterable(batches))


class Recorder:
    """Answers each image with its number; keeps what it was asked. Waits for `gate`, and fails on images `bad`."""

    def __init__(self, bad=(), held=False):
        self.batches = []
        self.alone = []
        self.bad = set(bad)
        self.gate = threading.Event()
        self.began = threading.Semaphore(0)
        if not held:
            self.gate.set()

    def predict(self, given, *, alone=True):
        numbers = numbers_of(given)
        self.batches.append(numbers.tolist())
        self.alone.append(alone)
        self.began.release()
        assert self.gate.wait(20)
        if self.bad & set(numbers.tolist()):
            raise ModelInvalid("The model fails on these images.", fix="none.")
        return np.repeat(numbers[:, None], 10, axis=1).astype(np.float32)


def answers(batcher, engine, asked, **more):
    return batcher.predict(engine, asked, **more).probabilities[:, 0].astype(int).tolist()


class Callers:
    """Threads that ask, and what came of each."""

    def __init__(self, batcher, engine):
        self.batcher, self.engine = batcher, engine
        self.outcomes = {}
        self.threads = []

    def ask(self, name, asked, client=""):
        def work():
            try:
                self.outcomes[name] = answers(self.batcher, self.engine, asked, client=client)
            except CifarError as error:
                self.outcomes[name] = error

        queued = self.batcher.state().queued
        thread = threading.Thread(target=work)
        thread.start()
        self.threads.append(thread)
        until(lambda: self.batcher.state().queued >= queued + len(asked) or not thread.is_alive())

    def wait(self):
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()


def until(happened, seconds=10):
    ends = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.001)


@pytest.fixture
def busy():
    """A batcher of one lane that works on one image until the engine's gate opens; what is asked meanwhile waits."""
    batcher, engine = Batcher(lanes=1), Recorder(held=True)
    first = threading.Thread(target=batcher.predict, args=(engine, images(1, first=9999)))
    first.start()
    engine.began.acquire()
    yield batcher, engine, Callers(batcher, engine)
    engine.gate.set()
    first.join(20)
    batcher.close()


def test_a_request_that_is_alone_is_predicted_at_once_on_all_cores():
    batcher, engine, before = Batcher(), Recorder(), set(threading.enumerate())
    answer = batcher.predict(engine, images(3, first=5))
    assert answer.probabilities[:, 0].tolist() == [5, 6, 7]
    assert (answer.waited, answer.batch, engine.alone) == (0.0, 3, [True])
    assert set(threading.enumerate()) <= before


def test_what_comes_while_one_is_predicted_is_predicted_together(busy):
    _, engine, callers = busy
    for number in range(8):
        callers.ask(number, images(1, first=number))
    engine.gate.set()
    callers.wait()
    assert callers.outcomes == {number: [number] for number in range(8)}
    assert engine.batches == [[9999], list(range(8))]


def test_no_batch_is_longer_than_the_longest_and_a_long_request_is_split(busy):
    _, engine, callers = busy
    callers.ask("long", images(100))
    engine.gate.set()
    callers.wait()
    assert callers.outcomes["long"] == list(range(100))
    assert max(len(batch) for batch in engine.batches) <= LONGEST_BATCH


def test_two_lanes_share_what_waits_and_use_a_core_each():
    batcher, engine = Batcher(lanes=2), Recorder(held=True)
    first = threading.Thread(target=batcher.predict, args=(engine, images(1, first=9999)))
    first.start()
    engine.began.acquire()
    callers = Callers(batcher, engine)
    for number in range(8):
        callers.ask(number, images(1, first=number))
    engine.gate.set()
    callers.wait()
    first.join()
    assert engine.alone[0] is True
    assert engine.alone[1] is False
    assert len(engine.batches[1]) == 4
    assert sorted(flat(engine.batches[1:])) == list(range(8))
    batcher.close()


def test_a_client_of_many_images_does_not_hold_up_another(busy):
    _, engine, callers = busy
    callers.ask("greedy", images(128), client="greedy")
    callers.ask("modest", images(1, first=500), client="modest")
    engine.gate.set()
    callers.wait()
    turn = next(index for index, batch in enumerate(engine.batches) if 500 in batch)
    assert turn <= 2  # after the one under way, and one of the greedy client's at most
    assert callers.outcomes["modest"] == [500]
    assert callers.outcomes["greedy"] == list(range(128))


def test_clients_get_the_same_number_of_images_whatever_their_requests_hold(busy):
    _, engine, callers = busy
    for number in range(4):
        callers.ask(f"long {number}", images(32, first=1000 + 32 * number), client="long")
    for number in range(96):
        callers.ask(f"short {number}", images(1, first=number), client="short")
    engine.gate.set()
    callers.wait()
    predicted = flat(engine.batches[1:])[:128]
    assert 48 <= sum(number < 1000 for number in predicted) <= 80


def test_two_models_are_not_mixed_in_a_batch(busy):
    batcher, engine, callers = busy
    other = Recorder()
    others = Callers(batcher, other)
    for number in range(4):
        callers.ask(number, images(1, first=number))
        others.ask(number, images(1, first=100 + number))
    engine.gate.set()
    callers.wait()
    others.wait()
    assert callers.outcomes == {number: [number] for number in range(4)}
    assert others.outcomes == {number: [100 + number] for number in range(4)}
    assert set(flat(other.batches)) == {100, 101, 102, 103}


def test_images_on_which_the_model_fails_fail_their_own_request_alone():
    batcher, engine = Batcher(lanes=1), Recorder(bad={2}, held=True)
    first = threading.Thread(target=batcher.predict, args=(engine, images(1, first=9999)))
    first.start()
    engine.began.acquire()
    callers = Callers(batcher, engine)
    for number in range(5):
        callers.ask(number, images(1, first=number))
    engine.gate.set()
    callers.wait()
    first.join()
    assert isinstance(callers.outcomes.pop(2), ModelInvalid)
    assert callers.outcomes == {number: [number] for number in (0, 1, 3, 4)}
    assert answers(batcher, engine, images(1, first=7)) == [7]
    batcher.close()


def test_a_failure_of_a_request_that_is_alone_is_the_callers_and_blocks_nobody():
    batcher, engine = Batcher(), Recorder(bad={2})
    with pytest.raises(ModelInvalid):
        batcher.predict(engine, images(1, first=2))
    assert answers(batcher, engine, images(1, first=3)) == [3]
    assert batcher.state().running == 0


def test_a_request_whose_time_is_over_is_refused_and_predicted_no_more():
    batcher, engine = Batcher(lanes=1, deadline=0.1), Recorder(held=True)
    first = threading.Thread(target=batcher.predict, args=(engine, images(1, first=9999)))
    first.start()
    engine.began.acquire()
    with pytest.raises(Overloaded, match=r"no answer came within 0\.1 s") as refused:
        batcher.predict(engine, images(2))
    assert refused.value.retry_after >= 1
    assert batcher.state().queued == 0
    assert batcher.state().refused == {"full": 0, "late": 1}
    engine.gate.set()
    first.join()
    assert answers(batcher, engine, images(1, first=4)) == [4]
    assert engine.batches == [[9999], [4]]


def test_one_client_may_fill_half_of_what_is_free_and_leaves_room_for_others():
    batcher, engine = Batcher(lanes=1, capacity=64), Recorder(held=True)
    first = threading.Thread(target=batcher.predict, args=(engine, images(1, first=9999)))
    first.start()
    engine.began.acquire()
    callers = Callers(batcher, engine)
    callers.ask("a", images(32), client="greedy")
    with pytest.raises(Overloaded, match="32 images wait already"):
        batcher.predict(engine, images(1), client="greedy")
    callers.ask("b", images(16, first=100), client="modest")
    assert batcher.state().queued == 48
    assert batcher.state().refused == {"full": 1, "late": 0}
    engine.gate.set()
    callers.wait()
    first.join()
    assert callers.outcomes == {"a": list(range(32)), "b": list(range(100, 116))}
    batcher.close()


def test_what_cannot_be_answered_in_time_is_refused_at_once_with_a_time_to_come_again():
    class Slow(Recorder):
        def predict(self, given, *, alone=True):
            time.sleep(0.05)
            return super().predict(given, alone=alone)

    batcher, engine = Batcher(lanes=1, capacity=4096, deadline=1.0), Slow()
    for _ in range(30):
        batcher.predict(engine, images(1))
    held = Recorder(held=True)
    first = threading.Thread(target=batcher.predict, args=(held, images(1)))
    first.start()
    held.began.acquire()
    callers = Callers(batcher, engine)
    callers.ask("long", images(400), client="other")
    asked_at = time.monotonic()
    with pytest.raises(Overloaded, match="an answer would take") as refused:
        batcher.predict(engine, images(1))
    assert time.monotonic() - asked_at < 0.5
    assert refused.value.retry_after > 10
    held.gate.set()
    callers.wait()
    first.join()
    batcher.close()


def test_where_batches_are_of_one_image_nobody_waits_for_more():
    batcher, engine = Batcher(lanes=1), Recorder()
    for number in range(20):
        assert answers(batcher, engine, images(1, first=number)) == [number]
    assert engine.batches == [[number] for number in range(20)]


def test_callers_who_ask_again_together_are_predicted_together_again():
    """Without the short wait, the first of sixteen to come back would be predicted alone, and fifteen wait for it."""

    class Fixed(Recorder):
        def predict(self, given, *, alone=True):
            time.sleep(0.004)
            return super().predict(given, alone=alone)

    batcher, engine = Batcher(lanes=1), Fixed()
    ending = time.monotonic() + 1.0

    def work():
        while time.monotonic() < ending:
            batcher.predict(engine, images(1))

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sizes = [len(batch) for batch in engine.batches[20:]]
    assert np.mean(sizes) > 6
    batcher.close()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 70), st.sampled_from("abc")), min_size=1, max_size=25), st.integers(1, 3))
def test_every_request_gets_its_own_rows_in_their_order(requests, lanes):
    batcher, engine = Batcher(lanes=lanes, capacity=10_000), Recorder()
    starts = np.cumsum([0, *(n for n, _ in requests)])
    outcomes = {}

    def work(index, n, client):
        outcomes[index] = answers(batcher, engine, images(n, first=starts[index]), client=client)

    threads = [threading.Thread(target=work, args=(i, n, client)) for i, (n, client) in enumerate(requests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert outcomes == {i: list(range(starts[i], starts[i + 1])) for i in range(len(requests))}
    assert sorted(flat(engine.batches)) == list(range(starts[-1]))
    assert batcher.state().queued == 0
    assert batcher.state().running == 0
    batcher.close()
    until(lambda: not any(thread.is_alive() for thread in batcher._threads))


def test_a_lane_that_waits_keeps_no_model_in_memory():
    batcher, held, replaced = Batcher(lanes=1), Recorder(held=True), Recorder()
    first = threading.Thread(target=batcher.predict, args=(held, images(1)))
    first.start()
    held.began.acquire()
    callers = Callers(batcher, replaced)
    callers.ask("in a lane", images(1))
    held.gate.set()
    callers.wait()
    first.join(20)
    assert replaced.alone == [True]
    gone = weakref.ref(replaced)
    del replaced, callers
    until(lambda: gone() is None)
    batcher.close()


def test_who_does_not_wait_is_handed_all_of_a_batch_at_once(busy):
    batcher, engine, _ = busy
    received = []
    requests = [batcher.submit(engine, images(1, first=n), received.append, n) for n in range(4)]
    engine.gate.set()
    until(lambda: received)
    assert received == [requests]
    assert [request.context for request in received[0]] == list(range(4))
    assert [request.answer().probabilities[0, 0] for request in received[0]] == list(range(4))


def test_a_receiver_that_fails_costs_nobody_else_an_answer(busy, caplog):
    batcher, engine, _ = busy

    def fail(_):
        raise RuntimeError("no")

    received = []
    batcher.submit(engine, images(1), fail)
    batcher.submit(engine, images(1, first=7), received.append)
    engine.gate.set()
    until(lambda: received)
    assert answers(batcher, engine, images(2)) == [0, 1]
    assert "not received" in caplog.text


def test_a_request_is_received_once_whoever_ends_it_first(busy):
    batcher, engine, _ = busy
    received = []
    waiting = batcher.submit(engine, images(20), received.append)
    batcher.give_up(waiting)
    batcher.give_up(waiting)
    assert received == [[waiting]]
    with pytest.raises(Overloaded):
        waiting.answer()
    assert batcher.state().queued == 0
    engine.gate.set()
    done = batcher.submit(engine, images(3), received.append)
    until(lambda: len(received) == 2)
    batcher.give_up(done)
    assert len(received) == 2
    assert done.answer().probabilities[:, 0].tolist() == [0, 1, 2]


def test_a_request_that_is_given_up_while_a_part_of_it_is_predicted_is_received_once():
    batcher, engine, received = Batcher(lanes=1), Recorder(held=True), []
    request = batcher.submit(engine, images(12), received.append)
    assert engine.began.acquire(timeout=10)
    batcher.give_up(request)
    engine.gate.set()
    assert answers(batcher, engine, images(2)) == [0, 1]
    assert received == [[request]]


def test_the_next_batch_begins_while_the_last_one_is_received():
    batcher, engine, held = Batcher(lanes=1), Recorder(), threading.Event()
    batcher.submit(engine, images(1), lambda _: held.wait(10))
    received = []
    batcher.submit(engine, images(1, first=1), received.append)
    until(lambda: received)
    held.set()
