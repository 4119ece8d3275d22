"""DICOM SEG of a CT: the server's encoder against highdicom's own constructor, in one run.

    python -m bench.dicom_seg

Both sides write a BINARY segmentation of the same mask with the same segments from the same headers to bytes,
one after the other in turning order. Ours also compares what it writes with its source, hashes it for its
UIDs, and counts the pixels of each class. The median of the rounds is quoted; peak memory is that of Python's
allocations in a round of its own.
"""

import argparse
import functools
import io
import json
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from bench.table import markdown
from server.arrays import DicomSource, Mask, Volume
from server.imaging.encode import ENCODERS
from server.imaging.encode.result import Algorithm, SegmentationResult

SPACING_MM, SLICE_MM = 0.8, 2.0
# The acceptance of this measurement.
LIMIT = 1.5


def instances(size: tuple[int, int, int]) -> list[Any]:
    """Headers of an axial CT of (columns, rows, slices)."""
    from pydicom import Dataset
    from pydicom.uid import CTImageStorage

    series = []
    for k in range(size[2]):
        one = Dataset()
        one.SOPClassUID, one.SOPInstanceUID = CTImageStorage, f"1.2.3.{k + 1}"
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = "1.2.4", "1.2.5", "1.2.6"
        one.PatientID, one.PatientName, one.PatientSex = "1", "Bench^Mark", "O"
        one.PatientBirthDate, one.StudyDate, one.StudyTime = "19700101", "20240101", "120000"
        one.AccessionNumber, one.StudyID, one.ReferringPhysicianName = "1", "1", ""
        one.Modality, one.SeriesNumber, one.InstanceNumber = "CT", 1, k + 1
        one.Rows, one.Columns, one.PositionReferenceIndicator = size[1], size[0], ""
        one.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        one.ImagePositionPatient = [-200, -200, k * SLICE_MM]
        one.PixelSpacing, one.SliceThickness = [SPACING_MM, SPACING_MM], SLICE_MM
        series.append(one)
    return series


def mask(size: tuple[int, int, int], classes: int) -> UInt8[ndarray, "X Y Z"]:
    """Columns of ellipses, one per class, that wander from slice to slice: each class is in each slice."""
    x, y = np.ogrid[: size[0], : size[1]]
    values = np.zeros(size, dtype=np.uint8, order="F")
    for k in range(size[2]):
        for value in range(1, classes + 1):
            angle = 2 * np.pi * value / classes + k / 40
            centre = 0.5 + 0.3 * np.cos(angle), 0.5 + 0.3 * np.sin(angle)
            near = ((x / size[0] - centre[0]) / 0.1) ** 2 + ((y / size[1] - centre[1]) / 0.08) ** 2 < 1
            values[..., k][near] = value
    return values


def segmentation(
    series: list[Any], classes: UInt8[ndarray, "X Y Z"], names: dict[int, str]
) -> SegmentationResult:
    """The result that the server encodes."""
    affine = np.diag([-SPACING_MM, -SPACING_MM, SLICE_MM, 1.0])
    affine[:3, 3] = 200, 200, 0
    source = DicomSource(tuple(series), tuple((k, 1) for k in range(len(series))))
    volume = Volume(np.zeros((*classes.shape, 1), dtype=np.uint8), affine, dicom=source)
    made_by = Algorithm("bench", "Benchmark", "0" * 64, "fast", 1, "fp32")
    colors = {value: (value, 128, 255 - value) for value in names}
    return SegmentationResult(volume, Mask(classes), colors, names, algorithm=made_by)


def by_highdicom(series: list[Any], classes: UInt8[ndarray, "X Y Z"], names: dict[int, str]) -> bytes:
    """The file that a program without the server would write."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    algorithm = hd.AlgorithmIdentificationSequence("bench", codes.DCM.ArtificialIntelligence, "1")
    described = [
        hd.seg.SegmentDescription(
            value, name, codes.SCT.AnatomicalStructure, codes.SCT.Organ, "AUTOMATIC", algorithm
        )
        for value, name in names.items()
    ]
    dataset = hd.seg.Segmentation(
        series, classes.T, "BINARY", described, hd.UID(), 1, hd.UID(), 1, "bench", "bench", "1", "1"
    )
    out = io.BytesIO()
    dataset.save_as(out)
    return out.getvalue()


def peak_mb(write: Callable[[], bytes]) -> float:
    """Peak of Python's allocations."""
    tracemalloc.start()
    try:
        write()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def main() -> None:
    """Measures and prints a table; the last column is accepted up to `LIMIT`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=(512, 512, 120), metavar=("X", "Y", "Z"))
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    chosen = parser.parse_args()
    size: tuple[int, int, int] = tuple(chosen.size)
    names = {value: f"class {value}" for value in range(1, chosen.classes + 1)}
    series, classes = instances(size), mask(size, chosen.classes)
    result = segmentation(series, classes, names)
    sides = {
        "highdicom": functools.partial(by_highdicom, series, classes, names),
        "unetpp": functools.partial(ENCODERS["dicomseg"].encode, result),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    file_mb = {name: len(write()) / 1e6 for name, write in sides.items()}
    for number in range(chosen.rounds):
        for name in sorted(sides, reverse=number % 2 == 1):
            begun = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(all_) for name, all_ in seconds.items()}
    ratio = medians["unetpp"] / medians["highdicom"]
    peaks = {name: peak_mb(write) for name, write in sides.items()}
    rows = [
        (name, f"{medians[name]:.2f}", f"{file_mb[name]:.1f}", f"{peaks[name]:.0f}", f"{ratio:.2f}")
        for name in sides
    ]
    print(markdown(("Writer", "Seconds", "File, MB", "Peak, MB", f"Ratio (limit {LIMIT})"), rows))
    if chosen.json:
        numbers = {
            "size": size,
            "classes": chosen.classes,
            "seconds": seconds,
            "peak_mb": peaks,
            "ratio": ratio,
        }
        chosen.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
