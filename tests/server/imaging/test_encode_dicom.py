"""Segmentations and reports in DICOM, read back by pydicom alone, by highdicom, by dcmqi, and checked by dciodvfy."""

import dataclasses
import io
import logging
import shutil
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings

from server.arrays import DicomSource
from server.errors import InvalidParameter
from server.imaging.encode import ENCODERS, encode, memory
from server.imaging.encode.result import SegmentationResult
from tests.server.imaging import dicom_series as dicom
from tests.server.imaging.conftest import deterministic
from tests.server.imaging.dicom_series import ORIENTATIONS, classes_of, instances, of_series

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")

SIZE = (7, 6, 5)
FORMATS = ["dicomseg", "dicomseg.labelmap", "dicomseg.fractional", "dicomsr"]
SEGMENTATIONS = FORMATS[:3]


def written(result: SegmentationResult, name: str = "dicomseg") -> bytes:
    return ENCODERS[name].encode(result)


def read(data: bytes) -> Any:
    return pydicom.dcmread(io.BytesIO(data))


def with_scores(result: SegmentationResult) -> SegmentationResult:
    scores = np.random.default_rng(3).random((len(result.names) + 1, *result.mask.classes.shape))
    return dataclasses.replace(
        result, mask=dataclasses.replace(result.mask, scores=scores.astype(np.float16))
    )


def enhanced(
    orientation: str, *, reverse: bool = False, classes: np.ndarray | None = None
) -> SegmentationResult:
    """A segmentation of one multi-frame instance."""
    whole = dicom.multi_frame(SIZE, ORIENTATIONS[orientation], reverse=reverse)
    frames = tuple((0, n) for n in range(1, SIZE[2] + 1))
    source = DicomSource((whole,), frames[::-1] if reverse else frames)
    affine = dicom.affine_of(instances(SIZE, ORIENTATIONS[orientation]))
    return dicom.result(classes_of(SIZE) if classes is None else classes, source, affine)


def radiograph(classes: np.ndarray | None = None, sop_class: str = dicom.DX) -> SegmentationResult:
    """A segmentation of a single image without geometry."""
    (one,) = instances((7, 6, 1), sop_class=sop_class)
    for name in ("FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness"):
        delattr(one, name)
    del one.PixelSpacing
    mask = np.ascontiguousarray(classes_of((7, 6, 3))[..., 1].T) if classes is None else classes
    return dicom.result(mask, DicomSource((one,), ((0, 1),)), None)


CASES: dict[str, Callable[[], SegmentationResult]] = {
    **{name: lambda o=o: of_series(instances(SIZE, o), classes_of(SIZE)) for name, o in ORIENTATIONS.items()},  # type: ignore[misc]
    "MR": lambda: of_series(instances(SIZE, sop_class=dicom.MR), classes_of(SIZE)),
    "one class": lambda: of_series(instances(SIZE), classes_of(SIZE, [1]), names={1: "liver"}),
    "single slice": lambda: of_series(instances((7, 6, 1)), classes_of((7, 6, 1))),
    "empty": lambda: of_series(instances(SIZE), np.zeros(SIZE, dtype=np.uint8, order="F")),
    "enhanced": lambda: enhanced("oblique"),
    "enhanced, frames descending": lambda: enhanced("sagittal", reverse=True),
    "enhanced, empty": lambda: enhanced("axial", classes=np.zeros(SIZE, dtype=np.uint8)),
    "radiograph": radiograph,
    "radiograph, empty": lambda: radiograph(np.zeros((6, 7), dtype=np.uint8)),
    "angiograph": lambda: radiograph(sop_class=dicom.XA),
}
SPATIAL = [name for name in CASES if "graph" not in name]
FULL = [name for name in SPATIAL if "empty" not in name]


def fits(name: str, case: str) -> bool:
    return name != "dicomsr" or case in SPATIAL


