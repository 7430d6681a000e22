"""The server's doors: keys that come and go, limits of callers, strict bodies, and what no reply ever says."""

import io
import json
import logging
import re
import tracemalloc

import numpy as np
import pytest
from flask import Flask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from deploy.server.app import create_app
from deploy.server.json_logging import JsonLines
from deploy.server.openapi import describe
from deploy.server.request_context import HEADERS
from ml.errors import CifarError, ConfigurationError, DatasetError, RegistryError, StorageError
from ml.serving.api_keys import add_key, revoke_key
from ml.serving.decoding import MAX_LISTS, MAX_SCANS
from ml.serving.router import Router
from tests.served_app import PIXELS, Served, b64, encoded

PNG = {"data": encoded(), "content_type": "image/png"}


@pytest.fixture
def served(tmp_path, settings):
    return ready(tmp_path, settings)


def ready(folder, settings, **changes):
    made = Served(folder, settings.model_copy(update=changes))
    made.follower.poll()
    return made


# Keys


def test_keys_of_the_file_open_and_close_while_the_server_runs(tmp_path, settings, monkeypatch):
    path = tmp_path / "keys.json"
    key, _ = add_key(path, "alice")
    monkeypatch.setattr("deploy.server.key_ring.LOOK_EVERY_NS", 0)
    served = ready(tmp_path, settings, prediction_api_keys_file=path, api_host="0.0.0.0", mlops_env="production")
    assert served.post("/v1/predict", **PNG).status_code == 401
    assert served.post("/v1/predict", headers={"X-API-Key": key}, **PNG).status_code == 200
    revoke_key(path, "alice")
    assert served.post("/v1/predict", headers={"X-API-Key": key}, **PNG).status_code == 401
    other, _ = add_key(path, "bob")
    assert served.get("/v1/model", headers={"Authorization": f"Bearer {other}"}).status_code == 200


def test_it_does_not_start_without_the_file_of_keys_that_is_set(tmp_path, settings):
    away = settings.model_copy(update={"prediction_api_keys_file": tmp_path / "none.json"})
    with pytest.raises(ConfigurationError, match="cifar10 keys add"):
        create_app(away, follower=None, log=None)


# Limits


@pytest.fixture
def limited(tmp_path, settings):
    path = tmp_path / "keys.json"
    keys = {name: add_key(path, name, limit)[0] for name, limit in [("slow", 0.01), ("slower", None), ("big", 1e6)]}
    served = ready(tmp_path, settings, prediction_api_keys_file=path, prediction_rate_limit=0.005)
    return lambda who, route="/v1/predict", **more: served.post(route, headers={"X-API-Key": keys[who]}, **more)


def many(n):
    return {"json": {"images": [b64(encoded())] * n}}


def test_a_caller_gets_its_burst_then_429_with_the_time_to_wait_and_others_go_on(limited):
    assert limited("slow", **many(127)).status_code == 200
    refused = limited("slow", **many(2))
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) == pytest.approx(100, abs=1)
    assert "0.01 images per second" in refused.get_json()["detail"]
    assert refused.headers["Retry-After"] + " s" in refused.get_json()["detail"]
    assert limited("slow", **PNG).status_code == 200  # a smaller one still fits
    assert limited("slow", **PNG).status_code == 429
    for other in ("slower", "big"):
        assert limited(other, **many(128)).status_code == 200
    assert int(limited("slower", **PNG).headers["Retry-After"]) == pytest.approx(200, abs=1)  # the server's limit
    assert limited("big", **many(128)).status_code == 200


def test_where_nothing_is_left_the_body_is_not_even_read(limited, monkeypatch):
    limited("slow", **many(128))
    monkeypatch.setattr("deploy.server.predictions.images_of", None)
    monkeypatch.setattr("deploy.server.predictions.json_of", None)
    for route in ("/v1/predict", "/invocations", "/v1/feedback"):
        assert limited("slow", route, data=b"x", content_type="image/png").status_code == 429


