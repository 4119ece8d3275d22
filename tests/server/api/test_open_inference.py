"""The Open Inference Protocol over HTTP; names as in Triton's L0_http and L0_input_validation where they try the same."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from server.api.open_inference.messages import HEADER
from server.arrays import Tiles
from tests.conftest import ROOT
from tests.server.api.open_inference_support import MODEL, answer_of, ask, files, image, refused
from tests.server.api.scraping import counted
from tests.server.api.sockets import connected, read_response
from tests.support.files import GOOD, nifti_bytes, pages_bytes, picture_bytes, volume_of
from tests.support.server import serving
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


def test_objects_of_a_picture_are_those_of_segment(client: httpx.Client) -> None:
    """The bundle's own smallest object holds where the request names none, and the answer says so."""
    encoded = (ROOT / "server/web/samples/cells.png").read_bytes()
    answer = client.post("/segment?level=1&instances=true", content=encoded).raise_for_status()
    expected = np.asarray(Image.open(io.BytesIO(answer.content)))
    pixels_of = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    for tensor in (files(encoded), image(pixels_of[None])):
        response = ask(
            client,
            "/v2/models/nuclei-l1/infer",
            tensor,
            parameters={"instances": True},
            outputs=[{"name": "mask"}],
        )
        head, outputs = answer_of(response)
        assert head["parameters"]["postprocessing"] == answer.headers["x-segment-postprocessing"]
        assert "min_size_px" in head["parameters"]["postprocessing"]
        assert outputs["mask"][0].astype(expected.dtype).tobytes() == expected.tobytes()


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


def test_neutral_parameters_of_clients_change_nothing(small: httpx.Client) -> None:
    parameters = {"priority": 0, "timeout": 60_000_000, "sequence_id": 0, "sequence_start": False}
    answer_of(ask(small, MODEL, files(GOOD), parameters=parameters))


def test_alias_decides_its_level(small: httpx.Client) -> None:
    head, _ = answer_of(ask(small, "/v2/models/fake-l3/infer", files(GOOD)))
    assert head["parameters"]["level"] == 3
    text = refused(ask(small, "/v2/models/fake-l3/infer", files(GOOD), parameters={"level": 1}), 422)
    assert "fake" in text


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


def test_large_body_lies_on_disk(client: httpx.Client, rng: np.random.Generator) -> None:
    """More than 4 MiB in one request: the array is a view of a mapped file."""
    pictures = pixels(rng, 30, 256, 256, 3)
    _, outputs = answer_of(
        ask(client, "/v2/models/nuclei-l1/infer", image(pictures), outputs=[{"name": "mask"}])
    )
    assert (outputs["mask"][29] == png_mask(client, pictures[29], "level=1")).all()


def test_objects_have_the_limits_of_the_bundle() -> None:
    def shade(tiles: Tiles) -> np.ndarray:
        return (tiles.pixels[:, :1].astype(np.float32) / 255).astype(np.float32)

    faint = np.zeros((1, 40, 60, 1), np.uint8)
    faint[0, 5:20, 5:20], faint[0, 25:35, 40:50], faint[0, 2, 50] = 230, 150, 230
    with serving(fake_app(shade, {"min_object_px": 20, "min_object_score": 0.7})) as client:
        for parameters, count in (
            ({"instances": True}, 1),
            ({"instances": True, "min_score": 0}, 2),
            ({"instances": True, "min_score": 0, "min_size_px": 0}, 3),
        ):
            _, outputs = answer_of(ask(client, MODEL, image(faint), parameters=parameters))
            assert outputs["mask"].max() == count
