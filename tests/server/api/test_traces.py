"""Spans of real requests, as an exporter gets them."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server import app as composed
from server.api import traces
from server.segment import steps
from tests.support.files import picture_bytes
from tests.support.server import serving
from tests.support.service import fake_app

pytest.importorskip("opentelemetry.sdk")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

PICTURE = picture_bytes(np.arange(64, dtype=np.uint8).reshape(8, 8))
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Of what is traced by applications that are made while it is there."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(composed.traces, "start", lambda: traces.Traces(provider))
    yield exporter
    provider.shutdown()


def split(exporter: InMemorySpanExporter) -> tuple[list[ReadableSpan], list[ReadableSpan]]:
    """Requests, and phases."""
    spans = exporter.get_finished_spans()
    return [s for s in spans if s.kind.name == "SERVER"], [s for s in spans if s.kind.name == "INTERNAL"]


def test_a_request_and_its_phases(exporter: InMemorySpanExporter) -> None:
    with serving(fake_app()) as client:
        client.post(
            "/segment?level=2",
            content=PICTURE,
            headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"},
        )
    (request,), phases = split(exporter)
    assert request.name == "POST /segment"
    assert request.attributes == {
        "http.request.method": "POST", "http.route": "/segment", "http.response.status_code": 200,
        "http.request.body.size": len(PICTURE), "unetpp.outcome": "ok", "unetpp.model": "fake", "unetpp.mode": "fast",
        "unetpp.requested_level": "2", "unetpp.served_level": "2", "unetpp.request_id": "mine",
    }  # fmt: skip
    assert request.parent is None
    (link,) = request.links
    assert (f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}") == (TRACE, PARENT)
    assert {phase.name for phase in phases} == {"decode", "plan", "queue", "infer", "restore", "encode"}
    for phase in phases:
        assert phase.parent.span_id == request.context.span_id
        assert request.start_time <= phase.start_time <= phase.end_time <= request.end_time
    assert request.status.is_unset


def test_callers_have_no_say_in_what_is_traced(exporter: InMemorySpanExporter) -> None:
    with serving(fake_app()) as client:
        for flag in ("00", "01"):
            client.get("/models", headers={"traceparent": f"00-{TRACE}-{PARENT}-{flag}"})
        client.get("/models")
    requests, _ = split(exporter)
    assert [len(request.links) for request in requests] == [1, 1, 0]
    # By the trace's id, too, a share of all is drawn.
    assert TRACE not in {f"{request.context.trace_id:032x}" for request in requests}


def test_failures(exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any) -> None:
        raise KeyError("SECRETNAME")

    monkeypatch.setattr(steps, "decode", bug)
    with serving(fake_app()) as client:
        client.post("/segment", content=PICTURE)
    (request,), phases = split(exporter)
    assert not request.status.is_ok
    assert not request.status.is_unset
    assert request.attributes["unetpp.outcome"] == "error"
    assert not phases


def test_nothing_of_what_was_sent(exporter: InMemorySpanExporter) -> None:
    with serving(fake_app()) as client:
        client.post(
            "/segment", files={"file": ("PATIENT-DOE.nii", PICTURE)}, headers={"tracestate": "a=HEADERJUNK"}
        )
        client.post(
            "/segment?model=QUERYJUNK&QUERYJUNK=1",
            content=b"SECRETNAME",
            headers={"traceparent": "HEADERJUNK"},
        )
        client.get("/jobs/QUERYJUNK")
        client.get("/QUERYJUNK", headers={"baggage": "a=HEADERJUNK"})
        client.request("QUERYJUNK", "/segment")
        # Of no interest.
        client.get("/health/ready")
        client.get("/metrics")
    requests, _ = split(exporter)
    assert [span.name for span in requests] == [
        "POST /segment",
        "POST /segment",
        "GET /jobs/{id}",
        "GET none",
        "other /segment",
    ]
    told = "".join(span.to_json() + str(span.context) for span in exporter.get_finished_spans())
    assert not [mark for mark in ("PATIENT-DOE", "QUERYJUNK", "HEADERJUNK", "SECRETNAME") if mark in told]


class TestStart:
    def test_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
        monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
        assert traces.start() is None

    def test_without_the_packages(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:1")
        monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
        assert traces.start() is None
        (said,) = caplog.records
        assert said.levelname == "WARNING"
        assert "pip install '.[otel]'" in said.getMessage()

    @pytest.mark.parametrize("named", [None, "mine"])
    def test_on(self, named: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:1")
        if named:
            monkeypatch.setenv("OTEL_SERVICE_NAME", named)
        started = traces.start()
        assert started
        assert started._provider.resource.attributes["service.name"] == (named or "unetpp")
        started.close()
