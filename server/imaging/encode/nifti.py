"""Masks, objects and scores as .nii.gz on the caller's own grid: a copy of the file's header with another data type, never one built anew."""

import io
from collections.abc import Iterator, Sequence
from typing import cast
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
from isal import igzip
from jaxtyping import Shaped
from numpy import ndarray

from server.arrays import Mask, Volume
from server.imaging.encode.rounding import eight_bits

# Caret's label table (Connectome Workbench reads it, and TotalSegmentator writes it).
CARET = 30
# Of the file's extensions comments alone are kept: others (DICOM, AFNI) describe the source's values, or the patient.
COMMENT = 6

# Fast, and masks are still small.
COMPRESSION = 1

# Voxels written at a time.
BLOCK = 4 * 1024 * 1024


def encode(volume: Volume, mask: Mask, colors: dict[int, tuple[int, int, int]], names: dict[int, str]) -> bytes:
    """Values are classes, `intent_code` 1002 says so; names and colours go along."""
    return write(volume, [mask.classes], np.uint8, intent="label", table=_label_table(colors, names))


def labels(volume: Volume, mask: Mask) -> bytes:
    """Values are the numbers of the objects, int32."""
    assert mask.objects is not None  # noqa: S101 - the table asks for them
    return write(volume, [mask.objects.labels], np.int32, intent="label")


def scores(volume: Volume, mask: Mask) -> bytes:
    """A fourth axis of score channels, however few; uint8, whose slope makes 255 of them 1."""
    assert mask.scores is not None  # noqa: S101 - the table asks for them
    return write(volume, list(mask.scores), np.uint8, slope=1 / 255, stacked=True)


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
    """Both affine codes, units and shape stay as the source has them.

    Args:
        volume: the source.
        parts: one array of values, or one per entry of the fourth axis; of float16 what is between 0 and 255 times `slope`.
        dtype: what they are stored as.
        slope: what 1 of that means.
        stacked: whether there is a fourth axis.
        intent: as nibabel calls it.
        table: names and colours, see `CARET`.
    """
    header = volume.file_header.copy()
    header.set_data_dtype(dtype)
    header.set_slope_inter(slope, 0)
    header.set_intent(intent)
    if stacked:
        header.set_data_shape((*volume.size, len(parts)))
        header["pixdim"][4] = 1
    # They were the window of the source's intensities, in which labels would be black.
    header["cal_min"] = header["cal_max"] = 0
    tables = [nib.nifti1.Nifti1Extension(CARET, table)] if table else []
    header.extensions[:] = [*(e for e in header.extensions if e.get_code() == COMMENT), *tables]
    # Zero lets nibabel compute it, with the extensions.
    header["vox_offset"] = 0
    start = io.BytesIO()
    header.write_to(start)
    out = io.BytesIO()
    # A fixed time: the same mask is the same bytes.
    with igzip.IGzipFile(fileobj=out, mode="wb", compresslevel=COMPRESSION, mtime=0) as stream:  # type: ignore[no-untyped-call]
        stream.write(start.getvalue().ljust(header.get_data_offset(), b"\0"))  # type: ignore[no-untyped-call]
        for part in parts:
            for block in _blocks(part):
                values = eight_bits(block, 255 * slope) if block.dtype == np.float16 else block
                stream.write(values.astype(header.get_data_dtype(), copy=False).tobytes())  # type: ignore[no-untyped-call]
    return out.getvalue()


def _blocks(values: Shaped[ndarray, "X Y Z"]) -> Iterator[Shaped[ndarray, " block"]]:
    """Voxels in the order of the file, a few at a time."""
    flat = values.ravel(order="F")
    return (flat[first : first + BLOCK] for first in range(0, flat.size, BLOCK))


def _label_table(colors: dict[int, tuple[int, int, int]], names: dict[int, str]) -> bytes:
    root = ElementTree.Element("CaretExtension")
    information = ElementTree.SubElement(root, "VolumeInformation", Index="0")
    table = ElementTree.SubElement(information, "LabelTable")
    rows = {0: ("background", (0, 0, 0), "0")} | {value: (name, colors[value], "1") for value, name in names.items()}
    for value, (name, color, alpha) in rows.items():
        red, green, blue = (f"{part / 255:.6g}" for part in color)
        label = ElementTree.SubElement(table, "Label", Key=str(value), Red=red, Green=green, Blue=blue, Alpha=alpha)
        label.text = name
    ElementTree.SubElement(information, "VolumeType").text = "Label"
    return cast("bytes", ElementTree.tostring(root, encoding="UTF-8", xml_declaration=True))
