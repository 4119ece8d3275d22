"""The Open Inference Protocol over HTTP; names as in Triton's L0_http and L0_input_validation where they try the same."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from server.api.auth import make
from server.api.open_inference.messages import HEADER, pack
from tests.server.api.jobs_support import Gate
from tests.server.api.open_inference_support import MODEL, answer_of, ask, files, image, refused
from tests.server.api.scraping import counted, value
from tests.server.api.sockets import connected, read_response
from tests.support.files import GOOD, nifti_bytes, pages_bytes, picture_bytes, volume_of
from tests.support.server import serving, until
from tests.support.service import FixedLatency, fake_app


@pytest.fixture(scope="module")
def volumes() -> Iterator[httpx.Client]:
    changes = {"dims": 3, "orientation": "LPS", "spacing": (1.0, 1.0, 2.0)}
    with serving(fake_app(changes=changes)) as client:
        yield client


def pixels(rng: np.random.Generator, *shape: int, dtype: Any = np.uint8) -> np.ndarray:
    """Noise with bright discs, (N, H, W, C), in which the network sees nuclei."""
    count, height, width, channels = shape
    values = rng.integers(20, 40, shape)
    rows, columns = np.mgrid[:height, :width]
    for number in range(count):
        for _ in range(5):
            row, column, radius = rng.integers(0, height), rng.integers(0, width), rng.integers(5, 12)
            inside = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
            values[number][inside] = rng.integers(140, 240, channels)
    return values.astype(dtype)


def png_mask(client: httpx.Client, picture: np.ndarray, query: str) -> np.ndarray:
    answer = client.post(
        f"/segment?format=mask.png&{query}", content=picture_bytes(picture)
    ).raise_for_status()
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def scores_of(client: httpx.Client, picture: np.ndarray, query: str) -> np.ndarray:
    answer = client.post(f"/segment?format=npz&{query}", content=picture_bytes(picture)).raise_for_status()
    return np.load(io.BytesIO(answer.content))["probabilities"]


# (96, 96) and (40, 72) go through in one piece; the others one by one.
@pytest.mark.parametrize("size", [(96, 96), (40, 72), (300, 40)])
@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("nuclei-l1", {}),
        ("nuclei", {"level": 2, "threshold": 0.3}),
        ("nuclei-auto", {}),
        ("nuclei-l1", {"tta": "flips"}),
        ("nuclei-l1", {"fill_holes": True, "min_size_px": 9}),
    ],
)
def test_masks_and_scores_are_those_of_segment(
    client: httpx.Client,
    rng: np.random.Generator,
    size: tuple[int, int],
    model: str,
    parameters: dict[str, Any],
) -> None:
    pictures = pixels(rng, 5, *size, 3)
    decided = {"nuclei-l1": "level=1", "nuclei": "", "nuclei-auto": "mode=auto"}[model]
    query = "&".join([decided, *(f"{name}={value}" for name, value in parameters.items())])
    url = f"/v2/models/{model}/infer"
    encoded = files(*map(picture_bytes, pictures))
    head, outputs = answer_of(ask(client, url, image(pictures), parameters=parameters))
    _, from_files = answer_of(ask(client, url, encoded, parameters=parameters))
    assert outputs["mask"].shape == (5, *size)
    assert head["parameters"]["model"] == "nuclei"
    for number, picture in enumerate(pictures):
        expected = png_mask(client, picture, query)
        assert (outputs["mask"][number] == expected).all()
        assert (from_files["mask"][number] == expected).all()
        assert (outputs["scores"][number] == scores_of(client, picture, query)).all()
    assert 0 < outputs["mask"].mean() < 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_grey_and_every_datatype_as_segment(
    client: httpx.Client, rng: np.random.Generator, channels: int, dtype: Any
) -> None:
    pictures = pixels(rng, 3, 64, 48, channels, dtype=dtype)
    _, outputs = answer_of(ask(client, "/v2/models/nuclei-l2/infer", image(pictures)))
    for number, picture in enumerate(pictures):
        squeezed = picture[..., 0] if channels == 1 else picture
        encoded = io.BytesIO()
        if dtype == np.uint8:
            encoded.write(picture_bytes(squeezed))
        else:
            import tifffile

            tifffile.imwrite(encoded, squeezed, photometric="rgb" if channels == 3 else "minisblack")
        sent = client.post("/segment?level=2&format=npz", content=encoded.getvalue()).raise_for_status()
        expected = np.load(io.BytesIO(sent.content))
        assert (outputs["mask"][number] == expected["mask"]).all()
        assert (outputs["scores"][number] == expected["probabilities"]).all()


def test_objects_are_numbered_as_in_segment(client: httpx.Client, rng: np.random.Generator) -> None:
    picture = pixels(rng, 1, 64, 64, 3)
    outputs = [{"name": "mask"}]
    parameters = {"instances": True}
    response = ask(
        client, "/v2/models/nuclei-l1/infer", image(picture), parameters=parameters, outputs=outputs
    )
    _, got = answer_of(response)
    answer = client.post(
        "/segment?level=1&instances=true", content=picture_bytes(picture[0])
    ).raise_for_status()
    assert got["mask"].dtype == np.uint16
    assert (got["mask"][0] == np.asarray(Image.open(io.BytesIO(answer.content)))).all()


def test_decoded_volumes_lie_as_the_network_sees_them(
    volumes: httpx.Client, rng: np.random.Generator
) -> None:
    voxels = rng.integers(-99, 99, (2, 9, 12, 7, 1)).astype(np.int16)
    for spacing, mm in ((None, (1, 1, 2)), ("1x2x0.5", (1, 2, 0.5))):
        parameters = {} if spacing is None else {"spacing_mm": spacing}
        _, outputs = answer_of(ask(volumes, MODEL, image(voxels), parameters={"level": 1, **parameters}))
        assert outputs["mask"].shape == (2, 9, 12, 7)
        for number, one in enumerate(voxels):
            affine = np.diag([-mm[0], -mm[1], mm[2], 1.0])
            answer = volumes.post("/segment?level=1", content=nifti_bytes(one[..., 0], affine))
            assert (outputs["mask"][number] == volume_of(answer.raise_for_status().content)).all()


def test_encoded_stack_comes_back_as_a_volume(small: httpx.Client, rng: np.random.Generator) -> None:
    pages = rng.integers(0, 99, (4, 16, 20)).astype(np.uint8)
    _, outputs = answer_of(ask(small, MODEL, files(pages_bytes(pages)), parameters={"level": 1}))
    assert outputs["mask"].shape == (1, 20, 16, 4)


def test_metadata_config_and_index(small: httpx.Client) -> None:
    server = small.get("/v2").json()
    assert server["name"] == "unetpp"
    assert "binary_tensor_data" in server["extensions"]
    names = [row["name"] for row in small.post("/v2/repository/index", json={"ready": True}).json()]
    assert names == ["fake", "fake-l1", "fake-l2", "fake-l3", "fake-l4", "fake-accurate"]
    assert small.post("/v2/repository/index").json()[0]["state"] == "READY"
    for name in names:
        metadata = small.get(f"/v2/models/{name}/versions/1/").raise_for_status().json()
        config = small.get(f"/v2/models/{name}/config").raise_for_status().json()
        assert [one["shape"][1:] for one in metadata["inputs"]] == [one["dims"] for one in config["input"]]
        assert [one["shape"][1:] for one in metadata["outputs"]] == [one["dims"] for one in config["output"]]
        assert config["max_batch_size"] > 0
        assert small.get(f"/v2/models/{name}/ready").json() == {"name": name, "ready": True}
    assert small.get("/v2/health/live").json() == {"live": True}
    assert small.get("/v2/health/ready/").json() == {"ready": True}


@pytest.mark.parametrize("path", ["", "/ready", "/config", "/stats", "/versions/2", "/versions/2/ready"])
def test_unknown_model_or_version(small: httpx.Client, path: str) -> None:
    name = "fake" if "2" in path else "none"
    refused(small.get(f"/v2/models/{name}{path}"), 404)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/nothing", 404),
        ("GET", MODEL, 405),
        ("POST", "/v2/repository/models/fake/load", 501),
        ("POST", "/v2/repository/models/fake/unload", 501),
        ("GET", "/v2/systemsharedmemory/status", 501),
        ("POST", "/v2/cudasharedmemory/region/a/register", 501),
        ("GET", "/v2/trace/setting", 501),
        ("POST", "/v2/models/fake/trace/setting", 501),
        ("POST", "/v2/logging", 501),
        ("POST", "/v2/models/none/infer", 404),
        ("POST", "/v2/models/fake/versions/7/infer", 404),
    ],
)
def test_what_is_not_offered_says_so_in_the_protocols_form(
    small: httpx.Client, method: str, path: str, status: int
) -> None:
    assert len(refused(small.request(method, path), status)) > 5


def test_statistics_count_images_and_requests() -> None:
    with serving(fake_app()) as client:
        before = client.get("/v2/models/fake-l1/stats").json()["model_stats"][0]
        assert before["inference_stats"]["success"] == {"count": 0, "ns": 0}
        ask(client, "/v2/models/fake-l1/infer", files(GOOD, GOOD)).raise_for_status()
        ask(client, "/v2/models/fake-l1/infer", image(np.zeros((3, 16, 16, 1), np.uint8))).raise_for_status()
        refused(ask(client, "/v2/models/fake-l1/infer"), 400)
        every = {row["name"]: row for row in client.get("/v2/models/stats").json()["model_stats"]}
        outcomes = counted(client, "requests", "outcome")
    row = every["fake-l1"]
    assert (row["inference_count"], row["execution_count"]) == (5, 2)
    counts = {name: one["count"] for name, one in row["inference_stats"].items()}
    assert counts.pop("fail") == 1
    assert counts.pop("cache_hit") == counts.pop("cache_miss") == 0
    assert set(counts.values()) == {2}
    assert all(isinstance(one["ns"], int) for one in row["inference_stats"].values())
    assert every["fake"]["inference_count"] == 0
    assert outcomes == {"ok": 2, "client_error": 1}


def test_raw_binary(small: httpx.Client) -> None:
    answer = small.post(MODEL, content=GOOD, headers={HEADER: "0"})
    head, outputs = answer_of(answer)
    assert all("binary_data_size" in row["parameters"] for row in head["outputs"])
    assert outputs["mask"].sum() == 128
    assert outputs["scores"].dtype == np.float16


def test_content_encoding_chunked_manually(small: httpx.Client) -> None:
    """The body in many chunks, of one byte each."""
    port = small.base_url.port
    assert port
    with connected(port) as raw:
        head = f"POST {MODEL} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n{HEADER}: 0\r\n\r\n"
        raw.sendall(head.encode() + b"".join(b"1\r\n%c\r\n" % byte for byte in GOOD) + b"0\r\n\r\n")
        response = read_response(raw)
    assert response.status == 200
    assert response.body[int(response.headers[HEADER]) :][:256].count(1) == 128


def test_json_request_and_answer_without_content_type(small: httpx.Client) -> None:
    row = {
        "name": "image",
        "datatype": "UINT8",
        "shape": [1, 16, 16, 1],
        "data": [[[[n] for n in range(256)]]],
    }
    request = {"id": "a7", "inputs": [row]}
    head, outputs = answer_of(small.post(MODEL, content=json.dumps(request)))
    assert head["id"] == "a7"
    assert {row["name"]: row["datatype"] for row in head["outputs"]} == {"mask": "UINT8", "scores": "FP32"}
    # An object of parameters makes C++ clients look for binary data.
    assert all("parameters" not in row for row in head["outputs"])
    assert outputs["mask"].sum() == 128


def test_outputs_that_are_not_asked_for_do_not_come(small: httpx.Client) -> None:
    outputs = [{"name": "scores", "parameters": {"binary_data": True}}, {"name": "mask"}]
    head, got = answer_of(ask(small, MODEL, files(GOOD), binary=False, outputs=outputs))
    assert [row["name"] for row in head["outputs"]] == ["scores", "mask"]
    assert "data" in head["outputs"][1]
    assert (got["mask"] == got["scores"][:, 0]).all()
    (only,) = answer_of(ask(small, MODEL, files(GOOD), outputs=[{"name": "mask"}]))[1]
    assert only == "mask"


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compressed_both_ways(small: httpx.Client, coding: str) -> None:
    row = {
        "name": "image",
        "datatype": "UINT8",
        "shape": [1, 64, 64, 1],
        "parameters": {"binary_data_size": 4096},
    }
    head = json.dumps({"inputs": [row], "parameters": {"binary_data_output": True}}).encode()
    body = head + bytes(range(256)) * 16
    packed = gzip.compress(body) if coding == "gzip" else zlib.compress(body)
    # The length is that of the JSON before compression.
    headers = {HEADER: f"{len(head)}", "Content-Encoding": coding, "Accept-Encoding": coding}
    answer = small.post(MODEL, content=packed, headers=headers)
    assert answer.headers["content-encoding"] == coding
    assert answer_of(answer)[1]["mask"].shape == (1, 64, 64)


def test_default_limit_rejection(small: httpx.Client) -> None:
    """A body over the limit, as it comes or when it is decompressed; one that is broken, and another coding."""
    zeros = bytes(3 * 1024 * 1024)
    refused(small.post(MODEL, content=zeros, headers={HEADER: "0"}), 413)
    for coding, compress in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        packed, short = compress(zeros), compress(GOOD)
        text = refused(small.post(MODEL, content=packed, headers={"Content-Encoding": coding}), 413)
        assert "UNETPP_LIMITS__MAX_BODY_MB" in text
        for broken in (packed[:20], short + b"x", short[:-3], b"nonsense", b""):
            refused(small.post(MODEL, content=broken, headers={"Content-Encoding": coding}), 422)
    refused(small.post(MODEL, content=b"x", headers={"Content-Encoding": "br"}), 415)
    refused(ask(small, MODEL, image(np.zeros((1, 400, 400, 1), np.uint8))), 413)


def test_input_validation_required_empty(small: httpx.Client) -> None:
    refused(ask(small, MODEL), 400)
    refused(small.post(MODEL), 400)


def test_multi_inputs(small: httpx.Client) -> None:
    grey = np.zeros((1, 16, 16, 1), np.uint8)
    refused(ask(small, MODEL, image(grey), files(GOOD)), 400)
    refused(ask(small, MODEL, image(grey, "picture")), 400)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((16, 16, 1), np.uint8),
        np.zeros((0, 16, 16, 1), np.uint8),
        np.zeros((1, 16, 0, 1), np.uint8),
        np.zeros((1, 16, 16, 16, 1), np.uint8),
        np.zeros((1001, 1, 1, 1), np.uint8),
        np.zeros((1, 16, 16, 1), np.float64),
        np.zeros((1, 16, 16, 1), np.int16),
        np.zeros((1, 16, 16, 1), np.bool_),
    ],
)
def test_wrong_input_shape_tensor_size(small: httpx.Client, values: np.ndarray) -> None:
    refused(ask(small, MODEL, image(values)), 400)


@pytest.mark.parametrize(
    ("parameters", "status"),
    [
        ({"level": 9}, 422),
        ({"level": "a"}, 422),
        ({"unknown": 1}, 422),
        ({"format": "png"}, 422),
        ({"priority": 3}, 422),
        ({"sequence_id": 4}, 422),
        ({"timeout": -1}, 422),
        ({"timeout": 10, "deadline_ms": 10}, 422),
        ({"deadline_ms": "soon"}, 422),
        ({"axes": "YX"}, 422),
        ({"spacing_mm": "1x1x1"}, 422),
        ({"axis": "1"}, 422),
        ({"channel": 4}, 422),
    ],
)
def test_wrong_parameters_are_named(small: httpx.Client, parameters: dict[str, Any], status: int) -> None:
    grey = image(np.zeros((1, 16, 16, 1), np.uint8))
    text = refused(ask(small, MODEL, grey, parameters=parameters), status)
    assert next(iter(parameters)).replace("timeout", "deadline") in text or "timeout" in text


def test_neutral_parameters_of_clients_change_nothing(small: httpx.Client) -> None:
    parameters = {"priority": 0, "timeout": 60_000_000, "sequence_id": 0, "sequence_start": False}
    answer_of(ask(small, MODEL, files(GOOD), parameters=parameters))


def test_alias_decides_its_level(small: httpx.Client) -> None:
    head, _ = answer_of(ask(small, "/v2/models/fake-l3/infer", files(GOOD)))
    assert head["parameters"]["level"] == 3
    text = refused(ask(small, "/v2/models/fake-l3/infer", files(GOOD), parameters={"level": 1}), 422)
    assert "fake" in text


def test_inputs_of_different_sizes_and_a_broken_one(small: httpx.Client) -> None:
    other = picture_bytes(np.zeros((8, 9), np.uint8))
    assert "different sizes" in refused(ask(small, MODEL, files(GOOD, other)), 422)
    refused(ask(small, MODEL, files(GOOD, b"nonsense")), 415)
    refused(ask(small, MODEL, files(GOOD, b"")), 422)


def test_values_that_are_not_finite(small: httpx.Client) -> None:
    values = np.arange(256, dtype=np.float32).reshape(1, 16, 16, 1)
    values[0, 0, 0, 0] = np.nan
    assert "nonfinite=zero" in refused(ask(small, MODEL, image(values)), 422)
    head, outputs = answer_of(ask(small, MODEL, image(values), parameters={"nonfinite": "zero"}))
    assert head["parameters"]["note"].startswith("1 value")
    assert outputs["mask"].sum() == 128


def test_descriptive_status_code() -> None:
    """A full server answers 429 with Retry-After, and a deadline that nothing can meet gets 422."""
    gate = Gate()
    gate.open.clear()
    with serving(fake_app(gate, http={"max_in_flight": 1})) as client, ThreadPoolExecutor(1) as pool:
        try:
            first = pool.submit(ask, client, MODEL, files(GOOD))
            until(lambda: value(client, "requests_in_flight") == 1)
            answer = ask(client, MODEL, files(GOOD))
            refused(answer, 429)
            assert int(answer.headers["retry-after"]) >= 1
        finally:
            gate.open.set()
        answer_of(first.result())
    with serving(fake_app(latency=FixedLatency(10.0))) as client:
        grey = image(np.zeros((1, 16, 16, 1), np.uint8))
        assert "deadline" in refused(ask(client, MODEL, grey, parameters={"timeout": 1_000_000}), 422)


def test_client_that_leaves_takes_its_tiles_along() -> None:
    """Of 40 tiles in one request the first batch runs; the others are dropped, and counted."""
    gate = Gate()
    gate.open.clear()
    with serving(fake_app(gate)) as client:
        try:
            values = np.zeros((40, 64, 64, 1), np.uint8)
            parts, length = pack({}, "inputs", [(image(values), True)])
            port = client.base_url.port
            assert port
            with connected(port) as raw:
                body = b"".join(parts)
                head = f"POST {MODEL} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{HEADER}: {length}\r\n\r\n"
                raw.sendall(head.encode() + body)
                gate.wait()
            until(lambda: value(client, "requests_in_flight") == 0)
        finally:
            gate.open.set()
        assert counted(client, "cancellations", "reason") == {"client_left": 1}
        assert 0 < counted(client, "windows_dropped", "reason")["cancelled"] < 40
        assert client.get("/v2/models/fake/stats").json()["model_stats"][0]["inference_count"] == 0


def test_deadline_lets_a_shallower_level_answer() -> None:
    latency = FixedLatency({"L1": 0.01, "L2": 0.01, "L3": 10.0, "L4": 10.0, "accurate": 10.0})
    app = fake_app(latency=latency)
    with serving(app) as client:
        parameters = {"min_level": 1, "deadline_ms": 5000}
        for tensor in (files(GOOD, GOOD), image(np.zeros((2, 16, 16, 1), np.uint8))):
            head, _ = answer_of(ask(client, MODEL, tensor, parameters=parameters))
            facts = head["parameters"]
            assert facts["level"] == 2
            assert facts["level_requested"] == 4
            assert facts["degraded"] == "deadline"


def test_keys_hold_for_all_but_health(tmp_path: Path) -> None:
    key, line = make("someone")
    (tmp_path / "keys").write_text(line)
    with serving(fake_app(auth={"keys_file": tmp_path / "keys"})) as client:
        assert client.get("/v2/health/ready").status_code == client.get("/v2/health/live").status_code == 200
        for path in ("/v2", "/v2/models/fake", "/v2/models/stats"):
            answer = client.get(path)
            assert "unetpp key" in refused(answer, 401)
            assert answer.headers["www-authenticate"].startswith("Bearer")
        refused(ask(client, MODEL, files(GOOD)), 401)
        assert client.get("/v2", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_pages_of_other_sites_are_refused_in_the_protocols_form(small: httpx.Client) -> None:
    refused(small.post(MODEL, content=GOOD, headers={HEADER: "0", "Origin": "http://elsewhere"}), 403)


def test_large_body_lies_on_disk(client: httpx.Client, rng: np.random.Generator) -> None:
    """More than 4 MiB in one request: the array is a view of a mapped file."""
    pictures = pixels(rng, 30, 256, 256, 3)
    _, outputs = answer_of(
        ask(client, "/v2/models/nuclei-l1/infer", image(pictures), outputs=[{"name": "mask"}])
    )
    assert (outputs["mask"][29] == png_mask(client, pictures[29], "level=1")).all()
