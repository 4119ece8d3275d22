import base64
import concurrent.futures
import contextlib
import csv
import gzip
import http.client
import io
import json
import socket
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow
from prometheus_client.parser import text_string_to_metric_families
from scipy import ndimage
from scipy.special import expit

from server.arrays import Tiles
from server.imaging.encode import ENCODERS
from tests.support.files import mask_of, pages_bytes, pages_of, picture_bytes
from tests.support.server import serving
from tests.support.service import bright, fake_app

PNG = {"content-type": "image/png"}
L1 = "/segment?mode=fast&level=1"


def random_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Like fluorescence: bright round nuclei on a dark ground, one every 30 pixels or so."""
    random = np.random.default_rng(seed)
    rows, columns = np.ogrid[:height, :width]
    picture = random.normal(20, 4, (height, width))
    for top in range(0, height, 30):
        for left in range(0, width, 30):
            (y, x), radius = random.uniform(10, 20, 2), random.uniform(5, 9)
            cell = slice(top, top + 30), slice(left, left + 30)
            distance = np.hypot(rows[cell[0]] - top - y, columns[:, cell[1]] - left - x)
            picture[cell] += random.uniform(100, 180) * expit((radius - distance) * 1.5)
    return np.clip(picture[..., None] * [0.9, 0.95, 1.0], 0, 255).astype(np.uint8)


# How many objects a document describes.
COUNTED: dict[str, Callable[[bytes], int]] = {
    "csv": lambda body: len(list(csv.DictReader(io.StringIO(body.decode())))),
    "geojson": lambda body: len(json.loads(body)["features"]),
    "geojson_gz": lambda body: len(json.loads(gzip.decompress(body))["features"]),
    "coco": lambda body: len(json.loads(body)["annotations"]),
}


class TestHappyPath:
    @pytest.mark.parametrize(
        ("query", "mode", "level", "requested"),
        [
            ("", "accurate", "4", "4"), ("?mode=accurate", "accurate", "4", "4"), ("?level=2", "fast", "2", "2"),
            *((f"?mode=fast&level={level}", "fast", f"{level}", f"{level}") for level in (1, 2, 3, 4)),
        ],
    )  # fmt: skip
    def test_modes_and_levels(self, client: httpx.Client, query: str, mode: str, level: str, requested: str) -> None:
        answer = client.post(f"/segment{query}", content=picture_bytes(random_picture(40, 50)), headers=PNG)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["x-segment-model"] == "nuclei"
        assert answer.headers["x-segment-mode"] == mode
        assert answer.headers["x-segment-level"] == level
        assert answer.headers["x-segment-level-requested"] == requested
        assert answer.headers["x-segment-precision"] == "fp32"
        assert "x-segment-iou" not in answer.headers
        mask = mask_of(answer.content)
        assert mask.shape == (40, 50)
        assert set(np.unique(mask)) <= {0, 1}

    def test_server_timing_names_the_phases(self, client: httpx.Client) -> None:
        answer = client.post(L1, content=picture_bytes(random_picture(20, 20)), headers=PNG)
        timing = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
        assert {"decode", "queue", "infer", "restore", "encode"} <= timing.keys()
        assert all(float(value) >= 0 for value in timing.values())

    def test_request_id(self, client: httpx.Client) -> None:
        def given(value: str | None) -> str:
            headers = PNG | ({} if value is None else {"x-request-id": value})
            return client.post(L1, content=picture_bytes(random_picture(8, 8)), headers=headers).headers["x-request-id"]

        assert given("mine-1.A_b") == "mine-1.A_b"
        assert given(None) != given(None)
        for bad in ("with space", "a" * 65, "semi;colon", ""):
            assert given(bad) != bad

    @pytest.mark.parametrize("precision", ["auto", "fp32", "int8"])
    def test_precisions(self, client: httpx.Client, precision: str) -> None:
        answer = client.post(f"{L1}&precision={precision}", content=picture_bytes(random_picture(20, 20)), headers=PNG)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-segment-precision"] == ("fp32" if precision == "auto" else precision)

    @pytest.mark.parametrize(
        "name", [name for name, row in ENCODERS.items() if "image" in row.kinds and "head_std" not in row.needs]
    )
    def test_formats(self, client: httpx.Client, name: str) -> None:
        picture = random_picture(33, 41)
        plain = mask_of(client.post(L1, content=picture_bytes(picture), headers=PNG).content)
        answer = client.post(f"{L1}&format={name}&include_mask=true", content=picture_bytes(picture), headers=PNG)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == ENCODERS[name].media_type
        if name in COUNTED:
            assert COUNTED[name](answer.content) == ndimage.label(plain, structure=np.ones((3, 3)))[1]
        elif name.startswith("npz"):
            with np.load(io.BytesIO(answer.content)) as arrays:
                assert np.array_equal(arrays["mask"], plain)
                assert arrays["probabilities"].shape == (1, 33, 41)
        elif name == "json":
            report = answer.json()
            assert report["size"] == {"height": 33, "width": 41}
            assert report["classes"][0]["pixels"] == plain.sum()
            assert (report["model"], report["mode"], report["level"], report["precision"]) == ("nuclei", "fast", 1, "fp32")
            assert report["timings_ms"].keys() >= {"decode", "infer"}
            assert np.array_equal(mask_of(base64.b64decode(report["mask_png"])), plain)
        elif answer.headers["content-type"].startswith("image/"):
            assert Pillow.open(io.BytesIO(answer.content)).size == (41, 33)
        else:
            assert answer.content

    def test_several_formats_are_a_zip(self, client: httpx.Client) -> None:
        sent = picture_bytes(random_picture(8, 9))
        answer = client.post(f"{L1}&format=mask,%20overlay", content=sent, headers=PNG)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/zip"
        assert answer.headers["content-disposition"] == 'inline; filename="mask.zip"'
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            assert archive.namelist() == ["mask.png", "overlay.png"]
            assert archive.read("mask.png") == client.post(L1, content=sent, headers=PNG).content

    def test_json_without_the_mask(self, client: httpx.Client) -> None:
        answer = client.post(f"{L1}&format=json", content=picture_bytes(random_picture(8, 8)), headers=PNG)
        assert "mask_png" not in answer.json()

    @pytest.mark.parametrize(("accept", "kind"), [("application/json", "application/json"), ("application/x-npz", "application/x-npz"),
                                                  ("image/*", "image/png"), ("text/html,*/*;q=0.8", "image/png")])  # fmt: skip
    def test_accept(self, client: httpx.Client, accept: str, kind: str) -> None:
        answer = client.post(L1, content=picture_bytes(random_picture(8, 8)), headers=PNG | {"accept": accept})
        assert answer.headers["content-type"] == kind

    @pytest.mark.parametrize(
        "declared",
        ["image/png", "image/tiff", "IMAGE/PNG; x=y", "application/octet-stream", "application/x-www-form-urlencoded", None],
    )
    def test_declared_types_of_a_raw_body(self, client: httpx.Client, declared: str | None) -> None:
        data = picture_bytes(random_picture(24, 24))
        plain = client.post(L1, content=data, headers=PNG)
        answer = client.post(L1, content=data, headers={} if declared is None else {"content-type": declared})
        assert answer.content == plain.content

    @pytest.mark.parametrize("declared", ["image/png", "application/octet-stream", ""])
    def test_multipart(self, client: httpx.Client, declared: str) -> None:
        data = picture_bytes(random_picture(24, 24))
        plain = client.post(L1, content=data, headers=PNG)
        assert client.post(L1, files={"file": ("a.png", data, declared)}).content == plain.content

    def test_a_body_that_streams_in(self, client: httpx.Client) -> None:
        data = picture_bytes(random_picture(64, 64))
        plain = client.post(L1, content=data, headers=PNG)
        chunked = client.post(L1, content=(data[i : i + 100] for i in range(0, len(data), 100)), headers=PNG)
        assert chunked.content == plain.content

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP"])
    @pytest.mark.parametrize("multipart", [False, True])
    def test_kinds_of_file(self, client: httpx.Client, kind: str, multipart: bool) -> None:
        picture = random_picture(24, 30)
        data = picture_bytes(picture, kind, **({"lossless": True} if kind == "WEBP" else {}))
        plain = client.post(L1, content=picture_bytes(picture), headers=PNG)
        answer = client.post(L1, files={"file": data}) if multipart else client.post(L1, content=data)
        assert answer.status_code == 200, answer.text
        assert answer.content == plain.content

    def test_a_large_tiff_waits_on_disk(self, client: httpx.Client) -> None:
        picture = random_picture(1300, 1300)
        out = io.BytesIO()
        tifffile.imwrite(out, picture, photometric="rgb")
        assert len(out.getvalue()) > 4 * 1024 * 1024
        answer = client.post(L1, content=out.getvalue())
        assert answer.status_code == 200, answer.text
        assert mask_of(answer.content).shape == (1300, 1300)

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
    def test_scientific_tiffs(self, client: httpx.Client, dtype: type) -> None:
        """The same picture at another depth gives the same mask: only the image's own statistics count."""
        picture = random_picture(48, 48)[..., 0]
        scaled = {np.uint8: picture, np.uint16: picture.astype(np.uint16) * 256, np.float32: picture.astype(np.float32) / 1024}[
            dtype
        ]
        out = io.BytesIO()
        tifffile.imwrite(out, scaled)
        answer = client.post(L1, content=out.getvalue())
        assert answer.status_code == 200, answer.text
        plain = client.post(L1, content=picture_bytes(picture))
        assert np.mean(mask_of(answer.content) != mask_of(plain.content)) < 1e-3

    def test_pages_that_differ_are_noted(self, client: httpx.Client) -> None:
        out = io.BytesIO()
        with tifffile.TiffWriter(out) as tiff:
            for side in (16, 8, 4):
                tiff.write(np.zeros((side, side), dtype=np.uint8), photometric="minisblack")
        answer = client.post(L1, content=out.getvalue())
        assert "first of 3 pages" in answer.headers["x-segment-note"]
        assert mask_of(answer.content).shape == (16, 16)

    def test_pages_that_are_alike_are_a_stack(self, client: httpx.Client) -> None:
        pages = np.stack([random_picture(40, 50, seed=i)[..., 0] for i in range(3)])
        answer = client.post(L1, content=pages_bytes(pages))
        assert answer.headers["content-type"] == "image/tiff"
        assert "x-segment-note" not in answer.headers
        assert pages_of(answer.content).shape == (3, 40, 50)
        assert all(page.any() and not page.all() for page in pages_of(answer.content))

    @pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (17, 33), (513, 700)])
    @pytest.mark.parametrize("query", ["mode=fast&level=1", "mode=fast&level=4"])
    def test_odd_sizes(self, client: httpx.Client, size: tuple[int, int], query: str) -> None:
        if size == (513, 700) and query.endswith("4"):
            pytest.skip("slow, and tiling does not depend on the level")
        answer = client.post(f"/segment?{query}", content=picture_bytes(random_picture(*size)), headers=PNG)
        assert answer.status_code == 200, answer.text
        assert mask_of(answer.content).shape == size

    def test_grey_is_as_good_as_grey_in_colour(self, client: httpx.Client) -> None:
        grey = random_picture(60, 70)[..., 0]
        one, three = (client.post(L1, content=picture_bytes(p)).content for p in (grey, np.dstack([grey] * 3)))
        assert one == three

    def test_a_real_image(self, client: httpx.Client, ihc: np.ndarray) -> None:
        mask = mask_of(client.post(L1, content=picture_bytes(ihc), headers=PNG).content)
        assert mask.shape == ihc.shape[:2]
        assert 0.01 < mask.mean() < 0.9


