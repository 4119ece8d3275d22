"""Masks to bytes. One row per output format; several at once are a zip."""

import io
import math
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from server.arrays import Image, InputHeader, Mask, Volume
from server.cancel import NO_CANCEL, CancelToken
from server.errors import UnknownFormat
from server.imaging import geometry
from server.imaging.encode import coco, csv, geojson, json, nifti, npz, nrrd, outlines, overlay, png, png16, tiff, uncertainty


@dataclass(frozen=True)
class SegmentationResult:
    """What an encoder may use.

    Attributes:
        mask: the answer; with scores where the row asks for them.
        colors: RGB per class value, e.g. {1: (255, 0, 0)}.
        names: class names per value.
        source: the decoded input.
        report: statistics and facts for JSON.
        file: name of the input, where it is known.
        stop: ends the work between two formats, and within those of many objects.
    """

    mask: Mask
    colors: dict[int, tuple[int, int, int]]
    names: dict[int, str]
    source: Image | Volume | None = None
    report: dict[str, Any] = field(default_factory=dict)
    file: str = ""
    stop: CancelToken = NO_CANCEL

    @cached_property
    def geojson(self) -> bytes:
        """As it is and packed: tracing outlines takes longer than all else."""
        return geojson.encode(self.mask, self.colors, self.names, _image(self.source), self.stop)


@dataclass(frozen=True)
class Encoder:
    """One row of the table.

    Attributes:
        media_type: of the answer.
        file: its name, also among others in a zip.
        encode: makes it.
        kinds: of input that it can answer, see `Extent.kind`.
        needs: what must be in the product: "scores", "head_std", "objects" (see `Mask`), "report".
        packed: whether it is compressed already.
        outlines: whether it describes the shape of each object, which takes longer than all else.
        image_bytes: of memory that it takes per pixel of an image, at the most, on top of what it makes; measured on noise, stripes
            and dots. Of volumes it makes a small picture.
        most_bytes: in all, where the number of objects, corners or runs is limited.
    """

    media_type: str
    file: str
    encode: Callable[[SegmentationResult], bytes]
    kinds: tuple[str, ...] = ("image", "stack", "volume")
    needs: frozenset[str] = frozenset()
    packed: bool = True
    outlines: bool = False
    image_bytes: int = 0
    most_bytes: int = 1 << 62


@dataclass(frozen=True)
class Encoded:
    """Bytes of an answer, their media type, and the name of a file that holds them."""

    body: bytes
    media_type: str
    file: str


def _image(source: Image | Volume | None) -> Image:
    assert isinstance(source, Image)  # noqa: S101 - the row's kinds say so
    return source


def _volume(source: Image | Volume | None) -> Volume:
    assert isinstance(source, Volume)  # noqa: S101 - the row's kinds say so
    return source


def _any(source: Image | Volume | None) -> Image | Volume:
    assert source is not None  # noqa: S101 - whoever makes an answer has decoded something
    return source


_IMAGE, _PAGES, _VOLUME = ("image",), ("image", "stack"), ("volume",)
_HEAD_STD = frozenset({"head_std"})
_SCORES = frozenset({"scores"})
_OBJECTS = frozenset({"objects"})
_REPORT = frozenset({"report"})

