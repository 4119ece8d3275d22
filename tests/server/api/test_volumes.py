import base64
import concurrent.futures
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from server.runtime.batcher import Batcher
from server.runtime.line import Caller, Lane

from server.app import create_app
from server.arrays import Tiles
from server.imaging.encode import ENCODERS
from server.settings import Settings
from tests.support.files import mask_of, nifti_bytes, pages_bytes, pages_of, picture_bytes, volume_of
from tests.support.server import serving
from tests.support.service import bright, fake_app

VOXELS = np.random.default_rng(1).integers(0, 256, (14, 20, 9), dtype=np.uint8)
WANTED = VOXELS.mean() < VOXELS
VOLUME, STACK, IMAGE = nifti_bytes(VOXELS, np.diag([1.0, 1, 2, 1])), pages_bytes(VOXELS), picture_bytes(VOXELS[0])


@pytest.fixture(scope="module", params=[2, 3])
def spatial(request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """A network of either kind."""
    with serving(fake_app(changes={"dims": request.param})) as client:
        yield client


@pytest.fixture(scope="module")
def flat() -> Iterator[httpx.Client]:
    """A network of two dimensions."""
    with serving(fake_app()) as client:
        yield client


@pytest.mark.parametrize(
    "declared",
    ["application/gzip", "application/x-gzip", "application/nifti", "application/x-nifti", "application/octet-stream", None],
)
@pytest.mark.parametrize("multipart", [False, True])
def test_a_volume_is_answered_by_a_volume(spatial: httpx.Client, declared: str | None, multipart: bool) -> None:
    if multipart:
        answer = spatial.post("/segment", files={"file": ("x.nii.gz", VOLUME, *((declared,) if declared else ()))})
    else:
        answer = spatial.post("/segment", content=VOLUME, headers={"content-type": declared} if declared else {})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/gzip"
    assert "content-encoding" not in answer.headers  # a client must not unpack it
    assert answer.headers["content-disposition"] == 'inline; filename="mask.nii.gz"'
    assert np.array_equal(volume_of(answer.content), WANTED)


def test_a_type_that_is_neither(spatial: httpx.Client, problem: Callable[..., Any]) -> None:
    refused = spatial.post("/segment", content=VOLUME, headers={"content-type": "application/pdf"})
    assert "application/gzip" in problem(refused, 415, "unsupported-type").detail


@pytest.mark.parametrize("data", [STACK, VOLUME])
@pytest.mark.parametrize("name", [name for name, row in ENCODERS.items() if "head_std" not in row.needs])
def test_every_format(spatial: httpx.Client, data: bytes, name: str) -> None:
    row = ENCODERS[name]
    answer = spatial.post(f"/segment?format={name}", content=data)
    if ("stack" if data is STACK else "volume") not in row.kinds:
        assert answer.status_code == 406
        return
    if data is STACK and spatial.get("/models").json()[0]["dims"] == 3:
        # A network of volumes needs to know where voxels lie.
        assert answer.status_code == 422
        return
    assert answer.headers["content-type"] == row.media_type
    assert row.file in answer.headers["content-disposition"]


@pytest.mark.parametrize(
    ("data", "kind", "name"),
    [(IMAGE, "image/png", "mask.png"), (STACK, "image/tiff", "mask.tif"), (VOLUME, "application/gzip", "mask.nii.gz")],
)
@pytest.mark.parametrize("accept", [None, "*/*", "text/html,application/xhtml+xml,*/*;q=0.8"])
def test_like_is_answered_by_like(flat: httpx.Client, data: bytes, kind: str, name: str, accept: str | None) -> None:
    answer = flat.post("/segment", content=data, headers={"accept": accept} if accept else {})
    assert answer.headers["content-type"] == kind
    assert answer.headers["content-disposition"] == f'inline; filename="{name}"'
    if data is STACK:
        assert np.array_equal(pages_of(answer.content), WANTED)


@pytest.mark.parametrize(
    ("data", "accept", "kind"),
    [
        (VOLUME, "application/json", "application/json"), (VOLUME, "application/gzip", "application/gzip"),
        (VOLUME, "image/png, application/x-npz;q=0.5", "image/png"), (STACK, "image/*", "image/tiff"),
        (IMAGE, "image/tiff", "image/tiff"), (STACK, "application/gzip;q=0.5, application/json;q=0.1", "application/json"),
    ],
)  # fmt: skip
def test_accept(flat: httpx.Client, data: bytes, accept: str, kind: str) -> None:
    assert flat.post("/segment", content=data, headers={"accept": accept}).headers["content-type"] == kind


@pytest.mark.parametrize(
    ("data", "query", "accept"),
    [(VOLUME, "?format=png", "*/*"), (STACK, "?format=nifti", "*/*"), (IMAGE, "?format=nifti", "*/*"), (VOLUME, "", "image/tiff")],
)
def test_formats_that_do_not_fit(flat: httpx.Client, problem: Callable[..., Any], data: bytes, query: str, accept: str) -> None:
    refused = problem(flat.post(f"/segment{query}", content=data, headers={"accept": accept}), 406, "unknown-format")
    assert "json" in refused.detail


@pytest.mark.parametrize(
    ("data", "key", "read", "size"),
    [
        (VOLUME, "mask_nifti", volume_of, {"x": 14, "y": 20, "z": 9}),
        (STACK, "mask_tiff", pages_of, {"x": 9, "y": 20, "z": 14}),
        (IMAGE, "mask_png", mask_of, {"height": 20, "width": 9}),
    ],
)
def test_report(flat: httpx.Client, data: bytes, key: str, read: Callable[[bytes], np.ndarray], size: dict[str, int]) -> None:
    report = flat.post("/segment?format=json&include_mask=true", content=data).json()
    assert report["size"] == size
    assert [name for name in report if name.startswith("mask_")] == [key]
    mask = read(base64.b64decode(report[key]))
    (row,) = report["classes"]
    assert row["pixels" if data is IMAGE else "voxels"] == mask.sum()
    assert ("spacing_mm" in report) == ("volume_ml" in row) == (data is VOLUME)
    if data is VOLUME:
        assert report["spacing_mm"] == {"x": 1, "y": 1, "z": 2}
        assert row["volume_ml"] == pytest.approx(mask.sum() * 2e-3)


def test_reference(spatial: httpx.Client, problem: Callable[..., Any]) -> None:
    truth = nifti_bytes(WANTED.astype(np.uint8), np.diag([1.0, 1, 2, 1]))
    answer = spatial.post("/segment", files={"file": VOLUME, "reference": truth})
    assert answer.headers["x-segment-iou"] == answer.headers["x-segment-dice"] == "1.0000"
    for wrong, said in (
        (nifti_bytes(VOXELS), "mm away"),
        (nifti_bytes(VOXELS[1:]), "13 × 20 × 9 voxels"),
        (IMAGE, "9 × 20 pixels"),
    ):
        assert (
            said in problem(spatial.post("/segment", files={"file": VOLUME, "reference": wrong}), 422, "invalid-parameter").detail
        )


@pytest.mark.parametrize("query", ["axis=3", "axis=x", "axis=-1", "nonfinite=", "nonfinite=drop"])
def test_parameters_that_do_not_exist(flat: httpx.Client, problem: Callable[..., Any], query: str) -> None:
    assert query.partition("=")[0] in problem(flat.post(f"/segment?{query}", content=VOLUME), 422, "invalid-parameter").detail


def test_axis_and_nonfinite(flat: httpx.Client, problem: Callable[..., Any]) -> None:
    voxels = VOXELS.astype(np.float32)
    voxels[0, 0, :3] = np.nan
    assert "nonfinite=zero" in problem(flat.post("/segment", content=nifti_bytes(voxels)), 422, "unreadable").detail
    for axis in ("auto", 0, 1, 2):
        answer = flat.post(f"/segment?nonfinite=zero&axis={axis}", content=nifti_bytes(voxels))
        assert answer.headers["x-segment-note"] == "3 values that are not finite were read as 0"
        assert np.array_equal(volume_of(answer.content), np.nan_to_num(voxels) > np.nan_to_num(voxels).mean(dtype=float))


def test_what_takes_too_long_is_sent_to_jobs_before_anything_runs(problem: Callable[..., Any]) -> None:
    ran = []
    app = fake_app(lambda tiles: ran.append(1) or bright(tiles), pace=0.01, limits={"max_wait_s": 20})
    with serving(app) as client:
        refused = problem(client.post("/segment", content=VOLUME), 413, "too-large")
        # 9 slices in windows of 32 × 16.
        assert "about 46 s" in refused.detail
        assert "at most 20 s" in refused.detail
        assert "POST /jobs" in refused.detail
        assert not ran
        assert client.post("/segment", content=IMAGE).status_code == 200
        metrics = client.get("/metrics").text
    row = 'unetpp_requests_total{{mode="accurate",model="fake",outcome="{}",requested_level="4",served_level="{}"}} 1.0'
    assert row.format("client_error", "none") in metrics
    assert row.format("ok", "4") in metrics


@pytest.mark.parametrize(
    ("limit", "said"), [({"max_voxels": 2000}, "2,520 voxels; the limit is 2,000"), ({"max_memory_mb": 64}, "64 MB")]
)
def test_limits_of_volumes(problem: Callable[..., Any], limit: dict[str, int], said: str) -> None:
    with serving(fake_app(changes={"dims": 3, "spacing": (0.1, 0.1, 0.1)}, limits=limit)) as client:
        assert said in problem(client.post("/segment", content=VOLUME), 413, "too-large").detail


def test_metrics_count_volumes_and_their_batches() -> None:
    with serving(fake_app(changes={"dims": 3})) as client:
        assert client.post("/segment?level=2", content=VOLUME).status_code == 200
        metrics = client.get("/metrics").text
    labels = 'mode="fast",model="fake",outcome="ok",requested_level="2",served_level="2"'
    assert f"unetpp_requests_total{{{labels}}} 1.0" in metrics
    assert "unetpp_requests_in_flight 0.0" in metrics
    assert any((line.startswith("unetpp_") and 'graph="L2"' in line and line.endswith("_count 1.0")) or 'graph="L2"} 1.0' in line
               for line in metrics.splitlines())  # fmt: skip


@pytest.mark.parametrize("kind", ["stack, same network", "volume, other network"])
def test_an_image_is_answered_in_the_middle_of_a_volume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    """After one further batch at most; the volume is not allowed to end before."""
    begun, image_waits, answered = threading.Event(), threading.Event(), threading.Event()
    calls: list[tuple[int, ...]] = []
    hand_in = Batcher.run

    async def noted(self: Batcher, lane: Lane, tiles: Tiles, caller: Caller | None = None) -> Any:
        if tiles.pixels.shape[2:] == (48, 32):
            image_waits.set()
        return await hand_in(self, lane, tiles, caller)

    def engine(tiles: Tiles) -> np.ndarray:
        calls.append(tiles.pixels.shape[2:])
        begun.set()
        if calls[-1] != (48, 32):
            assert image_waits.wait(30)
            assert len(calls) < 4 or answered.wait(30)
        return bright(tiles)

    monkeypatch.setattr(Batcher, "run", noted)
    monkeypatch.setattr("server.segment.plan.STEP_PIXELS", 4 * 16**3)
    bundles = fake_bundles(engine, name="fake")
    if kind.startswith("volume"):
        small = {"size": [16, 16, 16], "overlap": 0.5}
        bundles |= fake_bundles(engine, name="spatial", dims=3, window=small)
        url, data = "/segment?model=spatial", nifti_bytes(np.zeros((100, 16, 32), dtype=np.uint8))
    else:
        url, data = "/segment", pages_bytes(np.zeros((100, 64, 64), dtype=np.uint8))
    settings = Settings(default_model="fake", batching={"max_batch": 1}, jobs={"folder": tmp_path})
    with serving(create_app(settings, bundles)) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        volume = pool.submit(client.post, url, content=data)
        assert begun.wait(30)
        answer = client.post("/segment", content=picture_bytes(np.zeros((40, 31), dtype=np.uint8)))
        answered.set()
        assert answer.status_code == 200, answer.text
        assert volume.result().status_code == 200
    assert (48, 32) in calls[1:3]
    assert calls[-1] != (48, 32)
    assert len(calls) > 20
