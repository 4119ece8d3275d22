"""The Open Inference Protocol over gRPC: by the published stubs here, and by Triton's client in a process of its own.

Both declare the same messages, which one process cannot hold twice.
"""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.serving import free_port
from server.api.auth import make
from server.api.routes import open_inference_grpc
from server.api.stopping import Stopping
from server.errors import Misconfigured
from server.settings import HttpSettings
from tests.conftest import ROOT
from tests.server.api.jobs_support import Gate
from tests.server.api.open_inference_grpc_support import (
    GREY,
    Request,
    Tensor,
    grpc,
    messages,
    opened,
    refused,
    request,
    small_door,
    stubs,
)
from tests.server.api.scraping import counted, value
from tests.support.files import GOOD, picture_bytes
from tests.support.server import make_certificate, serving, until
from tests.support.service import fake_app, quiet_settings


@pytest.fixture(scope="module")
def door() -> Iterator[SimpleNamespace]:
    with small_door() as door:
        yield door


def test_health_and_metadata(door: SimpleNamespace) -> None:
    stub = door.stub
    assert stub.ServerLive(messages.ServerLiveRequest()).live
    assert stub.ServerReady(messages.ServerReadyRequest()).ready
    assert stub.ModelReady(messages.ModelReadyRequest(name="fake-l2", version="1")).ready
    assert stub.ServerMetadata(messages.ServerMetadataRequest()).name == "unetpp"
    metadata = stub.ModelMetadata(messages.ModelMetadataRequest(name="fake"))
    assert [(one.name, one.datatype, [*one.shape]) for one in metadata.inputs] == [
        ("image", "UINT8", [-1, -1, -1, 1]),
        ("bytes", "BYTES", [-1, 1]),
    ]


def test_infer_of_raw_and_typed_contents(door: SimpleNamespace) -> None:
    raw = door.stub.ModelInfer(request(id="a", model="fake-l1"))
    assert (raw.id, raw.model_version, raw.parameters["level"].int64_param) == ("a", "1", 1)
    assert [(one.name, one.datatype, [*one.shape]) for one in raw.outputs] == [
        ("mask", "UINT8", [1, 16, 16]),
        ("scores", "FP16", [1, 1, 16, 16]),
    ]
    mask = np.frombuffer(raw.raw_output_contents[0], np.uint8)
    assert mask.sum() == 128
    contents = messages.InferTensorContents(uint_contents=[*range(256)])
    typed = Tensor(name="image", datatype="UINT8", shape=GREY.shape, contents=contents)
    answer = door.stub.ModelInfer(Request(model_name="fake-l1", inputs=[typed]))
    assert answer.raw_output_contents[0] == raw.raw_output_contents[0]
    files = Tensor(name="bytes", datatype="BYTES", shape=[1, 1])
    files.contents.bytes_contents.append(GOOD)
    outputs = [Request.InferRequestedOutputTensor(name="mask")]
    level = {"level": messages.InferParameter(int64_param=1)}
    sent = Request(model_name="fake", inputs=[files], outputs=outputs, parameters=level)
    answer = door.stub.ModelInfer(sent)
    assert [*answer.raw_output_contents] == [raw.raw_output_contents[0]]


