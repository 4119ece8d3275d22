"""A CT as a zip of DICOM: reading it as the server does, against what pydicom and NumPy alone need for the same volume.

    python -m bench.dicom --size 512 512 300

Both sides read the same zip in memory, in one process and on one thread, in turning order; the ratio is the median over the pairs.
The other side does the least that gives the volume in Hounsfield units: each file is read with `dcmread`, sorted by position and
rescaled. The server also sniffs every file, reads the headers before the pixels and checks the geometry.
"""

import argparse
import io
import statistics
import time
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from bench.table import write
from server.imaging.decode import decode, read_header
from server.imaging.decode_options import DecodeOptions

# The server may take so much of the time of the other side.
MOST = 1.3


def packed_series(size: tuple[int, int, int], method: int) -> bytes:
    """A zip of CT slices of (columns, rows, slices), 12 bits in 16, with noise."""
    random = np.random.default_rng(0)
    columns, rows, count = size
    series, out = generate_uid(), io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for k in random.permutation(count):
            dataset: Any = Dataset()
            dataset.file_meta = FileMetaDataset()
            dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            dataset.SeriesInstanceUID, dataset.Modality = series, "CT"
            dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [0, 0, int(k)], [1, 0, 0, 0, 1, 0]
            dataset.PixelSpacing, dataset.RescaleSlope, dataset.RescaleIntercept = [0.7, 0.7], 1, -1024
            dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = rows, columns, 1
            dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
            dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
            # A header of usual length.
            for element in range(120):
                dataset.add_new((0x0009, 0x1000 + element), "LO", f"value {element}")
            dataset.add_new((0x0009, 0x0010), "LO", "BENCH")
            pixels = (1064 + random.normal(0, 15, (rows, columns))).astype("<u2")
            dataset.add_new(0x7FE00010, "OW", pixels.tobytes())
            file = io.BytesIO()
            pydicom.dcmwrite(file, dataset, enforce_file_format=True)
            archive.writestr(f"{k:05}", file.getvalue())
    return out.getvalue()


def ours(data: bytes) -> Any:
    """The server's two passes."""
    file, options = io.BytesIO(data), DecodeOptions(2**40, 2**40)
    header = read_header(file, options)
    return decode(file, DecodeOptions(2**40, 2**40, header=header)).values[..., 0]


def theirs(data: bytes) -> Any:
    """The least that pydicom and NumPy need."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        datasets = [pydicom.dcmread(io.BytesIO(archive.read(name))) for name in archive.namelist()]
    datasets.sort(key=lambda dataset: dataset.ImagePositionPatient[2])
    slices = [
        dataset.pixel_array.astype(np.int16) * np.int16(dataset.RescaleSlope)
        + np.int16(dataset.RescaleIntercept)
        for dataset in datasets
    ]
    return np.stack(slices).transpose(2, 1, 0)


def seconds(side: Callable[[bytes], Any], data: bytes) -> float:
    """Seconds of one run."""
    started = time.perf_counter()
    side(data)
    return time.perf_counter() - started


def main() -> None:
    """Measures and writes bench/results/dicom.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=3, default=(512, 512, 300), metavar=("X", "Y", "Z"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-write", action="store_true", help="print the ratio only")
    arguments = parser.parse_args()
    rows, facts = [], []
    for name, method in (("stored", zipfile.ZIP_STORED), ("deflate", zipfile.ZIP_DEFLATED)):
        data = packed_series(tuple(arguments.size), method)
        if not np.array_equal(ours(data), theirs(data)):
            raise SystemExit("the two sides read different volumes")
        pairs = []
        for number in range(arguments.rounds):
            order = (ours, theirs) if number % 2 else (theirs, ours)
            measured = {side.__name__: seconds(side, data) for side in order}
            pairs.append((measured["ours"], measured["theirs"]))
        ratio = statistics.median(one / other for one, other in pairs)
        mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name}: {mine:.2f} s against {other:.2f} s, ratio {ratio:.2f} (at most {MOST})")
        rows.append([name, f"{mine:.2f}", f"{other:.2f}", f"{ratio:.2f}"])
        facts.append(
            {"zip": name, "ours_s": mine, "pydicom_s": other, "ratio": ratio, "size": arguments.size}
        )
    if not arguments.no_write:
        caption = f"A CT of {' × '.join(map(str, arguments.size))} as a zip of DICOM, on one thread; the ratio is to be at most {MOST}."
        write("dicom", caption, ["zip", "server, s", "pydicom and NumPy, s", "ratio"], rows, facts)


if __name__ == "__main__":
    main()
