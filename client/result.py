"""The answer to one input, decoded when it is looked at."""

import functools
import gzip
import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.errors import BadResponse

# File names without their suffix that hold the mask, the plainest first. An .npz file has it beside the
# scores.
MASKS = ("mask", "labels", "mask_1bit")
STATISTICS, REPORT = "statistics.json", "report.json"


@dataclass(frozen=True)
class Result:
    """The answer to one input.

    Attributes:
        files: bytes of each requested format by the server's file name: "mask.png", "statistics.json",
            "objects.csv", ...
        model: name of the bundle.
        mode: "accurate", "fast" or "auto", as served.
        level: depth of the network, as served.
        precision: precision of the graph, as served.
        timings_ms: milliseconds per phase on the server.
        iou: IoU with the reference, mean over the foreground classes; None without a reference.
        dice: Dice with the reference; None without a reference.
        note: remark of the server, e.g. that values were replaced.
        degraded: "deadline" or "load" where a shallower level was served than requested, else "".
        request_id: id of the request in the server's log.
    """

    files: Mapping[str, bytes]
    model: str
    mode: str
    level: int
    precision: str
    timings_ms: Mapping[str, float]
    iou: float | None = None
    dice: float | None = None
    note: str = ""
    degraded: str = ""
    request_id: str = ""

    @functools.cached_property
    def mask(self) -> NDArray[Any]:
        """Class per pixel in the input's own grid, or object numbers where only labels were requested.

        Shape (H, W) of an image, (S, H, W) of a stack, (X, Y, Z) of a volume as stored; integers: uint8 for
        classes, uint16 or 32 bits for object numbers.

        Raises:
            LookupError: no requested format holds it, or the input was a zip of images.
        """
        if self.images:
            raise self._missing("mask", "mask")
        named = [name for stem in MASKS for name in self.files if name.startswith(f"{stem}.")]
        for name in (*named, *(name for name in self.files if name.endswith(".npz"))):
            if name.endswith(tuple(DECODERS)):
                return self.array(name)
        raise self._missing("mask", "mask")

    @functools.cached_property
    def statistics(self) -> dict[str, Any]:
        """Statistics of the mask: the document of `format=json`.

        Raises:
            LookupError: they were not requested, or the input was a zip of images.
        """
        if STATISTICS not in self.files:
            raise self._missing("statistics", "json")
        return json.loads(self.files[STATISTICS])  # type: ignore[no-any-return]

    @functools.cached_property
    def images(self) -> list[dict[str, Any]]:
        """Name, status and files of each image of a zip, in its order; empty for any other input."""
        return json.loads(self.files[REPORT])["images"] if REPORT in self.files else []

    @property
    def total_ms(self) -> float:
        """Milliseconds of all phases."""
        return sum(self.timings_ms.values())

    def array(self, name: str) -> NDArray[Any]:
        """Decodes a file that holds pixels.

        Args:
            name: key of `files`, e.g. "uncertainty.tiff".

        Returns:
            (H, W) of an image, (S, H, W) of a stack, (X, Y, Z) of a volume as stored; class values of an
                indexed picture.

        Raises:
            ValueError: the file holds no pixels.
        """
        for suffix, decode in DECODERS.items():
            if name.endswith(suffix):
                return decode(self.files[name])
        raise ValueError(f"{name} holds no pixels; names of files that do end with {', '.join(DECODERS)}")

    def _missing(self, what: str, format_: str) -> LookupError:
        if self.images:
            return LookupError(
                f"the answer to a zip of images has a file for each image; use .images and .array(name) for its {what}"
            )
        return LookupError(
            f"the answer has no {what}, only {', '.join(self.files)}; request it with formats=({format_!r}, ...)"
        )


def read_result(headers: Mapping[str, str], body: bytes) -> Result:
    """Reads a successful response.

    Args:
        headers: headers of the response, with case-insensitive names.
        body: one file, or a zip of several.

    Raises:
        BadResponse: the response does not come from a segmentation server.
    """
    if "x-segment-model" not in headers:
        raise BadResponse(
            "the response has no X-Segment-Model header; check that the address is a segmentation server's"
        )
    filename = re.search(r'filename="([^"\\/]+)"', headers.get("content-disposition", ""))
    timings = re.findall(r"([\w-]+);dur=([0-9.]+)", headers.get("server-timing", ""))
    return Result(
        split_files(headers.get("content-type", ""), filename[1] if filename else "mask", body),
        headers["x-segment-model"],
        headers.get("x-segment-mode", ""),
        int(headers.get("x-segment-level", "0")),
        headers.get("x-segment-precision", ""),
        {phase: float(milliseconds) for phase, milliseconds in timings},
        float(headers["x-segment-iou"]) if "x-segment-iou" in headers else None,
        float(headers["x-segment-dice"]) if "x-segment-dice" in headers else None,
        headers.get("x-segment-note", ""),
        headers.get("x-segment-degraded", ""),
        headers.get("x-request-id", ""),
    )


def split_files(media_type: str, filename: str, body: bytes) -> dict[str, bytes]:
    """Splits the body of a response into files by name."""
    if media_type.partition(";")[0] != "application/zip":
        return {filename: body}
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def _picture(data: bytes) -> NDArray[Any]:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        pixels = np.asarray(picture)
    # Pillow gives booleans for pictures of one bit.
    return pixels.astype(np.uint8) if pixels.dtype == bool else pixels


def _tiff(data: bytes) -> NDArray[Any]:
    import tifffile

    # By page, because the series of a file depend on its metadata.
    return tifffile.imread(io.BytesIO(data), key=slice(None))  # type: ignore[no-any-return]


def _nifti(data: bytes) -> NDArray[Any]:
    import nibabel as nib

    return np.asanyarray(nib.Nifti1Image.from_bytes(gzip.decompress(data)).dataobj)


def _nrrd(data: bytes) -> NDArray[Any]:
    import nrrd

    file = io.BytesIO(data)
    header = nrrd.read_header(file)
    if "data file" in header or "datafile" in header:
        # pynrrd would open that file, whatever it is.
        raise ValueError("the NRRD header names another file for its voxels, which is not read")
    return np.asarray(nrrd.read_data(header, file))


def _npz(data: bytes) -> NDArray[Any]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return np.asarray(arrays["mask"])


DECODERS: dict[str, Callable[[bytes], NDArray[Any]]] = {
    ".png": _picture,
    ".jpg": _picture,
    ".tiff": _tiff,
    ".tif": _tiff,
    ".nii.gz": _nifti,
    ".nrrd": _nrrd,
    ".npz": _npz,
}