def test_refusals_have_the_codes_of_grpc(door: SimpleNamespace) -> None:
    infer = door.stub.ModelInfer
    assert refused(infer, request(model="none")).code() is grpc.StatusCode.NOT_FOUND
    wrong = request()
    wrong.raw_input_contents[0] = b"123"
    error = refused(infer, wrong)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "256" in error.details()
    both = request()
    both.inputs[0].contents.uint_contents.append(1)
    assert refused(infer, both).code() is grpc.StatusCode.INVALID_ARGUMENT
    more = request()
    more.raw_input_contents.append(b"1")
    assert refused(infer, more).code() is grpc.StatusCode.INVALID_ARGUMENT
    level = {"level": messages.InferParameter(int64_param=9)}
    assert refused(infer, request(parameters=level)).code() is grpc.StatusCode.INVALID_ARGUMENT
    shared = request()
    shared.inputs[0].parameters["shared_memory_region"].string_param = "a"
    assert refused(infer, shared).code() is grpc.StatusCode.UNIMPLEMENTED
    large = np.zeros((1, 1100, 1000, 1), np.uint8)
    assert refused(infer, request(large)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_request_id_comes_back_and_statistics_are_those_of_http(door: SimpleNamespace) -> None:
    url = "/v2/models/fake-l3/stats"
    before = door.http.get(url).json()["model_stats"][0]["inference_count"]
    _, call = door.stub.ModelInfer.with_call(request(model="fake-l3"), metadata=[("x-request-id", "r-1")])
    assert dict(call.trailing_metadata())["x-request-id"] == "r-1"
    assert door.http.get(url).json()["model_stats"][0]["inference_count"] == before + 1


def test_cancelled_call_leaves_the_queue_and_a_full_server_says_when_to_come_back() -> None:
    gate, port = Gate(), free_port()
    gate.open.clear()
    app = fake_app(gate, http={"grpc_port": port, "max_in_flight": 1})
    try:
        with opened(app, port) as door:
            waiting = door.stub.ModelInfer.future(request())
            until(lambda: value(door.http, "requests_in_flight") == 1)
            error = refused(door.stub.ModelInfer, request())
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            trailing = dict(error.trailing_metadata())
            assert int(trailing["grpc-retry-pushback-ms"]) == int(trailing["retry-after"]) * 1000
            waiting.cancel()
            until(lambda: value(door.http, "requests_in_flight") == 0)
            assert counted(door.http, "cancellations", "reason") == {"client_left": 1}
            # The deadline of the call itself.
            assert refused_in(door, 0.05).code() is grpc.StatusCode.DEADLINE_EXCEEDED
            until(lambda: value(door.http, "requests_in_flight") == 0)
            gate.open.set()
    finally:
        gate.open.set()


def refuses(address: str) -> bool:
    """Whether nobody listens there any more."""
    host, port = address.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) != 0


def refused_in(door: SimpleNamespace, seconds: float) -> Any:
    with pytest.raises(grpc.RpcError) as raised:
        door.stub.ModelInfer(request(), timeout=seconds)
    return raised.value


def test_open_calls_finish_when_the_server_stops() -> None:
    gate, port = Gate(), free_port()
    gate.open.clear()
    app = fake_app(gate, http={"grpc_port": port})
    address = f"127.0.0.1:{port}"
    with grpc.insecure_channel(address) as channel, ThreadPoolExecutor(1) as pool:
        stub = stubs.GRPCInferenceServiceStub(channel)
        with serving(app) as client:
            waiting = stub.ModelInfer.future(request())
            until(lambda: value(client, "requests_in_flight") == 1)
            # By then the server has begun to stop.
            pool.submit(lambda: (until(lambda: refuses(address)), gate.open.set()))
        assert len(waiting.result().raw_output_contents) == 2


def test_keys_hold_for_all_but_health(tmp_path: Path) -> None:
    key, line = make("someone")
    (tmp_path / "keys").write_text(line)
    port = free_port()
    with opened(fake_app(http={"grpc_port": port}, auth={"keys_file": tmp_path / "keys"}), port) as door:
        assert door.stub.ServerReady(messages.ServerReadyRequest()).ready
        for metadata in ([], [("authorization", "Bearer wrong")]):
            error = refused(door.stub.ModelInfer, request(), metadata=metadata)
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        for metadata in ([("authorization", f"Bearer {key}")], [("x-api-key", key)]):
            assert door.stub.ModelInfer(request(), metadata=metadata).model_name == "fake"


