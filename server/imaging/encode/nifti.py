"""Masks, objects and scores as .nii.gz with a copy of the input's header, as a new one loses fields."""

import io
from collections.abc import Iterator, Sequence
from typing import cast
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
from isal import igzip
from jaxtyping import Float16, Shaped, UInt8
from numpy import ndarray

from server.arrays import Objects, Volume
from server.imaging.encode.rounding import eight_bits

# Extension code of Caret's label table, which Connectome Workbench reads and TotalSegmentator writes.
CARET = 30
# Extension code of comments. Other extensions (DICOM, AFNI) are dropped because they describe the values of
# the source, or the patient.
COMMENT = 6

# The fastest level, because masks are small at any.
COMPRESSION = 1

# Voxels written at a time.
BLOCK = 4 * 1024 * 1024


def encode(
    volume: Volume,
    classes: UInt8[ndarray, "X Y Z"],
    colors: dict[int, tuple[int, int, int]],
    names: dict[int, str],
) -> bytes:
    """Writes the classes as uint8 with `intent_code` 1002 (label) and a table of names and colours."""
    return write(volume, [classes], np.uint8, intent="label", table=_label_table(colors, names))


def labels(volume: Volume, objects: Objects) -> bytes:
    """Writes the object numbers as int32 with `intent_code` 1002 (label)."""
    return write(volume, [objects.labels], np.int32, intent="label")


def scores(volume: Volume, probabilities: Float16[ndarray, "K X Y Z"]) -> bytes:
    """Writes a fourth axis of score channels, also for one; uint8 with a slope that makes 255 mean 1."""
    return write(volume, list(probabilities), np.uint8, slope=1 / 255, stacked=True)


def write(
    volume: Volume,
    parts: Sequence[Shaped[ndarray, "X Y Z"]],
    dtype: type[np.generic],
    *,
    slope: float = 1.0,
    stacked: bool = False,
    intent: str = "none",
    table: bytes = b"",
) -> bytes:
    """Writes values with the affines, units and shape of the source.

    Args:
        volume: source of the header.
        parts: one array of values, or one per entry of the fourth axis; float16 values lie between 0 and
            255 * `slope`.
        dtype: type of the stored values.
        slope: factor from stored to real values.
        stacked: whether there is a fourth axis.
        intent: name that nibabel gives the intent.
        table: label table in the format of `CARET`.
    """
    header = volume.file_header.copy()
    header.set_data_dtype(dtype)
    header.set_slope_inter(slope, 0)
    header.set_intent(intent)
    if stacked:
        header.set_data_shape((*volume.size, len(parts)))
        header["pixdim"][4] = 1
    # Zero, because labels would be black in the display window of the source.
    header["cal_min"] = header["cal_max"] = 0
    tables = [nib.nifti1.Nifti1Extension(CARET, table)] if table else []
    header.extensions[:] = [*(e for e in header.extensions if e.get_code() == COMMENT), *tables]
    # Zero, because nibabel then computes the offset behind the extensions.
    header["vox_offset"] = 0
    start = io.BytesIO()
    header.write_to(start)
    out = io.BytesIO()
    # A fixed time, because the same mask must give the same bytes.
    with igzip.IGzipFile(fileobj=out, mode="wb", compresslevel=COMPRESSION, mtime=0) as stream:  # type: ignore[no-untyped-call]
        stream.write(start.getvalue().ljust(header.get_data_offset(), b"\0"))  # type: ignore[no-untyped-call]
        for part in parts:
            for block in blocks(part):
                values = eight_bits(block, 255 * slope) if block.dtype == np.float16 else block
                stream.write(values.astype(header.get_data_dtype(), copy=False).tobytes())  # type: ignore[no-untyped-call]
    return out.getvalue()


def blocks(values: Shaped[ndarray, "X Y Z"]) -> Iterator[Shaped[ndarray, " block"]]:
    """Voxels in the order of the file, `BLOCK` at a time."""
    flat = values.ravel(order="F")
    return (flat[first : first + BLOCK] for first in range(0, flat.size, BLOCK))


def _label_table(colors: dict[int, tuple[int, int, int]], names: dict[int, str]) -> bytes:
    root = ElementTree.Element("CaretExtension")
    information = ElementTree.SubElement(root, "VolumeInformation", Index="0")
    table = ElementTree.SubElement(information, "LabelTable")
    rows = {0: ("background", (0, 0, 0), "0")} | {
        value: (name, colors[value], "1") for value, name in names.items()
    }
    for value, (name, color, alpha) in rows.items():
        red, green, blue = (f"{part / 255:.6g}" for part in color)
        label = ElementTree.SubElement(
            table, "Label", Key=str(value), Red=red, Green=green, Blue=blue, Alpha=alpha
        )
        label.text = name
    ElementTree.SubElement(information, "VolumeType").text = "Label"
    return cast("bytes", ElementTree.tostring(root, encoding="UTF-8", xml_declaration=True))
