"""An answer of the server, read when it is looked at."""

import functools
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from client import errors
from client.decode import Array, decode
from client.documents import ImageReport, Statistics
from client.replies import Reply, file_name, timings

# Files that are the mask, the plainest first, as the server names them.
MASKS = ("mask.png", "mask.tif", "mask.nii.gz", "mask.seg.nrrd", "labels.png", "labels.tif", "labels.nii.gz", "mask_1bit.png",
         "scores.npz", "scores_8bit.npz")  # fmt: skip
STATISTICS = ("statistics.json",)
# Of a zip of images, beside the files of each.
REPORT = "report.json"


@dataclass(frozen=True)
class Result:
    """The answer to one input.

    Attributes:
        files: what was asked for, by the names that the server gives: "mask.png", "statistics.json", "objects.csv", ...
        model: bundle that served it.
        mode: accurate or fast, as served.
        level: as served.
        precision: as served.
        timings_ms: by phase, as the server measured them.
        iou: with the reference, mean over the foreground classes; None without one.
        dice: the same.
        note: what the server has to add, e.g. that values were replaced.
        degraded: why less was served than asked for: "deadline", "load", or "".
        request_id: under which the server's log has the request.
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
    def mask(self) -> Array:
        """Class of each pixel, in the input's own grid; numbers of objects where only `labels_*` was asked for.

        Raises:
            LookupError: none of the formats asked for holds it, or the input was a zip of images.
        """
        name = self._first(MASKS, "mask", "mask")
        return decode(name, self.files[name])

    @functools.cached_property
    def statistics(self) -> Statistics:
        """What the mask holds, in numbers.

        Raises:
            LookupError: they were not asked for, or the input was a zip of images.
        """
        return cast("Statistics", json.loads(self.files[self._first(STATISTICS, "statistics", "json")]))

    @functools.cached_property
    def images(self) -> list[ImageReport]:
        """What came of each image of a zip; empty where the input was none."""
        return cast("list[ImageReport]", json.loads(self.files[REPORT])["images"]) if REPORT in self.files else []

    def array(self, name: str) -> Array:
        """Any file that holds pixels, e.g. "score.png" or "uncertainty.tif"; see `decode`."""
        return decode(name, self.files[name])

    def _first(self, names: tuple[str, ...], what: str, format_: str) -> str:
        for name in names:
            if name in self.files:
                return name
        if self.images:
            example = next((held for held in self.files if held.endswith(names)), next(iter(self.files)))
            raise LookupError(
                f"the answer to a zip of images has a file for each, e.g. .array({example!r}) or .files[{example!r}]; .images lists them"
            )
        raise LookupError(f"the answer holds no {what}, only {', '.join(self.files)}; ask for it with formats=({format_!r}, ...)")


def read_result(reply: Reply) -> Result:
    """A good answer of POST /segment or of a job.

    Raises:
        Failed: it is none of a server of ours.
    """
    headers = reply.headers
    if "x-segment-model" not in headers:
        raise errors.Failed("the answer is none of a segmentation server's; is the address right?", reply.status)
    return Result(
        _files(reply),
        headers.get("x-segment-model", ""),
        headers.get("x-segment-mode", ""),
        int(headers.get("x-segment-level", "0")),
        headers.get("x-segment-precision", ""),
        timings(headers.get("server-timing", "")),
        _number(headers.get("x-segment-iou")),
        _number(headers.get("x-segment-dice")),
        headers.get("x-segment-note", ""),
        headers.get("x-segment-degraded", ""),
        reply.request_id,
    )


def _files(reply: Reply) -> dict[str, bytes]:
    if reply.headers.get("content-type", "").split(";")[0] != "application/zip":
        return {file_name(reply.headers): reply.body}
    with zipfile.ZipFile(io.BytesIO(reply.body)) as held:
        return {name: held.read(name) for name in held.namelist() if not name.endswith("/")}


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)


def query(formats: tuple[str, ...] | str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Choices as the server's query has them.

    Args:
        formats: see `Client.segment`.
        parameters: the others by name; None means the server's default.

    Raises:
        TypeError: the format is given twice.
    """
    if "format" in parameters:
        raise TypeError("formats=(...) says what is wanted, not format=")
    asked = [one.strip() for one in formats.split(",")] if isinstance(formats, str) else list(formats)
    # "As the input" alone is what the server does anyway.
    chosen = {} if asked in ([], ["mask"]) else {"format": ",".join(asked)}
    return chosen | {name: _text(name, value) for name, value in parameters.items() if value is not None}


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    # Sizes are written with x, as 0,5 is one number to many people.
    between = "x" if name == "pixel_size_um" else ","
    return between.join(map(str, value)) if isinstance(value, tuple | list) else str(value)