def pixels(result: SegmentationResult, value: int) -> np.ndarray:
    """Indices (column, row, slice) of the pixels of a class."""
    classes = result.mask.classes
    return np.argwhere((classes if classes.ndim == 3 else classes.T[..., None]) == value)


def places(result: SegmentationResult, value: int) -> np.ndarray:
    """Where the pixels of a class lie, in mm, from the headers of the source."""
    source = result.dicom
    heads = [source.datasets[index] for index, _ in source.frames]
    if len(source.datasets) == 1 and len(source.frames) > 1:
        heads = [
            frame_head(source.datasets[0].PerFrameFunctionalGroupsSequence[n - 1]) for _, n in source.frames
        ]
    found = pixels(result, value)
    by_slice = [(head, found[found[:, 2] == k]) for k, head in enumerate(heads)]
    return np.concatenate([dicom.place(head, part[:, 1], part[:, 0]) for head, part in by_slice])


def frame_head(frame: Any, shared: Any = None) -> Any:
    """The attributes that place a frame, as a header of a single image."""
    head, shared = pydicom.Dataset(), shared or frame
    head.ImagePositionPatient = frame.PlanePositionSequence[0].ImagePositionPatient
    head.ImageOrientationPatient = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    head.PixelSpacing = shared.PixelMeasuresSequence[0].PixelSpacing
    return head


