"""Triton's own client over HTTP, blocking and asyncio, against the shipped network."""

import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as blocking
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException

from tests.support.files import picture_bytes

# Clients are closed here. One that is collected later, in a thread of a server, would close there what belongs to gevent's own thread.
blocking.InferenceServerClient.__del__ = lambda _: None


@pytest.fixture
def address(client: httpx.Client) -> str:
    return client.base_url.netloc.decode()


@pytest.fixture
def triton(address: str) -> Iterator[blocking.InferenceServerClient]:
    with blocking.InferenceServerClient(address) as client:
        yield client


@pytest.fixture
def tiles(ihc: np.ndarray) -> np.ndarray:
    """Eight parts of a real picture, (8, 96, 96, 3)."""
    return np.stack([ihc[96 * k : 96 * (k + 1), 96 : 96 * 2] for k in range(4)] * 2)


def image_input(module: Any, values: np.ndarray, *, binary: bool = True) -> Any:
    tensor = module.InferInput("image", list(values.shape), "UINT8")
    tensor.set_data_from_numpy(values, binary_data=binary)
    return tensor


def files_input(module: Any, values: np.ndarray) -> Any:
    encoded = np.array([[picture_bytes(one)] for one in values], dtype=np.object_)
    tensor = module.InferInput("bytes", [len(values), 1], "BYTES")
    tensor.set_data_from_numpy(encoded)
    return tensor


def expected(client: httpx.Client, values: np.ndarray, query: str) -> np.ndarray:
    answers = [client.post(f"/segment?format=npz&{query}", content=picture_bytes(one)) for one in values]
    return np.stack([np.load(io.BytesIO(answer.content))["mask"] for answer in answers])


def test_every_call_of_the_client(triton: blocking.InferenceServerClient) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("nuclei-l1")
    assert triton.is_model_ready("nuclei", "1")
    assert not triton.is_model_ready("nothing")
    assert triton.get_server_metadata()["name"] == "unetpp"
    assert triton.get_model_metadata("nuclei", "1")["versions"] == ["1"]
    assert triton.get_model_config("nuclei-accurate")["name"] == "nuclei-accurate"
    assert {row["name"] for row in triton.get_model_repository_index()} >= {"nuclei", "nuclei-l4"}
    assert len(triton.get_inference_statistics()["model_stats"]) >= 6
    assert triton.get_inference_statistics("nuclei", "1")["model_stats"][0]["name"] == "nuclei"


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.load_model("nuclei"),
        lambda client: client.unload_model("nuclei"),
        lambda client: client.get_system_shared_memory_status(),
        lambda client: client.register_system_shared_memory("a", "/b", 10),
        lambda client: client.unregister_cuda_shared_memory(),
        lambda client: client.get_trace_settings(),
        lambda client: client.update_log_settings({"log_info": True}),
        lambda client: client.get_model_metadata("nothing"),
        lambda client: client.infer("nothing", []),
        lambda client: client.infer("nuclei", []),
    ],
)
def test_refusals_are_exceptions_of_the_client(triton: blocking.InferenceServerClient, call: Any) -> None:
    with pytest.raises(InferenceServerException) as raised:
        call(triton)
    assert raised.value.status() in {"400", "404", "501"}
    assert len(raised.value.message()) > 20


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_infer_of_arrays_and_of_files(
    client: httpx.Client,
    triton: blocking.InferenceServerClient,
    tiles: np.ndarray,
    compression: str | None,
) -> None:
    codings = {"request_compression_algorithm": compression, "response_compression_algorithm": compression}
    masks = expected(client, tiles, "level=1")
    assert 0 < masks.mean() < 1
    for tensor in (image_input(blocking, tiles), files_input(blocking, tiles)):
        result = triton.infer("nuclei-l1", [tensor], request_id="a1", **codings)
        assert result.get_response()["id"] == "a1"
        assert (result.as_numpy("mask") == masks).all()
        assert result.as_numpy("scores").shape == (8, 1, 96, 96)
    outputs = [blocking.InferRequestedOutput("mask", binary_data=False)]
    result = triton.infer("nuclei-l1", [image_input(blocking, tiles)], outputs=outputs, **codings)
    assert (result.as_numpy("mask") == masks).all()
    result = triton.infer(
        "nuclei",
        [image_input(blocking, tiles[:1], binary=False)],
        parameters={"level": 1},
        timeout=60_000_000,
    )
    assert (result.as_numpy("mask") == masks[:1]).all()


def test_async_infer_in_threads(
    client: httpx.Client, triton: blocking.InferenceServerClient, tiles: np.ndarray
) -> None:
    handle = triton.async_infer("nuclei-l2", [image_input(blocking, tiles)])
    assert (handle.get_result().as_numpy("mask") == expected(client, tiles, "level=2")).all()


async def test_asyncio_client(client: httpx.Client, address: str, tiles: np.ndarray) -> None:
    """aiohttp accepts compressed answers without being asked."""
    async with aio.InferenceServerClient(address) as triton:
        assert await triton.is_server_ready()
        assert (await triton.get_model_config("nuclei"))["max_batch_size"] > 1
        assert (await triton.get_model_repository_index())[0]["state"] == "READY"
        result = await triton.infer("nuclei-l1", [image_input(aio, tiles)])
        assert (result.as_numpy("mask") == expected(client, tiles, "level=1")).all()
        with pytest.raises(InferenceServerException):
            await triton.infer("nuclei-l1", [image_input(aio, tiles)], parameters={"level": 2})