def test_equals_the_graph_run_by_hand(client: httpx.Client, shipped_bundle: Path) -> None:
    """Nothing of the server's own code stands between the picture and the expected mask."""
    import onnxruntime

    picture = random_picture(50, 37)
    mean = picture.mean(axis=(0, 1), dtype=np.float64)
    inverse_std = 1 / picture.std(axis=(0, 1), dtype=np.float64)
    padded = np.pad(picture, ((0, 64 - 50), (0, 48 - 37), (0, 0)), mode="reflect").transpose(2, 0, 1)[None].astype(np.float32)
    feed = {"image": padded} | {
        key: value.astype(np.float32).reshape(1, 3, 1, 1) for key, value in (("mean", mean), ("inverse_std", inverse_std))
    }
    session = onnxruntime.InferenceSession(shipped_bundle / "accurate.onnx", providers=["CPUExecutionProvider"])
    scores = session.run(["scores"], feed)[0][0, 0, :50, :37]
    answer = client.post("/segment?precision=fp32&format=npz", content=picture_bytes(picture), headers=PNG)
    with np.load(io.BytesIO(answer.content)) as arrays:
        assert np.abs(arrays["probabilities"][0].astype(np.float32) - scores).max() < 1e-3  # float16
        sure = np.abs(scores - 0.5) > 1e-4
        assert np.array_equal(arrays["mask"][sure], (scores > 0.5)[sure])