# In the order in which a header Accept finds them.
ENCODERS: dict[str, Encoder] = {
    "png": Encoder("image/png", "mask.png", lambda p: png.encode(p.mask, p.colors), _IMAGE),
    "nifti": Encoder(
        "application/gzip", "mask.nii.gz", lambda p: nifti.encode(_volume(p.source), p.mask, p.colors, p.names), _VOLUME
    ),
    "tiff": Encoder("image/tiff", "mask.tif", lambda p: tiff.encode(p.mask, p.colors), _PAGES),
    "json": Encoder("application/json", "statistics.json", lambda p: json.encode(p.report), needs=_REPORT | _OBJECTS, packed=False),
    "npz": Encoder("application/x-npz", "scores.npz", lambda p: npz.encode(p.mask), needs=_SCORES),
    "png16": Encoder("image/png", "score.png", lambda p: png16.encode(p.mask), _IMAGE, _SCORES),
    "overlay": Encoder("image/png", "overlay.png", lambda p: overlay.encode(_any(p.source), p.mask, p.colors), image_bytes=17),
    "png1": Encoder("image/png", "mask_1bit.png", lambda p: png.one_bit(p.mask), _IMAGE),
    "nrrd": Encoder(
        "application/x-nrrd", "mask.seg.nrrd", lambda p: nrrd.encode(_volume(p.source), p.mask, p.colors, p.names), _VOLUME
    ),
    "labels_png": Encoder("image/png", "labels.png", lambda p: png.labels(p.mask), _IMAGE, _OBJECTS),
    "labels_tiff": Encoder("image/tiff", "labels.tif", lambda p: tiff.labels(p.mask), _PAGES, _OBJECTS),
    "labels_nifti": Encoder(
        "application/gzip", "labels.nii.gz", lambda p: nifti.labels(_volume(p.source), p.mask), _VOLUME, _OBJECTS
    ),
    "csv": Encoder(
        "text/csv",
        "objects.csv",
        lambda p: csv.encode(p.mask, p.names, p.source),
        needs=_OBJECTS,
        packed=False,
        image_bytes=75,
        most_bytes=500_000_000,
    ),
    "geojson": Encoder(
        "application/geo+json",
        "objects.geojson",
        lambda p: p.geojson,
        _IMAGE,
        _OBJECTS,
        packed=False,
        outlines=True,
        image_bytes=160,
        most_bytes=160 * outlines.MOST_CORNERS,
    ),
    "geojson_gz": Encoder(
        "application/gzip",
        "objects.geojson.gz",
        lambda p: geojson.packed(p.geojson),
        _IMAGE,
        _OBJECTS,
        outlines=True,
        image_bytes=160,
        most_bytes=160 * outlines.MOST_CORNERS,
    ),
    "coco": Encoder(
        "application/json",
        "coco.json",
        lambda p: coco.encode(p.mask, p.names, p.file, p.stop),
        _IMAGE,
        _OBJECTS,
        packed=False,
        outlines=True,
        image_bytes=90,
        most_bytes=90 * coco.MOST_RUNS,
    ),
    "npz8": Encoder("application/x-npz", "scores_8bit.npz", lambda p: npz.with_bytes(p.mask), needs=_SCORES),
    "scores_tiff": Encoder("image/tiff", "scores.tif", lambda p: tiff.scores(p.mask, p.names), _PAGES, _SCORES),
    "scores_nifti": Encoder(
        "application/gzip", "scores.nii.gz", lambda p: nifti.scores(_volume(p.source), p.mask), _VOLUME, _SCORES
    ),
    "overlay_jpeg": Encoder("image/jpeg", "overlay.jpg", lambda p: overlay.jpeg(_any(p.source), p.mask, p.colors), image_bytes=17),
    "picture": Encoder("image/png", "picture.png", lambda p: overlay.picture(_image(p.source)), _IMAGE, image_bytes=12),
    "uncertainty_png": Encoder("image/png", "uncertainty.png", lambda p: uncertainty.as_png(p.mask), _IMAGE, _HEAD_STD),
    "uncertainty_tiff": Encoder("image/tiff", "uncertainty.tif", lambda p: uncertainty.as_tiff(p.mask), _PAGES, _HEAD_STD),
    "uncertainty_nifti": Encoder(
        "application/gzip", "uncertainty.nii.gz", lambda p: uncertainty.as_nifti(_volume(p.source), p.mask), _VOLUME, _HEAD_STD
    ),
}

# What answers like with like, and what `format=mask` stands for.
DEFAULTS = {"image": "png", "stack": "tiff", "volume": "nifti"}
LABELS = {"image": "labels_png", "stack": "labels_tiff", "volume": "labels_nifti"}
MASK = "mask"
_KINDS = {"image": "an image", "stack": "a stack of pages", "volume": "a volume"}

# Dates would make the same answer other bytes each time; this is the earliest that a zip can hold.
EPOCH = (1980, 1, 1, 0, 0, 0)


def like(input_header: InputHeader | None, *, instances: bool = False) -> str:
    """What `format=mask` stands for: as the input, or the numbers of its objects in the same way."""
    kind = input_header.kind if input_header else "image"
    if instances:
        return LABELS[kind]
    # Of volumes there are two families.
    return input_header.family if input_header and kind == "volume" and not _sheared(input_header) else DEFAULTS[kind]


def _sheared(input_header: InputHeader | None) -> bool:
    """Whether NRRD is no use: ITK, and with it Slicer, would read the volume elsewhere, or not at all."""
    return input_header is not None and input_header.affine is not None and geometry.is_sheared(input_header.affine)


