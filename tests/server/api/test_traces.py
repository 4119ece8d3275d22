"""Spans of real requests, as an exporter gets them."""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from server import app as composed
from server.api import traces
from tests.server.api.conftest import InProcess
from tests.support.files import SMALL
from tests.support.service import fake_app

pytest.importorskip("opentelemetry.sdk")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Receives what is traced by applications that are made while it is there."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(composed.traces, "start", lambda parent: traces.Traces(provider, parent))
    yield exporter
    provider.shutdown()


def split(exporter: InMemorySpanExporter) -> tuple[list[ReadableSpan], list[ReadableSpan]]:
    """Spans of requests, and of phases."""
    spans = exporter.get_finished_spans()
    return [s for s in spans if s.kind.name == "SERVER"], [s for s in spans if s.kind.name == "INTERNAL"]


def traceparent(flag: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{TRACE}-{PARENT}-{flag}"}


async def test_request_has_a_span_with_its_phases(
    in_process: InProcess, exporter: InMemorySpanExporter
) -> None:
    async with in_process() as client:
        await client.post("/segment?level=2", content=SMALL, headers={"X-Request-Id": "mine"})
    (request,), phases = split(exporter)
    assert request.name == "POST /segment"
    assert request.attributes == {
        "http.request.method": "POST", "http.route": "/segment", "http.response.status_code": 200,
        "http.request.body.size": len(SMALL), "unetpp.outcome": "ok", "unetpp.model": "fake", "unetpp.mode": "fast",
        "unetpp.requested_level": "2", "unetpp.served_level": "2", "unetpp.request_id": "mine",
    }  # fmt: skip
    assert request.parent is None
    assert {"decode", "queue", "infer", "restore", "postprocess", "encode"} >= {
        phase.name for phase in phases
    }
    assert {"decode", "infer", "encode"} <= {phase.name for phase in phases}
    for phase in phases:
        assert phase.parent.span_id == request.context.span_id
        assert request.start_time <= phase.start_time <= phase.end_time <= request.end_time
    assert request.status.is_unset


async def test_caller_is_the_parent(in_process: InProcess, exporter: InMemorySpanExporter) -> None:
    async with in_process() as client:
        for headers in (traceparent(), traceparent("00"), {}):
            await client.get("/models", headers=headers)
    # Of the caller that does not sample, nothing is exported.
    (child, root), _ = split(exporter)
    assert f"{child.context.trace_id:032x}" == TRACE
    assert f"{child.parent.span_id:016x}" == PARENT
    assert root.parent is None
    assert not child.links


async def test_caller_is_only_linked_where_roots_are_set(
    in_process: InProcess, exporter: InMemorySpanExporter
) -> None:
    async with in_process(log={"trace_parent": "root"}) as client:
        for headers in (traceparent(), traceparent("00"), {}):
            await client.get("/models", headers=headers)
    requests, _ = split(exporter)
    assert [len(request.links) for request in requests] == [1, 1, 0]
    assert [request.parent for request in requests] == [None] * 3
    # The trace's id, too, decides what is sampled.
    assert TRACE not in {f"{request.context.trace_id:032x}" for request in requests}
    link = requests[0].links[0].context
    assert (f"{link.trace_id:032x}", f"{link.span_id:016x}") == (TRACE, PARENT)


async def test_failed_request_is_an_error(in_process: InProcess, exporter: InMemorySpanExporter) -> None:
    def fails(_: Any) -> np.ndarray:
        raise KeyError("SECRETNAME")

    async with in_process(fake_app(fails)) as client:
        await client.post("/segment", content=SMALL)
    (request,), phases = split(exporter)
    assert request.status.status_code.name == "ERROR"
    assert request.attributes["unetpp.outcome"] == "error"
    assert request.attributes["error.type"] == "500"
    assert not phases


async def test_spans_have_nothing_of_what_was_sent(
    in_process: InProcess, exporter: InMemorySpanExporter
) -> None:
    async with in_process() as client:
        named = {"file": ("PATIENT-DOE.nii", SMALL)}
        await client.post("/segment", files=named, headers=traceparent() | {"tracestate": "a=HEADERJUNK"})
        junk = {"traceparent": "HEADERJUNK"}
        await client.post("/segment?model=QUERYJUNK&QUERYJUNK=1", content=b"SECRETNAME", headers=junk)
        await client.get("/models/QUERYJUNK")
        await client.get("/QUERYJUNK", headers={"baggage": "a=HEADERJUNK"})
        await client.request("QUERYJUNK", "/segment")
        # These are polled, and of no interest.
        await client.get("/health/ready")
        await client.get("/metrics")
    requests, _ = split(exporter)
    names = ["POST /segment", "POST /segment", "GET /models/{name}", "GET", "_OTHER /segment"]
    # `/health/ready` fails here, because the jobs are not started.
    assert [span.name for span in requests][:5] == names
    text = "".join(span.to_json() + str(span.context) for span in exporter.get_finished_spans())
    assert not [mark for mark in ("PATIENT-DOE", "QUERYJUNK", "HEADERJUNK", "SECRETNAME") if mark in text]


def test_start_without_a_collector_traces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    assert traces.start() is None


def test_start_without_the_packages_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert traces.start() is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("name", [None, "mine"])
def test_start_names_the_service(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry.sdk import trace

    resources = []
    provider = trace.TracerProvider
    monkeypatch.setattr(trace, "TracerProvider", lambda **k: resources.append(k["resource"]) or provider(**k))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:1")
    if name:
        monkeypatch.setenv("OTEL_SERVICE_NAME", name)
    started = traces.start()
    assert started
    started.close()
    assert resources[0].attributes["service.name"] == (name or "unetpp")
