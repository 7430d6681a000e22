"""The local stack's secrets: generated once into the var folder, readable by their owner alone."""

import base64
import os
import secrets
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ml.files import write_whole

OWNER_ONLY = 0o600


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
    write_whole(path, made.model_dump_json(indent=2), mode=OWNER_ONLY)
    return made