def segments_of(dataset: Any) -> dict[int, np.ndarray]:
    """Where the pixels of each segment lie, from the headers of the segmentation alone."""
    shared = dataset.SharedFunctionalGroupsSequence[0]
    planes = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    found: dict[int, list[np.ndarray]] = {}
    for plane, frame in zip(planes, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        head = frame_head(frame, shared)
        for value in np.unique(plane[plane > 0]).tolist():
            group = frame if "SegmentIdentificationSequence" in frame else shared
            number = value
            if dataset.SegmentationType == "BINARY":
                number = int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
            found.setdefault(number, []).append(dicom.place(head, *np.nonzero(plane == value)))
    return {number: np.concatenate(points) for number, points in found.items()}


def in_order(points: np.ndarray) -> np.ndarray:
    return points[np.lexsort(points.round(3).T)]


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


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", [case for case in CASES if "empty" not in case])
def test_dciodvfy_finds_no_error(tmp_path: Path, case: str, name: str) -> None:
    if not shutil.which("dciodvfy"):
        pytest.skip("dciodvfy (Debian: dicom3tools) is not on PATH")
    if not fits(name, case):
        pytest.skip("a report measures volumes")
    if name == "dicomseg.labelmap":
        pytest.skip("the tables of dciodvfy are older than label maps")
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


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_same_result_gives_the_same_bytes_at_another_time(case: str, name: str) -> None:
    """highdicom writes the microsecond of each call."""
    if not fits(name, case):
        pytest.skip("a report measures volumes")
    first = written(with_scores(CASES[case]()), name)
    assert written(with_scores(CASES[case]()), name) == first
    assert dicom.now().encode() not in first


CHANGES: dict[str, Callable[[SegmentationResult], SegmentationResult]] = {
    "mask": lambda r: dataclasses.replace(r, mask=dataclasses.replace(r.mask, classes=r.mask.classes[::-1])),
    "level": lambda r: dataclasses.replace(r, algorithm=dataclasses.replace(r.made_by, level=3)),
    "mode": lambda r: dataclasses.replace(r, algorithm=dataclasses.replace(r.made_by, mode="auto")),
    "precision": lambda r: dataclasses.replace(r, algorithm=dataclasses.replace(r.made_by, precision="fp32")),
    "bundle": lambda r: dataclasses.replace(
        r, algorithm=dataclasses.replace(r.made_by, bundle_sha256="f" * 64)
    ),
    "post-processing": lambda r: dataclasses.replace(
        r, algorithm=dataclasses.replace(r.made_by, parameters={})
    ),
    "codes": lambda r: dataclasses.replace(r, codes={}),
    "colour": lambda r: dataclasses.replace(r, colors={**r.colors, 1: (0, 0, 0)}),
    "patient": lambda r: of_series(instances(SIZE, PatientName="Roe^Richard"), r.mask.classes),
    "series": lambda r: of_series(instances(SIZE, SeriesInstanceUID="1.2.77"), r.mask.classes),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_answer_is_another_instance(change: str) -> None:
    """An archive keeps the first of two instances of one UID."""
    plain = of_series(instances(SIZE), classes_of(SIZE))
    first, second = read(written(plain)), read(written(CHANGES[change](plain)))
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID"):
        assert first[keyword].value != second[keyword].value
    same = [one.TrackingUID for one in first.SegmentSequence] == [
        one.TrackingUID for one in second.SegmentSequence
    ]
    # The anatomy of a series is the same at each depth.
    assert same == (change != "series")


def test_uids_are_valid_and_differ_between_formats() -> None:
    result = with_scores(of_series(instances(SIZE), classes_of(SIZE)))
    read_back = [read(written(result, name)) for name in FORMATS]
    uids = [one.SOPInstanceUID for one in read_back] + [one.SeriesInstanceUID for one in read_back]
    assert len({*uids}) == 8
    assert all(uid.is_valid and uid.startswith("2.25.") for uid in uids)


def test_segmentation_says_what_made_it() -> None:
    dataset = read(written(of_series(instances(SIZE), classes_of(SIZE))))
    liver, spleen, _ = dataset.SegmentSequence
    assert [one.SegmentLabel for one in dataset.SegmentSequence] == list(dicom.NAMES.values())
    assert [one.SegmentNumber for one in dataset.SegmentSequence] == [1, 2, 3]
    kind = liver.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodeValue, kind.CodingSchemeDesignator, kind.CodeMeaning) == ("10200004", "SCT", "Liver")
    assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Anterior"
    private = spleen.SegmentedPropertyTypeCodeSequence[0]
    assert (private.CodingSchemeDesignator, private.CodeMeaning) == ("99UNETPP", "spleen")
    algorithm = liver.SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmName == liver.SegmentAlgorithmName == "UNet++ organs, level 2"
    assert algorithm.AlgorithmVersion == dicom.ALGORITHM.bundle_sha256
    said = "mode=fast,level=2,precision=int8,engine=onnxruntime,fill_holes=True"
    assert algorithm.AlgorithmParameters == said
    equipment = {one.get("ManufacturerModelName"): one for one in dataset.ContributingEquipmentSequence}
    assert "level 2, precision int8" in equipment["bundle organs"].ContributionDescription
    assert dataset.SeriesDescription == "Organs in CT, level 2"
    color = highdicom.color.CIELabColor.from_dicom_value(liver.RecommendedDisplayCIELabValue).to_rgb()
    assert np.abs(np.subtract(color, dicom.COLORS[1])).max() <= 1


def test_segmentation_repeats_patient_and_study() -> None:
    dataset = read(written(of_series(instances(SIZE), classes_of(SIZE))))
    source = instances(SIZE)[0]
    for keyword in (
        "PatientID",
        "PatientName",
        "PatientBirthDate",
        "PatientSex",
        "StudyInstanceUID",
        "StudyDate",
        "StudyTime",
        "AccessionNumber",
        "StudyID",
        "ReferringPhysicianName",
    ):
        assert dataset[keyword].value == source[keyword].value
    assert (dataset.ContentDate, dataset.ContentTime) == ("20240103", "121300.5")
    assert "InstanceCreationDate" not in dataset
    (series,) = dataset.ReferencedSeriesSequence
    assert [one.ReferencedSOPInstanceUID for one in series.ReferencedInstanceSequence] == [
        f"1.2.3.{k + 1}" for k in range(SIZE[2])
    ]


@pytest.mark.parametrize("case", ["empty", "enhanced, empty", "radiograph, empty"])
def test_mask_without_pixels_has_a_frame_per_segment(case: str) -> None:
    result = CASES[case]()
    dataset = read(written(result))
    assert (int(dataset.NumberOfFrames), len(dataset.SegmentSequence)) == (3, 3)
    assert not dataset.pixel_array.any()
    assert dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence[-1].ReferencedSOPInstanceUID == (
        result.dicom.datasets[-1].SOPInstanceUID
    )
    assert "liver, spleen, kidney" in encode(("dicomseg",), result).note


def test_class_without_pixels_is_described_and_said() -> None:
    result = of_series(instances(SIZE), classes_of(SIZE, [1, 3]))
    dataset = read(written(result))
    numbers = {
        int(one.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        for one in dataset.PerFrameFunctionalGroupsSequence
    }
    assert (numbers, len(dataset.SegmentSequence)) == ({1, 3}, 3)
    assert encode(("dicomseg", "dicomseg.labelmap"), result).note == encode(("dicomseg",), result).note
    assert "spleen" in encode(("dicomseg",), result).note
    assert encode(("dicomseg",), of_series(instances(SIZE), classes_of(SIZE, [1, 2, 3]))).note == ""


def test_objects_stay_classes_and_the_note_says_so() -> None:
    result = of_series(instances(SIZE), classes_of(SIZE, [1, 2, 3]), postprocessing={"instances": True})
    assert len(read(written(result)).SegmentSequence) == 3
    assert "format=labels" in encode(("dicomseg",), result).note


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("case", ["oblique", "enhanced, frames descending", "radiograph"])
def test_fractional_holds_the_probability_of_each_class(case: str, channels: int) -> None:
    result = dataclasses.replace(CASES[case](), names={1: "liver"})
    scores = np.random.default_rng(1).random((channels, *result.mask.classes.shape)).astype(np.float16)
    result = dataclasses.replace(result, mask=dataclasses.replace(result.mask, scores=scores))
    dataset = read(written(result, "dicomseg.fractional"))
    assert (dataset.SegmentationType, dataset.SegmentationFractionalType) == ("FRACTIONAL", "PROBABILITY")
    slices = {
        (result.dicom.datasets[index].SOPInstanceUID, frame): k
        for k, (index, frame) in enumerate(result.dicom.frames)
    }
    planes = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    assert len(planes) == len(slices)
    for plane, frame in zip(planes, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        source = frame.DerivationImageSequence[0].SourceImageSequence[0]
        k = slices[source.ReferencedSOPInstanceUID, int(source.get("ReferencedFrameNumber") or 1)]
        expected = scores[-1] if scores.ndim == 3 else scores[-1][..., k].T
        assert np.abs(plane / 255 - expected).max() <= 0.5 / 255 + 1e-6


def test_report_measures_the_segments_of_the_segmentation() -> None:
    result = of_series(instances(SIZE, ORIENTATIONS["oblique"]), classes_of(SIZE))
    report = highdicom.sr.srread(io.BytesIO(written(result, "dicomsr")))
    segmentation = read(written(result))
    groups = report.content.get_volumetric_roi_measurement_groups()
    assert len(groups) == 3
    for number, group in enumerate(groups, 1):
        segment = segmentation.SegmentSequence[number - 1]
        referenced = group.referenced_segment
        assert group.tracking_uid == segment.TrackingUID
        assert referenced.referenced_sop_instance_uid == segmentation.SOPInstanceUID
        assert referenced.referenced_segment_numbers[0] == number
        (volume,) = group.get_measurements()
        count = int((result.mask.classes == number).sum())
        assert float(volume.value) == pytest.approx(count * 0.75 * 0.5 * 2.5, abs=1e-3)
        assert volume.unit.value == "mm3"


def without(*names: str) -> list[Any]:
    series = instances(SIZE)
    for one in series:
        for name in names:
            delattr(one, name)
    return series


ODD = {
    "no patient": lambda: without("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    "no study": lambda: without(
        "StudyDate", "StudyTime", "AccessionNumber", "StudyID", "ReferringPhysicianName"
    ),
    "no dates": lambda: without("StudyDate", "AcquisitionDate"),
    "sex": lambda: instances(SIZE, PatientSex="U"),
    "thickness": lambda: without("SliceThickness"),
    "thickness empty": lambda: instances(SIZE, SliceThickness=None),
    "wrong distance": lambda: instances(SIZE, SpacingBetweenSlices=99),
    "no scanner": lambda: without("Manufacturer"),
    "series number": lambda: instances(SIZE, SeriesNumber=None),
    "name without parts": lambda: instances(SIZE, PatientName="Jane Doe"),
    "latin": lambda: instances(SIZE, SpecificCharacterSet="ISO_IR 100", PatientName="Müller^Jürgen"),
    "rounded": lambda: [
        *instances(SIZE)[:4],
        instances(SIZE, (1, 1e-7, 0, 0, 1, 0))[4],
    ],
}


@pytest.mark.parametrize("name", ["dicomseg", "dicomsr"])
@pytest.mark.parametrize("case", ODD)
def test_headers_as_they_are_in_practice(caplog: pytest.LogCaptureFixture, case: str, name: str) -> None:
    series = ODD[case]()
    with caplog.at_level(logging.DEBUG):
        dataset = read(written(of_series(series, classes_of(SIZE)), name))
    assert dataset.PatientName == series[0].get("PatientName", "")
    assert "Doe" not in caplog.text
    if name == "dicomseg":
        assert np.array_equal(
            segments_of(dataset)[1].shape, places(of_series(series, classes_of(SIZE)), 1).shape
        )
        measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        assert float(measures.SpacingBetweenSlices) == pytest.approx(2.5, abs=1e-6)
        assert float(measures.SliceThickness) == (2.5 if case.startswith("thickness") else 2)


def test_source_is_left_as_it_was() -> None:
    series = instances(SIZE, PatientSex="U", SpacingBetweenSlices=7)
    before = [one.to_json() for one in series]
    for name in FORMATS:
        written(with_scores(of_series(series, classes_of(SIZE))), name)
    assert [one.to_json() for one in series] == before


@pytest.mark.parametrize(
    "series",
    [
        without("PixelSpacing"),
        [*instances(SIZE)[:4], *instances((9, 6, 5))[4:]],
        instances(SIZE, SOPClassUID="1.2.9"),
    ],
    ids=["no pixel spacing", "two sizes", "unknown class"],
)
def test_headers_that_do_not_suffice_are_refused(series: list[Any]) -> None:
    source = DicomSource(tuple(series), tuple((k, 1) for k in range(len(series))))
    with pytest.raises(InvalidParameter) as caught:
        written(dicom.result(classes_of(SIZE), source, np.eye(4)))
    assert caught.value.fields == {"parameter": "format", "remedy": "mask"}


def test_names_beyond_ascii_are_written_in_utf_8() -> None:
    names = {1: "Großhirn", 2: "a\\b", 3: "x" * 99}
    dataset = read(written(of_series(instances(SIZE), classes_of(SIZE), names=names)))
    assert dataset.SpecificCharacterSet == "ISO_IR 192"
    assert [one.SegmentLabel for one in dataset.SegmentSequence] == ["Großhirn", "a/b", "x" * 64]


@pytest.mark.parametrize("name", SEGMENTATIONS)
def test_many_classes_take_no_more_memory_than_was_reserved(name: str) -> None:
    size, count = (128, 96, 12), 100
    rng = np.random.default_rng(0)
    classes = np.asfortranarray(rng.integers(0, count + 1, size).astype(np.uint8))
    names = {value: f"class {value}" for value in range(1, count + 1)}
    result = of_series(instances(size), classes, names=names)
    if name == "dicomseg.fractional":
        scores = np.zeros((count + 1, *size), dtype=np.float16)
        result = dataclasses.replace(result, mask=dataclasses.replace(result.mask, scores=scores))
    written(result, name)
    tracemalloc.start()
    try:
        written(result, name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The headers of the frames, and of the segments.
    headers = 25_000 * (size[2] * count + count)
    assert peak < memory((name,), result.source.input_header, count) + headers
