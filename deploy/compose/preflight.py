"""Before anything starts: can the services work with what .env says, and are the secrets fit for where this runs?

Compose gives every secret a default, so that `docker compose up` works on a laptop without a file; each says of itself
that it is for development only. With MLOPS_ENV=production none of them is accepted, nor a missing or short one.
Standard library only.
"""

import base64
import binascii
import os
import re
import sys
from collections.abc import Mapping

DEVELOPMENT_ONLY = "development-only"
SHORTEST = 16
SECRETS = (
    "POSTGRES_PASSWORD",
    "AIRFLOW_DATABASE_PASSWORD",
    "MLFLOW_DATABASE_PASSWORD",
    "PREDICTIONS_OWNER_PASSWORD",
    "PREDICTIONS_DATABASE_PASSWORD",
    "AIRFLOW_ADMIN_PASSWORD",
    "AIRFLOW_JWT_SECRET",
    "AIRFLOW_API_SECRET",
    "AIRFLOW_FERNET_KEY",
    "REDIS_PASSWORD",
    "S3_ACCESS_KEY",
    "S3_SECRET_KEY",
)
API_KEYS = "PREDICTION_API_KEYS"
API_KEYS_FILE = "PREDICTION_API_KEYS_FILE"
FERNET_KEY = "AIRFLOW_FERNET_KEY"
LISTS = (API_KEYS, FERNET_KEY)
"""Several, separated by commas: the old one and the new one while they are changed."""

FIT = re.compile(r"[A-Za-z0-9_=.-]*")
"""What stands unchanged in an address, in .env and in JSON alike: no service reads another secret than is meant."""

MOUNTED = {
    "CIFAR10_SOURCE": ("CIFAR10_ARCHIVE", "/opt/cifar10/cifar-10-python.tar.gz"),
    "VGG16_WEIGHTS": ("VGG16_WEIGHTS_FILE", "/srv/vgg16_notop.h5"),
}
"""Settings that may be a path, the variables that mount a file of this machine, and where it then lies."""
ENVIRONMENTS = ("development", "production")


def unfit(environment: Mapping[str, str]) -> list[str]:
    """What is wrong with the secrets, a line for each; empty where all are fit for production."""
    # A file of keys is as good as the list, and stands beside it.
    names = SECRETS if environment.get(API_KEYS_FILE) and not environment.get(API_KEYS) else (*SECRETS, API_KEYS)
    found = [(name, _weakness(environment.get(name, ""), name in LISTS)) for name in names]
    return [f"{name} {weakness}" for name, weakness in found if weakness]


def unusable(environment: Mapping[str, str]) -> list[str]:
    """What no service could work with, anywhere; a line for each."""
    values = {name: environment.get(name, "") for name in (*SECRETS, API_KEYS)}
    found = [
        f"{name} holds characters that an address or JSON reads otherwise. Fix: letters, digits, _ = . - alone."
        for name, value in values.items()
        if not FIT.fullmatch(_parts(name, value))
    ]
    for name, (variable, path) in MOUNTED.items():
        value = environment.get(name, "")
        if value.startswith(("/", ".", "~", "file:")) and value != path:
            found.append(
                f"{name}={value} is a path of this machine, which the containers do not see. "
                f"Fix: {variable}={value} and {name}={path}."
            )
    return found


def _parts(name: str, value: str) -> str:
    """A secret without what may stand around its parts: the commas of a list, and what says that a key is hashed."""
    if name == API_KEYS:
        value = re.sub(r"(^|,)\s*sha256:(?=[0-9a-fA-F]{64}(,|$))", ",", value)
    return value.replace(",", "") if name in LISTS else value


def _weakness(value: str, is_list: bool) -> str | None:
    secrets = [part.strip() for part in value.split(",") if part.strip()] if is_list else [value]
    return next(filter(None, map(_weakness_of_one, secrets)), None) if secrets else "is not set"


def _weakness_of_one(secret: str) -> str | None:
    if not secret:
        return "is not set"
    if DEVELOPMENT_ONLY in secret or DEVELOPMENT_ONLY in _decoded(secret):
        return "is the development default"
    return f"is shorter than {SHORTEST} characters" if len(secret) < SHORTEST else None


def _decoded(secret: str) -> str:
    # A Fernet key has to be base64, so its default can say what it is only inside.
    try:
        return base64.urlsafe_b64decode(secret).decode("ascii", "replace")
    except (binascii.Error, ValueError):
        return ""


def main(environment: Mapping[str, str]) -> int:
    """Says what it found; the exit code for Compose, which starts nothing else unless it is 0."""
    name = environment.get("MLOPS_ENV", "development")
    if name not in ENVIRONMENTS:
        print(f"MLOPS_ENV={name!r} is unknown. Fix: set it to {' or '.join(ENVIRONMENTS)}.", file=sys.stderr)
        return 2
    if broken := unusable(environment):
        print("Nothing is started with these settings:", *broken, sep="\n  ", file=sys.stderr)
        return 2
    problems = unfit(environment)
    if name == "production" and problems:
        print("MLOPS_ENV=production, and nothing is started with these secrets:", file=sys.stderr)
        print("".join(f"  {problem}\n" for problem in problems), end="", file=sys.stderr)
        print("Fix: run `make env`, which writes random ones into .env, or set them.", file=sys.stderr)
        return 1
    if problems:
        print("DEVELOPMENT ONLY: known secrets are in use; keep the ports on 127.0.0.1. `make env` writes random ones.")
    return 0


if __name__ == "__main__":
    sys.exit(main(os.environ))
