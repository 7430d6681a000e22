"""What the server refuses, and whom: bad bodies, bodies over the limit, wrong addresses, callers without a key."""

import io
import struct
import zlib

import pytest
from pydantic import SecretStr

from deploy.server.app import create_app
from deploy.server.bodies import MAX_BODY_BYTES
from deploy.server.exposure import check_exposure
from ml.errors import ConfigurationError
from tests.served_app import PIXELS, Served, encoded


@pytest.fixture
def served(tmp_path, settings):
    made = Served(tmp_path, settings)
    made.follower.poll()
    return made


def png_of_size(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("status", "said", "request_"),
    [
        (400, "not an image", {"data": b"hello", "content_type": "image/png"}),
        (400, "cut short", {"data": encoded()[:-200], "content_type": "image/png"}),
        (400, "empty", {"data": b"", "content_type": "image/png"}),
        (400, "not JSON", {"data": b"{", "content_type": "application/json"}),
        (400, "not JSON", {"data": b"[" * 200_000, "content_type": "application/json"}),
        (400, "base64", {"json": {"image": "%%%"}}),
        (413, "10000x10000", {"data": png_of_size(10_000, 10_000), "content_type": "image/png"}),
        (413, "at most 10 MB", {"data": b"\0" * (MAX_BODY_BYTES + 1), "content_type": "image/png"}),
        (413, "at most 10 MB", {"data": {"image": (io.BytesIO(b"\0" * MAX_BODY_BYTES), "a.png")}}),
        (413, "at most 128", {"json": {"images": ["AAAA"] * 129}}),
        (415, "declare it as image/png", {"data": encoded(), "content_type": "image/jpeg"}),
        (415, "GIF", {"data": encoded(PIXELS, "GIF"), "content_type": "image/png"}),
        (415, "--data-binary", {"data": encoded(), "content_type": "application/x-www-form-urlencoded"}),
        (415, "no content type", {"data": encoded()}),
        (415, "'text/plain'", {"data": "x", "content_type": "text/plain"}),
        (415, "'text/html'", {"data": {"image": (io.BytesIO(b"<p>"), "a.html", "text/html")}}),
        (422, "no image", {"data": {}, "content_type": "multipart/form-data"}),
        (422, "'picture'", {"data": {"picture": (io.BytesIO(encoded()), "a.png")}}),
        (422, "as text", {"data": {"image": "text"}, "content_type": "multipart/form-data"}),
        (422, "shape (32, 32)", {"json": {"instances": [PIXELS[:, :, 0].tolist()]}}),
        (422, "differ in length", {"json": {"instances": [[[[1, 2, 3], [1, 2]]]]}}),
        (422, "0-255", {"json": {"instances": [[[[1, 2, 300]]]]}}),
        (422, "0-255", {"data": '{"instances": [[[[1, NaN, 3]]]]}', "content_type": "application/json"}),
        (422, "a JSON list", {"json": []}),
    ],
)
def test_a_bad_request_is_refused_and_told_what_to_do(served, status, said, request_):
    reply = served.post("/v1/predict", **request_)
    assert reply.status_code == status
    assert reply.mimetype == "application/problem+json"
    assert said in reply.get_json()["detail"]
    assert served.log.predictions == []


def test_a_body_at_the_limit_is_read_and_one_over_it_is_not_even_chunked(served):
    for size, status in [(MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 413), (MAX_BODY_BYTES + 10_000, 413)]:
        padded = encoded() + b"\0" * (size - len(encoded()))
        stream = {"input_stream": io.BytesIO(padded), "content_type": "image/png"}
        reply = served.post("/v1/predict", **stream, environ_overrides={"wsgi.input_terminated": True})
        assert reply.status_code == status


def test_unknown_addresses_and_methods_are_problems_too(served):
    gone = served.client.get("/v2/predict")
    assert (gone.status_code, gone.mimetype) == (404, "application/problem+json")
    assert "/openapi.json" in gone.get_json()["detail"]
    wrong = served.client.get("/v1/predict")
    assert (wrong.status_code, wrong.mimetype) == (405, "application/problem+json")
    assert "POST" in wrong.headers["Allow"]


def test_a_failure_of_our_own_tells_the_client_nothing_but_its_id(served, caplog):
    def broken(images, *, alone):
        raise ZeroDivisionError("secret of /etc/passwd")

    served.follower.current().engine.predict = broken
    reply = served.post("/v1/predict", data=encoded(), content_type="image/png")
    assert reply.status_code == 500
    assert "secret" not in reply.get_data(as_text=True)
    assert "secret" in caplog.text


def test_an_unknown_query_is_refused(served):
    assert served.post("/v1/predict?include=all", data=encoded(), content_type="image/png").status_code == 422


# Who may call

KEYED = [
    ("POST", "/v1/predict"),
    ("POST", "/v1/feedback"),
    ("POST", "/invocations"),
    ("GET", "/v1/model"),
    ("GET", "/metrics"),
]


