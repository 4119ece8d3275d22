"""Grey pictures in false colours beside the same pictures in grey, and what the rule does to pictures in real colours.

    python -m bench.false_colour --data DATA [--level 2] [--every 3]

Fluorescence images of the validation and test splits are coloured (a tint, a ramp of a palette), written as a
file, and segmented. IoU is of the foreground against the labels, averaged over the images. The last row is
the images in real colours, of all splits: how many of them the rule would read as grey, or leave a note on.
"""

import argparse
import csv
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image as Pillow
from rich.progress import track

from bench.levels import BUNDLE
from bench.table import write
from export.calibrate import mean_overlap
from server.arrays import Image
from server.imaging.decode import decode
from server.imaging.decode_options import DecodeOptions
from server.runtime.bundle import Bundle, read_bundle
from server.runtime.engines import ENGINES
from server.runtime.machine import count_cores
from server.segment.sliding_window import infer_offline

MAX_PIXELS = 100_000_000
SPLITS = "train", "val", "test"

TINTS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "magenta": (1, 0, 1),
    "cyan": (0, 1, 1),
    "orange": (1, 0.5, 0),
}
Grey = UInt8[ndarray, "h w"]
Colors = UInt8[ndarray, "h w 3"]


@dataclass(frozen=True)
class Copy:
    """A way to write a grey picture.

    Attributes:
        name: What it is.
        write: Function of the grey picture that returns a file.
        reference: Name of the copy in grey to which it is compared.
        compared: Whether it is segmented as a colour picture, too.
    """

    name: str
    write: Callable[[Grey], bytes]
    reference: str = "grey, PNG"
    compared: bool = False


def tinted(grey: Grey, name: str, offset: int = 0, noise: float = 0) -> Colors:
    """The picture in one colour; other channels are constant, or constant and noise."""
    shares = np.array(TINTS[name])
    values = grey[..., None] * shares + offset * (shares == 0)
    values = values + np.random.default_rng(0).normal(0, noise, values.shape) * (shares == 0)
    colors: Colors = np.clip(values, 0, 255).round().astype(np.uint8)
    return colors


def png(pixels: Grey | Colors) -> bytes:
    """A PNG."""
    out = io.BytesIO()
    Pillow.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def jpeg(pixels: Grey | Colors, quality: int, subsampling: int = 2) -> bytes:
    """A JPEG; subsampling 2 halves both sides of the colours."""
    out = io.BytesIO()
    Pillow.fromarray(pixels).save(out, "JPEG", quality=quality, subsampling=subsampling)
    return out.getvalue()


def fire(grey: Grey) -> bytes:
    """A TIFF with a palette from black over blue, red and yellow to white, as of ImageJ's "fire"."""
    points = [
        (0, 0, 0),
        (0, 0, 128),
        (140, 0, 200),
        (200, 40, 60),
        (255, 150, 0),
        (255, 240, 80),
        (255, 255, 255),
    ]
    steps = np.linspace(0, len(points) - 1, 256)
    table = [np.interp(steps, range(len(points)), channel) for channel in zip(*points, strict=True)]
    out = io.BytesIO()
    colormap = np.array(table).astype(np.uint16) * 257
    tifffile.imwrite(out, grey, photometric="palette", colormap=colormap)
    return out.getvalue()


def tinted_png(name: str, offset: int, noise: float, grey: Grey) -> bytes:
    """A PNG of the picture in one colour."""
    return png(tinted(grey, name, offset, noise))


def tinted_jpeg(name: str, quality: int, subsampling: int, grey: Grey) -> bytes:
    """A JPEG of the picture in one colour."""
    return jpeg(tinted(grey, name), quality, subsampling)


def copies() -> Iterator[Copy]:
    """All ways to write a picture."""
    yield Copy("grey, PNG", png)
    for quality in (90, 75):
        yield Copy(f"grey, JPEG {quality}", partial(jpeg, quality=quality))
    for name in TINTS:
        yield Copy(f"{name}, PNG", partial(tinted_png, name, 0, 0), compared=True)
    for name in ("blue", "magenta"):
        yield Copy(f"{name}, others 20, PNG", partial(tinted_png, name, 20, 0))
        yield Copy(f"{name}, others 20 ± 3, PNG", partial(tinted_png, name, 20, 3))
    yield Copy("ramp of a palette, TIFF", fire)
    for name in TINTS:
        for quality, subsampling, title in ((90, 0, "4:4:4"), (90, 2, "4:2:0"), (75, 2, "4:2:0")):
            yield Copy(
                f"{name}, JPEG {quality} {title}",
                partial(tinted_jpeg, name, quality, subsampling),
                f"grey, JPEG {quality}",
            )


