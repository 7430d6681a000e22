"""The Flask app with a tiny model: every route, every form, every refusal, held against its own OpenAPI document."""

import base64
import io
import json
import logging
import re
from uuid import UUID, uuid4

import jsonschema
import numpy as np
import pytest
from PIL import Image

from deploy.server.json_logging import JsonLines
from ml.datasets.labels import CLASS_NAMES
from ml.serving.engine import Engine
from tests.served_app import OTHER, PIXELS, Served, b64, encoded
from tests.tiny_models import always, make_onnx


@pytest.fixture
def served(tmp_path, settings):
    made = Served(tmp_path, settings)
    made.follower.poll()
    return made


@pytest.fixture
def expected(served):
    return Engine(served.onnx).predict(np.stack([PIXELS, OTHER]))


def assert_predicts(reply, expected_rows):
    assert reply.status_code == 200, reply.get_data(as_text=True)
    body = reply.get_json()
    assert body["model"] == {"name": "cifar10-classifier", "version": 1, "alias": "champion", "data": "SYNTHETIC"}
    assert len(body["predictions"]) == len(expected_rows)
    for prediction, row in zip(body["predictions"], expected_rows, strict=True):
        assert list(prediction["probabilities"]) == list(CLASS_NAMES)
        np.testing.assert_allclose(list(prediction["probabilities"].values()), row, atol=1e-6)
        assert prediction["class_id"] == row.argmax()
        assert prediction["label"] == CLASS_NAMES[row.argmax()]
        assert prediction["probability"] == pytest.approx(row.max(), abs=1e-6)


# Every form of an image


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_a_raw_body_is_predicted_exactly(served, expected, kind, options):
    data = encoded(PIXELS, kind, **options)
    assert_predicts(served.post("/v1/predict", data=data, content_type=f"image/{kind.lower()}"), expected[:1])


def test_a_raw_jpeg_is_predicted_from_its_decoded_pixels(served):
    data = encoded(PIXELS, "JPEG")
    row = Engine(served.onnx).predict(np.asarray(Image.open(io.BytesIO(data)))[None])
    assert_predicts(served.post("/v1/predict", data=data, content_type="image/jpeg"), row)


def test_multipart_takes_several_files(served, expected):
    files = [
        (io.BytesIO(encoded(PIXELS)), "a.png"),
        (io.BytesIO(encoded(OTHER, "WEBP", lossless=True)), "b.webp", "application/octet-stream"),
    ]
    assert_predicts(served.post("/v1/predict", data={"image": files}), expected)


@pytest.mark.parametrize("key", ["image", "images"])
def test_base64_json_is_predicted(served, expected, key):
    both = [b64(encoded(PIXELS)), b64(encoded(OTHER))]
    payload = {key: both[0] if key == "image" else both}
    assert_predicts(served.post("/v1/predict", json=payload), expected[:1] if key == "image" else expected)


def test_numbers_are_predicted(served, expected):
    assert_predicts(served.post("/v1/predict", json={"instances": [PIXELS.tolist(), OTHER.tolist()]}), expected)


@pytest.mark.parametrize("key", ["instances", "inputs"])
def test_invocations_speak_mlflows_protocol(served, expected, key):
    reply = served.post("/invocations", json={key: [PIXELS.tolist(), OTHER.tolist()]})
    assert list(reply.get_json()) == ["predictions"]
    np.testing.assert_allclose(reply.get_json()["predictions"], expected, atol=1e-6)
    assert len(served.log.predictions) == 1


def test_the_image_that_the_model_saw_can_be_had(served):
    large = np.kron(PIXELS, np.ones((4, 4, 1), np.uint8))
    reply = served.post("/v1/predict?include=image", data=encoded(large), content_type="image/png")
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(reply.get_json()["predictions"][0]["image"]))))
    np.testing.assert_array_equal(seen, served.log.predictions[0].images[0])
    assert seen.shape == (32, 32, 3)


def test_every_prediction_is_logged_as_the_model_saw_it(served, expected):
    reply = served.post("/v1/predict", json={"images": [b64(encoded(PIXELS)), b64(encoded(OTHER))]})
    (logged,) = served.log.predictions
    assert str(logged.request_id) == reply.get_json()["request_id"]
    assert (logged.model_name, logged.model_version) == ("cifar10-classifier", 1)
    np.testing.assert_array_equal(logged.images, [PIXELS, OTHER])
    np.testing.assert_allclose(logged.probabilities, expected, atol=1e-6)
    assert logged.created_at.utcoffset().total_seconds() == 0


