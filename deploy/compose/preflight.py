"""Before anything starts: are the secrets fit for where this runs?

Compose gives every secret a default, so that `docker compose up` works on a laptop without a file; each says of itself
that it is for development only. With MLOPS_ENV=production none of them is accepted, nor a missing or short one.
Standard library only.
"""

import base64
import binascii
import os
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
ENVIRONMENTS = ("development", "production")


def unfit(environment: Mapping[str, str]) -> list[str]:
    """What is wrong with the secrets, a line for each; empty where all are fit for production."""
    found = {name: _weakness(environment.get(name, "")) for name in SECRETS}
    keys = [key.strip() for key in environment.get(API_KEYS, "").split(",") if key.strip()]
    found[API_KEYS] = "is not set" if not keys else next(filter(None, map(_weakness, keys)), None)
    return [f"{name} {weakness}" for name, weakness in found.items() if weakness]


def _weakness(secret: str) -> str | None:
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
