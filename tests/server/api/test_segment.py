"""POST /segment of images: headers, body forms, formats, references, and the same pixels as the graph run by hand."""

import base64
import concurrent.futures
import csv
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow
from scipy import ndimage
from scipy.special import expit

from server.api.compression import accepts_gzip
from server.imaging.encode import ENCODERS
from tests.support.files import mask_of, pages_bytes, pages_of, picture_bytes

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


PICTURE = random_picture(33, 41)
SENT = picture_bytes(PICTURE)

# Number of objects that a document describes.
COUNT: dict[str, Callable[[bytes], int]] = {
    "csv": lambda body: len(list(csv.DictReader(io.StringIO(body.decode())))),
    "geojson": lambda body: len(json.loads(body)["features"]),
    "coco": lambda body: len(json.loads(body)["annotations"]),
}


def post(client: httpx.Client, url: str = L1, content: bytes = SENT, **options: Any) -> httpx.Response:
    answer = client.post(url, content=content, **options)
    assert answer.status_code == 200, answer.text
    return answer


@pytest.fixture(scope="module")
def plain(client: httpx.Client) -> bytes:
    """The mask of `PICTURE` at level 1."""
    return post(client).content


@pytest.mark.parametrize(
    ("query", "mode", "level"),
    [("", "accurate", "4"), ("?mode=accurate", "accurate", "4"), ("?level=2", "fast", "2")]
    + [(f"?mode=fast&level={level}", "fast", f"{level}") for level in (1, 2, 3, 4)],
)
def test_segment_headers_tell_what_was_served(
    client: httpx.Client, query: str, mode: str, level: str
) -> None:
    answer = post(client, f"/segment{query}")
    expected = {
        "content-type": "image/png",
        "content-disposition": 'inline; filename="mask.png"',
        "x-segment-model": "nuclei",
        "x-segment-mode": mode,
        "x-segment-level": level,
        "x-segment-mode-requested": mode,
        "x-segment-level-requested": level,
        "x-segment-precision": "fp32",
    }
    assert dict(answer.headers).items() >= expected.items()
    assert not {"x-segment-iou", "x-segment-degraded", "x-segment-note", "vary"} & answer.headers.keys()
    timing = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    assert {"decode", "queue", "infer", "restore", "encode"} <= timing.keys()
    assert all(float(value) >= 0 for value in timing.values())
    mask = mask_of(answer.content)
    assert mask.shape == PICTURE.shape[:2]
    assert set(np.unique(mask)) <= {0, 1}


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("mine-1.A_b", True),
        (None, False),
        ("with space", False),
        ("a" * 65, False),
        ("semi;colon", False),
        ("", False),
    ],
)
def test_request_id_is_kept_if_valid(small: httpx.Client, grey: bytes, sent: str | None, kept: bool) -> None:
    headers = {} if sent is None else {"x-request-id": sent}
    first, second = (post(small, content=grey, headers=headers).headers["x-request-id"] for _ in range(2))
    assert (first == sent, first == second) == (kept, kept)


@pytest.mark.parametrize("precision", ["auto", "fp32", "int8"])
def test_segment_serves_the_named_precision(client: httpx.Client, precision: str) -> None:
    served = post(client, f"{L1}&precision={precision}").headers["x-segment-precision"]
    assert served == ("fp32" if precision == "auto" else precision)


@pytest.mark.parametrize(
    "name", [name for name, row in ENCODERS.items() if "image" in row.kinds and "head_std" not in row.needs]
)
def test_segment_answers_in_every_format(client: httpx.Client, plain: bytes, name: str) -> None:
    answer, row, mask = post(client, f"{L1}&format={name}&include_mask=true"), ENCODERS[name], mask_of(plain)
    assert answer.headers["content-type"] == row.media_type
    assert answer.headers["content-disposition"] == f'inline; filename="{row.filename}"'
    if name in COUNT:
        assert COUNT[name](answer.content) == ndimage.label(mask, structure=np.ones((3, 3)))[1]
    elif name == "json":
        report = answer.json()
        assert report["size"] == {"height": 33, "width": 41}
        assert report["classes"][0]["pixels"] == mask.sum()
        assert (report["model"], report["mode"], report["level"], report["precision"]) == (
            "nuclei",
            "fast",
            1,
            "fp32",
        )
        assert np.array_equal(mask_of(base64.b64decode(report["mask_png"])), mask)
    elif row.media_type == "application/x-npz":
        with np.load(io.BytesIO(answer.content)) as arrays:
            assert np.array_equal(arrays["mask"], mask)
            assert arrays["probabilities"].shape == (1, 33, 41)
    elif row.media_type.startswith("image/"):
        assert Pillow.open(io.BytesIO(answer.content)).size == (41, 33)


