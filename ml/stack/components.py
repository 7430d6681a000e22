"""What the local stack consists of: PostgreSQL, MLflow, Airflow's three parts, the prediction server, Evidently's UI.

The only place that knows how each is configured. All listen on 127.0.0.1, all share one PostgreSQL server with a
database and a role each.
"""

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx

from ml.database import connect
from ml.errors import ComponentFailed, ConfigurationError, DatabaseUnavailable
from ml.files import write_whole
from ml.settings import PROJECT_ROOT, Settings
from ml.stack.airflow_api import AirflowApi
from ml.stack.migrations import migrate
from ml.stack.postgres import Cluster, ensure_database
from ml.stack.secret_store import OWNER_ONLY, Secrets
from ml.stack.supervisor import Job, Service, Unit, tail

STACK_MARK = "MLOPS_STACK"
"""An environment variable that every process of a stack carries: the stack's var folder."""
TRAINING_POOL = "training"
LOOPBACK = "127.0.0.1"


def ports(settings: Settings) -> dict[str, int]:
    """Every port of the stack, by the setting that moves it."""
    return {
        "POSTGRES_PORT": settings.postgres_port,
        "MLFLOW_PORT": settings.mlflow_port,
        "AIRFLOW_PORT": settings.airflow_port,
        "API_PORT": settings.api_port,
        "REPORTS_PORT": settings.reports_port,
    }


def urls(settings: Settings) -> dict[str, str]:
    """Where the parts that have a page listen."""
    return {
        "airflow": f"http://{LOOPBACK}:{settings.airflow_port}",
        "mlflow": f"http://{LOOPBACK}:{settings.mlflow_port}",
        "predictions": f"http://{LOOPBACK}:{settings.api_port}",
        "reports": f"http://{LOOPBACK}:{settings.reports_port}",
    }


def cluster(settings: Settings, secrets: Secrets) -> Cluster:
    """The stack's PostgreSQL."""
    return Cluster(settings.mlops_var_dir / "postgres", settings.postgres_port, secrets.postgres)


def shared_environment(settings: Settings, secrets: Secrets) -> dict[str, str]:
    """What every process of the stack needs to find the others; also what other shells read from `stack.env`."""
    database = cluster(settings, secrets).url("predictions", user="predictions", password=secrets.predictions_database)
    return {
        "MLOPS_DATABASE_URL": database,
        "MLFLOW_TRACKING_URI": urls(settings)["mlflow"],
        "MLOPS_DATA_URL": settings.data_url,
        "AIRFLOW_PORT": str(settings.airflow_port),
        "MLFLOW_PORT": str(settings.mlflow_port),
        "API_PORT": str(settings.api_port),
        "REPORTS_PORT": str(settings.reports_port),
        "POSTGRES_PORT": str(settings.postgres_port),
    }


def require_own_addresses(settings: Settings, secrets: Secrets) -> None:
    """Checks that the settings name no other database or registry: the commands would use those, the stack its own.

    Raises:
        ConfigurationError: names the setting.
    """
    own = shared_environment(settings, secrets)
    url = settings.mlops_database_url
    given = {
        "MLOPS_DATABASE_URL": None if url is None else url.get_secret_value(),
        "MLFLOW_TRACKING_URI": settings.mlflow_tracking_uri or None,
    }
    foreign = [name for name, value in given.items() if value not in (None, own[name])]
    if foreign:
        raise ConfigurationError(
            f"The local stack brings its own PostgreSQL and MLflow, but {' and '.join(foreign)} names another.",
            fix="unset it for the local stack, or use the services it names without `make up` and `make demo`.",
        )


def airflow_api(settings: Settings, secrets: Secrets) -> AirflowApi:
    """A client of the stack's Airflow, as its administrator."""
    return AirflowApi(urls(settings)["airflow"], "admin", secrets.airflow_admin)