def test_random_weights_are_said_in_the_reply(served):
    served.source.crown(served.onnx, 2, weights="RANDOM WEIGHTS")
    served.follower.poll()
    reply = served.post("/v1/predict", data=encoded(), content_type="image/png")
    assert reply.get_json()["model"]["weights"] == "RANDOM WEIGHTS"


# Request ids, headers, log lines


def test_the_callers_uuid_is_the_request_id(served):
    mine = str(uuid4())
    reply = served.post("/v1/predict", data=encoded(), content_type="image/png", headers={"X-Request-ID": mine})
    assert reply.get_json()["request_id"] == reply.headers["X-Request-ID"] == mine


@pytest.mark.parametrize("given", ["", "7", "x" * 500, "'; DROP TABLE predictions; --"])
def test_another_text_is_replaced_by_a_uuid(served, given):
    reply = served.get("/healthz", headers={"X-Request-ID": given})
    assert reply.headers["X-Request-ID"] != given


def test_browsers_are_told_to_run_nothing_but_the_pages_own_script(served):
    headers = served.get("/").headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_a_request_leaves_one_line_of_json_with_its_id(served, caplog):
    caplog.set_level(logging.INFO, logger="deploy.server.access")
    caplog.handler.setFormatter(JsonLines())
    reply = served.post("/v1/predict", data=encoded(), content_type="image/png")
    (line,) = [json.loads(text) for text in caplog.text.splitlines()]
    assert line["request_id"] == reply.get_json()["request_id"]
    assert (line["route"], line["status"], line["images"]) == ("/v1/predict", 200, 1)


# Feedback


def test_feedback_is_kept_then_replaced(served):
    request_id = served.post("/v1/predict", json={"images": [b64(encoded())] * 2}).get_json()["request_id"]
    first = served.post("/v1/feedback", json={"request_id": request_id, "index": 1, "label": "cat"})
    assert (first.status_code, first.get_json()) == (201, {"request_id": request_id, "index": 1, "label": "cat"})
    again = served.post("/v1/feedback", json={"request_id": request_id, "index": 1, "label": "dog"})
    assert again.status_code == 200
    assert served.post("/v1/feedback", json={"request_id": request_id, "label": "frog"}).status_code == 201
    assert served.log.feedback == {(UUID(request_id), 1): 5, (UUID(request_id), 0): 6}


@pytest.mark.parametrize(
    ("status", "said", "payload"),
    [
        (404, "request_id", {"request_id": str(uuid4()), "label": "cat"}),
        (422, "airplane, automobile", {"request_id": str(uuid4()), "label": "lion"}),
        (422, "label", {"request_id": str(uuid4()), "label": 3}),
        (422, "label", {"request_id": str(uuid4())}),
        (422, "UUID", {"request_id": "7", "label": "cat"}),
        (422, "UUID", {"label": "cat"}),
        (422, "index", {"request_id": str(uuid4()), "label": "cat", "index": -1}),
        (422, "index", {"request_id": str(uuid4()), "label": "cat", "index": True}),
        (422, "'note'", {"request_id": str(uuid4()), "label": "cat", "note": "x"}),
        (422, "list", []),
    ],
)
def test_wrong_feedback_is_refused(served, status, said, payload):
    reply = served.post("/v1/feedback", json=payload)
    assert reply.status_code == status
    assert said in reply.get_json()["detail"].replace("send an id", "request_id")


def test_predictions_go_on_without_the_database_and_feedback_waits(served):
    served.log.away = True
    reply = served.post("/v1/predict", data=encoded(), content_type="image/png")
    assert reply.status_code == 200
    told = served.post("/v1/feedback", json={"request_id": reply.get_json()["request_id"], "label": "cat"})
    assert (told.status_code, told.headers["Retry-After"]) == (503, "2")
    assert "db.internal" not in told.get_data(as_text=True)


# Health, model, figures


