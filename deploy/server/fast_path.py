"""The request that nearly all callers send, one PNG of 32x32, answered without Flask's machinery and without a thread
that waits for it: its admission runs on the event loop, its reply is made on the thread that predicted it.

It answers what it can answer as the app would, header by header. Everything else, and whatever goes wrong, is left to
the app, which alone says what is wrong with a request: so a rule about requests is written in one place.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from deploy.server.access import Gate
from deploy.server.metrics import ServerMetrics
from deploy.server.predictions import Log, note_prediction, prediction_json, predictions_json
from deploy.server.request_context import (
    FAILURE,
    HEADERS_OF_WHAT_CHANGES,
    Reporter,
    Stage,
    Visit,
    request_id_of,
)
from ml.serving.batcher import Answer, Overloaded, Pending
from ml.serving.decoding import plain_png
from ml.serving.hot_swap import LoadedModel
from ml.serving.router import Router

_ROUTE = "/v1/predict"
_LONGEST_BODY = 16 << 10
"""Bytes: so much is unpacked in a tenth of a millisecond, for which the event loop may be held. A photograph in 32x32
has two thousand.
"""

Reply = tuple[int, list[tuple[str, str]], bytes]
"""Status, headers and body."""
End = Callable[[Reply | None], object]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is known of a request while it waits for its prediction."""

    here: Visit
    environ: dict[str, Any]
    model: LoadedModel
    images: np.ndarray
    since: float
    end: End


class FastPath:
    """Answers requests from their environment; see the module. Safe to use from several threads at once."""

    def __init__(self, router: Router, *, log: Log, gate: Gate, metrics: ServerMetrics, reporter: Reporter) -> None:
        self._router = router
        self._batcher = router.batcher
        self._log = log
        self._gate = gate
        self._metrics = metrics
        self._reporter = reporter

    @property
    def deadline(self) -> float:
        """Seconds after which a request that was begun is to be given up."""
        return self._batcher.deadline

    def begin(self, environ: dict[str, Any], end: End) -> Callable[[], None] | None:
        """Begins to answer a request; waits for nothing.

        Args:
            environ: WSGI's, with the whole body in an `io.BytesIO`.
            end: called once, on any thread, with the reply, or with None where the app is to say what went wrong; it
                finds that in `environ`.

        Returns:
            What gives the request up, which calls `end` where nothing else did; None where `end` will not be called and
            the app is to answer.
        """
        if not _is_plain(environ):
            return None
        here = Visit(request_id_of(environ))
        try:
            here.caller = self._gate.check(environ)
            model = self._router.undivided()
            if model is None:
                return None
            with here.stage("decode"):
                image = plain_png(environ["wsgi.input"].getvalue())
            if image is None:
                return None
            self._gate.charge(here, 1)
        except Exception:  # noqa: BLE001 - nothing was done yet: the app finds the same, and says it
            return None
        asked = _Asked(here, environ, model, image[None], time.perf_counter(), end)
        try:
            pending = self._batcher.submit(model.engine, asked.images, self._receive, asked, client=here.caller.name)
        except Overloaded as error:
            _leave_to_app(asked, error)
            return None
        return lambda: self._batcher.give_up(pending)

    def _receive(self, requests: list[Pending]) -> None:
        for request in requests:
            asked: _Asked = request.context
            reply = None
            try:
                reply = self._reply(asked, request.answer())
            except Exception as error:  # noqa: BLE001 - whatever it is, the app tells it
                _leave_to_app(asked, error)
            asked.end(reply)

    def _reply(self, asked: _Asked, answer: Answer) -> Reply:
        here = asked.here
        predicting = Stage("predict", here.stages, asked.since, time.perf_counter() - asked.since)
        here.stages.append(predicting)
        note_prediction(here, predicting, asked.model, answer, asked.images, log=self._log, metrics=self._metrics)
        body = orjson.dumps(predictions_json(here, asked.model, [prediction_json(answer.probabilities[0])]))
        self._reporter.report(here, asked.environ, _ROUTE, 200)
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            *HEADERS_OF_WHAT_CHANGES,
            ("X-Request-ID", here.said_id),
        ]
        return 200, headers, body


def _is_plain(environ: dict[str, Any]) -> bool:
    return (
        environ["PATH_INFO"] == _ROUTE
        and environ["REQUEST_METHOD"] == "POST"
        and environ.get("CONTENT_TYPE") == "image/png"
        and not environ["QUERY_STRING"]
        and "HTTP_CONTENT_ENCODING" not in environ
        and environ["wsgi.input"].getbuffer().nbytes <= _LONGEST_BODY
    )


def _leave_to_app(asked: _Asked, error: Exception) -> None:
    asked.environ[FAILURE] = error
    asked.environ["HTTP_X_REQUEST_ID"] = asked.here.said_id
