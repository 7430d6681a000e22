"""The load generator of the benchmarks: its counts add up, its times are true, and it counts what fails."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from benchmarks.load import Load, Outcome, post, read_requests, save_requests
from benchmarks.responder import ANSWER, serve

REQUESTS = [post("127.0.0.1", "/predict", "image/png", bytes([n]) * 50) for n in range(3)]


@contextmanager
def responding(answer=ANSWER):
    """The benchmarks' own responder; gives its address."""
    wake, end = os.pipe()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener, wake, answer))
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            os.close(end)
            thread.join()
            os.close(wake)


@contextmanager
def behaving(behave):
    """A server that takes one connection after the other and calls `behave(stream, n, request)` for the nth
    request, from 0.

    It closes a connection where that returns True, and everything where it raises.
    """

    def run():
        n = 0
        while True:
            try:
                stream, _ = listener.accept()
            except OSError:
                return
            with stream:
                while request := stream.recv(65536):
                    try:
                        if behave(stream, n, request):
                            break
                    except ConnectionAbortedError:
                        listener.close()
                        return
                    finally:
                        n += 1

    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        if listener.fileno() >= 0:
            # Wakes `accept`, which a close from another thread does not.
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        thread.join()


def require_sums(outcome: Outcome):
    assert outcome.sent == sum(outcome.answered.values()) + sum(outcome.errors.values())
    assert outcome.failed == outcome.sent - outcome.answered.get("200", 0)


def test_a_closed_loop_counts_every_request_and_measures_it():
    with responding() as address:
        outcome = Load(address, REQUESTS).closed(4, 0.2)
    require_sums(outcome)
    assert outcome.errors == {}
    assert outcome.answered == {"200": outcome.sent}
    assert outcome.sent > 20
    assert outcome.per_second == pytest.approx(outcome.sent / outcome.seconds)
    assert 0.1 < outcome.seconds < 2
    latency = outcome.latency_ms
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"] < 1000
    # Four at a time: none can have waited for longer than all of the time.
    assert outcome.sent * latency["mean"] <= 4 * 1000 * outcome.seconds * 1.001
    assert outcome.cpu_us > 0


def test_a_latency_is_what_the_server_took():
    took = []

    def slowly(stream, _, __):
        began = time.perf_counter()
        time.sleep(0.02)
        took.append((time.perf_counter() - began) * 1000)
        stream.sendall(ANSWER)

    with behaving(slowly) as address:
        outcome = Load(address, REQUESTS).closed(1, 0.4)
    mean = sum(took) / len(took)
    assert outcome.ok == len(took)
    # However long the machine lets it sleep; sending and receiving are a fraction of it.
    assert mean <= outcome.latency_ms["mean"] == pytest.approx(mean, rel=0.3)
    assert min(took) <= outcome.latency_ms["p50"] <= outcome.latency_ms["max"]
    assert outcome.per_second == pytest.approx(1000 / outcome.latency_ms["mean"], rel=0.3)


def test_requests_are_sent_whole_and_in_turn():
    came = []

    def keep(stream, n, request):
        came.append(request)
        stream.sendall(ANSWER)

    with behaving(keep) as address:
        outcome = Load(address, REQUESTS).closed(1, 0.05)
    assert outcome.sent == outcome.ok == len(came) > 3
    assert came == [REQUESTS[n % 3] for n in range(len(came))]


def test_an_open_loop_keeps_its_rate():
    with responding() as address:
        outcome = Load(address, REQUESTS).open(400, 0.5, seed=1)
    require_sums(outcome)
    assert outcome.sent == outcome.due == outcome.ok
    assert 140 < outcome.due < 260  # 200 on average, with a standard deviation of 14
    assert outcome.seconds == pytest.approx(0.5, rel=0.2)


