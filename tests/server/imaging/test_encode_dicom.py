"""Segmentations in DICOM, read back by pydicom alone, by highdicom and by dcmqi, and checked by dciodvfy."""

import io
import shutil
import subprocess
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings

from tests.server.imaging.conftest import deterministic
from tests.server.imaging.dicom_cases import (
    CASES,
    FORMATS,
    FULL,
    fits,
    in_order,
    places,
    read,
    segments_of,
    with_scores,
    written,
)
from tests.server.imaging.dicom_series import ORIENTATIONS, instances, of_series

highdicom = pytest.importorskip("highdicom")


@pytest.mark.parametrize("name", ["dicomseg", "dicomseg.labelmap"])
@pytest.mark.parametrize("case", FULL)
def test_every_pixel_lies_where_it_lies_in_the_source(case: str, name: str) -> None:
    result = CASES[case]()
    found = segments_of(read(written(result, name)))
    assert found.keys() == {value for value in result.names if (result.mask.classes == value).any()}
    for number, points in found.items():
        expected = places(result, number)
        assert np.abs(points.mean(axis=0) - expected.mean(axis=0)).max() < 0.1
        assert np.abs(in_order(points) - in_order(expected)).max() < 1e-6


@pytest.mark.parametrize("case", FULL)
def test_highdicom_reads_the_same_mask_by_source_instance(case: str) -> None:
    result = CASES[case]()
    seg = highdicom.seg.segread(io.BytesIO(written(result)))
    source = result.dicom
    uids = [source.datasets[index].SOPInstanceUID for index, _ in source.frames]
    assert seg.StudyInstanceUID == source.datasets[0].StudyInstanceUID
    assert seg.FrameOfReferenceUID == source.datasets[0].FrameOfReferenceUID
    options = {
        "combine_segments": True,
        "ignore_spatial_locations": False,
        "assert_missing_frames_are_empty": True,
    }
    if len(source.datasets) == 1 and "NumberOfFrames" in source.datasets[0]:
        planes = seg.get_pixels_by_source_frame(uids[0], [frame for _, frame in source.frames], **options)
    else:
        planes = seg.get_pixels_by_source_instance(uids, **options)
    assert np.array_equal(planes, result.mask.classes.T)


# pydicom suspects tiny frames whose compressed size is that of their pixels.
@pytest.mark.filterwarnings("ignore:The number of bytes of compressed pixel data matches")
# Fewer examples than elsewhere, because highdicom takes tenths of a second for each.
@settings(deterministic, max_examples=12)
@hypothesis.given(
    seed=st.integers(0, 99),
    orientation=st.sampled_from(sorted(ORIENTATIONS)),
    size=st.tuples(st.integers(1, 9), st.integers(8, 11), st.integers(1, 4)),
    count=st.integers(1, 5),
)
def test_any_mask_comes_back_by_position(
    seed: int, orientation: str, size: tuple[int, int, int], count: int
) -> None:
    classes = np.random.default_rng(seed).integers(0, count + 1, size).astype(np.uint8)
    names = {value: f"class {value}" for value in range(1, count + 1)}
    result = of_series(instances(size, ORIENTATIONS[orientation]), classes, names=names)
    for name in ("dicomseg", "dicomseg.labelmap"):
        found = segments_of(read(written(result, name)))
        assert found.keys() == {int(value) for value in np.unique(classes) if value}
        for number, points in found.items():
            assert np.abs(in_order(points) - in_order(places(result, number))).max() < 1e-6


# The tables of dciodvfy are older than label maps.
CHECKED = [
    (case, name)
    for case in CASES
    for name in FORMATS
    if "empty" not in case and name != "dicomseg.labelmap" and fits(name, case)
]


@pytest.mark.parametrize(("case", "name"), CHECKED)
def test_dciodvfy_finds_no_error(tmp_path: Path, case: str, name: str) -> None:
    if not shutil.which("dciodvfy"):
        pytest.skip("dciodvfy (Debian: dicom3tools) is not on PATH")
    path = tmp_path / "answer.dcm"
    path.write_bytes(written(with_scores(CASES[case]()), name))
    ran = subprocess.run(["dciodvfy", "-new", path], capture_output=True, text=True, check=False)
    assert [line for line in ran.stderr.splitlines() if line.startswith("Error")] == []
    assert ran.returncode == 0


@pytest.mark.parametrize("case", FULL)
def test_dcmqi_reads_each_segment_where_it_is(tmp_path: Path, case: str) -> None:
    tool = shutil.which("segimage2itkimage")
    if not tool:
        pytest.skip("segimage2itkimage (dcmqi) is not on PATH")
    sitk = pytest.importorskip("SimpleITK")
    result = CASES[case]()
    (tmp_path / "mask.dcm").write_bytes(written(result))
    command = [tool, "--inputDICOM", tmp_path / "mask.dcm", "--outputDirectory", tmp_path, "-t", "nrrd"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for value in np.unique(result.mask.classes[result.mask.classes > 0]):
        image = sitk.ReadImage(str(tmp_path / f"{value}.nrrd"))
        points = np.array(
            [
                image.TransformIndexToPhysicalPoint([int(one) for one in index[::-1]])
                for index in np.argwhere(sitk.GetArrayFromImage(image))
            ]
        )
        expected = places(result, int(value))
        assert np.abs(in_order(points) - in_order(expected)).max() < 0.01