def choose(
    wanted: str | None, accept: str | None, input_header: InputHeader | None = None, *, instances: bool = False
) -> tuple[str, ...]:
    """The output formats: those named, else the most wanted in the Accept header that exists, else what the input is.

    Args:
        wanted: as asked for: a name, or several by comma; "mask" is what the input is. Or None.
        accept: the Accept header, or None.
        input_header: of the input; None while it is not known, when any row that could do is given.
        instances: whether the numbers of objects are the mask that is meant.

    Raises:
        UnknownFormat: lists what exists.
    """
    kind, sheared = input_header.kind if input_header else None, _sheared(input_header)
    fitting = [key for key, row in ENCODERS.items() if (kind is None or kind in row.kinds) and not (sheared and key == "nrrd")]
    default = like(input_header, instances=instances)
    if wanted is not None:
        return tuple(dict.fromkeys(_named(name, fitting, kind or "image", default) for name in _split(wanted)))
    types = _by_preference(accept or "*/*")
    for media_type in types:
        for key in (default, *fitting):
            if fnmatchcase(ENCODERS[key].media_type, media_type):
                return (key,)
    # Of zips what is in them is as the input.
    if any(t in ("text/html", "application/problem+json", "application/zip") for t in types):
        return (default,)
    raise UnknownFormat(f"nothing in Accept: {accept} is offered; use format= with one of: {', '.join(fitting)}")


def _split(wanted: str) -> list[str]:
    return [name.strip() for name in wanted.split(",")]


def _named(name: str, fitting: list[str], kind: str, default: str) -> str:
    if name == MASK:
        return default
    exists = ", ".join(fitting)
    if name not in ENCODERS:
        raise UnknownFormat(f"format={name!r:.60} does not exist; there are: {MASK} (as the input), {exists}")
    if name == "nrrd" and kind == "volume" and name not in fitting:
        raise UnknownFormat(
            f"format={name!r} does not fit: the volume's axes are not at right angles (sheared, as by a tilted gantry), and Slicer and ITK "
            "would read the mask elsewhere; use nifti"
        )
    if name not in fitting:
        raise UnknownFormat(f"format={name!r} does not fit: the input is {_KINDS[kind]}; there are: {exists}")
    return name


def needs(names: tuple[str, ...]) -> frozenset[str]:
    """What the product must hold for these formats."""
    return frozenset().union(*(ENCODERS[name].needs for name in names))


def memory(names: tuple[str, ...], input_header: InputHeader) -> int:
    """Bytes that encoding takes at the most: one format after the other, each dropped but for what is sent."""
    if input_header.kind != "image":
        return 0
    rows, pixels = [ENCODERS[name] for name in names], math.prod(input_header.size)
    return max(min(row.image_bytes * pixels, row.most_bytes) for row in rows)


def wants(wanted: str | None, what: str) -> bool:
    """Whether one of the formats asked for needs it, whatever the input is."""
    return any(what in ENCODERS[name].needs for name in _split(wanted or "") if name in ENCODERS)


def without(wanted: str | None, what: str) -> str | None:
    """The formats asked for less those that need it; the mask, if none is left."""
    return ",".join(name for name in _split(wanted) if not wants(name, what)) or MASK if wanted else wanted


def encode(names: tuple[str, ...], result: SegmentationResult) -> Encoded:
    """One format as it is, several as a zip with a file for each.

    Raises:
        InvalidParameter: there are too many objects, or they have too many corners.
        Stopped: see `Product`.
    """
    rows = [ENCODERS[name] for name in names]
    if len(rows) == 1:
        return Encoded(rows[0].encode(result), rows[0].media_type, rows[0].file)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for row in rows:
            result.stop.check()
            method = zipfile.ZIP_STORED if row.packed else zipfile.ZIP_DEFLATED
            archive.writestr(zipfile.ZipInfo(row.file, EPOCH), row.encode(result), method, compresslevel=1)
    return Encoded(out.getvalue(), "application/zip", "mask.zip")


def _by_preference(accept: str) -> list[str]:
    """The media types of an Accept header, most wanted first; q=0 means unwanted."""
    weighted: list[tuple[float, str]] = []
    for part in accept.split(","):
        media_type, *parameters = (piece.strip().lower() for piece in part.split(";"))
        given = next((p.removeprefix("q=") for p in parameters if p.startswith("q=")), "1")
        weight = float(given) if re.fullmatch(r"[01](\.\d{0,3})?", given) else 1.0
        weighted.append((weight, media_type))
    return [media_type for weight, media_type in sorted(weighted, key=lambda pair: -pair[0]) if weight > 0]
