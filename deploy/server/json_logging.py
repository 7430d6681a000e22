"""Log lines as JSON on stderr, each with the id of the request that it belongs to.

Light to import: gunicorn's parent process reads it before it forks, and must not have loaded ONNX Runtime then.
"""

import json
import logging
from datetime import UTC, datetime

from flask import g, has_request_context


class JsonLines(logging.Formatter):
    """One JSON object a line; inside a request, with its id."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if has_request_context() and "request_id" in g:
            line["request_id"] = str(g.request_id)
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def logging_config(level: str = "INFO") -> dict[str, object]:
    """For `logging.config.dictConfig` and gunicorn's `logconfig_dict`: everything on stderr as JSON lines."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": "deploy.server.json_logging.JsonLines"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}},
        "root": {"level": level, "handlers": ["stderr"]},
        "loggers": {
            # gunicorn's own access log would say what ours says; its error log goes the common way.
            "gunicorn.error": {"level": level, "handlers": [], "propagate": True},
            "gunicorn.access": {"level": "CRITICAL", "handlers": [], "propagate": False},
            "httpx": {"level": "WARNING"},
            "urllib3": {"level": "ERROR"},  # its retries are told by the follower, once
        },
    }
