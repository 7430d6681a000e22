"""Log lines as JSON on stderr, each with the id of the request that it belongs to.

Light to import: the server's supervisor reads it before it forks, and must not have loaded ONNX Runtime then, and has
no use for Flask.
"""

import atexit
import json
import logging
import logging.config
import sys
import threading
import time
from typing import Any, TextIO

import orjson


class JsonLines(logging.Formatter):
    """One JSON object a line; inside a request, with its id."""

    _second: tuple[int, str] = (0, "")

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, object] = {
            "time": self._time(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (here := _visit()) is not None:
            line["request_id"] = here.said_id
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line, default=str).decode()
        except orjson.JSONEncodeError:  # text that is no Unicode, such as the name of a file
            return json.dumps(line, default=str)

    def _time(self, created: float) -> str:
        second, written = self._second
        if int(created) != second:
            second = int(created)
            written = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = second, written  # in one step: threads share it
        return f"{written}.{int((created - second) * 1000):03d}+00:00"


def _visit() -> Any:
    """The request that this thread answers, if any. The supervisor answers none, and does not load Flask."""
    flask = sys.modules.get("flask")
    return flask.g.get("visit") if flask is not None and flask.has_request_context() else None


class GatheredLines(logging.StreamHandler[TextIO]):
    """Writes lines a few times a second, many at a time: at a thousand requests a second, one write for each would cost
    as much as all the rest of logging. From a warning on, a line and those before it are written at once.
    """

    _EVERY = 0.2

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._lines: list[str] = []
        threading.Thread(target=self._write_now_and_then, name="log-lines", daemon=True).start()
        atexit.register(self.flush)

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the line for a moment."""
        try:
            self._lines.append(f"{self.format(record)}\n")
            if record.levelno >= logging.WARNING:
                self.flush()
        except Exception:  # noqa: BLE001 - as every handler of the standard library: logging fails nobody
            self.handleError(record)

    def flush(self) -> None:
        """Writes what is kept."""
        self.acquire()  # which `emit` runs under as well
        try:
            lines, self._lines = self._lines, []
            if lines:
                self.stream.write("".join(lines))
            super().flush()
        finally:
            self.release()

    def _write_now_and_then(self) -> None:
        while True:
            time.sleep(self._EVERY)
            if self._lines:
                self.flush()


def configure(level: str = "INFO") -> None:
    """Makes it so in this process, and has no record look up what no line shows: threads, processes, source lines."""
    wanted = logging_config(level)
    wanted["handlers"]["stderr"]["class"] = "deploy.server.json_logging.GatheredLines"
    logging.config.dictConfig(wanted)
    logging.captureWarnings(True)
    # Python's own advice for such a server (logging HOWTO, "Optimization").
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def logging_config(level: str = "INFO") -> dict[str, Any]:
    """For `logging.config.dictConfig`, here and in granian: everything on stderr as JSON lines."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": "deploy.server.json_logging.JsonLines"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}},
        "root": {"level": level, "handlers": ["stderr"]},
        "loggers": {
            "httpx": {"level": "WARNING"},
            "urllib3": {"level": "ERROR"},  # its retries are told by the follower, once
        },
    }
