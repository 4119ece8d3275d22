"""What gRPC refuses before a message is in memory, and how large ones are worked on."""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.serving import free_port
from server.api.auth import make
from server.api.routes import open_inference_grpc
from tests.server.api.open_inference_grpc_support import (
    Request,
    grpc,
    messages,
    opened,
    refused,
    request,
    small_door,
    stubs,
)
from tests.server.api.scraping import value
from tests.support.server import until
from tests.support.service import fake_app


@pytest.fixture(scope="module")
def door() -> Iterator[SimpleNamespace]:
    with small_door() as door:
        yield door


def unsent(door: SimpleNamespace, stop: threading.Event, **options: Any) -> Any:
    """A call whose message does not come until the end of the test."""

    def messages_of_call() -> Iterator[bytes]:
        stop.wait(60)
        yield from ()

    ask = door.channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
    return ask.future(messages_of_call(), timeout=60, **options)


def test_refused_calls_are_not_read(tmp_path: Path) -> None:
    """Neither without a key nor on a full server does a message get into memory; a call that sends none has its place."""
    key, line = make("someone")
    (tmp_path / "keys").write_text(line)
    port, stop = free_port(), threading.Event()
    http = {"grpc_port": port, "max_in_flight": 1}
    held = [("x-api-key", key)]
    with opened(fake_app(http=http, auth={"keys_file": tmp_path / "keys"}), port) as door:
        door.http.headers["x-api-key"] = key
        try:
            assert unsent(door, stop).exception(60).code() is grpc.StatusCode.UNAUTHENTICATED
            first = unsent(door, stop, metadata=held)
            until(lambda: value(door.http, "requests_in_flight") == 1)
            error = unsent(door, stop, metadata=held).exception(60)
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "grpc-retry-pushback-ms" in dict(error.trailing_metadata())
            assert door.stub.ServerReady(messages.ServerReadyRequest()).ready
            first.cancel()
            until(lambda: value(door.http, "requests_in_flight") == 0)
        finally:
            stop.set()


def test_message_that_is_none_and_one_that_does_not_come(door: SimpleNamespace) -> None:
    ask = door.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    assert refused(ask, b"\xff" * 9).code() is grpc.StatusCode.INVALID_ARGUMENT
    nothing = door.channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
    assert refused(nothing, iter(())).code() is grpc.StatusCode.INVALID_ARGUMENT
    port, stop = free_port(), threading.Event()
    with opened(fake_app(http={"grpc_port": port}, limits={"max_wait_s": 0.2}), port) as other:
        try:
            error = unsent(other, stop).exception(60)
        finally:
            stop.set()
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "did not arrive" in error.details()


def test_more_calls_than_places_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_inference_grpc, "SPARE_CALLS", 0)
    port, stop = free_port(), threading.Event()
    with opened(fake_app(http={"grpc_port": port, "max_in_flight": 1}), port) as door:
        try:
            first = unsent(door, stop)
            until(lambda: value(door.http, "requests_in_flight") == 1)
            # A connection of its own: on one the calls wait for each other.
            own = [("grpc.use_local_subchannel_pool", 1)]
            with grpc.insecure_channel(f"127.0.0.1:{port}", own) as channel:
                stub = stubs.GRPCInferenceServiceStub(channel)
                error = refused(stub.ServerReady, messages.ServerReadyRequest())
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            first.cancel()
        finally:
            stop.set()


def test_answers_are_limited_as_binary_data(door: SimpleNamespace) -> None:
    values = np.zeros((100, 64, 64, 1), np.uint8)
    error = refused(door.stub.ModelInfer, request(values))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "1 MiB" in error.details()
    mask = [Request.InferRequestedOutputTensor(name="mask")]
    answer = door.stub.ModelInfer(request(values, outputs=mask))
    assert len(answer.raw_output_contents[0]) == values.size


def test_large_messages_are_read_and_written_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, list[str]] = {"parse_message": [], "read_inputs": [], "write_response": []}

    def noted(name: str) -> Any:
        call = getattr(open_inference_grpc, name)

        def note(*arguments: Any) -> Any:
            threads[name].append(threading.current_thread().name)
            return call(*arguments)

        return note

    for name in threads:
        monkeypatch.setattr(open_inference_grpc, name, noted(name))
    port = free_port()
    with opened(fake_app(http={"grpc_port": port}), port) as door:
        door.stub.ModelInfer(request())
        mask = [Request.InferRequestedOutputTensor(name="mask")]
        door.stub.ModelInfer(request(np.zeros((600, 64, 64, 1), np.uint8), outputs=mask))
    for name, (small, large) in threads.items():
        assert not small.startswith("worker"), name
        assert large.startswith("worker"), name