def names_of(data: Path, stain: str, splits: Sequence[str]) -> list[str]:
    """Names of the images of a stain."""
    with (data / "index.csv").open() as index:
        return [
            row["id"] for row in csv.DictReader(index) if row["stain"] == stain and row["split"] in splits
        ]


def decoded(data: bytes) -> Image:
    """The picture as the server reads it."""
    image = decode(io.BytesIO(data), DecodeOptions(MAX_PIXELS))
    if not isinstance(image, Image):
        raise SystemExit("a copy is not an image")
    return image


def as_colors(data: bytes) -> Image:
    """The colours as Pillow reads them, without the rule."""
    with Pillow.open(io.BytesIO(data)) as picture:
        return Image(np.asarray(picture.convert("RGB")))


def pixels(path: Path) -> UInt8[ndarray, "..."]:
    """Pixels of a file, by Pillow."""
    with Pillow.open(path) as picture:
        return np.asarray(picture)


class Measured:
    """Mean IoU over labelled images; a picture whose pixels were seen before is not segmented again."""

    def __init__(self, bundle: Bundle, level: int, labels: Sequence[Grey]) -> None:
        self._manifest, self._graph, self._labels = (
            bundle.manifest,
            bundle.manifest.graph(f"L{level}"),
            labels,
        )
        path = bundle.path(self._graph.name, "fp32")
        self._engine = ENGINES["onnxruntime"].open(path, "fp32", "cpu", count_cores())
        self._known: dict[tuple[int, bytes], float] = {}

    def mean_iou(self, images: Sequence[Image]) -> float:
        """Mean IoU of the foreground."""
        return float(np.mean([self._iou(number, image) for number, image in enumerate(images)]))

    def _iou(self, number: int, image: Image) -> float:
        key = number, hashlib.sha256(image.pixels.tobytes()).digest()
        if key not in self._known:
            mask = infer_offline(image, self._manifest, self._graph, self._engine)
            self._known[key] = mean_overlap(mask.classes, self._labels[number], [1])[0]
        return self._known[key]


def main() -> None:
    """Measures, prints, writes results/false_colour.{md,json}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--level", type=int, default=2)
    parser.add_argument("--every", type=int, default=3, help="take every third image")
    arguments = parser.parse_args()
    images, labels = arguments.data / "images", arguments.data / "labels"
    names = names_of(arguments.data, "fluorescence", ("val", "test"))[:: arguments.every]
    greys = [pixels(images / f"{name}.png") for name in names]
    measured = Measured(
        read_bundle(BUNDLE),
        arguments.level,
        [(pixels(labels / f"{name}.png") > 0).astype(np.uint8) for name in names],
    )
    facts: dict[str, dict[str, float]] = {}
    for copy in track(list(copies())):
        files = [copy.write(grey) for grey in greys]
        read = [decoded(file) for file in files]
        facts[copy.name] = {
            "read_as_grey": sum(image.pixels.shape[-1] == 1 for image in read),
            "iou": measured.mean_iou(read),
            "reference_iou": facts[copy.reference]["iou"] if facts else 0.0,
        }
        if copy.compared:
            facts[copy.name]["iou_as_colours"] = measured.mean_iou([as_colors(file) for file in files])
    real = [
        decoded((images / f"{name}.png").read_bytes())
        for name in names_of(arguments.data, "histology", SPLITS)
    ]
    changed = sum(bool(image.note) or image.pixels.shape[-1] != 3 for image in real)
    caption = (
        f"{arguments.data.name}, {len(names)} fluorescence images of the validation and test splits; level "
        f"{arguments.level}, fp32. IoU of the foreground in %: of the file as a colour picture, as the server reads "
        "it, and the difference to the grey picture in a file of the same kind."
    )
    headings = ["file", "read as grey", "IoU as colours", "IoU", "difference to grey"]
    rows = [_row(name, fact, len(names)) for name, fact in facts.items()]
    rows.append([f"histology, {len(real)} images as they are", f"{changed} of {len(real)}", "", "", ""])
    write(
        "false_colour",
        caption,
        headings,
        rows,
        facts | {"histology": {"images": len(real), "changed": changed}},
    )


def _row(name: str, fact: dict[str, float], images: int) -> list[str]:
    difference = fact["iou"] - fact["reference_iou"]
    return [
        name,
        f"{fact['read_as_grey']:.0f} of {images}",
        f"{fact['iou_as_colours'] * 100:.2f}" if "iou_as_colours" in fact else "",
        f"{fact['iou'] * 100:.2f}",
        "" if name.startswith("grey") else f"{difference * 100:+.2f}",
    ]


if __name__ == "__main__":
    main()