class TestReference:
    def test_of_itself_is_perfect(self, client: httpx.Client) -> None:
        data = picture_bytes(random_picture(60, 70))
        own = client.post(L1, content=data, headers=PNG).content
        assert mask_of(own).any()
        answer = client.post(L1, files={"file": data, "reference": own})
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-segment-iou"] == answer.headers["x-segment-dice"] == "1.0000"
        assert answer.content == own

    def test_json_has_it_per_class(self, client: httpx.Client) -> None:
        data = picture_bytes(random_picture(60, 70))
        mask = mask_of(client.post(L1, content=data, headers=PNG).content)
        half = mask.copy()
        half[:30] = 0
        answer = client.post(f"{L1}&format=json", files={"file": data, "reference": picture_bytes(half * 255)})
        iou = half.sum() / mask.sum()
        assert answer.json()["reference"]["nucleus"]["iou"] == pytest.approx(iou)
        assert float(answer.headers["x-segment-iou"]) == pytest.approx(iou, abs=1e-4)

    def test_instance_map_in_tiff(self, client: httpx.Client) -> None:
        data = picture_bytes(random_picture(60, 70))
        mask = mask_of(client.post(L1, content=data, headers=PNG).content)
        out = io.BytesIO()
        tifffile.imwrite(out, mask.astype(np.uint16) * np.arange(1, 71, dtype=np.uint16))
        answer = client.post(L1, files={"file": data, "reference": out.getvalue()})
        assert answer.headers["x-segment-iou"] == "1.0000"

    @pytest.mark.parametrize(
        ("reference", "said"),
        [
            (picture_bytes(np.zeros((61, 70), dtype=np.uint8)), "70 × 61"),
            (picture_bytes(random_picture(60, 70)), "colour"),
            (b"", "0 bytes"),
            (picture_bytes(random_picture(60, 70))[:200], "cannot be decoded"),
        ],
    )
    def test_that_does_not_fit(self, client: httpx.Client, problem: Callable[..., Any], reference: bytes, said: str) -> None:
        answer = client.post(L1, files={"file": picture_bytes(random_picture(60, 70)), "reference": reference})
        assert said in problem(answer, 422).detail