def units(settings: Settings, secrets: Secrets) -> list[Unit]:
    """The stack as a graph: who starts after whom."""
    var = settings.mlops_var_dir
    log = var / "log"
    postgres = cluster(settings, secrets)
    base = _base_environment(settings, secrets)
    airflow_env = base | _airflow_environment(settings, secrets)
    addresses = urls(settings)
    api = airflow_api(settings, secrets)

    def databases() -> None:
        ensure_database(postgres, "airflow", secrets.airflow_database)
        ensure_database(postgres, "mlflow", secrets.mlflow_database)
        migrate(ensure_database(postgres, "predictions", secrets.predictions_database))

    def airflow(part: str, *options: str, after: str, ready: Callable[[], bool]) -> Service:
        name = f"airflow-{part}"
        command = (*_module("airflow"), part, *options)
        return Service(name, command, airflow_env, log / f"{name}.log", ready, after=(after,))

    return [
        Service(
            name="postgres",
            command=tuple(postgres.command()),
            environment=base,
            log=log / "postgres.log",
            ready=lambda: _accepts(postgres),
            prepare=postgres.create,
            user=postgres.system_user(),
            stop_signal=signal.SIGINT,
        ),
        Job("databases", databases, after=("postgres",)),
        Job(
            "airflow-migrate",
            lambda: _run((*_module("airflow"), "db", "migrate"), airflow_env, log / "airflow-migrate.log"),
            after=("databases",),
        ),
        airflow(
            "api-server", after="airflow-migrate", ready=lambda: _answers(f"{addresses['airflow']}/api/v2/version")
        ),
        # A task talks to the API server from its first moment, so the scheduler starts none before that answers.
        airflow(
            "scheduler",
            "--skip-serve-logs",
            after="airflow-api-server",
            ready=lambda: api.is_healthy("scheduler"),
        ),
        airflow("dag-processor", after="airflow-migrate", ready=lambda: api.is_healthy("dag_processor")),
        Job("airflow-pool", lambda: _make_pool(api), after=("airflow-api-server",)),
        Service(
            name="mlflow",
            command=(
                *(*_module("mlflow"), "server", "--workers", "1"),
                *("--host", LOOPBACK, "--port", str(settings.mlflow_port)),
                *("--serve-artifacts", "--artifacts-destination", str(var / "artifacts")),
            ),
            # Not on the command line, which every user of the machine can read.
            environment=base
            | {
                "MLFLOW_BACKEND_STORE_URI": postgres.url("mlflow", user="mlflow", password=secrets.mlflow_database),
            },
            log=log / "mlflow.log",
            ready=lambda: _answers(f"{addresses['mlflow']}/health"),
            after=("databases",),
        ),
        Service(
            name="prediction-server",
            command=_module("deploy.server"),
            environment=base,
            log=log / "prediction-server.log",
            ready=lambda: _answers(f"{addresses['predictions']}/healthz"),
            # Not after MLflow: with the registry still away it serves the last champion from its cache.
            after=("databases",),
        ),
        Service(
            name="reports",
            command=(
                *(*_module("evidently.cli"), "ui", "--workspace", str(settings.reports_dir / "workspace")),
                *("--host", LOOPBACK, "--port", str(settings.reports_port)),
            ),
            environment=base,
            log=log / "reports.log",
            ready=lambda: _answers(addresses["reports"]),
            prepare=lambda: (settings.reports_dir / "workspace").mkdir(parents=True, exist_ok=True),
        ),
    ]


