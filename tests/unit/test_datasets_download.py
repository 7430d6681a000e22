"""Downloads against a real HTTP server that breaks, refuses and forgets."""

import logging
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ml.datasets import download as module
from ml.datasets.cifar10 import load_cifar10
from ml.datasets.download import RetryPolicy
from ml.errors import SourceCorrupt, SourceNotFound, SourceUnreachable, StorageError
from tests.cifar10_archive import batch_files, layout_of, write_archive

CONTENT = bytes(range(256)) * 4096  # 1 MiB
IMPATIENT = RetryPolicy(fruitless_attempts=3, first_wait=0.01, longest_wait=0.01, connect_timeout=1, read_timeout=2)


def download(url: str, target: Path, policy: RetryPolicy) -> Path:
    return module.download(url, target, policy, otherwise="set SOURCE to a copy")


class Server(ThreadingHTTPServer):
    """Serves `content`; `script` names what each request in turn meets, after which all goes well."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.etag = '"1"'
        self.ranges = True
        self.script: list[str] = []
        self.seen: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/cifar-10-python.tar.gz"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        self.server.seen.append(self.headers["Range"])
        act = server.script.pop(0) if server.script else "ok"
        if act.isdigit():
            self.send_response(int(act))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = self._start()
        if start > len(server.content) or (start and start == len(server.content)):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", server.etag)
        self.end_headers()
        if act == "break":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        if act == "hang up":
            self.close_connection = True
            return
        self.wfile.write(body)

    def _start(self) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        same = self.headers["If-Range"] in (None, self.server.etag)
        return int(match[1]) if match and same and self.server.ranges else 0


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "cifar-10-python.tar.gz"


def assert_complete(target: Path) -> None:
    assert target.read_bytes() == CONTENT
    assert not target.with_name(target.name + ".part").exists()


def test_a_broken_transfer_goes_on_where_it_broke(server: Server, target: Path) -> None:
    server.script = ["break", "break"]
    assert_complete(download(server.url, target, IMPATIENT))
    assert server.seen == [None, f"bytes={len(CONTENT) // 2}-", f"bytes={len(CONTENT) * 3 // 4}-"]


def test_a_later_call_goes_on_too(server: Server, target: Path) -> None:
    server.script = ["break", *["503"] * 10]
    with pytest.raises(SourceUnreachable, match="HTTP 503"):
        download(server.url, target, IMPATIENT)
    assert not target.exists()
    server.script = []
    assert_complete(download(server.url, target, IMPATIENT))
    assert server.seen[-1] == f"bytes={len(CONTENT) // 2}-"


def test_more_breaks_than_attempts_are_borne_while_bytes_come(server: Server, target: Path) -> None:
    server.script = ["break"] * (IMPATIENT.fruitless_attempts + 3)
    assert_complete(download(server.url, target, IMPATIENT))


def test_a_server_without_ranges_starts_over(server: Server, target: Path) -> None:
    server.ranges = False
    server.script = ["break"]
    assert_complete(download(server.url, target, IMPATIENT))


def test_a_file_that_changed_meanwhile_starts_over(server: Server, target: Path) -> None:
    part = target.with_name(target.name + ".part")

    def change(_: object) -> str:
        server.etag, server.content = '"2"', CONTENT[::-1]
        return "x"

    server.script = ["break", "503"]
    original = server.process_request

    def process_request(*arguments: object) -> None:
        if len(server.seen) == 2:
            change(None)
        original(*arguments)  # type: ignore[arg-type]

    server.process_request = process_request  # type: ignore[method-assign]
    download(server.url, target, IMPATIENT)
    assert target.read_bytes() == CONTENT[::-1]
    assert not part.exists()


def test_a_part_that_was_complete_is_taken(server: Server, target: Path) -> None:
    target.parent.mkdir()
    target.with_name(target.name + ".part").write_bytes(CONTENT)
    assert_complete(download(server.url, target, IMPATIENT))


def test_a_part_that_is_too_long_starts_over(server: Server, target: Path) -> None:
    target.parent.mkdir()
    target.with_name(target.name + ".part").write_bytes(CONTENT + b"more")
    assert_complete(download(server.url, target, IMPATIENT))


def test_passing_failures_are_retried(server: Server, target: Path) -> None:
    server.script = ["503", "hang up"]
    assert_complete(download(server.url, target, IMPATIENT))


def test_it_gives_up_on_a_server_that_brings_nothing(server: Server, target: Path) -> None:
    server.script = ["hang up"] * 10
    with pytest.raises(SourceUnreachable, match="3 attempts in a row") as error:
        download(server.url, target, IMPATIENT)
    assert len(server.seen) == IMPATIENT.fruitless_attempts
    assert error.value.fix.endswith("or set SOURCE to a copy.")
    assert not target.exists()


def test_nobody_listens(target: Path) -> None:
    with pytest.raises(SourceUnreachable, match=re.escape("127.0.0.1:9")):
        download("http://127.0.0.1:9/x", target, IMPATIENT)


@pytest.mark.parametrize(
    ("status", "kind"), [("404", SourceNotFound), ("410", SourceNotFound), ("403", SourceUnreachable)]
)
def test_a_refusal_is_not_repeated(status: str, kind: type[Exception], server: Server, target: Path) -> None:
    server.script = [status]
    with pytest.raises(kind, match=f"HTTP {status}"):
        download(server.url, target, IMPATIENT)
    assert len(server.seen) == 1


@pytest.mark.parametrize("act", ["ok", "break", "404", "403", "hang up"])
def test_what_lets_one_in_is_shown_nowhere(
    act: str, server: Server, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server.script = [act] * (1 if act == "break" else 10)
    url = server.url.replace("http://", "http://me:s3cret@") + "?X-Amz-Signature=s3cret"
    said = ""
    try:
        download(url, target, IMPATIENT)
    except (SourceUnreachable, SourceNotFound) as error:
        said = str(error)
        assert server.url in said
    assert "s3cret" not in said
    assert any(record.name == "httpx" for record in caplog.records)
    assert server.url in caplog.text
    assert "s3cret" not in caplog.text


def test_what_is_there_is_not_fetched_again(server: Server, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"here")
    assert download(server.url, target, IMPATIENT).read_bytes() == b"here"
    assert server.seen == []


def test_a_full_disk_is_named(server: Server, target: Path) -> None:
    target.parent.mkdir()
    target.with_name(target.name + ".part").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left") as error:
        download(server.url, target, IMPATIENT)
    assert "MLOPS_VAR_DIR" in error.value.fix
    assert not target.exists()


@pytest.fixture
def from_server(server: Server, tmp_path: Path) -> Callable[[], object]:
    files = batch_files()
    server.content = write_archive(tmp_path / "served.tar.gz", files).read_bytes()
    cache = tmp_path / "cache"
    secret = server.url.replace("http://", "http://me:s3cret@") + "?signature=s3cret"
    return lambda: load_cifar10(secret, cache, False, layout=layout_of(files), retries=IMPATIENT)


def test_a_url_is_a_source(server: Server, from_server: Callable[[], object]) -> None:
    server.script = ["break"]
    raw = from_server()
    assert raw.source == server.url
    asked = len(server.seen)
    from_server()
    assert len(server.seen) == asked, "the second run reads the cache"


def test_a_corrupt_download_does_not_stay_in_the_cache(
    server: Server, from_server: Callable[[], object], tmp_path: Path
) -> None:
    good, server.content = server.content, b"<html>Please log in</html>"
    with pytest.raises(SourceCorrupt, match="was deleted") as error:
        from_server()
    assert "s3cret" not in str(error.value)
    assert list((tmp_path / "cache").glob("*.tar.gz")) == []
    server.content = good
    from_server()