def test_what_was_refused_for_its_content_costs_nothing_and_feedback_costs_one(limited):
    assert limited("slow", **many(127)).status_code == 200
    for _ in range(5):
        assert limited("slow", data=b"x", content_type="image/png").status_code == 400
    known = {"request_id": "6a99f06a-ce86-431f-b8d4-ba0e10f2701b", "label": "cat"}
    assert limited("slow", "/v1/feedback", json=known).status_code == 404
    assert limited("slow", "/v1/feedback", json=known).status_code == 429


def test_without_keys_the_limit_is_an_addresss(tmp_path, settings):
    served = ready(tmp_path, settings, prediction_rate_limit=0.01)
    for status in (200, 429):
        assert served.post("/v1/predict", **many(128)).status_code == status
    other = {"environ_overrides": {"REMOTE_ADDR": "127.0.0.2"}}
    assert served.post("/v1/predict", **many(128), **other).status_code == 200
    assert served.get("/v1/model").status_code == 200


# Bodies


@pytest.mark.parametrize(
    ("status", "content_type", "headers"),
    [
        (200, "application/json; charset=utf-8", {}),
        (200, "Application/JSON;charset=UTF-8", {}),
        (200, "application/json", {"Content-Encoding": "identity"}),
        (415, "application/json; charset=utf-16", {}),
        (415, "application/json; profile=x", {}),
        (415, "application/json, application/json", {}),
        (415, "application/json", {"Content-Encoding": "gzip"}),
        (415, "application/json", {"Content-Encoding": "identity, br"}),
        (415, "application/jsonx", {}),
        (415, "json", {}),
        (415, "", {}),
    ],
)
def test_content_types_and_encodings_are_taken_at_their_word(served, status, content_type, headers):
    body = json.dumps({"image": b64(encoded())})
    reply = served.post("/v1/predict", data=body, content_type=content_type, headers=headers)
    assert reply.status_code == status


@pytest.mark.parametrize(
    ("status", "content_type"),
    [(200, "image/png"), (200, "IMAGE/PNG"), (415, "image/png; charset=utf-8"), (415, "image/png,image/png")],
)
def test_an_images_content_type_has_no_parameters(served, status, content_type):
    assert served.post("/v1/predict", data=encoded(), content_type=content_type).status_code == status


def parts(n, name="image"):
    part = f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n\r\n'.encode()
    return b"".join(part + encoded() + b"\r\n" for _ in range(n)) + b"--b--\r\n"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, parts(128)),
        (413, parts(129)),
        (413, parts(500)),
        (400, parts(2)[:-200]),
        (400, b"x"),
        (422, b""),
        (422, parts(1, "x" * 5000)),
        (413, b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"x" * 1_000_000 + b"\r\n--b--\r\n"),
        (
            422,
            b"".join(b'--b\r\nContent-Disposition: form-data; name="%d"\r\n\r\n\r\n' % i for i in range(9)) + b"--b--",
        ),
        (413, b"--b\r\n" + b"X: y\r\n" * 500_000),
    ],
    ids=["most", "one more", "many", "cut", "none", "empty", "long name", "long text", "fields", "headers"],
)
def test_a_form_is_whole_and_has_at_most_128_parts(served, status, body):
    reply = served.post("/v1/predict", data=body, content_type="multipart/form-data; boundary=b")
    assert reply.status_code == status
    if status == 413:
        assert "128 images" in reply.get_json()["detail"] or "at most 128" in reply.get_json()["detail"]


def test_a_form_without_a_boundary_is_undecodable(served):
    assert served.post("/v1/predict", data=parts(1), content_type="multipart/form-data").status_code == 400


