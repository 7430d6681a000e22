"""A user of the system in containers: has its addresses, a password and a key, and nothing else."""

import io
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from ml.client import CifarClient
from ml.stack.airflow_api import AirflowApi, DagRun
from tests.compose.stack import Project

INGEST, PROMOTE, MONITOR = "cifar10_ingest", "cifar10_promote", "cifar10_monitor"
TRAINERS = {"baseline": "cifar10_train_baseline", "vgg16": "cifar10_finetune_vgg16"}
DAG_IDS = (INGEST, *TRAINERS.values(), PROMOTE, MONITOR)
MODEL = "cifar10-classifier"
DEVELOPMENT_PASSWORD = "development-only-admin"

Found = TypeVar("Found")


def wait_for(found: Callable[[], Found], *, seconds: float, what: str) -> Found:
    """Asks once a second until the answer is true, and returns it."""
    deadline = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(1)
    return answer


def png(image: np.ndarray) -> bytes:
    """uint8 (height, width, 3) as a file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


class User:
    """Asks the published ports, as a program on the same machine would."""

    def __init__(self, project: Project) -> None:
        settings = project.settings
        self.password = settings.get("AIRFLOW_ADMIN_PASSWORD", DEVELOPMENT_PASSWORD)
        self.key = settings.get("PREDICTION_API_KEYS", "")
        self.airflow = AirflowApi(project.address("AIRFLOW_PORT"), "admin", self.password)
        self.predictions = CifarClient(project.address("API_PORT"), self.key or None)
        self._mlflow = MlflowClient(project.address("MLFLOW_PORT"))

    # --- Airflow ---------------------------------------------------------------------------------------------------

    def runs(self) -> dict[str, dict[str, str]]:
        """{DAG: {run: state}} of all that ran or runs."""
        return {dag_id: {run.run_id: run.state for run in self.airflow.runs(dag_id)} for dag_id in DAG_IDS}

    def new_run(self, dag_id: str, known: Iterable[str], *, seconds: float) -> DagRun:
        """Waits for a run that is not among the known ones."""
        known = set(known)

        def appeared() -> list[DagRun]:
            return [run for run in self.airflow.runs(dag_id) if run.run_id not in known]

        return wait_for(appeared, seconds=seconds, what=f"a run of {dag_id}")[-1]

    def finish(self, run: DagRun, *, seconds: float) -> DagRun:
        """Waits for a run to end, and fails unless it ended well."""
        ended = wait_for(
            lambda: now if (now := self.airflow.run(run)).ended else None, seconds=seconds, what=f"{run.dag_id} to end"
        )
        self.airflow.require_success(ended)
        return ended

    # --- MLflow ----------------------------------------------------------------------------------------------------

    def aliases(self) -> dict[str, int]:
        """Which version bears each alias of the registered model."""
        return {alias: int(version) for alias, version in self._mlflow.get_registered_model(MODEL).aliases.items()}

    def versions(self) -> dict[int, dict[str, str]]:
        """The registered versions with their tags."""
        return {int(one.version): one.tags for one in self._mlflow.search_model_versions(f"name = '{MODEL}'")}

    def training_runs(self, architecture: str) -> dict[str, Run]:
        """MLflow's runs of that architecture, by their ids."""
        experiments = [one.experiment_id for one in self._mlflow.search_experiments()]
        found = self._mlflow.search_runs(experiments, f"tags.architecture = '{architecture}'")
        return {run.info.run_id: run for run in found}
