"""Who may call, and how much: API keys, or, where none are set, this machine alone; images per second.

Without keys the server must be safe on a laptop: it answers loopback callers only, and no web page of another site
that the laptop's browser happens to show (DNS rebinding, cross-site forms). Where it may be reached from at all is
`deploy.server.exposure`'s.
"""

import time
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from flask import request

from deploy.server.exposure import is_loopback
from deploy.server.key_ring import Caller, KeyRing
from deploy.server.problems import NotAuthorised, RateLimited
from deploy.server.rate_limit import RateLimiter
from deploy.server.request_context import Visit, visit
from ml.serving.decoding import MAX_IMAGES
from ml.settings import Settings

_SEND_A_KEY = "send 'Authorization: Bearer <key>' (or 'X-API-Key: <key>') with one of the server's PREDICTION_API_KEYS."


class Gate:
    """Lets a request pass or raises."""

    def __init__(self, settings: Settings) -> None:
        """Reads the keys. Raises ConfigurationError where they cannot be read."""
        self._ring = KeyRing(settings.prediction_api_keys, settings.prediction_api_keys_file)
        self._asks = self._ring.asks
        self._limiter = RateLimiter(MAX_IMAGES, time.monotonic_ns)
        self._rate = settings.prediction_rate_limit
        self._keyless_hosts = frozenset(settings.api_keyless_hosts)
        # Most requests come from the same few places under the same name.
        self._neighbour_of = lru_cache(maxsize=256)(self._look_at_neighbour)
        self._is_published = bool(self._keyless_hosts) and not is_loopback(settings.api_host)

    @property
    def asks_for_key(self) -> bool:
        """Whether callers need a key."""
        return self._asks

    def check(self, environ: dict[str, Any]) -> Caller:
        """Who calls, by a request's WSGI environment. Raises NotAuthorised, with what to do about it, for a caller that
        may not pass.
        """
        return self._holder(environ) if self._asks else self._neighbour(environ)

    def enter(self) -> None:
        """Checks the present request and keeps who it is from in its `Visit`."""
        visit().caller = self.check(request.environ)

    def enter_metered(self) -> None:
        """As `enter`; raises RateLimited where the caller has nothing left, so that its body need not be read."""
        here = visit()
        here.caller = self.check(request.environ)
        self._take(here.caller, 1, kept=False)

    def charge(self, here: Visit, images: int) -> None:
        """Takes so many images off what its caller may have. Raises RateLimited where it has too few left."""
        self._take(here.caller, images, kept=True)

    def _take(self, caller: Caller, images: int, *, kept: bool) -> None:
        rate = caller.limit or self._rate
        if not rate:
            return
        seconds = self._limiter.take(caller.name, images, rate) if kept else self._limiter.wait(caller.name, 1, rate)
        if seconds:
            most = self._limiter.burst(rate)
            raise RateLimited(
                f"{caller.name} may have {rate:g} images per second predicted, and {most} at once.",
                fix=f"send it again after {seconds} s, or ask the operator for a higher limit.",
                retry_after=seconds,
            )

    def _holder(self, environ: dict[str, Any]) -> Caller:
        given = _given_key(environ)
        if given is None:
            raise NotAuthorised("This server asks for a key.", fix=_SEND_A_KEY)
        caller = self._ring.caller(given)
        if caller is None:
            raise NotAuthorised("The key is not one of this server's.", fix=_SEND_A_KEY)
        return caller

    def _neighbour(self, environ: dict[str, Any]) -> Caller:
        forwarded = "HTTP_X_FORWARDED_FOR" in environ or "HTTP_FORWARDED" in environ
        return self._neighbour_of(
            environ.get("REMOTE_ADDR") or "", environ.get("HTTP_HOST", ""), environ.get("HTTP_ORIGIN"), forwarded
        )

    def _look_at_neighbour(self, address: str, host: str, origin: str | None, forwarded: bool) -> Caller:
        fix = (
            "call it from its own machine as http://127.0.0.1, or have its operator set PREDICTION_API_KEYS "
            "(or, in a container, API_KEYLESS_HOSTS)."
        )
        if forwarded or not (self._is_published or is_loopback(address)):
            raise NotAuthorised("Without keys this server answers callers on its own machine only.", fix=fix)
        name = urlsplit(f"//{host}").hostname or ""
        if not is_loopback(name) and name not in self._keyless_hosts:
            raise NotAuthorised("Without keys this server does not answer under this name.", fix=fix)
        if origin is not None and origin.partition("://")[2] != host:
            raise NotAuthorised("Without keys this server answers no pages of other sites.", fix=fix)
        return Caller(address)


def _given_key(environ: dict[str, Any]) -> bytes | None:
    scheme, _, credentials = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return _raw(credentials)
    key = environ.get("HTTP_X_API_KEY", "").strip()
    return _raw(key) if key else None


def _raw(header: str) -> bytes:
    return header.strip().encode("latin-1", "replace")  # WSGI hands bytes on as latin-1
