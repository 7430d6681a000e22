"""The client against the real app, in the same process, and against a server that fails."""

import httpx
import numpy as np
import pytest
from PIL import Image
from pydantic import SecretStr

from deploy.server.app import create_app
from deploy.server.testing import MemoryLog
from ml.client import BATCH, CifarClient
from ml.errors import ConfigurationError, ImageUndecodable, InputInvalid, PredictionNotFound, ServiceUnavailable
from ml.serving.engine import Engine
from ml.serving.hot_swap import ChampionFollower
from ml.serving.testing import FolderSource
from tests.tiny_models import make_onnx

IMAGES = np.random.default_rng(1).integers(0, 256, (BATCH + 5, 32, 32, 3), dtype=np.uint8)


class Unreliable(httpx.BaseTransport):
    """Fails so often before it lets requests through."""

    def __init__(self, inner, failures):
        self.inner, self.failures, self.calls = inner, list(failures), []

    def handle_request(self, request):
        self.calls.append(request)
        failure = self.failures.pop(0) if self.failures else None
        if isinstance(failure, Exception):
            raise failure
        return failure or self.inner.handle_request(request)


@pytest.fixture
def onnx(tmp_path):
    return make_onnx(tmp_path / "1.onnx")


@pytest.fixture
def log():
    return MemoryLog()


@pytest.fixture
def transport(tmp_path, settings, onnx, log):
    source = FolderSource(tmp_path / "registry")
    source.crown(onnx, 1, data="cifar-10")
    follower = ChampionFollower(source, tmp_path / "cache")
    follower.poll()
    keyed = settings.model_copy(update={"prediction_api_keys": (SecretStr("key"),)})
    return httpx.WSGITransport(app=create_app(keyed, follower=follower, log=log))


@pytest.fixture
def client(transport):
    with CifarClient("http://localhost", "key", transport=transport) as made:
        yield made


def test_arrays_are_predicted_in_order_and_in_batches(client, onnx, log):
    got = client.predict(IMAGES)
    expected = Engine(onnx).predict(IMAGES)
    assert [p.class_id for p in got] == expected.argmax(axis=1).tolist()
    np.testing.assert_allclose([list(p.probabilities.values()) for p in got], expected, atol=1e-6)
    assert [len(p.images) for p in log.predictions] == [BATCH, 5]
    assert (got[0].model_name, got[0].model_version, got[0].data) == ("cifar10-classifier", 1, "cifar-10")


def test_files_are_predicted(client, tmp_path, log):
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    Image.fromarray(IMAGES[1]).save(tmp_path / "b.webp", lossless=True)
    client.predict([tmp_path / "a.png", str(tmp_path / "b.webp")])
    np.testing.assert_array_equal(log.predictions[0].images, IMAGES[:2])


def test_feedback_reaches_the_image_that_it_is_about(client, log):
    got = client.predict(IMAGES)
    client.feedback(got[BATCH + 2], "ship")
    assert log.feedback == {(log.predictions[1].request_id, 2): 8}


def test_refusals_are_errors_of_our_own(client, tmp_path, transport):
    (tmp_path / "x.png").write_bytes(b"x")
    with pytest.raises(ImageUndecodable, match="whole PNG"):
        client.predict([tmp_path / "x.png"])
    known = client.predict(IMAGES[:1])[0]
    with pytest.raises(InputInvalid, match="airplane"):
        client.feedback(known, "lion")
    other = type(known)(**{**vars(known), "request_id": "6a99f06a-ce86-431f-b8d4-ba0e10f2701b"})
    with pytest.raises(PredictionNotFound):
        client.feedback(other, "cat")
    with pytest.raises(ConfigurationError, match="PREDICTION_API_KEYS"):
        CifarClient("http://localhost", transport=transport).predict(IMAGES[:1])


def test_a_server_that_is_away_for_a_moment_is_asked_again_with_the_same_id(transport, log):
    unreliable = Unreliable(transport, [httpx.ConnectError("refused"), httpx.Response(503), httpx.ReadError("cut")])
    with CifarClient("http://localhost", "key", transport=unreliable) as client:
        assert len(client.predict(IMAGES[:1])) == 1
    assert len(unreliable.calls) == 4
    (request_id,) = {call.headers["X-Request-ID"] for call in unreliable.calls}
    assert str(log.predictions[0].request_id) == request_id


def test_a_server_that_stays_away_is_could_not_ask():
    with CifarClient("http://127.0.0.1:9", patience=0.3) as client:
        assert client.ready() is False
        with pytest.raises(ServiceUnavailable, match=r"127\.0\.0\.1:9"):
            client.predict(IMAGES[:1])


def test_ready_follows_the_server(client):
    assert client.ready() is True