@pytest.fixture
def keyed(tmp_path, settings):
    keys = (SecretStr("first-key"), SecretStr("schlüssel"))
    made = Served(tmp_path, settings.model_copy(update={"prediction_api_keys": keys, "api_host": "0.0.0.0"}))
    made.follower.poll()
    return made


@pytest.mark.parametrize(("method", "path"), KEYED)
@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first-key"}, {"X-API-Key": ""}],
    ids=["none", "wrong", "basic", "empty"],
)
def test_a_call_without_a_right_key_is_refused(keyed, method, path, headers):
    reply = keyed.call(method, path, headers=headers)
    assert reply.status_code == 401
    assert reply.headers["WWW-Authenticate"].startswith("Bearer")
    assert "PREDICTION_API_KEYS" in reply.get_json()["detail"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer first-key"},
        {"X-API-Key": "first-key"},
        {"Authorization": "bearer " + "schlüssel".encode().decode("latin-1")},
    ],
)
def test_each_key_opens_from_anywhere(keyed, headers):
    from_afar = {"REMOTE_ADDR": "203.0.113.9"}
    reply = keyed.post(
        "/v1/predict", data=encoded(), content_type="image/png", headers=headers, environ_overrides=from_afar
    )
    assert reply.status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/ping", "/openapi.json", "/"])
def test_probes_and_the_page_need_no_key(keyed, path):
    assert keyed.get(path).status_code == 200


@pytest.mark.parametrize(
    "more",
    [
        {"environ_overrides": {"REMOTE_ADDR": "192.168.1.7"}},
        {"headers": {"X-Forwarded-For": "203.0.113.9"}},
        {"headers": {"Host": "rebound.example"}},
        {"headers": {"Origin": "https://evil.example"}},
        {"headers": {"Origin": "http://["}},
    ],
    ids=["another machine", "through a proxy", "another name", "another site's page", "a page of no site"],
)
def test_without_keys_only_this_machine_may_call(served, more):
    reply = served.get("/v1/model", **more)
    assert reply.status_code == 401
    assert served.get("/v1/model", headers={"Origin": "http://localhost"}).status_code == 200


THE_BRIDGE = {"environ_overrides": {"REMOTE_ADDR": "172.18.0.1"}}


@pytest.fixture
def published(tmp_path, settings):
    """In a container, its port published on loopback alone."""
    placed = {"api_host": "0.0.0.0", "api_keyless_hosts": ("prediction-server",)}
    made = Served(tmp_path, settings.model_copy(update=placed))
    made.follower.poll()
    return made


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "Prediction-Server:8000"])
def test_a_published_server_answers_its_machine_and_its_neighbours(published, host):
    for headers in ({"Host": host}, {"Host": host, "Origin": f"http://{host}"}):
        assert published.get("/v1/model", headers=headers, **THE_BRIDGE).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "rebound.example"},
        {"Host": "0.0.0.0"},
        {"Host": "prediction-server.example"},
        {"Host": "localhost", "X-Forwarded-For": "203.0.113.9"},
        {"Host": "localhost", "Origin": "https://evil.example"},
        {"Host": "localhost", "Origin": "null"},
    ],
    ids=["another name", "the address it listens on", "a longer name", "a proxy", "another site's page", "a file"],
)
def test_a_published_server_answers_nobody_else(published, headers):
    assert published.get("/v1/model", headers=headers, **THE_BRIDGE).status_code == 401


def test_on_loopback_a_keyless_host_is_a_name_and_opens_nothing_to_others(tmp_path, settings):
    named = Served(tmp_path, settings.model_copy(update={"api_keyless_hosts": ("my-laptop",)}))
    named.follower.poll()
    assert named.get("/v1/model", headers={"Host": "my-laptop"}).status_code == 200
    assert named.get("/v1/model", headers={"Host": "my-laptop"}, **THE_BRIDGE).status_code == 401


def test_a_published_server_with_keys_asks_for_one(tmp_path, settings):
    placed = {
        "api_host": "0.0.0.0",
        "api_keyless_hosts": ("prediction-server",),
        "prediction_api_keys": (SecretStr("first-key"),),
        "mlops_env": "production",
    }
    keyed = Served(tmp_path, settings.model_copy(update=placed))
    keyed.follower.poll()
    assert keyed.get("/v1/model", headers={"Host": "prediction-server"}).status_code == 401
    assert keyed.get("/v1/model", headers={"X-API-Key": "first-key"}, **THE_BRIDGE).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_in_production_nothing_is_keyless_but_loopback(settings, host):
    production = settings.model_copy(update={"mlops_env": "production", "api_host": host})
    keyless = production.model_copy(update={"api_keyless_hosts": ("prediction-server",)})
    with pytest.raises(ConfigurationError, match="MLOPS_ENV=production"):
        check_exposure(keyless)
    if host == "127.0.0.1":
        check_exposure(production)
    else:
        with pytest.raises(ConfigurationError, match="API_HOST"):
            check_exposure(production)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::", "server.example"])
def test_the_network_is_not_served_without_keys(settings, host):
    with pytest.raises(ConfigurationError, match="PREDICTION_API_KEYS"):
        create_app(settings.model_copy(update={"api_host": host}), follower=None, log=None)
