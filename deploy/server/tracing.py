"""Requests as OpenTelemetry spans, sent over OTLP/HTTP. Imported only where OTEL_EXPORTER_OTLP_ENDPOINT is set.

Spans are made when the request is over, from the times that the log's line has too: a request is timed once, and the
parts that other threads did need no context handed to them. A collector that is away costs the spans and nothing else:
they wait in a bounded queue, and a thread of the SDK sends them.
"""

import time
from collections.abc import Iterable
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from deploy.server.request_context import Stage

SERVICE = "cifar10-prediction-server"
PATIENCE_SECONDS = 3
"""With the collector: a server that ends waits for it no longer, and its predictions are still to be written out."""
_TRACE_CONTEXT = TraceContextTextMapPropagator()
_ATTRIBUTES = {
    "method": "http.request.method",
    "route": "http.route",
    "status": "http.response.status_code",
    "bytes": "http.request.body.size",
    "remote": "client.address",
    "images": "cifar10.images",
    "caller": "cifar10.caller",
}
"""Of a line in the log: what OpenTelemetry's semantic conventions call it."""


class Tracing:
    """Records requests. The SDK's own variables hold: OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_BSP_*."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint` is OTEL_EXPORTER_OTLP_ENDPOINT, to which /v1/traces is added."""
        resource = Resource.create().merge(Resource({"service.name": SERVICE})).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource)
        exporter = OTLPSpanExporter(f"{endpoint}/v1/traces", timeout=PATIENCE_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("deploy.server")

    def record(self, fields: dict[str, Any], environ: dict[str, Any], started: float, stages: Iterable[Stage]) -> str:
        """One span for the request, below the caller's where it sent a `traceparent`, and one for each stage.

        Args:
            fields: of the line in the log.
            environ: the request's, as WSGI has it.
            started: on `time.perf_counter`'s clock, as the stages'.
            stages: its parts.

        Returns:
            The trace's id, 32 hexadecimal digits.
        """
        to_wall_clock = time.time() - time.perf_counter()

        def nanoseconds(moment: float) -> int:
            return int((to_wall_clock + moment) * 1e9)

        context = _TRACE_CONTEXT.extract({name: environ[key] for name, key in _PARENT.items() if key in environ})
        span = self._tracer.start_span(
            f"{fields['method']} {fields['route']}",
            context,
            SpanKind.SERVER,
            {said: fields[name] for name, said in _ATTRIBUTES.items() if fields[name] is not None},
            start_time=nanoseconds(started),
        )
        if fields["status"] >= 500:
            span.set_status(Status(StatusCode.ERROR))
        within = set_span_in_context(span)
        for stage in stages:
            part = self._tracer.start_span(
                stage.name, within, attributes=stage.attributes, start_time=nanoseconds(stage.started)
            )
            part.end(nanoseconds(stage.started + stage.seconds))
        span.end()
        return f"{span.get_span_context().trace_id:032x}"

    def close(self) -> None:
        """Sends what waits; the SDK also does so when the process ends."""
        self._provider.shutdown()


_PARENT = {name: f"HTTP_{name.upper()}" for name in _TRACE_CONTEXT.fields}
