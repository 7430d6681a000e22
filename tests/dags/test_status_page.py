"""The Airflow UI's plugin: whom it asks, with what, and where its links lead."""

import importlib.util
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[2] / "plugins" / "cifar10_ui.py"
NOBODY = "http://127.0.0.1:9"
MODEL = {
    "name": "cifar10-classifier",
    "version": 3,
    "architecture": "vgg16",
    "weights": "RANDOM WEIGHTS",
    "data": "SYNTHETIC",
}
ADDRESSES = {
    "MLFLOW_TRACKING_URI": NOBODY,
    "PREDICTIONS_URL": NOBODY,
    "REPORTS_URL": NOBODY,
    "MLFLOW_PUBLIC_URL": "https://mlflow.example/",
    "PREDICTIONS_PUBLIC_URL": "https://try.example",
    "REPORTS_PUBLIC_URL": "https://reports.example",
}


@pytest.fixture
def neighbour():
    """Stands for all three services; asks for the key `schüssel` as the prediction server does."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            given = self.headers.get("X-API-Key", "").encode("latin-1")
            refused = self.path == "/v1/model" and given != "schüssel".encode()
            self.send_response(401 if refused else 200)
            self.end_headers()
            self.wfile.write(json.dumps(MODEL).encode())

        def log_message(self, *_):
            pass

    asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.asked = asked
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def plugin(monkeypatch):
    """The plugin as Airflow imports it under these settings."""

    def load(**environment):
        for name in (*ADDRESSES, "PREDICTION_API_KEYS", "MLFLOW_PORT", "API_PORT", "REPORTS_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        spec = importlib.util.spec_from_file_location("cifar10_ui_under_test", PLUGIN)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_airflow_takes_it_in(airflow_database):
    from airflow import plugins_manager

    assert plugins_manager.get_import_errors() == {}
    assert "cifar10_ui" in {plugin["name"] for plugin in plugins_manager.get_plugin_info()}


def page(module):
    from airflow.api_fastapi.core_api.security import get_user
    from fastapi.testclient import TestClient

    module.app.dependency_overrides[get_user] = lambda: "somebody who has logged in"
    reply = TestClient(module.app).get("/")
    assert reply.status_code == 200
    return reply.text


def test_without_a_login_nothing_is_told(plugin, neighbour):
    from fastapi.testclient import TestClient

    reply = TestClient(plugin(**ADDRESSES | {"PREDICTIONS_URL": neighbour.url}).app).get("/")
    assert reply.status_code == 401
    assert neighbour.asked == []


def links(module):
    return [view["href"] for view in module.Cifar10Ui.external_views[1:]]


def test_services_are_asked_where_they_are_and_linked_where_a_browser_finds_them(plugin, neighbour, monkeypatch):
    monkeypatch.setenv("http_proxy", NOBODY)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    internal = dict.fromkeys(("MLFLOW_TRACKING_URI", "PREDICTIONS_URL", "REPORTS_URL"), f"{neighbour.url}/")
    module = plugin(**ADDRESSES | internal, PREDICTION_API_KEYS="schüssel, other")
    shown = page(module)
    assert "cifar10-classifier version 3: vgg16, RANDOM WEIGHTS, trained on SYNTHETIC" in shown
    assert shown.count("ready") == 3
    assert sorted(neighbour.asked) == ["/", "/health", "/readyz", "/v1/model"]
    assert neighbour.url not in shown
    assert links(module) == [
        "https://mlflow.example/#/models/cifar10-classifier",
        "https://reports.example",
        "https://try.example",
    ]
    assert all(f'href="{link}"' in shown for link in links(module))


def test_without_its_key_the_champion_is_not_known(plugin, neighbour):
    assert "known to callers with a key only" in page(plugin(**ADDRESSES | {"PREDICTIONS_URL": neighbour.url}))


def test_services_that_are_away_are_said_to_be(plugin):
    shown = page(plugin(**ADDRESSES))
    assert "unknown: the prediction server does not answer" in shown
    assert shown.count("does not answer (ConnectError)") == 3


def test_an_address_that_is_not_given_is_the_port_on_this_machine(plugin):
    module = plugin(API_PORT="9000", MLFLOW_PUBLIC_URL="")
    assert links(module) == [
        "http://127.0.0.1:5000/#/models/cifar10-classifier",
        "http://127.0.0.1:8001",
        "http://127.0.0.1:9000",
    ]
    assert module.PREDICTIONS.url == "http://127.0.0.1:9000"
