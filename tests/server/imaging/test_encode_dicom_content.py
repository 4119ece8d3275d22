"""What answers in DICOM say: UIDs, patient, algorithm, segments, probabilities, volumes; and headers from practice."""

import dataclasses
import io
import logging
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.tag import BaseTag

from server.arrays import DicomSource
from server.errors import InvalidParameter
from server.imaging.encode import encode, memory
from server.imaging.encode.result import SegmentationResult
from tests.server.imaging import dicom_series as dicom
from tests.server.imaging.dicom_cases import (
    CASES,
    FORMATS,
    SEGMENTATIONS,
    SIZE,
    fits,
    places,
    read,
    segments_of,
    with_scores,
    written,
)
from tests.server.imaging.dicom_series import ORIENTATIONS, classes_of, instances, of_series

highdicom = pytest.importorskip("highdicom")


@pytest.mark.parametrize(
    ("case", "name"), [(case, name) for case in CASES for name in FORMATS if fits(name, case)]
)
def test_same_result_gives_the_same_bytes_at_another_time(case: str, name: str) -> None:
    """highdicom writes the microsecond of each call."""
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


def test_note_fits_into_a_header() -> None:
    names = {1: "liver", 2: "spleen", 3: "肝\r\nX-Evil: 1"}
    note = encode(("dicomseg",), of_series(instances(SIZE), classes_of(SIZE), names=names)).note
    assert "?" in note
    assert note.isascii()
    assert note.isprintable()


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


def test_several_instances_of_several_frames_are_refused() -> None:
    parts = tuple(dicom.multi_frame((7, 6, 2), ORIENTATIONS["axial"]) for _ in range(2))
    source = DicomSource(parts, ((0, 1), (0, 2), (1, 1), (1, 2)))
    with pytest.raises(InvalidParameter) as caught:
        written(dicom.result(classes_of((7, 6, 4)), source, np.eye(4)))
    assert caught.value.fields["remedy"] == "mask"


def test_names_beyond_ascii_are_written_in_utf_8() -> None:
    names = {1: "Großhirn", 2: "a\\b", 3: "x" * 99}
    dataset = read(written(of_series(instances(SIZE), classes_of(SIZE), names=names)))
    assert dataset.SpecificCharacterSet == "ISO_IR 192"
    assert [one.SegmentLabel for one in dataset.SegmentSequence] == ["Großhirn", "a/b", "x" * 64]


@pytest.mark.parametrize("name", SEGMENTATIONS)
def test_many_classes_take_no_more_memory_than_was_reserved(name: str) -> None:
    size, count = (128, 96, 6), 50
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


@pytest.mark.filterwarnings("ignore")  # pydicom warns about what it tolerates
@pytest.mark.parametrize(("tag", "vr"), [(0x00200011, "IS"), (0x00200032, "DS")])
def test_error_never_repeats_what_a_header_says(tag: int, vr: str) -> None:
    series = instances(SIZE)
    result = of_series(series, classes_of(SIZE))
    for dataset in series:
        dataset[tag] = RawDataElement(BaseTag(tag), vr, 16, b"Mustermann 4711 ", 0, False, True)
    with pytest.raises(InvalidParameter) as caught:
        written(result)
    told = f"{caught.value} {caught.value.fields}"
    assert "do not suffice" in told
    assert [word for word in ("Mustermann", "4711") if word in told] == []


def test_error_names_the_attribute_that_is_missing() -> None:
    series = instances(SIZE)
    result = of_series(series, classes_of(SIZE))
    for dataset in series:
        del dataset.StudyInstanceUID
    with pytest.raises(InvalidParameter, match=r"\(AttributeError: StudyInstanceUID\)"):
        written(result)
