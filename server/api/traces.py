"""Traces by OpenTelemetry: a span for each request, and one for each of its phases."""

import logging
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from server import __version__
from server.settings import otlp_endpoint_is_set

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)

# A collector that does not answer must not hold up the end of the server.
CLOSING_S = 3


class Traces:
    """Gives finished requests to a provider.

    Args:
        provider: exports their spans.
    """

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("unetpp", __version__)
        self._extract = TraceContextTextMapPropagator().extract
        self._kind, self._failed = SpanKind.SERVER, Status(StatusCode.ERROR)

    def add(
        self, name: str, traceparent: str, ended_ns: int, seconds: float, fields: Mapping[str, Any], phases: Mapping[str, float]
    ) -> None:
        """One request, once it is done.

        Args:
            name: method and route.
            traceparent: as the caller's header has it.
            ended_ns: when that was, in nanoseconds since 1970.
            seconds: it took.
            fields: those of its line in the log.
            phases: seconds of each. Those of large inputs overlap; they are shown one after the other, ending when the request does.
        """
        from opentelemetry import trace

        # Without `tracestate`, in which callers may write what they like.
        parent = self._extract({"traceparent": traceparent})
        begun_ns = ended_ns - int(seconds * 1e9)
        attributes = {NAMES.get(field, f"unetpp.{field}"): value for field, value in fields.items() if field != "seconds"}
        span = self._tracer.start_span(name, parent, self._kind, attributes, start_time=begun_ns)
        inside = trace.set_span_in_context(span)
        at_ns = max(begun_ns, ended_ns - int(sum(phases.values()) * 1e9))
        for phase, taken in phases.items():
            child = self._tracer.start_span(phase, inside, start_time=at_ns)
            at_ns = min(ended_ns, at_ns + int(taken * 1e9))
            child.end(at_ns)
        if fields["status"] >= 500:
            span.set_status(self._failed)
        span.end(ended_ns)

    def close(self) -> None:
        """Exports what is left; blocks for `CLOSING_S` at most."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSING_S)


# By OpenTelemetry's semantic conventions.
NAMES = {
    "method": "http.request.method",
    "route": "http.route",
    "status": "http.response.status_code",
    "bytes_in": "http.request.body.size",
}


def start() -> Traces | None:
    """As the standard OTEL_* variables say; None where they name no collector, or, with a warning, where OpenTelemetry is not installed."""
    if not otlp_endpoint_is_set():
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError:
        log.warning("a collector for traces is set, but OpenTelemetry is not installed: nothing is traced; pip install '.[otel]'")
        return None
    # Ours only where the operator has no names of his own.
    own = Resource({"service.name": "unetpp", "service.version": __version__})
    provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Traces(provider)
