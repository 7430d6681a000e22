"""Who may call: API keys, or, where none are set, this machine alone.

Without keys the server must be safe on a laptop: it answers loopback callers only, and no web page of another site
that the laptop's browser happens to show (DNS rebinding, cross-site forms).

A container must listen on the network, and callers through its published port come from the bridge's gateway: their
address says nothing. `API_KEYLESS_HOSTS` says that the server is so placed, and under which names its neighbours call
it. It then trusts every program that can reach the port, since a program can claim any name; a browser cannot, so pages
of other sites stay out. That is as safe as loopback where the port is published on 127.0.0.1 alone and whatever shares
the container's networks is one's own. It is for development: production refuses it.
"""

import hmac
import ipaddress
from urllib.parse import urlsplit

from flask import Request

from deploy.server.problems import NotAuthorised
from ml.errors import ConfigurationError
from ml.settings import Settings

_SEND_A_KEY = "send 'Authorization: Bearer <key>' (or 'X-API-Key: <key>') with one of the server's PREDICTION_API_KEYS."


def check_exposure(settings: Settings) -> None:
    """Refuses to serve the network without keys.

    Raises:
        ConfigurationError: when no key is set and either `api_host` is not loopback while `api_keyless_hosts` is
            empty, or `api_keyless_hosts` is set in production.
    """
    if settings.prediction_api_keys:
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
        self._keys = tuple(key.get_secret_value().encode() for key in settings.prediction_api_keys)
        self._keyless_hosts = frozenset(settings.api_keyless_hosts)
        self._is_published = bool(self._keyless_hosts) and not _is_loopback(settings.api_host)

    @property
    def asks_for_key(self) -> bool:
        """Whether callers need a key."""
        return bool(self._keys)

    def check(self, request: Request) -> None:
        """Raises NotAuthorised, with what to do about it, for a caller that may not pass."""
        if self._keys:
            self._check_key(request)
        else:
            self._check_local(request)

    def _check_key(self, request: Request) -> None:
        given = _given_key(request)
        if given is None:
            raise NotAuthorised("This server asks for a key.", fix=_SEND_A_KEY)
        # All keys are compared, each in constant time, so that the time tells nothing about any of them.
        if not sum([hmac.compare_digest(given, key) for key in self._keys]):
            raise NotAuthorised("The key is not one of this server's.", fix=_SEND_A_KEY)

    def _check_local(self, request: Request) -> None:
        fix = (
            "call it from its own machine as http://127.0.0.1, or have its operator set PREDICTION_API_KEYS "
            "(or, in a container, API_KEYLESS_HOSTS)."
        )
        forwarded = "X-Forwarded-For" in request.headers or "Forwarded" in request.headers
        if forwarded or not (self._is_published or _is_loopback(request.remote_addr or "")):
            raise NotAuthorised("Without keys this server answers callers on its own machine only.", fix=fix)
        name = urlsplit(f"//{request.host}").hostname or ""
        if not _is_loopback(name) and name not in self._keyless_hosts:
            raise NotAuthorised("Without keys this server does not answer under this name.", fix=fix)
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != request.host:
            raise NotAuthorised("Without keys this server answers no pages of other sites.", fix=fix)


def _given_key(request: Request) -> bytes | None:
    scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return _raw(credentials)
    key = request.headers.get("X-API-Key", "").strip()
    return _raw(key) if key else None


def _raw(header: str) -> bytes:
    return header.strip().encode("latin-1", "replace")  # WSGI hands bytes on as latin-1


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