@pytest.mark.parametrize("unit", [b"[],", b"{},", b"[[[[1,2,3]]]],"])
def test_json_that_would_swell_in_memory_is_refused_before_it_does(served, unit):
    body = b'{"instances": [' + unit * (2 * MAX_LISTS // unit.count(b"[") if b"[" in unit else 2 * MAX_LISTS) + b"1]}"
    tracemalloc.start()
    reply = served.post("/v1/predict", data=body, content_type="application/json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reply.status_code == 413
    assert peak < 3 * len(body) + 5_000_000


def test_the_largest_of_the_images_that_are_sent_as_numbers_is_taken(served):
    image = np.zeros((700, 700, 3), np.uint8).tolist()
    assert served.post("/v1/predict", json={"instances": [image]}).status_code == 200


@pytest.mark.parametrize("number", ["1" * 4000, "1" * 5000, "1e400", "-1e400", "1E-400", "NaN", "0.1e+9999999999"])
def test_numbers_beyond_all_measure_are_refused_or_nought(served, number):
    body = f'{{"instances": [[[[0, 0, {number}]]]]}}'
    reply = served.post("/v1/predict", data=body, content_type="application/json")
    assert reply.status_code == (200 if number == "1E-400" else 400 if number == "1" * 5000 else 422)


@pytest.mark.parametrize("depth", [10, 60, 70, 500, 5000, 200_000])
@pytest.mark.parametrize("route", ["/v1/predict", "/invocations"])
def test_depth_is_refused(served, route, depth):
    body = '{"instances": ' + "[" * depth + "1" + "]" * depth + "}"
    assert served.post(route, data=body, content_type="application/json").status_code in (400, 422)


def test_a_jpeg_of_endless_scans_is_refused_and_one_of_many_is_not(served):
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    assert 1 < data.count(b"\xff\xda") < MAX_SCANS
    assert served.post("/v1/predict", data=data, content_type="image/jpeg").status_code == 200
    last = data.rindex(b"\xff\xda")
    bomb = data[:-2] + data[last:-2] * MAX_SCANS + data[-2:]
    reply = served.post("/v1/predict", data=bomb, content_type="image/jpeg")
    assert reply.status_code == 413
    assert "scans" in reply.get_json()["detail"]


def test_text_that_swells_inside_a_png_is_refused(served):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("a", "\0" * 50_000_000, zip=True)
    body = encoded(pnginfo=info)
    assert len(body) < 100_000
    assert served.post("/v1/predict", data=body, content_type="image/png").status_code == 400


# Addresses, methods, queries


@pytest.mark.parametrize("route", ["/v1/predict", "/v1/feedback", "/invocations", "/v1/model", "/metrics"])
@pytest.mark.parametrize("query", ["x=1", "include=image&include=image", "include=image&x", "%00=1"])
def test_a_query_that_would_be_ignored_is_refused(served, route, query):
    method = "GET" if route in ("/v1/model", "/metrics") else "POST"
    reply = served.call(method, f"{route}?{query}", **(PNG if method == "POST" else {}))
    assert reply.status_code == 422
    assert "query parameter" in reply.get_json()["detail"]


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "BREW", "HEAD", "GET"])
def test_other_methods_are_refused_with_those_that_are_taken(served, method):
    reply = served.client.open("/v1/predict", method=method)
    assert reply.status_code == 405
    assert reply.headers["Allow"] == "OPTIONS, POST"
    assert (reply.data == b"") == (method == "HEAD")


def test_options_and_head_do_nothing(served):
    reply = served.client.options("/v1/predict")
    assert (reply.status_code, reply.data) == (200, b"")
    assert set(reply.headers["Allow"].split(", ")) == {"POST", "OPTIONS"}
    assert served.client.head("/v1/model").status_code == 200
    assert served.log.predictions == []


ADDRESSES = [
    ("GET", "/"),
    ("GET", "/static/page.css"),
    ("GET", "/static/nothing.css"),
    ("GET", "/static/../app.py"),
    ("GET", "/static/%2e%2e/app.py"),
    ("GET", "/v1//model"),
    ("GET", "/v1/model/"),
    ("GET", "/nowhere"),
    ("GET", "/healthz"),
    ("GET", "/openapi.json"),
    ("GET", "/metrics"),
    ("POST", "/v1/predict"),
    ("PUT", "/v1/predict"),
    ("OPTIONS", "/v1/predict"),
    ("HEAD", "/"),
]


