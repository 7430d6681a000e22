"""The app while a challenger gets traffic: who answers, what the log says, what is told of it."""

from uuid import UUID, uuid4

import numpy as np
import pytest

from deploy.server.app import create_app
from deploy.server.testing import MemoryShadows
from ml.datasets.labels import CLASS_NAMES
from ml.serving.router import Router
from tests.served_app import OTHER, PIXELS, Served, b64, encoded
from tests.tiny_models import PIXELS as INPUTS
from tests.tiny_models import always, make_onnx


class Challenged(Served):
    """Version 1 answers `cat`; version 2 is the challenger, answers `horse`, and gets no traffic yet."""

    def __init__(self, folder, settings):
        super().__init__(folder, settings, always(3))
        self.shadows = MemoryShadows()
        self.router = Router(self.follower, record=self.shadows.append)
        self.app = create_app(settings, follower=self.follower, log=self.log, router=self.router, shadows=self.shadows)
        self.client = self.app.test_client()
        self.source.name_challenger(make_onnx(folder / "2.onnx", **always(7)), 2)
        self.follower.poll()
        self.router.start()

    def send(self, mode, share=1.0):
        self.source.send(2, mode, share)
        self.follower.poll()

    def predict(self, route="/v1/predict", **headers):
        payload = {
            "/v1/predict": {"images": [b64(encoded(PIXELS)), b64(encoded(OTHER))]},
            "/invocations": {"inputs": [PIXELS.tolist(), OTHER.tolist()]},
        }[route]
        reply = self.post(route, json=payload, headers=headers)
        assert reply.status_code == 200, reply.get_data(as_text=True)
        return reply.get_json()

    def challenger(self):
        return self.get("/v1/model").get_json()["challenger"]


@pytest.fixture
def served(tmp_path, settings):
    made = Challenged(tmp_path, settings)
    yield made
    made.router.close()


def class_of(route, reply):
    if route == "/invocations":
        return int(np.argmax(reply["predictions"][0]))
    return reply["predictions"][0]["class_id"]


def test_without_traffic_there_is_no_challenger(served):
    served.predict()
    assert served.challenger() is None
    assert "cifar10_challenger_share{" not in served.get("/metrics").get_data(as_text=True)


@pytest.mark.parametrize("route", ["/v1/predict", "/invocations"])
def test_mirrored_the_champion_answers_and_the_challenger_is_shown_the_same(served, route):
    served.send("mirror")
    request_id = str(uuid4())
    reply = served.predict(route, **{"X-Request-ID": request_id})
    assert class_of(route, reply) == 3
    assert served.router.flush()
    (one,) = served.shadows.mirrored
    (logged,) = served.log.predictions
    assert one.request_id == logged.request_id == UUID(request_id)
    assert (logged.model_version, one.champion_version, one.challenger_version) == (1, 1, 2)
    assert one.champion_classes.tolist() == [3, 3]
    assert one.probabilities.argmax(axis=1).tolist() == [7, 7]
    said = served.challenger()
    assert (said["version"], said["mode"], said["share"], said["loaded"]) == (2, "mirror", 1.0, True)
    assert (said["mirrored"], said["disagreed"], said["answered"], said["failed"]) == (2, 2, 0, 0)


@pytest.mark.parametrize("route", ["/v1/predict", "/invocations"])
def test_as_a_canary_it_answers_and_reply_and_log_say_so(served, route):
    served.send("canary")
    reply = served.predict(route)
    assert class_of(route, reply) == 7
    if route == "/v1/predict":
        assert (reply["model"]["version"], reply["model"]["alias"]) == (2, "challenger")
    assert served.log.predictions[0].model_version == 2
    assert served.challenger()["answered"] == 2
    assert served.shadows.mirrored == []


def test_a_canary_gets_its_share_and_a_repeated_request_the_same_model(served):
    served.send("canary", 0.5)
    versions = {}
    for _ in range(30):
        request_id = str(uuid4())
        versions[request_id] = served.predict(**{"X-Request-ID": request_id})["model"]["version"]
    assert set(versions.values()) == {1, 2}
    for request_id, version in versions.items():
        assert served.predict(**{"X-Request-ID": request_id})["model"]["version"] == version


@pytest.mark.parametrize("mode", ["mirror", "canary"])
def test_where_the_challenger_fails_the_champion_answers_and_it_is_counted(served, tmp_path, mode):
    # Its warm-up, a blank image, goes well; anything brighter overflows.
    broken = make_onnx(tmp_path / "3.onnx", weights=np.full((INPUTS, 10), 3e38))
    served.source.name_challenger(broken, 3)
    served.source.send(3, mode, 1)
    served.follower.poll()
    assert served.predict()["model"]["version"] == 1
    assert served.router.flush()
    said = served.challenger()
    assert (said["version"], said["failed"], said["answered"]) == (3, 2, 0)
    assert served.log.predictions[0].model_version == 1
    assert 'cifar10_challenger_failed_images_total{version="3"} 2.0' in served.get("/metrics").get_data(as_text=True)


def test_a_challenger_that_does_not_load_is_told_and_changes_nothing(served, tmp_path):
    (tmp_path / "4.onnx").write_bytes(b"broken")
    served.source.name_challenger(tmp_path / "4.onnx", 4)
    served.source.send(4, "canary", 1)
    served.follower.poll()
    assert served.predict()["model"]["version"] == 1
    said = served.challenger()
    assert (said["version"], said["loaded"]) == (4, False)
    assert "4.onnx" in said["failure"]["message"]
    assert served.get("/v1/model").get_json()["failure"] is None
    lines = served.get("/metrics").get_data(as_text=True).splitlines()
    assert "cifar10_challenger_load_failures_total 1.0" in lines
    assert "cifar10_challenger_failing 1.0" in lines


def test_traffic_that_cannot_be_read_is_told(served, tmp_path):
    (tmp_path / "registry" / "traffic.json").write_text("?")
    served.follower.poll()
    said = served.challenger()
    assert (said["version"], said["mode"], said["share"], said["loaded"]) == (None, None, None, False)
    assert served.predict()["model"]["version"] == 1


def test_the_figures_are_there_for_prometheus(served):
    served.send("mirror", 1)
    served.predict()
    assert served.router.flush()
    lines = served.get("/metrics").get_data(as_text=True).splitlines()
    for line in (
        'cifar10_challenger_share{mode="mirror",version="2"} 1.0',
        'cifar10_challenger_mirrored_images_total{version="2"} 2.0',
        'cifar10_challenger_disagreed_images_total{version="2"} 2.0',
        'cifar10_challenger_answered_images_total{version="2"} 0.0',
        'cifar10_challenger_failed_images_total{version="2"} 0.0',
        'cifar10_challenger_dropped_images_total{version="2"} 0.0',
        "cifar10_challenger_failing 0.0",
        "cifar10_mirror_queued_images 0.0",
        "cifar10_shadow_log_written_rows_total 2.0",
        "cifar10_shadow_log_dropped_rows_total 0.0",
        f'cifar10_predictions_total{{label="{CLASS_NAMES[3]}",version="1"}} 2.0',
    ):
        assert line in lines
