"""The app with a tiny model and its fakes, and a client that holds every reply against the OpenAPI document."""

import base64
import io
import re
from uuid import UUID

import jsonschema
import numpy as np
from PIL import Image

from deploy.server.app import create_app
from deploy.server.testing import MemoryLog
from ml.serving.hot_swap import ChampionFollower
from ml.serving.testing import FolderSource
from tests.tiny_models import make_onnx

PIXELS = np.random.default_rng(5).integers(0, 256, (32, 32, 3), dtype=np.uint8)
OTHER = np.random.default_rng(6).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def encoded(image=PIXELS, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()


def b64(data):
    return base64.b64encode(data).decode()


class Served:
    """An app, its fakes, and a client that checks every reply against the OpenAPI document."""

    def __init__(self, folder, settings, model=None):
        self.source = FolderSource(folder / "registry")
        (folder / "registry").mkdir()
        self.onnx = make_onnx(folder / "1.onnx", **(model or {}))
        self.source.crown(self.onnx, 1)
        self.follower = ChampionFollower(self.source, folder / "cache")
        self.log = MemoryLog()
        self.app = create_app(settings, follower=self.follower, log=self.log)
        self.client = self.app.test_client()
        self.document = self.client.get("/openapi.json").get_json()

    def call(self, method, path, **more):
        reply = self.client.open(path, method=method, **more)
        self.check(method, path.partition("?")[0], reply)
        return reply

    def post(self, path, **more):
        return self.call("POST", path, **more)

    def get(self, path, **more):
        return self.call("GET", path, **more)

    def check(self, method, path, reply):
        UUID(reply.headers["X-Request-ID"])
        described = self.document["paths"][path][method.lower()]["responses"][str(reply.status_code)]
        media = described["content"][reply.mimetype]
        if "json" in reply.mimetype and "schema" in media:
            root = {**media["schema"], "components": self.document["components"]}
            jsonschema.Draft202012Validator(root, format_checker=jsonschema.FormatChecker()).validate(reply.get_json())
        if reply.status_code >= 400:
            problem = reply.get_json()
            assert problem["status"] == reply.status_code
            assert problem["request_id"] == reply.headers["X-Request-ID"]
            assert problem["instance"] == f"urn:uuid:{problem['request_id']}"
            assert not re.search(r"Traceback|/tmp/|/home/|\.py\b", reply.get_data(as_text=True))
