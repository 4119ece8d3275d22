"""Requests of the Open Inference Protocol that are refused, cancelled or over a limit; names as in Triton's where they try the same."""

import gzip
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from server.api.auth import make
from server.api.open_inference.messages import HEADER, pack
from tests.server.api.jobs_support import Gate
from tests.server.api.open_inference_support import MODEL, answer_of, ask, files, image, refused
from tests.server.api.scraping import counted, value
from tests.server.api.sockets import connected
from tests.support.files import GOOD, picture_bytes
from tests.support.server import serving, until
from tests.support.service import FixedLatency, fake_app


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