def test_without_a_champion_it_is_alive_and_not_ready(tmp_path, settings):
    served = Served(tmp_path, settings)
    (tmp_path / "registry" / "champion.json").unlink()
    served.follower.poll()
    assert served.get("/healthz").status_code == 200
    for path in ("/readyz", "/ping", "/v1/model"):
        reply = served.get(path)
        assert (reply.status_code, reply.headers["Retry-After"]) == (503, "2")
        assert "cifar10 promote" in reply.get_json()["detail"]
    assert served.post("/v1/predict", data=encoded(), content_type="image/png").status_code == 503
    served.source.crown(served.onnx, 1)
    served.follower.poll()
    assert served.get("/readyz").get_json()["model"]["version"] == 1
    assert served.get("/ping").status_code == 200


def test_the_model_route_says_what_serves_and_what_failed(served, tmp_path):
    before = served.get("/v1/model").get_json()
    assert (before["version"], before["data"], before["failure"]) == (1, "SYNTHETIC", None)
    assert before["engine"] == "fp32"
    broken = tmp_path / "secret-folder" / "2.onnx"
    broken.parent.mkdir()
    broken.write_bytes(b"not a model")
    served.source.crown(broken, 2)
    served.follower.poll()
    after = served.get("/v1/model").get_json()
    assert (after["version"], after["failed_swaps"], after["failure"]["version"]) == (1, 1, 2)
    assert "2.onnx cannot be loaded" in after["failure"]["message"]
    assert "secret-folder" not in json.dumps(after)


def test_metrics_count_what_happened(served):
    for _ in range(3):
        served.post("/v1/predict", data=encoded(), content_type="image/png")
    served.post("/v1/predict", data=b"x", content_type="image/png")
    served.client.get("/nowhere/at/all")
    text = served.get("/metrics").get_data(as_text=True)
    label = served.log.predictions[0].probabilities.argmax()
    for line in (
        'cifar10_http_requests_total{method="POST",route="/v1/predict",status="200"} 3.0',
        'cifar10_http_requests_total{method="POST",route="/v1/predict",status="400"} 1.0',
        'cifar10_http_requests_total{method="GET",route="unmatched",status="404"} 1.0',
        f'cifar10_predictions_total{{label="{CLASS_NAMES[label]}",version="1"}} 3.0',
        'cifar10_model_info{alias="champion",data="SYNTHETIC",name="cifar10-classifier",version="1"} 1.0',
        "cifar10_model_swaps_total 1.0",
        "cifar10_model_swap_failures_total 0.0",
        "cifar10_prediction_log_written_rows_total 3.0",
        "cifar10_prediction_log_dropped_rows_total 0.0",
        "cifar10_prediction_log_queued_rows 0.0",
    ):
        assert line in text.splitlines()
    assert 'cifar10_http_request_duration_seconds_count{route="/v1/predict"} 4.0' in text
    assert "nowhere" not in text


def test_two_apps_count_apart(served, tmp_path, settings):
    (tmp_path / "other").mkdir()
    other = Served(tmp_path / "other", settings)
    served.get("/healthz")
    assert 'route="/healthz"' not in other.get("/metrics").get_data(as_text=True)


def test_the_document_holds_every_route_and_no_other(served):
    routes = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in served.app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    described = {(path, method) for path, methods in served.document["paths"].items() for method in methods}
    assert routes == described
    assert served.document["openapi"] == "3.1.0"
    for schema in served.document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ("Images", {"image": "AAAA"}, {"image": "AAAA", "images": ["AAAA"]}),
        ("Images", {"instances": [PIXELS.tolist()]}, {"instances": [[[[1, 2]]]]}),
        ("MlflowInput", {"inputs": [[[[1, 2, 3]]]], "params": {}}, {"inputs": [[[[1, 2, 3]]]], "params": {"a": 1}}),
        ("Feedback", {"request_id": str(uuid4()), "label": "cat"}, {"request_id": str(uuid4()), "label": "lion"}),
    ],
)
def test_the_document_tells_good_bodies_from_bad(served, schema, good, bad):
    root = {"$ref": f"#/components/schemas/{schema}", "components": served.document["components"]}
    validator = jsonschema.Draft202012Validator(root)
    assert validator.is_valid(good)
    assert not validator.is_valid(bad)


def test_a_version_is_answered_by_its_own_model(served, tmp_path):
    for version, class_id in [(2, 3), (3, 8)]:
        served.source.crown(make_onnx(tmp_path / f"{version}.onnx", **always(class_id)), version)
        served.follower.poll()
        body = served.post("/v1/predict", data=encoded(), content_type="image/png").get_json()
        assert (body["model"]["version"], body["predictions"][0]["class_id"]) == (version, class_id)
