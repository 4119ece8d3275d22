"""The mask as .nii.gz on the caller's own grid: a copy of the file's header with another data type, never a header built anew."""

import io
from typing import cast
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
from isal import igzip

from server.arrays import Mask, Volume

# Caret's label table (Connectome Workbench reads it, and TotalSegmentator writes it).
CARET = 30
# Of the file's extensions comments alone are kept: others (DICOM, AFNI) describe the source's values, or the patient.
COMMENT = 6

# Fast, and masks are still small.
COMPRESSION = 1

# Voxels written at a time.
BLOCK = 4 * 1024 * 1024


def encode(volume: Volume, mask: Mask, colors: dict[int, tuple[int, int, int]], names: dict[int, str]) -> bytes:
    """Both affine codes, units and shape stay as they are; values are classes, `intent_code` 1002 says so."""
    header = volume.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header.set_intent("label")
    # They were the window of the source's intensities, in which labels would be black.
    header["cal_min"] = header["cal_max"] = 0
    comments = [extension for extension in header.extensions if extension.get_code() == COMMENT]
    header.extensions[:] = [*comments, nib.nifti1.Nifti1Extension(CARET, _label_table(colors, names))]
    # Zero lets nibabel compute it, with the extensions.
    header["vox_offset"] = 0
    start = io.BytesIO()
    header.write_to(start)
    out = io.BytesIO()
    # A fixed time: the same mask is the same bytes.
    with igzip.IGzipFile(fileobj=out, mode="wb", compresslevel=COMPRESSION, mtime=0) as stream:  # type: ignore[no-untyped-call]
        stream.write(start.getvalue().ljust(header.get_data_offset(), b"\0"))  # type: ignore[no-untyped-call]
        voxels = mask.classes.ravel(order="F")
        for first in range(0, voxels.size, BLOCK):
            stream.write(voxels[first : first + BLOCK].tobytes())  # type: ignore[no-untyped-call]
    return out.getvalue()


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