def test_segment_several_formats_are_a_zip(client: httpx.Client, plain: bytes) -> None:
    answer = post(client, f"{L1}&format=mask,%20overlay")
    assert answer.headers["content-type"] == "application/zip"
    assert answer.headers["content-disposition"] == 'inline; filename="mask.zip"'
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.namelist() == ["mask.png", "overlay.png"]
        assert archive.read("mask.png") == plain


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("gzip", True), ("br, gzip", True), ("GZIP;q=0.5", True), ("*", True), ("br, *;q=0.1", True), (None, False),
        ("", False), ("identity", False), ("gzip;q=0", False), ("gzip; q=0.0, *", False), ("*;q=0", False),
        ("gzip;q=many", False), ("xgzip", False), ("gzip;q=nan", False),
    ],
)  # fmt: skip
def test_accepts_gzip_reads_weights(header: str | None, expected: bool) -> None:
    assert accepts_gzip(header) == expected


@pytest.mark.parametrize("name", ["json", "csv", "geojson", "coco"])
def test_segment_compresses_documents_for_who_accepts_it(client: httpx.Client, name: str) -> None:
    content = picture_bytes(random_picture(120, 120))
    packed, same, plain = (
        post(client, f"{L1}&format={name}", content, headers={"accept-encoding": coding})
        for coding in ("gzip", "gzip", "identity")
    )
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.headers["content-length"] == same.headers["content-length"]
    assert int(packed.headers["content-length"]) < len(plain.content)
    assert packed.content == plain.content
    assert "content-encoding" not in plain.headers
    assert packed.headers["vary"] == plain.headers["vary"] == "Accept-Encoding"


@pytest.mark.parametrize("name", ["mask", "scores.npz", "mask,json"])
def test_segment_does_not_compress_what_is_compressed(client: httpx.Client, name: str) -> None:
    answer = post(client, f"{L1}&format={name}", headers={"accept-encoding": "gzip"})
    assert not {"content-encoding", "vary"} & answer.headers.keys()


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("application/json", "application/json"),
        ("application/x-npz", "application/x-npz"),
        ("image/*", "image/png"),
        ("text/html,*/*;q=0.8", "image/png"),
    ],
)
def test_segment_follows_accept(client: httpx.Client, accept: str, media_type: str) -> None:
    assert post(client, headers={"accept": accept}).headers["content-type"] == media_type


@pytest.mark.parametrize(
    "declared", ["image/png", "image/tiff", "IMAGE/PNG; x=y", "application/octet-stream", "", None]
)
def test_segment_reads_every_form_of_body(client: httpx.Client, plain: bytes, declared: str | None) -> None:
    headers = {"content-type": declared} if declared else {}
    assert post(client, headers=headers).content == plain
    pieces = (SENT[start : start + 100] for start in range(0, len(SENT), 100))
    assert client.post(L1, content=pieces, headers=headers).content == plain
    part = ("a.png", SENT) if declared is None else ("a.png", SENT, declared)
    assert client.post(L1, files={"file": part}).content == plain


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "WEBP"])
def test_segment_reads_other_kinds_of_file(client: httpx.Client, plain: bytes, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert post(client, content=picture_bytes(PICTURE, kind, **options)).content == plain


def test_segment_reads_a_body_that_waits_on_disk(client: httpx.Client) -> None:
    assert mask_of(post(client, content=SENT + bytes(5 * 2**20)).content).shape == (33, 41)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_segment_of_another_bit_depth_gives_the_same_mask(client: httpx.Client, dtype: type) -> None:
    """Only the image's own statistics count."""
    grey = PICTURE[..., 0]
    scaled = grey.astype(dtype) * 256 if dtype is np.uint16 else grey.astype(dtype) / 1024
    out = io.BytesIO()
    tifffile.imwrite(out, scaled)
    first, second, colour = (
        mask_of(post(client, content=content).content)
        for content in (out.getvalue(), picture_bytes(grey), picture_bytes(np.dstack([grey] * 3)))
    )
    assert np.mean(first != second) < 1e-3
    assert np.array_equal(second, colour)


def test_segment_notes_pages_that_differ(client: httpx.Client) -> None:
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as tiff:
        for side in (16, 8, 4):
            tiff.write(np.zeros((side, side), dtype=np.uint8), photometric="minisblack")
    answer = post(client, content=out.getvalue())
    assert answer.headers["x-segment-note"]
    assert mask_of(answer.content).shape == (16, 16)


def test_segment_answers_a_stack_by_a_stack(client: httpx.Client) -> None:
    pages = np.stack([random_picture(40, 50, seed=i)[..., 0] for i in range(3)])
    answer = post(client, content=pages_bytes(pages))
    assert answer.headers["content-type"] == "image/tiff"
    assert "x-segment-note" not in answer.headers
    assert pages_of(answer.content).shape == (3, 40, 50)
    assert all(page.any() and not page.all() for page in pages_of(answer.content))


@pytest.mark.parametrize("level", [1, 4])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (17, 33), (270, 60)])
def test_segment_of_any_size_gives_that_size(client: httpx.Client, size: tuple[int, int], level: int) -> None:
    answer = post(client, f"/segment?level={level}", picture_bytes(random_picture(*size)))
    assert mask_of(answer.content).shape == size