def _base_environment(settings: Settings, secrets: Secrets) -> dict[str, str]:
    return (
        dict(os.environ)
        | shared_environment(settings, secrets)
        | {
            STACK_MARK: str(settings.mlops_var_dir),
            "MLOPS_VAR_DIR": str(settings.mlops_var_dir),
            "CIFAR10_SOURCE": settings.cifar10_source,
            "VGG16_WEIGHTS": settings.vgg16_weights,
            "PYTHONUNBUFFERED": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            # The parts talk to each other on this machine, never through a proxy.
            "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), LOOPBACK, "localhost"])),
            "no_proxy": ",".join(filter(None, [os.environ.get("no_proxy"), LOOPBACK, "localhost"])),
            # Nothing here phones home.
            "DO_NOT_TRACK": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            # Its job runner serves GenAI features: a process of 230 MB that nothing here asks for anything.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
    )


def _airflow_environment(settings: Settings, secrets: Secrets) -> dict[str, str]:
    home = settings.mlops_var_dir / "airflow"
    passwords = home / "passwords.json"
    write_whole(passwords, json.dumps({"admin": secrets.airflow_admin}), mode=OWNER_ONLY)
    database = cluster(settings, secrets).url("airflow", user="airflow", password=secrets.airflow_database)
    address = urls(settings)["airflow"]
    options = {
        "core": {
            "dags_folder": str(PROJECT_ROOT / "dags"),
            "plugins_folder": str(PROJECT_ROOT / "plugins"),
            "load_examples": "False",
            "executor": "LocalExecutor",
            # A worker of the LocalExecutor holds about 140 MB; one training at a time is the pool's doing.
            "parallelism": "4",
            "dags_are_paused_at_creation": "False",
            "execution_api_server_url": f"{address}/execution/",
            "fernet_key": secrets.airflow_fernet,
            "simple_auth_manager_users": "admin:admin",
            "simple_auth_manager_passwords_file": str(passwords),
        },
        "database": {"sql_alchemy_conn": database.replace("postgresql://", "postgresql+psycopg2://")},
        "api": {
            "host": LOOPBACK,
            "port": str(settings.airflow_port),
            "base_url": address,
            "workers": "1",
            "secret_key": secrets.airflow_api,
        },
        "api_auth": {"jwt_secret": secrets.airflow_jwt},
        "dag_processor": {"refresh_interval": "30", "min_file_process_interval": "30"},
        "scheduler": {"scheduler_idle_sleep_time": "0.5"},
        # Five, the default, last ten seconds: a restart of the API server takes longer, and must cost no training.
        "workers": {"execution_api_retries": "8"},
        "logging": {"base_log_folder": str(settings.mlops_var_dir / "log" / "airflow-tasks")},
    }
    flat = {f"AIRFLOW__{s.upper()}__{k.upper()}": v for s, section in options.items() for k, v in section.items()}
    # The menu and the status page have the environment alone; these may stand in .env.
    menu = {
        "PREDICTIONS_URL": settings.predictions_url,
        "REPORTS_URL": settings.reports_url,
        "MLFLOW_PUBLIC_URL": settings.mlflow_public_url,
        "PREDICTIONS_PUBLIC_URL": settings.predictions_public_url,
        "REPORTS_PUBLIC_URL": settings.reports_public_url,
        "PREDICTION_API_KEYS": ",".join(key.get_secret_value() for key in settings.prediction_api_keys),
    }
    return flat | menu | {"AIRFLOW_HOME": str(home)}


def _module(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name)


def _run(command: tuple[str, ...], environment: Mapping[str, str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False)
    if done.returncode:
        raise ComponentFailed(f"`{' '.join(command[2:])}` failed:\n{tail(log)}", fix=f"see {log}.")


def _make_pool(api: AirflowApi) -> None:
    # One slot: two trainings at once on two cores take longer than one after the other.
    api.ensure_pool(TRAINING_POOL, slots=1, description="one training at a time")


def _accepts(postgres: Cluster) -> bool:
    try:
        connect(postgres.url("postgres")).close()
    except DatabaseUnavailable:
        return False
    return True


def _answers(url: str) -> bool:
    try:
        return _probe().get(url).is_success
    except httpx.TransportError:
        return False


@functools.cache
def _probe() -> httpx.Client:
    # One for all: each client reads the trust store, 25 ms, and parts are asked four times a second until they answer.
    unkept = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(timeout=2, follow_redirects=True, trust_env=False, limits=unkept)
