"""The Airflow UI's way to the rest of the system: links in the menu, and a page that says where the loop stands.

Runs inside Airflow's API server: standard library, httpx and FastAPI only, nothing of `ml`.
"""

import asyncio
import os
from dataclasses import dataclass
from html import escape

import httpx
from airflow.api_fastapi.core_api.security import requires_authenticated
from airflow.plugins_manager import AirflowPlugin
from fastapi import Depends, FastAPI
from fastapi.responses import HTMLResponse


@dataclass(frozen=True)
class Service:
    """Where this process reaches it, and what a browser opens."""

    url: str
    public_url: str


def _service(url: str, public_url: str, port: str, default_port: str) -> Service:
    """From the settings of these names; `ml.settings` describes them."""
    here = f"http://127.0.0.1:{os.environ.get(port) or default_port}"
    return Service(*(os.environ.get(name, "").rstrip("/") or here for name in (url, public_url)))


MLFLOW = _service("MLFLOW_TRACKING_URI", "MLFLOW_PUBLIC_URL", "MLFLOW_PORT", "5000")
PREDICTIONS = _service("PREDICTIONS_URL", "PREDICTIONS_PUBLIC_URL", "API_PORT", "8000")
REPORTS = _service("REPORTS_URL", "REPORTS_PUBLIC_URL", "REPORTS_PORT", "8001")
MODELS = f"{MLFLOW.public_url}/#/models/cifar10-classifier"

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>CIFAR-10: where the loop stands</title>
<style>:root{{color-scheme:light dark}}body{{font:16px/1.5 system-ui,sans-serif;margin:2rem;max-width:48rem}}
table{{border-collapse:collapse}}td,th{{padding:.4rem 1rem .4rem 0;text-align:left;border-bottom:1px solid #8884}}
</style></head><body><h1>Where the loop stands</h1><table>{rows}</table></body></html>"""

# Airflow mounts the page as it is: who may see it is for the page to say.
app = FastAPI(
    title="CIFAR-10 status",
    docs_url=None,
    redoc_url=None,
    openapi_url=None,
    dependencies=[Depends(requires_authenticated())],
)


async def _ask(client: httpx.AsyncClient, url: str) -> str:
    try:
        answer = await client.get(url)
    except httpx.TransportError as error:
        return f"does not answer ({type(error).__name__})"
    return "ready" if answer.is_success else f"answers {answer.status_code}"


def _key() -> dict[str, str | bytes]:
    keys = os.environ.get("PREDICTION_API_KEYS", "").split(",")
    first = next((key.strip() for key in keys if key.strip() and not key.strip().startswith("sha256:")), None)
    return {"X-API-Key": first.encode()} if first else {}


async def _champion(client: httpx.AsyncClient) -> str:
    try:
        answer = await client.get(f"{PREDICTIONS.url}/v1/model", headers=_key())
    except httpx.TransportError:
        return "unknown: the prediction server does not answer"
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        return "known to callers with a key only"
    if not answer.is_success:
        return "none yet: trigger cifar10_ingest, training and promotion follow"
    model = answer.json()
    made_of = f"{model['architecture']}, {model['weights']}, trained on {model['data']}"
    return f"{model['name']} version {model['version']}: {made_of}"


@app.get("/", response_class=HTMLResponse)
async def status() -> str:
    """The page."""
    # No proxy: these are neighbours.
    async with httpx.AsyncClient(timeout=3, trust_env=False) as client:
        champion, server, mlflow, reports = await asyncio.gather(
            _champion(client),
            _ask(client, f"{PREDICTIONS.url}/readyz"),
            _ask(client, f"{MLFLOW.url}/health"),
            _ask(client, REPORTS.url),
        )
    entries = [
        ("Champion", champion, MODELS),
        ("Prediction server", server, PREDICTIONS.public_url),
        ("MLflow", mlflow, MLFLOW.public_url),
        ("Drift reports", reports, REPORTS.public_url),
    ]
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(state)}</td>'
        f'<td><a href="{escape(url)}" target="_blank" rel="noopener">open</a></td></tr>'
        for name, state, url in entries
    )
    return PAGE.format(rows=rows)


class Cifar10Ui(AirflowPlugin):
    """Menu entries under "CIFAR-10"."""

    name = "cifar10_ui"
    fastapi_apps = [{"app": app, "url_prefix": "/cifar10", "name": "cifar10-status"}]  # noqa: RUF012 - Airflow's form
    external_views = [  # noqa: RUF012 - Airflow's form
        {"name": "Where the loop stands", "href": "/cifar10/", "url_route": "cifar10", "category": "CIFAR-10"},
        {"name": "Models (MLflow)", "href": MODELS, "category": "CIFAR-10"},
        {"name": "Drift reports (Evidently)", "href": REPORTS.public_url, "category": "CIFAR-10"},
        {"name": "Try a prediction", "href": PREDICTIONS.public_url, "category": "CIFAR-10"},
    ]
