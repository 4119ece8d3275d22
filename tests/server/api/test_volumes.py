"""POST /segment of volumes and stacks: the container of the answer follows that of the input."""

import base64
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import SimpleITK

from server.imaging.encode import ENCODERS
from tests.server.imaging.conftest import nifti
from tests.server.imaging.itk import by_itk, itk_read
from tests.support.files import mask_of, nifti_bytes, pages_bytes, pages_of, picture_bytes, volume_of
from tests.support.server import serving
from tests.support.service import FixedLatency, fake_app

Checked = Callable[..., Any]

VOXELS = np.random.default_rng(1).integers(0, 256, (14, 20, 9), dtype=np.uint8)
MASK = VOXELS.mean() < VOXELS
VOLUME = nifti_bytes(VOXELS, np.diag([1.0, 1, 2, 1]))
STACK, IMAGE = pages_bytes(VOXELS), picture_bytes(VOXELS[0])
INPUTS = {"image": IMAGE, "stack": STACK, "volume": VOLUME}


@pytest.fixture(scope="module")
def spatial() -> Iterator[httpx.Client]:
    """A network of three dimensions."""
    with serving(fake_app(changes={"dims": 3})) as client:
        yield client


@pytest.fixture(params=[2, 3])
def either(request: pytest.FixtureRequest, small: httpx.Client, spatial: httpx.Client) -> httpx.Client:
    """A network of two, and one of three dimensions."""
    return small if request.param == 2 else spatial


@pytest.mark.parametrize(
    "declared",
    [
        "application/gzip",
        "application/x-gzip",
        "application/nifti",
        "application/x-nifti",
        "application/octet-stream",
        None,
    ],
)
@pytest.mark.parametrize("multipart", [False, True])
def test_segment_answers_a_volume_by_a_volume(
    either: httpx.Client, declared: str | None, multipart: bool
) -> None:
    if multipart:
        answer = either.post(
            "/segment", files={"file": ("x.nii.gz", VOLUME, *((declared,) if declared else ()))}
        )
    else:
        answer = either.post(
            "/segment", content=VOLUME, headers={"content-type": declared} if declared else {}
        )
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/gzip"
    # Otherwise clients would unpack it.
    assert "content-encoding" not in answer.headers
    assert answer.headers["content-disposition"] == 'inline; filename="mask.nii.gz"'
    assert np.array_equal(volume_of(answer.content), MASK)


@pytest.mark.parametrize("kind", ["stack", "volume"])
@pytest.mark.parametrize("name", [name for name, row in ENCODERS.items() if "head_std" not in row.needs])
def test_segment_answers_volumes_in_every_format_of_theirs(small: httpx.Client, kind: str, name: str) -> None:
    answer, row = small.post(f"/segment?format={name}", content=INPUTS[kind]), ENCODERS[name]
    if kind not in row.kinds:
        assert (answer.status_code, answer.json()["code"]) == (406, "unknown-format")
        return
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == row.media_type
    assert row.filename in answer.headers["content-disposition"]


@pytest.mark.parametrize(("format_", "status"), [("mask.tiff", 422), ("mask.nii.gz", 406)])
def test_segment_refuses_a_stack_where_the_network_needs_voxel_sizes(
    spatial: httpx.Client, problem: Checked, format_: str, status: int
) -> None:
    problem(spatial.post(f"/segment?format={format_}", content=STACK), status)


@pytest.mark.parametrize(
    ("name", "image", "stack", "volume"),
    [
        ("mask", "mask.png", "mask.tiff", "mask.nii.gz"),
        ("labels", "labels.png", "labels.tiff", "labels.nii.gz"),
        ("scores", "scores.png", "scores.tiff", "scores.nii.gz"),
    ],
)
def test_segment_format_follows_the_kind_of_the_input(
    small: httpx.Client, name: str, image: str, stack: str, volume: str
) -> None:
    for kind, filename in (("image", image), ("stack", stack), ("volume", volume)):
        answer = small.post(f"/segment?format={name}", content=INPUTS[kind])
        assert answer.headers["content-disposition"] == f'inline; filename="{filename}"'
        assert answer.headers["content-type"] == ENCODERS[filename].media_type