def test_certificate_of_http_is_that_of_grpc(tmp_path: Path) -> None:
    make_certificate(tmp_path)
    port = free_port()
    files = {"tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}
    known = grpc.ssl_channel_credentials((tmp_path / "cert.pem").read_bytes())
    with (
        serving(fake_app(http={"grpc_port": port, **files})),
        grpc.secure_channel(f"localhost:{port}", known) as channel,
    ):
        stub = stubs.GRPCInferenceServiceStub(channel)
        assert stub.ModelInfer(request(), timeout=60).model_name == "fake"


def test_missing_extra_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_inference_grpc, "find_spec", lambda _: None)
    with pytest.raises(Misconfigured) as raised:
        fake_app(http={"grpc_port": 1})
    assert raised.value.fields["setting"] == "UNETPP_HTTP__GRPC_PORT"


async def test_taken_port_is_refused() -> None:
    limits = SimpleNamespace(max_body_mb=1)
    door: Any = SimpleNamespace(service=SimpleNamespace(limits=limits))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = HttpSettings(grpc_port=taken.getsockname()[1])
        server = open_inference_grpc.GrpcServer(door, settings, None, Stopping(), lambda _: None)
        with pytest.raises(Misconfigured) as raised:
            await server.__aenter__()
    assert raised.value.fields["setting"] == "UNETPP_HTTP__GRPC_PORT"


TRITON = """
import asyncio, json, sys
import numpy as np
import tritonclient.grpc as blocking
import tritonclient.grpc.aio as aio
from tritonclient.utils import InferenceServerException

address, picture, encoded = sys.argv[1], np.load(sys.argv[2]), open(sys.argv[3], "rb").read()

def inputs(module):
    tensor = module.InferInput("image", [*picture.shape], "UINT8")
    tensor.set_data_from_numpy(picture)
    return [tensor]

found = {}
with blocking.InferenceServerClient(address) as client:
    found["ready"] = [client.is_server_live(), client.is_server_ready(), client.is_model_ready("nuclei-l1")]
    found["name"] = client.get_server_metadata().name
    found["versions"] = [*client.get_model_metadata("nuclei").versions]
    answer = client.infer("nuclei-l1", inputs(blocking), request_id="7", parameters={"min_size_px": 1})
    found["id"], found["mask"] = answer.get_response().id, answer.as_numpy("mask").tolist()
    tensor = blocking.InferInput("bytes", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[encoded]], dtype=np.object_))
    found["file"] = client.infer("nuclei-l1", [tensor]).as_numpy("mask").tolist()
    found["errors"] = []
    for call in (lambda: client.infer("none", inputs(blocking)), lambda: client.infer("nuclei", []), lambda: client.get_model_config("nuclei")):
        try:
            call()
        except InferenceServerException as error:
            found["errors"].append(error.status())

async def ask():
    async with aio.InferenceServerClient(address) as client:
        answer = await client.infer("nuclei-l1", inputs(aio))
        return answer.as_numpy("mask").tolist()

found["aio"] = asyncio.run(ask())
print(json.dumps(found))
"""


def test_tritons_client_blocking_and_asyncio(shipped_bundle: Path, ihc: np.ndarray, tmp_path: Path) -> None:
    from server.app import create_app

    port = free_port()
    picture = ihc[:64, :80]
    np.save(tmp_path / "picture.npy", picture[None])
    (tmp_path / "picture.png").write_bytes(picture_bytes(picture))
    settings = quiet_settings(bundles=shipped_bundle, runtime={"precision": "fp32"}, http={"grpc_port": port})
    with opened(create_app(settings), port) as door:
        answer = door.http.post(
            "/segment?level=1&format=json&include_mask=true", content=picture_bytes(picture)
        )
        command = [
            sys.executable,
            "-c",
            TRITON,
            f"127.0.0.1:{port}",
            tmp_path / "picture.npy",
            tmp_path / "picture.png",
        ]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["ready"] == [True] * 3
    assert (found["name"], found["versions"], found["id"]) == ("unetpp", ["1"], "7")
    assert found["errors"] == [
        "StatusCode.NOT_FOUND",
        "StatusCode.INVALID_ARGUMENT",
        "StatusCode.UNIMPLEMENTED",
    ]
    assert found["mask"] == found["file"] == found["aio"]
    assert np.sum(found["mask"]) == sum(row["pixels"] for row in answer.json()["classes"])
