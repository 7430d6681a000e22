"""Downloads one file over HTTP: resumed where it broke, retried with backoff, and under its name only when complete.

What the file must contain is the caller's business; this module only promises that it has as many bytes as the
server said.
"""

import fcntl
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx
from tenacity import RetryCallState, retry, retry_if_exception_type, wait_random_exponential

from ml.addresses import public_text, public_url
from ml.errors import SourceNotFound, SourceUnreachable, StorageError

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 5.0


class _Interrupted(Exception):
    """An attempt ended early; the reason is its text."""


@dataclass(frozen=True)
class RetryPolicy:
    """`fruitless_attempts`: how many in a row may bring not one byte before it is given up. Waits are in seconds."""

    fruitless_attempts: int = 4
    first_wait: float = 0.5
    longest_wait: float = 8.0
    connect_timeout: float = 5.0
    read_timeout: float = 20.0


class _PublicAddresses(logging.Filter):
    """httpx logs each request's whole URL, which Airflow shows: what lets one in is taken out of it."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = public_text(record.getMessage()), None
        return True


_PUBLIC_ADDRESSES = _PublicAddresses()


def download(url: str, destination: Path, policy: RetryPolicy = RetryPolicy(), *, otherwise: str) -> Path:
    """Fetches `url` into `destination` unless that exists already.

    A broken transfer leaves `destination` + ".part", from which this or a later call goes on (HTTP Range).

    Args:
        url: http or https. Logs and errors name it without password and query.
        destination: the file; its folder is made where there is none.
        policy: how patient to be.
        otherwise: what a user can do where it fails; ends each error's fix: "..., or {otherwise}."

    Raises:
        SourceUnreachable: no answer, a refusal, or a connection that brings nothing any more.
        SourceNotFound: the server says that there is no such file.
        StorageError: the local disk refused the bytes.
    """
    logging.getLogger("httpx").addFilter(_PUBLIC_ADDRESSES)  # without effect where it is there
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(destination):
            if not destination.exists():
                _Download(url, destination, policy, otherwise).run()
    except OSError as error:
        raise StorageError(
            f"{destination} could not be written: {error.strerror or error}.",
            fix=f"free some space under {destination.parent} or set MLOPS_VAR_DIR to a disk that has it; "
            "the bytes that were fetched are kept and the download goes on from there.",
        ) from error
    return destination


@contextmanager
def _exclusive(destination: Path) -> Iterator[None]:
    """Two processes that want the same file: the second waits and finds it. The system frees a killed one's lock."""
    with destination.with_name(destination.name + ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _Download:
    """One download's state across its attempts."""

    def __init__(self, url: str, destination: Path, policy: RetryPolicy, otherwise: str) -> None:
        self.url = url
        self.shown = public_url(url)
        self.otherwise = otherwise
        self.destination = destination
        self.part = destination.with_name(destination.name + ".part")
        self.policy = policy
        self.validator: str | None = None
        self.fruitless = 0

    def run(self) -> None:
        policy = self.policy
        timeout = httpx.Timeout(policy.read_timeout, connect=policy.connect_timeout)
        # identity: a server that compresses the archive once more would make byte ranges mean something else.
        headers = {"Accept-Encoding": "identity", "User-Agent": "cifar10-continuous-training"}
        with httpx.Client(timeout=timeout, headers=headers, follow_redirects=True) as client:
            attempt = retry(
                retry=retry_if_exception_type(_Interrupted),
                wait=wait_random_exponential(multiplier=policy.first_wait, max=policy.longest_wait),
                stop=self._give_up,
                before_sleep=self._announce,
                reraise=True,
            )(self._attempt)
            try:
                attempt(client)
            except _Interrupted as why:
                raise SourceUnreachable(
                    f"{self.shown} could not be downloaded ({why}, {self.fruitless} attempts in a row without a byte).",
                    fix=f"check the network or the proxy and run it again (it resumes); or {self.otherwise}.",
                ) from why
        self.part.replace(self.destination)
        logger.info("Downloaded %s (%.1f MB)", self.destination, self.destination.stat().st_size / 1e6)

    def _give_up(self, _: RetryCallState) -> bool:
        return self.fruitless >= self.policy.fruitless_attempts

    def _announce(self, state: RetryCallState) -> None:
        why = state.outcome.exception() if state.outcome else None
        wait = state.next_action.sleep if state.next_action else 0.0
        logger.warning("Download interrupted at %.1f MB (%s); trying again in %.1f s", self._have() / 1e6, why, wait)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _attempt(self, client: httpx.Client) -> None:
        before = self._have()
        try:
            self._fetch(client, before)
        except httpx.TransportError as error:
            reason = public_text(str(error)) or type(error).__name__
            raise _Interrupted(reason) from error
        finally:
            self.fruitless = 0 if self._have() > before else self.fruitless + 1

    def _fetch(self, client: httpx.Client, have: int) -> None:
        headers = {"Range": f"bytes={have}-"} if have else {}
        if have and self.validator:
            headers["If-Range"] = self.validator
        with client.stream("GET", self.url, headers=headers) as response:
            self._refuse_failure(response)
            etag = response.headers.get("etag", "")
            # A weak validator is not allowed in If-Range.
            self.validator = etag if etag and not etag.startswith("W/") else response.headers.get("last-modified")
            if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                if have and _total(response) == have:
                    return
                self.part.unlink(missing_ok=True)
                raise _Interrupted("the server has fewer bytes than were fetched: starting over")
            resumed = response.status_code == httpx.codes.PARTIAL_CONTENT and _first_byte(response) == have
            if response.status_code == httpx.codes.PARTIAL_CONTENT and not resumed:
                self.part.unlink(missing_ok=True)
                raise _Interrupted("the server resumed at another byte than was asked for: starting over")
            with self.part.open("ab" if resumed else "wb") as part:
                self._copy(response, part, have if resumed else 0)

    def _refuse_failure(self, response: httpx.Response) -> None:
        status = response.status_code
        if status in (httpx.codes.NOT_FOUND, httpx.codes.GONE):
            raise SourceNotFound(
                f"{self.shown} does not exist (HTTP {status}).",
                fix=f"correct the address; or {self.otherwise}.",
            )
        passing = (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS, httpx.codes.TOO_EARLY)
        if response.is_server_error or status in passing:
            raise _Interrupted(f"HTTP {status}")
        if not response.is_success and status != httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise SourceUnreachable(
                f"{self.shown} was refused (HTTP {status}).",
                fix=f"check that the address may be read from here and through the proxy; or {self.otherwise}.",
            )

    def _copy(self, response: httpx.Response, part: BinaryIO, start: int) -> None:
        expected = int(response.headers["content-length"]) if "content-length" in response.headers else None
        total = start + expected if expected is not None else None
        began = told = time.monotonic()
        have = start
        logger.info("Downloading %s from byte %d of %s", self.shown, start, total if total is not None else "unknown")
        # As it arrives: with a chunk size httpx holds bytes back, and loses them when the line breaks.
        for chunk in response.iter_raw():
            part.write(chunk)
            have += len(chunk)
            now = time.monotonic()
            if now - told >= _PROGRESS_SECONDS:
                told = now
                rate = (have - start) / (now - began)
                eta = f"{(total - have) / rate:.0f} s left" if total is not None else "size unknown"
                logger.info("Downloaded %.1f MB, %.1f MB/s, %s", have / 1e6, rate / 1e6, eta)
        if total is not None and have != total:
            raise _Interrupted(f"the connection ended after {have} of {total} bytes")


def _total(response: httpx.Response) -> int | None:
    match = re.search(r"/(\d+)$", response.headers.get("content-range", ""))
    return int(match[1]) if match else None


def _first_byte(response: httpx.Response) -> int | None:
    match = re.match(r"bytes (\d+)-", response.headers.get("content-range", ""))
    return int(match[1]) if match else None