@pytest.mark.parametrize(
    ("kind", "accept", "media_type"),
    [
        ("image", "*/*", "image/png"),
        ("stack", "text/html,application/xhtml+xml,*/*;q=0.8", "image/tiff"),
        ("volume", "*/*", "application/gzip"),
        ("volume", "application/json", "application/json"),
        ("volume", "application/gzip", "application/gzip"),
        ("volume", "image/png, application/x-npz;q=0.5", "application/x-npz"),
        ("stack", "image/*", "image/tiff"),
        ("image", "image/tiff", "image/tiff"),
        ("stack", "application/gzip;q=0.5, application/json;q=0.1", "application/json"),
    ],
)
def test_segment_accept_chooses_among_what_fits(
    small: httpx.Client, kind: str, accept: str, media_type: str
) -> None:
    answer = small.post("/segment", content=INPUTS[kind], headers={"accept": accept})
    assert answer.headers["content-type"] == media_type


@pytest.mark.parametrize(
    ("kind", "query", "accept"),
    [
        ("volume", "?format=mask.png", "*/*"),
        ("stack", "?format=mask.nii.gz", "*/*"),
        ("image", "?format=mask.nii.gz", "*/*"),
        ("volume", "", "image/tiff"),
        # A lossy or decorated picture is given by name only.
        ("volume", "", "image/png"),
        ("image", "", "image/jpeg"),
    ],
)
def test_segment_format_that_does_not_fit_is_refused(
    small: httpx.Client, problem: Checked, kind: str, query: str, accept: str
) -> None:
    answer = small.post(f"/segment{query}", content=INPUTS[kind], headers={"accept": accept})
    refused = problem(answer, 406, "unknown-format")
    assert "json" in refused.allowed


@pytest.mark.parametrize(
    ("kind", "key", "read", "size"),
    [
        ("volume", "mask_nifti", volume_of, {"x": 14, "y": 20, "z": 9}),
        ("stack", "mask_tiff", pages_of, {"x": 9, "y": 20, "z": 14}),
        ("image", "mask_png", mask_of, {"height": 20, "width": 9}),
    ],
)
def test_report_has_the_size_and_the_mask(
    small: httpx.Client, kind: str, key: str, read: Callable[[bytes], np.ndarray], size: dict[str, int]
) -> None:
    report = small.post("/segment?format=json&include_mask=true", content=INPUTS[kind]).json()
    assert report["size"] == size
    assert [name for name in report if name.startswith("mask_")] == [key]
    (row,) = report["classes"]
    assert row["pixels" if kind == "image" else "voxels"] == read(base64.b64decode(report[key])).sum()
    assert ("spacing_mm" in report) == ("volume_ml" in row) == (kind == "volume")
    if kind == "volume":
        assert report["spacing_mm"] == {"x": 1, "y": 1, "z": 2}


@pytest.mark.parametrize(
    "reference",
    [
        nifti_bytes(MASK.astype(np.uint8), np.diag([1.0, 1, 3, 1])),
        nifti_bytes(MASK[1:].astype(np.uint8)),
        IMAGE,
    ],
    ids=["spacing", "size", "kind"],
)
def test_reference_on_another_grid_is_refused(
    either: httpx.Client, problem: Checked, reference: bytes
) -> None:
    files = {"file": VOLUME, "reference": reference}
    problem(either.post("/segment", files=files), 422, "invalid-parameter")


def test_reference_of_a_volume_is_scored(either: httpx.Client) -> None:
    reference = nifti_bytes(MASK.astype(np.uint8), np.diag([1.0, 1, 2, 1]))
    answer = either.post("/segment", files={"file": VOLUME, "reference": reference})
    assert answer.headers["x-segment-iou"] == "1.0000"


@pytest.mark.parametrize("axis", ["auto", "0", "1", "2"])
def test_axis_and_nonfinite_are_read(small: httpx.Client, problem: Checked, axis: str) -> None:
    voxels = VOXELS.astype(np.float32)
    voxels[0, 0, :3] = np.nan
    problem(small.post("/segment", content=nifti_bytes(voxels)), 422, "unreadable")
    answer = small.post(f"/segment?nonfinite=zero&axis={axis}", content=nifti_bytes(voxels))
    assert answer.headers["x-segment-note"]
    finite = np.nan_to_num(voxels)
    assert np.array_equal(volume_of(answer.content), finite > finite.mean(dtype=float))