def test_segment_of_a_real_image_finds_nuclei(client: httpx.Client, ihc: np.ndarray) -> None:
    mask = mask_of(post(client, content=picture_bytes(ihc[:256, :256])).content)
    assert 0.01 < mask.mean() < 0.9


def test_segment_equals_the_graph_run_by_hand(client: httpx.Client, shipped_bundle: Path) -> None:
    """None of the server's own code stands between the picture and the expected mask."""
    import onnxruntime

    picture = random_picture(50, 37)
    padded = np.pad(picture, ((0, 14), (0, 11), (0, 0)), mode="reflect").transpose(2, 0, 1)[None]
    statistics = {
        "mean": picture.mean((0, 1), np.float64),
        "inverse_std": 1 / picture.std((0, 1), np.float64),
    }
    feed = {name: value.astype(np.float32).reshape(1, 3, 1, 1) for name, value in statistics.items()}
    session = onnxruntime.InferenceSession(
        shipped_bundle / "accurate.onnx", providers=["CPUExecutionProvider"]
    )
    scores = session.run(["scores"], feed | {"image": padded.astype(np.float32)})[0][0, 0, :50, :37]
    answer = post(client, "/segment?precision=fp32&format=scores.npz", picture_bytes(picture))
    with np.load(io.BytesIO(answer.content)) as arrays:
        assert np.abs(arrays["probabilities"][0].astype(np.float32) - scores).max() < 1e-3  # float16
        sure = np.abs(scores - 0.5) > 1e-4
        assert np.array_equal(arrays["mask"][sure], (scores > 0.5)[sure])


def with_reference(client: httpx.Client, reference: bytes, query: str = "") -> httpx.Response:
    return client.post(f"{L1}{query}", files={"file": SENT, "reference": reference})


def test_reference_that_equals_the_mask_scores_1(client: httpx.Client, plain: bytes) -> None:
    mask = mask_of(plain)
    assert mask.any()
    out = io.BytesIO()
    tifffile.imwrite(out, mask.astype(np.uint16) * np.arange(1, 42, dtype=np.uint16))
    # As labels, too, whose numbers are objects.
    for reference in (plain, out.getvalue()):
        answer = with_reference(client, reference)
        assert answer.headers["x-segment-iou"] == answer.headers["x-segment-dice"] == "1.0000"
        assert answer.content == plain


def test_reference_is_scored_per_class(client: httpx.Client, plain: bytes) -> None:
    mask = mask_of(plain)
    half = mask.copy()
    half[:15] = 0
    answer = with_reference(client, picture_bytes(half * 255), "&format=json")
    iou = half.sum() / mask.sum()
    assert answer.json()["reference"]["nucleus"]["iou"] == pytest.approx(iou)
    assert float(answer.headers["x-segment-iou"]) == pytest.approx(iou, abs=1e-4)


@pytest.mark.parametrize(
    "reference",
    [picture_bytes(np.zeros((34, 41), np.uint8)), SENT, b"", SENT[:200]],
    ids=["size", "colour", "empty", "truncated"],
)
def test_reference_that_does_not_fit_is_refused(
    client: httpx.Client, problem: Callable[..., Any], reference: bytes
) -> None:
    problem(with_reference(client, reference), 422)


def test_concurrent_requests_get_their_own_masks(client: httpx.Client) -> None:
    sizes = [(40, 50), (64, 64), (33, 80), (64, 64)]
    requests = [
        (f"{L1[:-1]}{1 + i % 2}", picture_bytes(random_picture(*sizes[i % 4], seed=i))) for i in range(12)
    ]
    alone = [post(client, *request).content for request in requests]
    assert len(set(alone)) == 12
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda request: post(client, *request).content, requests))
    for first, second in zip(together, alone, strict=True):
        # Batches may round differently in the last digit, and a pixel at the threshold may fall either way.
        assert np.mean(mask_of(first) != mask_of(second)) < 1e-3
