"""Who may call, and how much: API keys, or, where none are set, this machine alone; images per second.

Without keys the server must be safe on a laptop: it answers loopback callers only, and no web page of another site
that the laptop's browser happens to show (DNS rebinding, cross-site forms).

A container must listen on the network, and callers through its published port come from the bridge's gateway: their
address says nothing. `API_KEYLESS_HOSTS` says that the server is so placed, and under which names its neighbours call
it. It then trusts every program that can reach the port, since a program can claim any name; a browser cannot, so pages
of other sites stay out. That is as safe as loopback where the port is published on 127.0.0.1 alone and whatever shares
the container's networks is one's own. It is for development: production refuses it.
"""

import ipaddress
import time
from functools import lru_cache
from urllib.parse import urlsplit

from flask import Request, g, request

from deploy.server.key_ring import Caller, KeyRing
from deploy.server.problems import NotAuthorised, RateLimited
from deploy.server.rate_limit import RateLimiter
from ml.errors import ConfigurationError
from ml.serving.decoding import MAX_IMAGES
from ml.settings import Settings

_SEND_A_KEY = "send 'Authorization: Bearer <key>' (or 'X-API-Key: <key>') with one of the server's PREDICTION_API_KEYS."


def check_exposure(settings: Settings) -> None:
    """Refuses to serve the network without keys.

    Raises:
        ConfigurationError: when no key is set and either `api_host` is not loopback while `api_keyless_hosts` is
            empty, or `api_keyless_hosts` is set in production; when the keys that are set cannot be read.
    """
    if KeyRing(settings.prediction_api_keys, settings.prediction_api_keys_file).asks:
        return
    if settings.api_keyless_hosts and settings.mlops_env == "production":
        raise ConfigurationError(
            f"API_KEYLESS_HOSTS={','.join(settings.api_keyless_hosts)} would let callers in without a key, which "
            "MLOPS_ENV=production rules out.",
            fix="set PREDICTION_API_KEYS to one or more comma-separated keys.",
        )
    if not settings.api_keyless_hosts and not _is_loopback(settings.api_host):
        raise ConfigurationError(
            f"API_HOST={settings.api_host} would let the whole network use the server without a key.",
            fix="set PREDICTION_API_KEYS to one or more comma-separated keys, or API_HOST=127.0.0.1.",
        )


class Gate:
    """Lets a request pass or raises."""

    def __init__(self, settings: Settings) -> None:
        """Reads the keys. Raises ConfigurationError where they cannot be read."""
        self._ring = KeyRing(settings.prediction_api_keys, settings.prediction_api_keys_file)
        self._asks = self._ring.asks
        self._limiter = RateLimiter(MAX_IMAGES, time.monotonic_ns)
        self._rate = settings.prediction_rate_limit
        self._keyless_hosts = frozenset(settings.api_keyless_hosts)
        self._is_published = bool(self._keyless_hosts) and not _is_loopback(settings.api_host)

    @property
    def asks_for_key(self) -> bool:
        """Whether callers need a key."""
        return self._asks

    def check(self, request: Request) -> Caller:
        """Who calls. Raises NotAuthorised, with what to do about it, for a caller that may not pass."""
        return self._holder(request) if self._asks else self._neighbour(request)

    def enter(self) -> None:
        """Checks the present request and keeps who it is from as `g.caller`."""
        g.caller = self.check(request)

    def enter_metered(self) -> None:
        """As `enter`; raises RateLimited where the caller has nothing left, so that its body need not be read."""
        g.caller = self.check(request)
        self._take(1, kept=False)

    def charge(self, images: int) -> None:
        """Takes so many images off what the present caller may have. Raises RateLimited where it has too few left."""
        self._take(images, kept=True)

    def _take(self, images: int, *, kept: bool) -> None:
        caller: Caller = g.caller
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

    def _holder(self, request: Request) -> Caller:
        given = _given_key(request)
        if given is None:
            raise NotAuthorised("This server asks for a key.", fix=_SEND_A_KEY)
        caller = self._ring.caller(given)
        if caller is None:
            raise NotAuthorised("The key is not one of this server's.", fix=_SEND_A_KEY)
        return caller

    def _neighbour(self, request: Request) -> Caller:
        fix = (
            "call it from its own machine as http://127.0.0.1, or have its operator set PREDICTION_API_KEYS "
            "(or, in a container, API_KEYLESS_HOSTS)."
        )
        forwarded = "X-Forwarded-For" in request.headers or "Forwarded" in request.headers
        address = request.remote_addr or ""
        if forwarded or not (self._is_published or _is_loopback(address)):
            raise NotAuthorised("Without keys this server answers callers on its own machine only.", fix=fix)
        name = urlsplit(f"//{request.host}").hostname or ""
        if not _is_loopback(name) and name not in self._keyless_hosts:
            raise NotAuthorised("Without keys this server does not answer under this name.", fix=fix)
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != request.host:
            raise NotAuthorised("Without keys this server answers no pages of other sites.", fix=fix)
        return Caller(address)


def _given_key(request: Request) -> bytes | None:
    scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return _raw(credentials)
    key = request.headers.get("X-API-Key", "").strip()
    return _raw(key) if key else None


def _raw(header: str) -> bytes:
    return header.strip().encode("latin-1", "replace")  # WSGI hands bytes on as latin-1


@lru_cache(maxsize=1024)  # asked twice for each request, always of the same few
def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
