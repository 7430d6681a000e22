"""Spans over real OTLP/HTTP into a small collector; nothing of it where no collector is named."""

import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from deploy.server.tracing import Tracing
from ml.settings import PROJECT_ROOT
from tests.served_app import Served, encoded

PNG = {"data": encoded(), "content_type": "image/png"}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def collector():
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, self.headers["Content-Type"], ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()
        thread.join()


@pytest.fixture
def made(monkeypatch):
    """Every `Tracing` of the test, to be ended with it."""
    tracings = []

    class Kept(Tracing):
        def __init__(self, endpoint):
            super().__init__(endpoint)
            tracings.append(self)

    monkeypatch.setattr("deploy.server.tracing.Tracing", Kept)
    yield tracings
    for tracing in tracings:
        tracing.close()


def traced(folder, settings, endpoint):
    served = Served(folder, settings.model_copy(update={"otel_exporter_otlp_endpoint": endpoint}))
    served.follower.poll()
    return served


def spans_of(received):
    """By trace, then by name."""
    found = {}
    for _, _, message in received:
        for resource in message.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    found.setdefault(span.trace_id.hex(), {})[span.name] = span
    # Without what the fixture itself asked for when it began.
    return {trace: spans for trace, spans in found.items() if "GET /openapi.json" not in spans}


def values(attributes):
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}


def test_a_request_is_a_span_below_its_callers_with_a_span_for_each_part(tmp_path, settings, collector, made):
    url, received = collector
    served = traced(tmp_path, settings, url)
    before = time.time_ns()
    served.post("/v1/predict", headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}, **PNG)
    after = time.time_ns()
    served.post("/v1/predict", data=b"x", content_type="image/png")
    made[-1].close()
    ((path, kind, message),) = received
    assert (path, kind) == ("/v1/traces", "application/x-protobuf")
    assert values(message.resource_spans[0].resource.attributes)["service.name"] == "cifar10-prediction-server"

    spans = spans_of(received)
    good = spans.pop(TRACE)
    assert set(good) == {"POST /v1/predict", "decode", "predict", "queue", "engine", "log"}
    server = good.pop("POST /v1/predict")
    assert server.parent_span_id.hex() == PARENT
    assert values(server.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/predict",
        "http.response.status_code": 200,
        "http.request.body.size": len(encoded()),
        "client.address": "127.0.0.1",
        "cifar10.images": 1,
        "cifar10.caller": "127.0.0.1",
    }
    assert before < server.start_time_unix_nano < server.end_time_unix_nano < after
    for name, part in good.items():
        assert part.parent_span_id == server.span_id
        assert server.start_time_unix_nano <= part.start_time_unix_nano
        assert part.start_time_unix_nano <= part.end_time_unix_nano <= server.end_time_unix_nano
        # Alone, it waits in no line.
        assert (part.start_time_unix_nano < part.end_time_unix_nano) is (name != "queue")
    assert values(good["predict"].attributes) == {"cifar10.model.version": 1, "cifar10.batch.size": 1}

    ((other, bad),) = spans.items()
    assert other != TRACE
    assert set(bad) == {"POST /v1/predict", "decode"}
    assert bad["POST /v1/predict"].parent_span_id == b""


def test_a_caller_that_does_not_trace_is_not_traced(tmp_path, settings, collector, made):
    url, received = collector
    served = traced(tmp_path, settings, url)
    served.post("/v1/predict", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}, **PNG)
    for wrong in ("", "x", "00-0-0-01", "é" * 50):
        served.post("/v1/predict", headers={"traceparent": wrong}, **PNG)
    made[-1].close()
    spans = spans_of(received)
    assert TRACE not in spans
    assert len(spans) == 4


def test_a_collector_that_is_away_costs_no_prediction_and_no_time(tmp_path, settings, made):
    served = traced(tmp_path, settings, "http://127.0.0.1:9")
    started = time.monotonic()
    for _ in range(50):
        assert served.post("/v1/predict", **PNG).status_code == 200
    made[-1].close()
    assert time.monotonic() - started < 10


def test_probes_are_not_traced_while_all_is_well(tmp_path, settings, collector, made):
    url, received = collector
    served = traced(tmp_path, settings, url)
    for path in ("/healthz", "/readyz", "/ping", "/metrics"):
        assert served.get(path).status_code == 200
    made[-1].close()
    assert spans_of(received) == {}


def test_where_no_collector_is_named_the_sdk_is_not_even_loaded():
    script = (
        "import sys; from deploy.server.app import create_app; from deploy.server.testing import MemoryLog;"
        "from ml.settings import Settings; create_app(Settings(_env_file=None), follower=None, log=MemoryLog());"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
