"""The local stack's secrets: generated once into the var folder, readable by their owner alone."""

import base64
import json
import os
import secrets
from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Secrets(BaseModel):
    """Passwords and keys of the local stack."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    postgres: str
    airflow_database: str
    mlflow_database: str
    predictions_database: str
    airflow_admin: str
    airflow_jwt: str
    airflow_api: str
    airflow_fernet: str


def load_or_create(folder: Path) -> Secrets:
    """Reads `folder/secrets.json`, and makes it where there is none."""
    path = folder / "secrets.json"
    if path.exists():
        return Secrets.model_validate_json(path.read_text())
    generated = {name: secrets.token_urlsafe(48) for name in Secrets.model_fields}
    generated["airflow_fernet"] = base64.urlsafe_b64encode(os.urandom(32)).decode()
    generated["airflow_admin"] = secrets.token_urlsafe(12)  # people type it
    made = Secrets(**generated)
    write_private(path, made.model_dump_json(indent=2))
    return made


def write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner can read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    temporary.replace(path)


def write_private_json(path: Path, content: object) -> None:
    """`write_private` for JSON."""
    write_private(path, json.dumps(content, indent=2))
