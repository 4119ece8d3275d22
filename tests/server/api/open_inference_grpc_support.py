"""Calls of the Open Inference Protocol over gRPC, by the published stubs."""

import contextlib
from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.serving import free_port
from tests.support.server import serving
from tests.support.service import fake_app

grpc = pytest.importorskip("grpc")
messages: Any = import_module("open_inference.grpc.protocol")
stubs: Any = import_module("open_inference.grpc.service")

Request, Tensor = messages.ModelInferRequest, messages.ModelInferRequest.InferInputTensor
GREY = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)


@contextlib.contextmanager
def opened(app: Any, port: int) -> Iterator[SimpleNamespace]:
    # In this order, so that calls in flight see the end of the server.
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, serving(app) as client:
        yield SimpleNamespace(
            http=client, port=port, channel=channel, stub=stubs.GRPCInferenceServiceStub(channel)
        )


@contextlib.contextmanager
def small_door() -> Iterator[SimpleNamespace]:
    """A server on fake engines that takes bodies of 1 MiB."""
    port = free_port()
    with opened(fake_app(http={"grpc_port": port}, limits={"max_body_mb": 1}), port) as door:
        yield door


def request(values: np.ndarray = GREY, model: str = "fake", **members: Any) -> Any:
    tensor = Tensor(name="image", datatype="UINT8", shape=values.shape)
    return Request(model_name=model, inputs=[tensor], raw_input_contents=[values.tobytes()], **members)


def refused(call: Any, *arguments: Any, **options: Any) -> Any:
    with pytest.raises(grpc.RpcError) as raised:
        call(*arguments, timeout=60, **options)
    return raised.value
