"""A small client of Airflow's REST API: what the stack and the demo ask of it, as a user would."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import httpx
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_exponential

from ml.errors import ComponentFailed, OrchestratorUnavailable


@dataclass(frozen=True)
class DagRun:
    """One run of a DAG. `seconds` is None until it has ended; times are ISO 8601."""

    dag_id: str
    run_id: str
    state: str
    queued_at: str
    seconds: float | None

    @property
    def ended(self) -> bool:
        """Whether it will change no more."""
        return self.state in ("success", "failed")


class AirflowApi:
    """Talks to `base_url` as `user`; `transport` is for tests.

    Every method raises OrchestratorUnavailable when Airflow cannot be asked for a minute.
    """

    def __init__(
        self, base_url: str, user: str, password: str, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        self.base_url = base_url
        self._login = {"username": user, "password": password}
        self._http = httpx.Client(base_url=base_url, timeout=20, trust_env=False, transport=transport)
        self._token = ""

    def is_healthy(self, part: str) -> bool:
        """Whether `scheduler` or `dag_processor` reports a fresh heartbeat; False where nobody answers."""
        try:
            health = self._http.get("/api/v2/monitor/health", timeout=5)
            return health.is_success and (health.json().get(part) or {}).get("status") == "healthy"
        except httpx.TransportError:
            return False

    def ensure_pool(self, name: str, *, slots: int, description: str) -> None:
        """Makes a pool, or leaves the one that an operator may have resized."""
        body = {"name": name, "slots": slots, "description": description, "include_deferred": False}
        self._call("POST", "/api/v2/pools", body, accept=(httpx.codes.CONFLICT,))

    def dag_ids(self) -> dict[str, bool]:
        """The DAGs that Airflow has read, and whether each is paused."""
        return {dag["dag_id"]: dag["is_paused"] for dag in self._call("GET", "/api/v2/dags")["dags"]}

    def import_errors(self) -> list[str]:
        """What kept DAG files from being read."""
        errors = self._call("GET", "/api/v2/importErrors")["import_errors"]
        return [f"{error['filename']}: {error['stack_trace']}" for error in errors]

    def unpause(self, dag_id: str) -> None:
        """Lets a DAG run."""
        self._call("PATCH", f"/api/v2/dags/{dag_id}", {"is_paused": False})

    def trigger(self, dag_id: str, conf: Mapping[str, Any]) -> DagRun:
        """Starts a run, as the trigger form does."""
        # An id of our own: an answer that is lost, and asked for again, starts no second run.
        run_id = f"api__{datetime.now(UTC).isoformat(timespec='seconds')}__{uuid4().hex[:8]}"
        body = {"dag_run_id": run_id, "logical_date": None, "conf": dict(conf)}
        self._call("POST", f"/api/v2/dags/{dag_id}/dagRuns", body, accept=(httpx.codes.CONFLICT,))
        return _dag_run(self._call("GET", f"/api/v2/dags/{dag_id}/dagRuns/{quote(run_id, safe='')}"))

    def runs(self, dag_id: str) -> list[DagRun]:
        """The runs of a DAG, newest first."""
        found = self._call("GET", f"/api/v2/dags/{dag_id}/dagRuns?order_by=-run_after&limit=50")
        return [_dag_run(run) for run in found["dag_runs"]]

    def run(self, run: DagRun) -> DagRun:
        """A run as it stands now."""
        return _dag_run(self._call("GET", _path(run)))

    def result(self, run: DagRun, task_id: str) -> Any:
        """What a task returned."""
        path = f"{_path(run)}/taskInstances/{task_id}/xcomEntries/return_value"
        return self._call("GET", f"{path}?deserialize=true")["value"]

    def tasks(self, run: DagRun) -> dict[str, str]:
        """The tasks of a run and the state of each ("none" before it is scheduled)."""
        return {task["task_id"]: task["state"] or "none" for task in self._task_instances(run)}

    def last_words(self, run: DagRun) -> str:
        """The newest line that a running task has logged through `ml`; empty where there is none yet."""
        for task in self._task_instances(run):
            if task["state"] == "running" and task["try_number"]:
                spoken = [line for line in self._log(run, task) if line.get("logger", "").startswith("ml.")]
                if spoken:
                    return str(spoken[-1]["event"])
        return ""

    def require_success(self, run: DagRun) -> None:
        """Returns for a run that has succeeded.

        Raises:
            ComponentFailed: names the tasks that failed and where their logs are.
        """
        if run.state != "success":
            failed = [task for task in self._task_instances(run) if task["state"] == "failed"]
            told = "; ".join(f"{task['task_id']}: {self._why(run, task)}" for task in failed)
            raise ComponentFailed(
                f"{run.dag_id} ({run.run_id}) {run.state}. {told}",
                fix="mend what the task says; its whole log lies under var/log/airflow-tasks.",
            )

    def _why(self, run: DagRun, task: Mapping[str, Any]) -> str:
        """The exception that ended a task, from its log."""
        details = [detail for line in self._log(run, task) for detail in line.get("error_detail") or []]
        return str(details[-1].get("exc_value")) if details else "its log names no error"

    def _log(self, run: DagRun, task: Mapping[str, Any]) -> list[dict[str, Any]]:
        path = f"{_path(run)}/taskInstances/{task['task_id']}/logs/{task['try_number']}"
        return [line for line in self._call("GET", path)["content"] if isinstance(line, dict)]

    def _task_instances(self, run: DagRun) -> list[dict[str, Any]]:
        return list(self._call("GET", f"{_path(run)}/taskInstances")["task_instances"])

    @retry(
        retry=retry_if_exception_type(OrchestratorUnavailable),
        stop=stop_after_delay(60),
        wait=wait_exponential(multiplier=0.5, max=5),
        reraise=True,
    )
    def _call(self, method: str, path: str, body: object = None, accept: tuple[int, ...] = ()) -> Any:
        try:
            response = self._send(method, path, body)
            if response.status_code == httpx.codes.UNAUTHORIZED:
                self._token = ""
                response = self._send(method, path, body)
        except httpx.TransportError as error:
            raise OrchestratorUnavailable(
                f"Airflow at {self.base_url} could not be asked: {error}.", fix="start it with `make up`."
            ) from error
        if response.is_server_error:
            raise OrchestratorUnavailable(
                f"Airflow answered {response.status_code} to {method} {path}.",
                fix="see var/log/airflow-api-server.log.",
            )
        if response.is_error and response.status_code not in accept:
            raise ComponentFailed(
                f"Airflow refused {method} {path}: {response.status_code} {response.text[:500]}",
                fix="see that its DAGs are the ones of this version (`make down`, `make up`).",
            )
        return response.json() if response.content else None

    def _send(self, method: str, path: str, body: object) -> httpx.Response:
        if not self._token:
            answer = self._http.post("/auth/token", json=self._login)
            if answer.status_code == httpx.codes.UNAUTHORIZED:
                raise ComponentFailed(
                    f"Airflow at {self.base_url} refused the login of {self._login['username']}.",
                    fix="another stack may be listening there: see `cifar10 status`.",
                )
            self._token = answer.json()["access_token"] if answer.is_success else "none"
        return self._http.request(method, path, json=body, headers={"Authorization": f"Bearer {self._token}"})


def _path(run: DagRun) -> str:
    return f"/api/v2/dags/{run.dag_id}/dagRuns/{quote(run.run_id, safe='')}"


def _dag_run(found: Mapping[str, Any]) -> DagRun:
    return DagRun(
        dag_id=found["dag_id"],
        run_id=found["dag_run_id"],
        state=found["state"],
        queued_at=found.get("queued_at") or found["run_after"],
        seconds=found.get("duration"),
    )
