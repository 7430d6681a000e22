"""Stand-ins for what the monitor talks to: a webhook's receiver and a registry. For tests and rehearsals."""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class WebhookReceiver:
    """A webhook on a loopback port. `texts` are the messages it took; `answers` are status codes yet to be given.

    Without `answers` it takes everything (200); what is answered otherwise is counted and not kept.
    """

    url: str = ""
    texts: list[str] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    calls: int = 0


@contextmanager
def webhook_receiver() -> Iterator[WebhookReceiver]:
    """Runs a receiver until the block ends."""
    receiver = WebhookReceiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            receiver.calls += 1
            status = receiver.answers.pop(0) if receiver.answers else 200
            if status == 200:
                receiver.texts.append(body["text"])
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Stays silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_port}/hook"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass(frozen=True)
class FakeVersion:
    """What the monitor asks of a model version."""

    name: str = "cifar10-classifier"
    version: int = 1
    architecture: str = "baseline"
    dataset_id: str = "ds-0123456789ab"
    tags: Mapping[str, str] = field(default_factory=lambda: {"recipe": "demo"})


@dataclass
class FakeRegistry:
    """A registry with at most one version, the champion; its files lie in `folder`. `failure` is raised when asked."""

    folder: Path
    champion: FakeVersion | None = field(default_factory=FakeVersion)
    failure: Exception | None = None

    def by_alias(self, alias: str) -> FakeVersion | None:
        """The champion, where `alias` is that."""
        if self.failure is not None:
            raise self.failure
        return self.champion if alias == "champion" else None

    def fetch(self, version: Any, cache_dir: Path, files: Sequence[str]) -> Path:  # noqa: ARG002 - the registry's signature
        """The folder itself."""
        if self.failure is not None:
            raise self.failure
        return self.folder
