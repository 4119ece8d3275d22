"""Where the heads of the network differ: the standard deviation over them of the foreground probability, from 0 to 0.5."""

import io

import numpy as np
import tifffile
from isal import igzip
from PIL import Image as Pillow

from server.arrays import Mask, Volume
from server.imaging.encode.nifti import BLOCK, COMMENT, COMPRESSION
from server.imaging.encode.png import blocks, save

# Of numbers from 0 to 1, half of which lie at 0 and half at 1.
LARGEST = 0.5


def png(mask: Mask) -> bytes:
    """16-bit grey: 65535 is 0.5."""
    assert mask.spread is not None  # noqa: S101 - the table asks for it
    picture = np.empty(mask.classes.shape, dtype=np.uint16)
    for rows in blocks(len(picture)):
        picture[rows] = np.rint(np.clip(mask.spread[rows].astype(np.float32) / LARGEST, 0, 1) * 65535)
    return save(Pillow.fromarray(picture))


def tiff(mask: Mask) -> bytes:
    """Pages of (H, W) float32, one per slice, deflated."""
    assert mask.spread is not None  # noqa: S101 - the table asks for it
    pages = mask.spread[None] if mask.spread.ndim == 2 else mask.spread.transpose(2, 1, 0)
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        for page in pages:
            writer.write(
                np.ascontiguousarray(page, dtype=np.float32), photometric="minisblack", compression="zlib",
                compressionargs={"level": 1}, metadata=None, contiguous=False,
            )  # fmt: skip
    return out.getvalue()


def nifti(volume: Volume, mask: Mask) -> bytes:
    """The caller's own grid and header; uint8, whose slope makes 255 of them 0.5."""
    assert mask.spread is not None  # noqa: S101 - the table asks for it
    header = volume.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(LARGEST / 255, 0)
    header.set_intent("none")
    header["cal_min"], header["cal_max"] = 0, LARGEST
    header.extensions[:] = [extension for extension in header.extensions if extension.get_code() == COMMENT]
    header["vox_offset"] = 0
    start = io.BytesIO()
    header.write_to(start)
    out = io.BytesIO()
    with igzip.IGzipFile(fileobj=out, mode="wb", compresslevel=COMPRESSION, mtime=0) as stream:  # type: ignore[no-untyped-call]
        stream.write(start.getvalue().ljust(header.get_data_offset(), b"\0"))  # type: ignore[no-untyped-call]
        voxels = mask.spread.ravel(order="F")
        for first in range(0, voxels.size, BLOCK):
            part = voxels[first : first + BLOCK].astype(np.float32)
            stream.write(np.rint(np.clip(part / LARGEST, 0, 1) * 255).astype(np.uint8).tobytes())  # type: ignore[no-untyped-call]
    return out.getvalue()
