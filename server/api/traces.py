"""OpenTelemetry traces: a span for each request, and one for each of its phases."""

import logging
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from server import __version__
from server.settings import otlp_endpoint_is_set

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)

# Seconds that the export of the last spans may take, because a collector that does not answer must not hold
# up the stop.
CLOSE_TIMEOUT_S = 3

Parent = Literal["caller", "root"]


class Traces:
    """Creates the spans of finished requests.

    Args:
        provider: exports the spans.
        parent: "caller" makes the span of the caller's `traceparent` the parent, whose sampling flag then
            counts; "root" starts a trace of its own for each request, with a link to the caller's span.
    """

    def __init__(self, provider: "TracerProvider", parent: Parent = "caller") -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._parent = parent
        self._tracer = provider.get_tracer("unetpp", __version__)
        self._extract = TraceContextTextMapPropagator().extract
        self._root = Context()
        self._kind, self._error = SpanKind.SERVER, Status(StatusCode.ERROR)

    def add(
        self,
        name: str,
        traceparent: str,
        ended_ns: int,
        duration_s: float,
        attributes: Mapping[str, Any],
        timings: Mapping[str, float],
    ) -> None:
        """Creates the spans of one finished request.

        Args:
            name: method and route.
            traceparent: header of the caller (W3C Trace Context), or "".
            ended_ns: end of the request, in nanoseconds since 1970.
            duration_s: duration of the request, in seconds.
            attributes: attributes of its span, by names of the semantic conventions.
            timings: seconds per phase. Phases of large inputs overlap; they are shown one after the other,
                and the last one ends with the request.
        """
        from opentelemetry import trace

        # Without `tracestate`, because callers may write anything into it.
        context = self._extract({"traceparent": traceparent}, self._root)
        caller = trace.get_current_span(context).get_span_context()
        as_root = self._parent == "root"
        links = [trace.Link(caller)] if as_root and caller.is_valid else []
        started_ns = ended_ns - int(duration_s * 1e9)
        parent = self._root if as_root else context
        span = self._tracer.start_span(
            name, parent, self._kind, dict(attributes), links, start_time=started_ns
        )
        inside = trace.set_span_in_context(span, self._root)
        at_ns = max(started_ns, ended_ns - int(sum(timings.values()) * 1e9))
        for phase, seconds in timings.items():
            child = self._tracer.start_span(phase, inside, start_time=at_ns)
            at_ns = min(ended_ns, at_ns + int(seconds * 1e9))
            child.end(at_ns)
        status = attributes["http.response.status_code"]
        if status >= 500:
            span.set_attribute("error.type", f"{status}")
            span.set_status(self._error)
        span.end(ended_ns)

    def close(self) -> None:
        """Exports what is left; blocks for `CLOSE_TIMEOUT_S` at most."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)


def start(parent: Parent = "caller") -> Traces | None:
    """Starts tracing as the standard OTEL_* variables say.

    Returns:
        None where they name no collector, and, with a warning, where OpenTelemetry is not installed.
    """
    if not otlp_endpoint_is_set():
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError:
        log.warning(
            "a collector for traces is set, but OpenTelemetry is not installed: nothing is traced; pip install '.[otel]'"
        )
        return None
    # These names apply only where the operator has set none.
    own = Resource({"service.name": "unetpp", "service.version": __version__})
    provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Traces(provider, parent)