@pytest.mark.parametrize(("method", "path"), ADDRESSES)
def test_every_reply_has_the_headers_that_keep_browsers_safe_once(served, method, path):
    reply = served.client.open(path, method=method)
    assert reply.status_code in (200, 404, 405, 415)
    for name, value in HEADERS:
        assert reply.headers.getlist(name) == [value]
    assert len(reply.headers.getlist("X-Request-ID")) == 1


# What no reply says

SECRET = "secret of /srv/private/model.py"
OURS = st.sampled_from([CifarError, ConfigurationError, DatasetError, RegistryError, StorageError])
THEIRS = st.sampled_from(
    [
        *(Exception, ValueError, TypeError, KeyError, OSError, MemoryError, RecursionError, AssertionError),
        *(
            StopIteration,
            ZeroDivisionError,
            UnicodeError,
            TimeoutError,
            ConnectionResetError,
            PermissionError,
            EOFError,
        ),
    ]
)
FAILURES = OURS.map(lambda kind: kind(SECRET, fix=SECRET)) | st.builds(
    lambda kind, text: kind(SECRET + text), THEIRS, st.text(max_size=20)
)


@pytest.fixture
def failing(served, caplog, monkeypatch):
    caplog.set_level(logging.CRITICAL)

    def fail_with(error):
        def predict(*_):
            raise error

        monkeypatch.setattr(Router, "predict", predict)
        return served

    return fail_with


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(FAILURES, st.sampled_from(["/v1/predict", "/invocations"]))
def test_a_failure_within_is_told_to_the_operator_and_to_no_one_else(failing, error, route):
    body = {"json": {"instances": [PIXELS[:2, :2].tolist()]}}
    reply = failing(error).post(route, **body)
    assert (reply.status_code, reply.mimetype) == (500, "application/problem+json")
    text = reply.get_data(as_text=True) + str(reply.headers)
    assert not re.search(r"secret|/srv|\.py\b|Traceback|[a-z]Error\b|line \d", text), text
    for name, value in HEADERS:
        assert reply.headers.getlist(name) == [value]


# The log


def test_a_line_says_who_sent_how_much_and_how_long_each_part_took(limited, caplog):
    caplog.set_level(logging.INFO, logger="deploy.server.access")
    caplog.handler.setFormatter(JsonLines())
    limited("big", **PNG)
    limited("slow", data=b"x", content_type="image/png")
    good, bad = [json.loads(text) for text in caplog.text.splitlines()]
    assert (good["caller"], good["bytes"], good["images"]) == ("big", len(encoded()), 1)
    assert 0 <= good["decode_ms"] + good["predict_ms"] + good["log_ms"] <= good["ms"]
    assert (bad["caller"], bad["status"]) == ("slow", 400)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", good["time"])


def test_a_key_stands_in_no_line(tmp_path, settings, caplog):
    caplog.set_level(logging.DEBUG)
    caplog.handler.setFormatter(JsonLines())
    path = tmp_path / "keys.json"
    key, _ = add_key(path, "alice")
    served = ready(tmp_path, settings, prediction_api_keys_file=path)
    for given_key in (key, key + "x"):
        served.post("/v1/predict", headers={"Authorization": f"Bearer {given_key}"}, **PNG)
    assert key not in caplog.text
    assert "alice" in caplog.text


# The document


def test_a_route_without_a_description_is_no_app():
    app = Flask(__name__, static_folder=None)
    app.add_url_rule("/secret", view_func=lambda: "x")
    with pytest.raises(LookupError, match="/secret is not described"):
        describe(app)


def test_the_document_follows_the_types(served):
    document = served.get("/openapi.json").get_json()
    predict = document["paths"]["/v1/predict"]["post"]
    assert set(predict["requestBody"]["content"]) == {
        *("image/png", "image/jpeg", "image/webp", "multipart/form-data", "application/json"),
    }
    assert set(predict["responses"]) == {"200", "400", "401", "413", "415", "422", "429", "500", "503"}
    assert "Retry-After" in predict["responses"]["429"]["headers"]
    assert {path for path, methods in document["paths"].items() for m in methods.values() if "security" in m} == {
        *("/", "/healthz", "/readyz", "/ping", "/openapi.json", "/static/{filename}"),
    }
