"""Segmentation results to files. One row of `ENCODERS` per output format; several formats are a zip."""

import io
import zipfile
from dataclasses import dataclass

from server.imaging.encode.formats import ALIASES, ENCODERS, FAMILIES, LABELS, MASK, Encoder
from server.imaging.encode.negotiate import choose, like, memory, needs, requires, split, without
from server.imaging.encode.result import SegmentationResult

__all__ = [
    "ALIASES",
    "ENCODERS",
    "EPOCH",
    "FAMILIES",
    "LABELS",
    "MASK",
    "Encoded",
    "Encoder",
    "SegmentationResult",
    "choose",
    "encode",
    "like",
    "memory",
    "needs",
    "requires",
    "split",
    "without",
]

# The earliest date that a zip can hold, because the same result must give the same bytes.
EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Encoded:
    """An encoded answer.

    Attributes:
        body: bytes of the file.
        media_type: media type of the file.
        filename: name of the file.
        compressible: whether HTTP's Content-Encoding should compress it.
        note: remark on the answer for the caller.
    """

    body: bytes
    media_type: str
    filename: str
    compressible: bool = False
    note: str = ""


def encode(names: tuple[str, ...], result: SegmentationResult) -> Encoded:
    """Writes one format as its file, and several formats as a zip of their files.

    Args:
        names: rows of `ENCODERS`.
        result: finished segmentation.

    Raises:
        InvalidParameter: there are too many objects for a format, or their outlines are too long.
        Cancelled: the token of the result was set.
    """
    rows = [ENCODERS[name] for name in names]
    if len(rows) == 1:
        row = rows[0]
        return Encoded(row.encode(result), row.media_type, row.filename, row.compressible, row.note(result))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for row in rows:
            result.cancel.check()
            method = zipfile.ZIP_DEFLATED if row.compressible else zipfile.ZIP_STORED
            archive.writestr(
                zipfile.ZipInfo(row.filename, EPOCH), row.encode(result), method, compresslevel=1
            )
    # The same remark of two formats once.
    notes = dict.fromkeys(note for row in rows if (note := row.note(result)))
    return Encoded(out.getvalue(), "application/zip", "mask.zip", note="; ".join(notes))
