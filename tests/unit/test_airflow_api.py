"""The client of Airflow's REST API against a transport that plays Airflow."""

import json

import httpx
import pytest

from ml.errors import ComponentFailed
from ml.stack.airflow_api import AirflowApi, DagRun

RUN = {"dag_id": "d", "dag_run_id": "r", "state": "failed", "run_after": "2026-01-01T00:00:00Z", "duration": 2.5}


class Airflow:
    """Answers by (method, path); a list is answered one by one, its last for ever. Keeps what it was asked."""

    def __init__(self, answers):
        self.answers = {("POST", "/auth/token"): (201, {"access_token": "t1"})} | answers
        self.asked = []

    def __call__(self, request):
        key = (request.method, request.url.path)
        self.asked.append((*key, request.headers.get("Authorization"), request.content))
        answer = self.answers[key]
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer[0], json=answer[1])

    def api(self):
        return AirflowApi("http://airflow", "admin", "password", transport=httpx.MockTransport(self))


def test_it_logs_in_once_and_again_when_the_token_is_refused():
    airflow = Airflow({("GET", "/api/v2/dags"): [(401, {}), (200, {"dags": [{"dag_id": "d", "is_paused": True}]})]})
    airflow.answers["POST", "/auth/token"] = [(201, {"access_token": "old"}), (201, {"access_token": "new"})]
    api = airflow.api()
    assert api.dag_ids() == {"d": True}
    assert api.dag_ids() == {"d": True}
    assert [token for _, path, token, _ in airflow.asked if path == "/api/v2/dags"] == [
        "Bearer old",
        "Bearer new",
        "Bearer new",
    ]


def test_a_wrong_password_is_said_and_not_repeated():
    airflow = Airflow({("POST", "/auth/token"): (401, {})})
    with pytest.raises(ComponentFailed, match="refused the login of admin"):
        airflow.api().dag_ids()
    assert len(airflow.asked) == 1


@pytest.mark.parametrize("passing", [(503, {}), httpx.ConnectError("refused")])
def test_what_passes_is_tried_again(passing):
    airflow = Airflow({("GET", "/api/v2/dags"): [passing, (200, {"dags": []})]})
    assert airflow.api().dag_ids() == {}


def test_a_refusal_is_said_with_what_airflow_answered():
    airflow = Airflow({("PATCH", "/api/v2/dags/d"): (404, {"detail": "no such DAG"})})
    with pytest.raises(ComponentFailed, match="no such DAG"):
        airflow.api().unpause("d")


def test_a_trigger_whose_answer_was_lost_starts_no_second_run():
    airflow = Airflow({})
    sent = []

    def answer(request):
        if request.method == "POST" and request.url.path.endswith("/dagRuns"):
            sent.append(json.loads(request.content)["dag_run_id"])
            if len(sent) == 1:
                raise httpx.ReadTimeout("lost")
            return httpx.Response(409, json={})
        if request.method == "GET":
            return httpx.Response(200, json=RUN | {"dag_run_id": request.url.path.rsplit("/", 1)[-1]})
        return airflow(request)

    api = AirflowApi("http://airflow", "admin", "password", transport=httpx.MockTransport(answer))
    run = api.trigger("d", {"recipe": "demo"})
    assert sent == [run.run_id] * 2


def test_a_failed_run_names_its_tasks_and_what_ended_them():
    tasks = [
        {"task_id": "ingest", "state": "failed", "try_number": 1},
        {"task_id": "explore", "state": "upstream_failed", "try_number": 0},
    ]
    log = [{"event": "Task failed", "error_detail": [{"exc_type": "AirflowFailException", "exc_value": "Wrong md5."}]}]
    prefix = "/api/v2/dags/d/dagRuns/r/taskInstances"
    airflow = Airflow(
        {("GET", prefix): (200, {"task_instances": tasks}), ("GET", f"{prefix}/ingest/logs/1"): (200, {"content": log})}
    )
    with pytest.raises(ComponentFailed, match=r"d \(r\) failed. ingest: Wrong md5."):
        airflow.api().require_success(DagRun("d", "r", "failed", "", 2.5))


def test_nobody_there_is_not_healthy():
    airflow = Airflow({("GET", "/api/v2/monitor/health"): [httpx.ConnectError("refused"), (200, {"scheduler": None})]})
    api = airflow.api()
    assert not api.is_healthy("scheduler")
    assert not api.is_healthy("scheduler")
