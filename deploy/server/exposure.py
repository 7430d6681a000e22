"""Where the server may be reached from without a key: this machine alone, unless its operator says how it is placed.

A container must listen on the network, and callers through its published port come from the bridge's gateway: their
address says nothing. `API_KEYLESS_HOSTS` says that the server is so placed, and under which names its neighbours call
it. It then trusts every program that can reach the port, since a program can claim any name; a browser cannot, so pages
of other sites stay out. That is as safe as loopback where the port is published on 127.0.0.1 alone and whatever shares
the container's networks is one's own. It is for development: production refuses it.

Light to import: the server's supervisor asks this before it forks, and must not have loaded ONNX Runtime then.
"""

import ipaddress

from deploy.server.key_ring import KeyRing
from ml.errors import ConfigurationError
from ml.settings import Settings


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
    if not settings.api_keyless_hosts and not is_loopback(settings.api_host):
        raise ConfigurationError(
            f"API_HOST={settings.api_host} would let the whole network use the server without a key.",
            fix="set PREDICTION_API_KEYS to one or more comma-separated keys, or API_HOST=127.0.0.1.",
        )


def is_loopback(host: str) -> bool:
    """Whether it is a name or an address of this machine, as seen from itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