def test_concurrent_requests_get_their_own_masks(client: httpx.Client) -> None:
    sizes = [(40, 50), (64, 64), (33, 80), (64, 64)]
    jobs = [(f"/segment?mode=fast&level={1 + i % 2}", picture_bytes(random_picture(*sizes[i % 4], seed=i))) for i in range(16)]
    alone = [client.post(url, content=data, headers=PNG).content for url, data in jobs]
    assert len(set(alone)) > 8
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda job: client.post(job[0], content=job[1], headers=PNG), jobs))
    assert [answer.status_code for answer in together] == [200] * 16
    for answer, expected in zip(together, alone, strict=True):
        # Batches may round differently in the last digit; a pixel at the threshold may fall either way.
        assert np.mean(mask_of(answer.content) != mask_of(expected)) < 1e-3


def test_too_many_at_once(problem: Callable[..., Any]) -> None:
    inside, leave = threading.Event(), threading.Event()

    def slow(tiles: Tiles) -> np.ndarray:
        inside.set()
        assert leave.wait(30)
        return bright(tiles)

    data = picture_bytes(random_picture(16, 16))
    with serving(fake_app(slow, http={"max_in_flight": 1})) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/segment", content=data)
        assert inside.wait(30)
        refused = client.post("/segment", content=data)
        assert "1 request" in problem(refused, 429, "overloaded").detail
        assert int(refused.headers["retry-after"]) >= 1
        leave.set()
        assert first.result().status_code == 200
        assert client.post("/segment", content=data).status_code == 200
        metrics = client.get("/metrics").text
        labels = 'mode="none",model="none",outcome="refused",requested_level="none",served_level="none"'
        assert f"unetpp_requests_total{{{labels}}} 1.0" in metrics
        assert 'unetpp_refusals_total{reason="in_flight"} 1.0' in metrics
        assert "unetpp_requests_in_flight 0.0" in metrics


