"""Ten thousand malformed bodies against the whole app: each is refused with a problem that says the fix."""

import collections
import io
import json
import random
import re

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ml.serving.testing import FolderSource
from tests.served_app import OTHER, PIXELS, Served, b64, encoded
from tests.server_process import serving_folder
from tests.tiny_models import make_onnx

NOISE = np.random.default_rng(1).integers(0, 256, (48, 40, 3), dtype=np.uint8)
BOUNDARY = "----a-boundary"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
IMAGES = [
    ("image/png", encoded(PIXELS)),
    ("image/png", encoded(NOISE)),
    ("image/jpeg", encoded(NOISE, "JPEG")),
    ("image/jpeg", encoded(NOISE, "JPEG", progressive=True)),
    ("image/webp", encoded(NOISE, "WEBP")),
    ("image/webp", encoded(PIXELS, "WEBP", lossless=True)),
]


def form(*files):
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n'
        f"Content-Type: {kind}\r\n\r\n".encode()
        + data
        + b"\r\n"
        for kind, data in files
    ]
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


SEEDS = [
    *IMAGES,
    (FORM, form(*IMAGES[:2])),
    (FORM, form(IMAGES[2])),
    ("application/json", json.dumps({"images": [b64(encoded(PIXELS)), b64(encoded(OTHER))]}).encode()),
    ("application/json", json.dumps({"instances": [PIXELS[:4, :4].tolist()]}).encode()),
]
PROBLEM = {"type", "title", "status", "detail", "instance", "request_id"}


class Sender:
    """Calls the app as a WSGI server does; werkzeug's own client takes longer than the app."""

    def __init__(self, app):
        self.app = app
        self.statuses = collections.Counter()

    def send(self, body, kind, path="/v1/predict"):
        environ = {
            "REQUEST_METHOD": "POST",
            "PATH_INFO": path,
            "SCRIPT_NAME": "",
            "QUERY_STRING": "",
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "HTTP_HOST": "localhost",
            "REMOTE_ADDR": "127.0.0.1",
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": io.StringIO(),
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        if kind is not None:
            environ["CONTENT_TYPE"] = kind
        said = []
        reply = b"".join(self.app(environ, lambda status, headers, exc_info=None: said.extend([status, headers])))
        status, headers = int(said[0].split()[0]), dict(said[1])
        self.statuses[status] += 1
        return status, headers, reply

    def refused(self, body, kind, path="/v1/predict"):
        """Whether it was, once the reply is seen to be as it should be either way."""
        status, headers, reply = self.send(body, kind, path)
        assert headers["X-Content-Type-Options"] == "nosniff"
        if status == 200:
            assert headers["Content-Type"] == "application/json"
            assert json.loads(reply)["predictions"]
            return False
        assert 400 <= status < 500, (status, kind, body[:2000], reply)
        assert headers["Content-Type"] == "application/problem+json"
        problem = json.loads(reply)
        assert set(problem) == PROBLEM
        assert problem["status"] == status
        assert not re.search(r"Traceback|/tmp/|/home/|\.py\b", problem["detail"])
        return True


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    from ml.settings import Settings

    made = Served(tmp_path_factory.mktemp("served"), Settings(_env_file=None))
    made.follower.poll()
    return made


@pytest.fixture(autouse=True)
def answers_afterwards(served):
    yield
    reply = served.post("/v1/predict", data=encoded(), content_type="image/png")
    assert (reply.status_code, len(reply.get_json()["predictions"])) == (200, 1)
    served.log.predictions.clear()


def damaged(rng, data):
    """Cut, flipped, swapped, doubled, filled or wrapped, one to three times."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data)) if data else 0
        size = rng.randint(1, 1 + len(data) // 2)
        match rng.randrange(7):
            case 0:
                del data[at:]
            case 1:
                del data[at : at + size]
            case 2:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 3:
                data[at:at] = rng.randbytes(min(size, 64))
            case 4:
                data[at : at + size] = bytes(len(data[at : at + size]))
            case 5:
                data[at : at + 4] = rng.choice(
                    [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b'"[{:', b"\r\n--"]
                )
            case _:
                other = rng.choice(SEEDS)[1]
                data[at:] = other[rng.randrange(len(other)) :]
    return bytes(data)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_nine_thousand_damaged_files_forms_and_documents_are_refused_or_still_images(served, record_property):
    rng = random.Random(20261123)
    sender = Sender(served.app)
    refused = 0
    while refused < 9_000:
        kind, body = rng.choice(SEEDS)
        if rng.random() < 0.1:
            kind = rng.choice(SEEDS)[0]
        path = "/v1/predict"
        if kind == "application/json" and rng.random() < 0.3:
            path = rng.choice(["/invocations", "/v1/feedback"])
        refused += sender.refused(damaged(rng, body), kind, path)
        assert sum(sender.statuses.values()) < 20_000, sender.statuses
    record_property("statuses", dict(sender.statuses))
    # All kinds of refusal were met, and what was answered had images in it.
    assert {400, 415, 422} <= set(sender.statuses), sender.statuses
    assert sender.statuses[200] == len(served.log.predictions)


def test_over_real_http_they_are_refused_and_the_same_process_goes_on(tmp_path):
    folder = tmp_path / "registry"
    folder.mkdir()
    FolderSource(folder).crown(make_onnx(tmp_path / "1.onnx"), 1)
    log = tmp_path / "server.log"
    rng = random.Random(7)
    statuses = collections.Counter()
    with serving_folder(folder, log) as (_, url), httpx.Client(base_url=url, timeout=20) as client:
        for i in range(300):
            kind, body = rng.choice(SEEDS)
            sent = damaged(rng, body)
            # Every third in chunks, of which nobody says beforehand how long they are together.
            content = iter([sent[:100], sent[100:]]) if i % 3 == 0 else sent
            reply = client.post("/v1/predict", content=content, headers={"Content-Type": kind})
            statuses[reply.status_code] += 1
            assert reply.status_code == 200 or reply.headers["Content-Type"] == "application/problem+json"
        good = client.post("/v1/predict", content=IMAGES[0][1], headers={"Content-Type": "image/png"})
        assert good.status_code == 200
    assert statuses[400] > 100
    assert set(statuses) <= {200, 400, 413, 415, 422}
    assert log.read_text().count("Spawning worker") == 1
    assert "Traceback" not in log.read_text()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**300, 10**320)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["AAAA", "data:image/png;base64,AAAA", "data:,", "=", b64(encoded())[:50]]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["image", "images", "instances", "inputs", "params"]), inner, max_size=2)
    ),
    max_leaves=12,
)
TYPES = st.sampled_from([None, "", "image/png", "image/jpeg", "image/webp", "application/json", FORM, "text/html"]) | (
    st.text(st.characters(codec="latin-1", exclude_characters="\r\n"), max_size=40)
)


@settings(max_examples=600, phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))
@given(VALUES, st.sampled_from(["/v1/predict", "/invocations", "/v1/feedback"]))
def test_json_of_any_form_is_refused(served, value, path):
    assert Sender(served.app).refused(json.dumps(value).encode(), "application/json", path)


@settings(max_examples=400, phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200), TYPES, st.sampled_from(["/v1/predict", "/invocations", "/v1/feedback"]))
def test_any_bytes_of_any_type_are_refused(served, body, kind, path):
    assert Sender(served.app).refused(body, kind, path)
