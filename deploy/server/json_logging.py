"""Log lines as JSON on stderr, each with the id of the request that it belongs to.

Light to import: the server's supervisor reads it before it forks, and must not have loaded ONNX Runtime then.
"""

import json
import logging
import time

from flask import g, has_request_context

# json.dumps makes a new encoder for every line that is not all defaults.
_encode = json.JSONEncoder(default=str).encode


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
        if has_request_context() and (request_id := g.get("request_id")):
            line["request_id"] = str(request_id)
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encode(line)

    def _time(self, created: float) -> str:
        second, written = self._second
        if int(created) != second:
            second = int(created)
            written = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = second, written  # in one step: threads share it
        return f"{written}.{int((created - second) * 1000):03d}+00:00"


def logging_config(level: str = "INFO") -> dict[str, object]:
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