def test_a_failing_engine(problem: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    broken = threading.Event()

    def touchy(tiles: Tiles) -> np.ndarray:
        if broken.is_set():
            raise RuntimeError("secret: /home/operator/weights")
        return bright(tiles)

    data = picture_bytes(random_picture(16, 16))
    with serving(fake_app(touchy)) as client:
        assert client.get("/health/ready").status_code == 200
        broken.set()
        failed = problem(client.post("/segment?level=2", content=data, headers={"x-request-id": "mine"}), 500, "inference-failed")
        assert "secret" not in str(failed)
        assert "log" in failed.detail
        assert "X-Request-Id" in failed.detail
        assert "request mine failed" in caplog.text
        assert "secret" in caplog.text
        labels = 'mode="fast",model="fake",outcome="error",requested_level="2",served_level="none"'
        assert f"unetpp_requests_total{{{labels}}} 1.0" in client.get("/metrics").text
        broken.clear()
        assert client.post("/segment?level=2", content=data).status_code == 200


def test_an_unexpected_error_is_a_problem_too(
    problem: Callable[..., Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret")

    data = picture_bytes(random_picture(16, 16))
    with serving(fake_app()) as client:
        with monkeypatch.context() as patch:
            patch.setattr("server.segment.work.make_plan", bug)
            failed = problem(client.post("/segment", content=data, headers={"x-request-id": "mine"}), 500, "internal")
            assert "secret" not in str(failed)
            assert "request mine failed" in caplog.text
            assert "ZeroDivisionError" in caplog.text
            for _ in range(5):  # the connection is closed, and the answer says so
                answer = client.post("/segment", content=data, headers={"x-request-id": "mine"})
                assert answer.headers["x-request-id"] == "mine"
                assert answer.headers["connection"] == "close"
        assert client.post("/segment", content=data).status_code == 200


def test_a_client_that_leaves_while_he_sends() -> None:
    data = picture_bytes(random_picture(16, 16))
    with serving(fake_app()) as client:
        where = client.base_url.host, client.base_url.port
        for kind in (b"image/png", b"multipart/form-data; boundary=x"):
            with socket.create_connection(where, timeout=30) as leaving:
                leaving.sendall(
                    b"POST /segment HTTP/1.1\r\nHost: a\r\nContent-Type: " + kind + b"\r\nContent-Length: 100000\r\n\r\n--x\r\n"
                )
        assert client.post("/segment", content=data).status_code == 200
        for _ in range(500):
            metrics = client.get("/metrics").text
            if 'unetpp_cancellations_total{reason="client_left"} 2.0' in metrics:
                break
            time.sleep(0.02)
        labels = 'mode="accurate",model="fake",outcome="cancelled",requested_level="4",served_level="none"'
        assert f"unetpp_requests_total{{{labels}}} 2.0" in metrics
        assert "unetpp_requests_in_flight 0.0" in metrics


# One tile of 16 × 16, whose run should take so many seconds by graph; none of them really passes.
GREY = picture_bytes(np.arange(256, dtype=np.uint8).reshape(16, 16))
DEAR = {graph: seconds / 256 for graph, seconds in (("L1", 0.001), ("L2", 5.0), ("L3", 100.0), ("L4", 100.0), ("accurate", 100.0))}


class Held:
    """An engine that waits for the test, and counts its batches."""

    def __init__(self) -> None:
        self.inside, self.leave = threading.Event(), threading.Event()
        self.batches = 0

    def __call__(self, tiles: Tiles) -> np.ndarray:
        self.batches += 1
        self.inside.set()
        assert self.leave.wait(60)
        return bright(tiles)


@contextlib.contextmanager
def holding(app: Any, engine: Held, *urls: str, data: bytes = GREY) -> Iterator[httpx.Client]:
    """A client, while requests wait for the engine; they are answered at the end."""
    with serving(app) as client, concurrent.futures.ThreadPoolExecutor(len(urls)) as pool:
        waiting = [pool.submit(client.post, url, content=data) for url in urls]
        try:
            assert engine.inside.wait(30)
            yield client
        finally:
            engine.leave.set()
        assert [answer.result().status_code for answer in waiting] == [200] * len(urls)


def samples(client: httpx.Client, name: str) -> list[Any]:
    """The samples of a metric."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return [sample for family in families for sample in family.samples if sample.name == name]


def outcomes(client: httpx.Client) -> dict[str, int]:
    """Requests by outcome, those that were not left out."""
    found: Counter[str] = Counter()
    for sample in samples(client, "unetpp_requests_total"):
        found[sample.labels["outcome"]] += int(sample.value)
    return +found


def dropped(client: httpx.Client) -> dict[str, int]:
    """Windows that were not run, by reason, zeros left out."""
    return {s.labels["reason"]: int(s.value) for s in samples(client, "unetpp_windows_dropped_total") if s.value}


def given_up(client: httpx.Client) -> dict[str, int]:
    """Requests that were given up, by reason, zeros left out."""
    return {s.labels["reason"]: int(s.value) for s in samples(client, "unetpp_cancellations_total") if s.value}


def settled(client: httpx.Client, wanted: dict[str, int]) -> dict[str, int]:
    """The outcomes, once they are those wanted or some seconds have passed."""
    for _ in range(500):
        if outcomes(client) == wanted:
            break
        time.sleep(0.02)
    return outcomes(client)


@pytest.fixture(scope="module")
def dear() -> Iterator[httpx.Client]:
    """A server that thinks its deeper graphs are slow."""
    with serving(fake_app(pace=DEAR)) as client:
        yield client


class TestDeadline:
    @pytest.mark.parametrize("given", [{"params": {"deadline_ms": "60000"}}, {"params": {"deadline_ms": "6e4"}},
                                       {"headers": {"X-Deadline-Ms": "60000"}}, {"headers": {"x-deadline-ms": "60000.5"}}])  # fmt: skip
    def test_one_that_is_met(self, dear: httpx.Client, given: dict[str, Any]) -> None:
        answer = dear.post("/segment", content=GREY, params={"level": "1"} | given.get("params", {}), headers=given.get("headers"))
        assert answer.status_code == 200, answer.text

    @pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf", "abc", "", "1 2", "0x10", "1e999"])
    @pytest.mark.parametrize("where", ["query", "header"])
    def test_what_is_no_time(self, dear: httpx.Client, problem: Callable[..., Any], value: str, where: str) -> None:
        before = outcomes(dear).get("client_error", 0)
        if where == "query":
            answer = dear.post(L1, content=GREY, params={"deadline_ms": value, "level": "1"})
        else:
            answer = dear.post(L1, content=GREY, headers={"X-Deadline-Ms": value})
        assert problem(answer, 422, "invalid-parameter").detail
        assert outcomes(dear)["client_error"] == before + 1

    @pytest.mark.parametrize("headers", [[("X-Deadline-Ms", "9000")], [("X-Deadline-Ms", "1000"), ("X-Deadline-Ms", "9000")]])
    def test_two_of_them(self, dear: httpx.Client, problem: Callable[..., Any], headers: list[tuple[str, str]]) -> None:
        url = L1 if len(headers) > 1 else f"{L1}&deadline_ms=9000"
        assert "twice" in problem(dear.post(url, content=GREY, headers=headers), 422, "invalid-parameter").detail
        assert problem(dear.post(f"{L1}&deadline_ms=9000&deadline_ms=9000", content=GREY), 422, "invalid-parameter")

    def test_one_that_could_never_be_met(self, dear: httpx.Client, problem: Callable[..., Any]) -> None:
        answer = dear.post("/segment?level=4&deadline_ms=30000", content=GREY)
        said = problem(answer, 422, "deadline-too-short").detail
        assert "even when nobody else waits" in said
        assert "min_level" in said
        assert "retry-after" not in answer.headers

    @pytest.mark.parametrize("milliseconds", ["0.000001", "0.001"])
    def test_no_time_at_all_is_no_overload(self, problem: Callable[..., Any], milliseconds: str) -> None:
        """Nobody else is there: to try again later is no advice."""
        with serving(fake_app(pace=DEAR)) as client:
            answer = client.post(f"{L1}&deadline_ms={milliseconds}", content=GREY)
            assert problem(answer, answer.status_code).type in ("urn:unetpp:deadline-too-short", "urn:unetpp:deadline-passed")
            assert outcomes(client).keys() <= {"client_error", "late"}

    def test_one_that_others_prevent(self, problem: Callable[..., Any]) -> None:
        """Refused before the body is read, of which nothing has come here."""
        engine = Held()
        with holding(fake_app(engine, pace=DEAR, limits={"max_wait_s": 150.0}), engine, "/segment?level=4") as client:
            head = b"POST /segment?level=2&deadline_ms=50000 HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\n"
            with socket.create_connection((client.base_url.host, client.base_url.port), timeout=30) as raw:
                raw.sendall(head)
                answer = http.client.HTTPResponse(raw)
                answer.begin()
                assert answer.status == 429
                assert json.loads(answer.read())["type"] == "urn:unetpp:overloaded"
                # 100 s for the batch that runs; 50 s would be of use.
                assert 40 <= int(answer.headers["retry-after"]) <= 120
            # By its own cost, which its header tells.
            refused = client.post("/segment?level=4", content=GREY)
            assert "others wait already" in problem(refused, 429, "overloaded").detail
            assert int(refused.headers["retry-after"]) >= 1
            assert outcomes(client) == {"refused": 2}
        assert engine.batches == 1

    @pytest.mark.parametrize("through", ["query", "header"])
    def test_one_that_passes(self, problem: Callable[..., Any], through: str) -> None:
        engine = Held()
        with holding(fake_app(engine), engine, "/segment?level=4") as client:
            url, headers = (
                ("/segment?level=4&deadline_ms=200", {}) if through == "query" else ("/segment?level=4", {"X-Deadline-Ms": "200"})
            )
            answer = client.post(url, content=GREY, headers=headers)
            # While the engine is still at work.
            assert "deadline passed" in problem(answer, 504, "deadline-passed").detail
            assert (outcomes(client), dropped(client)) == ({"late": 1}, {"late": 1})
            assert given_up(client) == {"deadline": 1}
            labels = {"model": "fake", "mode": "fast", "requested_level": "4", "served_level": "none", "outcome": "late"}
            assert [s.labels for s in samples(client, "unetpp_requests_total") if s.value] == [labels]
            # Whoever made way is not waited for.
            engine.leave.set()
            assert client.post("/segment?level=4", content=GREY).status_code == 200
        assert engine.batches == 2


class TestMinLevel:
    @pytest.mark.parametrize(
        ("query", "asked", "served"),
        [
            ("level=4&min_level=1", ("fast", "4"), ("fast", "2")),
            ("level=4&min_level=2", ("fast", "4"), ("fast", "2")),
            ("min_level=1", ("accurate", "4"), ("fast", "2")),
            ("level=2&min_level=1", ("fast", "2"), ("fast", "2")),
            ("level=1", ("fast", "1"), ("fast", "1")),
            ("level=1&min_level=1", ("fast", "1"), ("fast", "1")),
        ],
    )
    def test_headers_tell_what_was_asked_and_what_was_served(
        self, dear: httpx.Client, query: str, asked: tuple[str, str], served: tuple[str, str]
    ) -> None:
        answer = dear.post(f"/segment?{query}&deadline_ms=60000&format=json", content=GREY)
        assert answer.status_code == 200, answer.text
        told = answer.headers
        assert (told["x-segment-mode-requested"], told["x-segment-level-requested"]) == asked
        assert (told["x-segment-mode"], told["x-segment-level"]) == served
        assert told.get("x-segment-degraded") == (None if asked == served else "deadline")
        facts = answer.json()
        assert (facts["mode"], facts["level"]) == (served[0], int(served[1]))
        assert facts.get("degraded") == (None if asked == served else "deadline")
        assert facts.get("requested") == (None if asked == served else {"mode": asked[0], "level": int(asked[1])})

    def test_a_queue_that_is_too_long_is_a_reason_too(self) -> None:
        with serving(fake_app(pace=DEAR, limits={"max_wait_s": 60.0})) as client:
            answer = client.post("/segment?level=4&min_level=1", content=GREY)
            assert (answer.headers["x-segment-level"], answer.headers["x-segment-degraded"]) == ("2", "load")
            assert client.post("/segment?level=4", content=GREY).status_code == 413
            (sample,) = (sample for sample in samples(client, "unetpp_degraded_total") if sample.value)
            labels = {"model": "fake", "requested_level": "4", "served_level": "2", "reason": "load"}
            assert (sample.labels, sample.value) == (labels, 1)

    @pytest.mark.parametrize(
        "query", ["min_level=0", "min_level=5", "level=2&min_level=3", "min_level=abc", "min_level=", "min_level=1&min_level=2"]
    )
    def test_what_is_no_level(self, dear: httpx.Client, problem: Callable[..., Any], query: str) -> None:
        assert "min_level" in problem(dear.post(f"/segment?{query}", content=GREY), 422, "invalid-parameter").detail

    @pytest.mark.parametrize("name", ["deadline_ms", "min_level"])
    def test_neither_is_for_jobs(self, dear: httpx.Client, problem: Callable[..., Any], name: str) -> None:
        answer = dear.post(f"/jobs?{name}=1", content=GREY)
        assert f"unknown parameter '{name}'" in problem(answer, 422, "invalid-parameter").detail


def test_a_client_that_leaves_while_his_windows_wait() -> None:
    """Of 48 windows, in batches of 2, those of the batch that runs are the only ones."""
    data, engine = pages_bytes(np.random.default_rng(0).integers(0, 256, (48, 16, 16), dtype=np.uint8)), Held()
    with serving(fake_app(engine, batching={"max_batch": 2})) as client:
        head = f"POST {L1} HTTP/1.1\r\nHost: a\r\nContent-Type: image/tiff\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=30) as leaving:
            leaving.sendall(head + data)
            assert engine.inside.wait(30)
            assert samples(client, "unetpp_requests_in_flight")[0].value == 1
        # The engine is still at work.
        assert settled(client, {"cancelled": 1}) == {"cancelled": 1}
        assert dropped(client) == {"cancelled": 46}
        assert given_up(client) == {"client_left": 1}
        assert samples(client, "unetpp_requests_in_flight")[0].value == 0
        labels = {"model": "fake", "mode": "fast", "requested_level": "1", "served_level": "none", "outcome": "cancelled"}
        assert [s.labels for s in samples(client, "unetpp_requests_total") if s.value] == [labels]
        engine.leave.set()
        assert client.post(L1, content=GREY).status_code == 200
        assert engine.batches == 2


def test_a_client_that_keeps_the_connection_has_not_left() -> None:
    """Several requests over one connection, each of whose ends is watched for."""
    with serving(fake_app()) as client:
        for _ in range(5):
            assert client.post(L1, content=GREY).status_code == 200
            assert client.post(L1, files={"file": GREY}).status_code == 200
        assert outcomes(client) == {"ok": 10}


def test_every_request_has_one_outcome() -> None:
    engine = Held()
    with (
        serving(fake_app(engine, pace=DEAR, limits={"max_wait_s": 150.0})) as client,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        sent: Counter[str] = Counter()
        first = pool.submit(client.post, "/segment?level=4", content=GREY)
        assert engine.inside.wait(30)
        assert client.post("/segment?level=4", content=GREY).status_code == 429
        assert client.post("/segment?level=4&deadline_ms=50000", content=GREY).status_code == 429
        sent["refused"] += 2
        engine.leave.set()
        assert first.result().status_code == 200
        sent["ok"] += 1
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=30) as leaving:
            leaving.sendall(b"POST /segment?level=1 HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nabc")
        sent["cancelled"] += 1
        for query, data, status in (
            ("level=1", GREY, 200), ("level=1&deadline_ms=60000&min_level=1", GREY, 200), ("level=abc", GREY, 422),
            ("level=9", GREY, 422), ("model=none", GREY, 404), ("format=gif", GREY, 406), ("levle=1", GREY, 422),
            ("level=1", b"nonsense", 415), ("level=1", GREY[:45], 422), ("level=4&deadline_ms=30000", GREY, 422),
            ("deadline_ms=0", GREY, 422), ("min_level=9", GREY, 422), ("level=1&precision=int9", GREY, 422),
        ):  # fmt: skip
            answer = client.post(f"/segment?{query}", content=data)
            assert answer.status_code == status, (query, answer.content)
            sent["ok" if status == 200 else "client_error"] += 1
        assert settled(client, dict(sent)) == dict(sent)
        assert sum(s.value for s in samples(client, "unetpp_request_duration_seconds_count")) == sent["ok"]
        assert samples(client, "unetpp_requests_in_flight")[0].value == 0
        assert samples(client, "unetpp_backlog_seconds")[0].value == 0
        assert sum(s.value for s in samples(client, "unetpp_requests_total")) == sent.total()
        assert {s.labels["reason"]: s.value for s in samples(client, "unetpp_refusals_total") if s.value} == {"wait": 2}
        assert given_up(client) == {"client_left": 1}