def test_volume_that_takes_too_long_is_sent_to_jobs(problem: Checked) -> None:
    with serving(fake_app(latency=FixedLatency(5.0), limits={"max_wait_s": 20})) as client:
        refused = problem(client.post("/segment", content=VOLUME), 413, "too-large")
        # It has nine slices of one window each.
        assert (refused.limit, refused.actual, refused.remedy) == (20, 45, "POST /jobs")
        assert client.post("/segment", content=IMAGE).status_code == 200


@pytest.mark.parametrize(
    ("limits", "limit", "setting"),
    [
        ({"max_voxels": 2000}, 2000, "UNETPP_LIMITS__MAX_VOXELS"),
        ({"max_memory_mb": 64}, 64, "UNETPP_LIMITS__MAX_MEMORY_MB"),
    ],
)
def test_volume_over_a_limit_is_refused(
    problem: Checked, limits: dict[str, int], limit: int, setting: str
) -> None:
    with serving(fake_app(changes={"dims": 3, "spacing": (0.1, 0.1, 0.1)}, limits=limits)) as client:
        refused = problem(client.post("/segment", content=VOLUME), 413, "too-large")
    assert (refused.limit, refused.setting) == (limit, setting)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_itk_volume_is_answered_as_slicer_reads_it(either: httpx.Client, suffix: str) -> None:
    image = SimpleITK.GetImageFromArray(VOXELS.transpose(2, 1, 0))
    image.SetSpacing((1.0, 2.0, 3.0))
    file = by_itk(image, suffix, packed=True)
    answer = either.post("/segment", content=file, headers={"content-type": "application/x-nrrd"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-nrrd"
    assert answer.headers["content-disposition"] == 'inline; filename="mask.seg.nrrd"'
    in_slicer = itk_read(answer.content, ".nrrd")
    assert in_slicer.GetSpacing() == image.GetSpacing()
    nifti = either.post("/segment?format=mask.nii.gz", content=file)
    assert np.array_equal(SimpleITK.GetArrayFromImage(in_slicer).transpose(2, 1, 0), volume_of(nifti.content))
    assert np.array_equal(volume_of(nifti.content), MASK)
    scored = either.post("/segment", files={"file": file, "reference": answer.content})
    assert float(scored.headers["x-segment-iou"]) == 1


def test_itk_image_is_an_image(small: httpx.Client) -> None:
    file = by_itk(SimpleITK.GetImageFromArray(VOXELS[0]), ".mha")
    first, second = (mask_of(small.post("/segment", content=content).content) for content in (file, IMAGE))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("unit", ["µm", "μm", "um", "Å"])
def test_unit_of_any_characters_is_noted(small: httpx.Client, unit: str) -> None:
    """A header of HTTP holds no characters beyond Latin-1."""
    units = " ".join([f'"{unit}"'] * 3)
    lines = f"NRRD0005\ntype: uchar\ndimension: 3\nsizes: 3 4 5\nspace: LPS\nencoding: raw\nspace directions: (2,0,0) (0,2,0) (0,0,9)\nspace units: {units}\n\n"
    answer = small.post("/segment", content=lines.encode() + bytes(60))
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-segment-note"].isascii()
    assert "space units" in answer.headers["x-segment-note"]
    assert f"space units: {units}\n".encode() in answer.content


def test_objects_of_nanometres_are_told_apart(small: httpx.Client) -> None:
    voxels = np.zeros((20, 20, 20), dtype=np.uint8)
    voxels[2:5, 2:5, 2:5] = voxels[10:14, 10:14, 10:14] = 200
    data = nifti(voxels, np.diag([5e-5, 5e-5, 2e-4, 1]))
    rows = small.post("/segment?format=json", content=data).json()["objects"]
    assert [row["centroid_mm"] for row in rows] == [
        pytest.approx([index * 5e-5, index * 5e-5, index * 2e-4], abs=1e-7) for index in (3, 11.5)
    ]
    assert rows[1]["box_mm"][0] == pytest.approx([9.5 * 5e-5, 9.5 * 5e-5, 9.5 * 2e-4], abs=1e-7)