def test_an_open_loop_counts_a_stall_against_all_that_it_delays():
    def stall(stream, n, _):
        if n == 5:
            time.sleep(0.3)
        stream.sendall(ANSWER.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        return True  # one connection after the other: whoever comes meanwhile waits

    with behaving(stall) as address:
        closed = Load(address, REQUESTS).closed(1, 0.35)
    with behaving(stall) as address:
        opened = Load(address, REQUESTS).open(200, 0.4, seed=1)
    # To a client that waits for its answer one request of many was slow.
    assert closed.latency_ms["max"] > 290
    assert closed.latency_ms["p50"] < 50
    # To those who come when they come, all that fell due in those 0.3 s were: three quarters.
    assert opened.sent == opened.due == opened.ok
    assert opened.latency_ms["max"] > 250
    assert opened.latency_ms["p50"] > 50


def test_other_answers_are_counted_by_status_and_are_no_throughput():
    def sometimes(stream, n, _):
        stream.sendall(ANSWER if n % 2 else b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\nno")

    with behaving(sometimes) as address:
        outcome = Load(address, REQUESTS).closed(1, 0.1)
    require_sums(outcome)
    assert abs(outcome.answered["503"] - outcome.answered["200"]) <= 1
    assert outcome.per_second == pytest.approx(outcome.answered["200"] / outcome.seconds)
    assert outcome.failed == outcome.answered["503"]


@pytest.mark.parametrize("loop", ["closed", "open"])
def test_a_server_that_dies_is_counted_as_errors(loop):
    def die(stream, n, _):
        if n == 10:
            raise ConnectionAbortedError
        stream.sendall(ANSWER)

    with behaving(die) as address:
        load = Load(address, REQUESTS)
        outcome = load.closed(1, 0.4) if loop == "closed" else load.open(50, 0.6, seed=2)
    require_sums(outcome)
    assert outcome.ok == 10
    # The one that was out; in an open loop several may be, since nobody waits for an answer to ask again.
    assert outcome.errors["broken"] == 1 if loop == "closed" else outcome.errors["broken"] >= 1
    assert outcome.errors["refused"] >= 2


def test_a_server_that_never_answers_is_given_up():
    with behaving(lambda *_: None) as address:
        outcome = Load(address, REQUESTS, deadline=0.1).closed(1, 0.05)
    assert outcome.errors == {"no answer in time": 1}
    assert (outcome.sent, outcome.per_second) == (1, 0)


def test_an_answer_may_come_in_pieces_and_end_its_connection():
    head, body = ANSWER.split(b"\r\n\r\n")

    def pieces(stream, *_):
        for piece in (head[:20], head[20:] + b"\r\nConnection: close\r\n\r\n", body[:5], body[5:]):
            stream.sendall(piece)
            time.sleep(0.002)
        return True

    with behaving(pieces) as address:
        outcome = Load(address, REQUESTS).closed(1, 0.05)
    assert outcome.sent == outcome.ok > 1


def test_a_connection_that_the_server_ends_while_it_rests_is_no_failed_request():
    def end(stream, *_):
        # Held back until the connection is closed, so that the answer and its end arrive together: were the end later,
        # a request could meet it under way, and that one has failed.
        stream.sendall(ANSWER, socket.MSG_MORE)
        return True

    with behaving(end) as address:
        outcome = Load(address, REQUESTS).open(30, 0.4, seed=3)
    assert outcome.sent == outcome.ok > 3


def test_an_answer_of_unknown_length_is_an_error():
    with responding(b"HTTP/1.1 200 OK\r\n\r\nhow long is this?") as address:
        outcome = Load(address, REQUESTS).closed(1, 0.02)
    require_sums(outcome)
    assert set(outcome.errors) == {"no length"}


def test_as_a_program_it_goes_on_until_its_input_ends(tmp_path):
    save_requests(tmp_path / "requests", REQUESTS)
    assert read_requests(tmp_path / "requests") == REQUESTS
    answered = threading.Semaphore(0)

    def answer(stream, *_):
        stream.sendall(ANSWER)
        answered.release()

    with behaving(answer) as (host, port):
        job = {"host": host, "port": port, "requests": str(tmp_path / "requests"), "clients": 1, "seconds": None}
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        for _ in range(30):
            assert answered.acquire(timeout=20)
        assert process.poll() is None
        said, _ = process.communicate(timeout=20)
    outcome = Outcome(**json.loads(said))
    require_sums(outcome)
    assert outcome.ok >= 30
