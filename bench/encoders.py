"""How long each output format takes, beside the obvious other way of making it.

    python -m bench.encoders [--repeats 5]

One image of 4096 × 4096 pixels with 30,000 objects, one volume of 256³ voxels; both ways get the same arrays in the same process. What
takes minutes the other way is timed for a few objects and multiplied; the table says so.
"""

import argparse
import dataclasses
import gzip
import io
import json
import time
from collections.abc import Callable
from typing import Any

import nrrd
import numpy as np
import tifffile
from jaxtyping import Float16, Int32
from nibabel.nifti1 import Nifti1Image
from PIL import Image as Pillow
from pycocotools import mask as coco_masks
from rich.progress import track
from scipy import ndimage
from skimage.measure import find_contours

from bench.levels import picture
from bench.table import write
from server.arrays import Image, Mask, Objects, Volume
from server.imaging.encode import ENCODERS, SegmentationResult
from server.imaging.encode.nrrd import TO_LPS
from server.imaging.encode.overlay import displayed, draw
from server.segment import statistics
from server.segment.labels import find as find_objects

SIDE, OBJECTS, VOXELS = 4096, 30_000, 256
# Seconds that the project set itself for a mask, and for as many polygons.
MASK_GOAL, POLYGONS_GOAL = 0.25, 1.5
POLYGONS = ("geojson", "geojson_gz", "coco")
# Objects that the slowest other ways are timed with.
SOME = 20
# Seconds after which a way is not run again.
LONG = 2.0

COLORS, NAMES = {1: (255, 127, 14)}, {1: "nucleus"}


def ellipses() -> Int32[np.ndarray, "H W"]:
    """(4096, 4096) int32: about 30,000 ellipses in a jittered grid, cut where they overlap."""
    rng = np.random.default_rng(0)
    rows = round(OBJECTS**0.5)
    step = SIDE / rows
    labels = np.zeros((SIDE, SIDE), dtype=np.int32)
    for number in range(rows * rows):
        center = (np.array(divmod(number, rows)) + 0.5) * step + rng.uniform(-3, 3, 2)
        a, b, angle = *rng.uniform(0.25 * step, 0.45 * step, 2), rng.uniform(0, np.pi)
        top, left = np.maximum(center - step / 2, 0).astype(int)
        part = labels[top : top + int(step) + 1, left : left + int(step) + 1]
        y, x = np.indices(part.shape) + np.array([top, left])[:, None, None] - center[:, None, None]
        u, v = y * np.cos(angle) + x * np.sin(angle), x * np.cos(angle) - y * np.sin(angle)
        part[(u / a) ** 2 + (v / b) ** 2 <= 1] = number + 1
    found = np.unique(labels[labels > 0])
    numbers = np.zeros(rows * rows + 1, dtype=np.int32)
    numbers[found] = np.arange(1, len(found) + 1)
    compact: Int32[np.ndarray, "H W"] = numbers[labels]
    return compact


def measured(labels: np.ndarray) -> Objects:
    """What encoders need to know of the objects."""
    boxes = ndimage.find_objects(labels)
    low, high = (np.array([[getattr(side, end) for side in box] for box in boxes], dtype=np.int64) for end in ("start", "stop"))
    count = len(boxes)
    pixels = np.bincount(labels.ravel(), minlength=count + 1)[1:].astype(np.int64)
    ones = np.ones(count, dtype=np.uint8)
    scores = np.random.default_rng(1).random(count).astype(np.float32)
    return Objects(labels, ones, pixels, (low + high - 1) / 2, low, high, scores, np.zeros(count, dtype=bool))


def probabilities(inside: np.ndarray) -> np.ndarray:
    """(1, ...) float16: a blurred mask with noise where it is neither 0 nor 1."""
    scores = ndimage.gaussian_filter(inside.astype(np.float32), 1.5)
    noise = np.random.default_rng(2).normal(0, 0.002, scores.shape).astype(np.float32)
    grainy: Float16[np.ndarray, "*size"] = np.clip(scores + noise * ((scores > 0.01) & (scores < 0.99)), 0, 1).astype(np.float16)
    return grainy[None]


def spread_of(scores: np.ndarray) -> np.ndarray:
    """Something that is 0 where the scores are sure, as the spread of heads is; float16."""
    head_std: Float16[np.ndarray, "*size"] = (scores[0] * (1 - scores[0])).astype(np.float16)
    return head_std


def statistics_of(product: SegmentationResult) -> bytes:
    """As `format=json` makes it of the mask's objects."""
    found = product.mask.objects
    assert found is not None  # noqa: S101 - made so
    classes = statistics.describe(found, NAMES, None, np.ones(1, dtype=np.float32), 0.5, {})
    report = {"classes": classes, "objects": statistics.listed(found, NAMES, None, None)}
    return ENCODERS["json"].encode(dataclasses.replace(product, report=report))


def photograph() -> np.ndarray:
    """(4096, 4096, 3) uint8: a real image enlarged eightfold, with the grain of a camera."""
    large = np.asarray(Pillow.fromarray(picture(SIDE // 8)).resize((SIDE, SIDE), Pillow.Resampling.BICUBIC), dtype=np.float32)
    return np.clip(large + np.random.default_rng(3).normal(0, 2, large.shape), 0, 255).astype(np.uint8)


def image() -> SegmentationResult:
    """The 2D case."""
    labels = ellipses()
    inside = (labels > 0).astype(np.uint8)
    scores = probabilities(inside)
    return SegmentationResult(Mask(inside, scores, spread_of(scores), measured(labels)), COLORS, NAMES, Image(photograph()))


def volume() -> SegmentationResult:
    """The 3D case: blobs, in the order of files."""
    smooth = ndimage.gaussian_filter(np.random.default_rng(4).normal(size=(VOXELS,) * 3).astype(np.float32), 6)
    inside = np.asfortranarray(smooth > 0.02, dtype=np.uint8)
    labels = np.asfortranarray(ndimage.label(inside)[0], dtype=np.int32)
    header = Nifti1Image(np.zeros((VOXELS,) * 3, dtype=np.int16), np.diag([1, 1, 1.5, 1])).header
    voxels = np.asfortranarray(smooth * 5000, dtype=np.int16)[..., None]
    source = Volume(voxels, header.get_best_affine(), header)
    scores = np.asfortranarray(probabilities(inside)[0])[None]
    return SegmentationResult(Mask(inside, scores, spread_of(scores), measured(labels)), COLORS, NAMES, source)


def by_pillow(pixels: np.ndarray) -> bytes:
    """PNG at Pillow's own level, which is 6."""
    out = io.BytesIO()
    Pillow.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def by_tifffile(pages: np.ndarray) -> bytes:
    """At zlib's own level, which is 6."""
    out = io.BytesIO()
    tifffile.imwrite(out, pages, compression="zlib")
    return out.getvalue()


def by_numpy(**arrays: np.ndarray) -> bytes:
    """As a notebook would."""
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


def by_nibabel(values: np.ndarray, source: Volume) -> bytes:
    """As nibabel.save does it for .nii.gz, at its level."""
    return gzip.compress(Nifti1Image(values, source.affine).to_bytes(), 1)


def by_pynrrd(values: np.ndarray, affine: np.ndarray) -> bytes:
    """With the level that slicerio takes by default."""
    out = io.BytesIO()
    header = {"space": "left-posterior-superior", "space directions": affine[:3, :3].T, "space origin": affine[:3, 3]}
    nrrd.write(out, values, header, compression_level=9)
    return out.getvalue()


def by_contours(found: Objects) -> bytes:
    """scikit-image's contours, object by object within their boxes, and json."""
    features = []
    for number, (low, high) in enumerate(zip(found.low, found.high, strict=True), 1):
        box = found.labels[low[0] : high[0], low[1] : high[1]]
        rings = [(ring[:, ::-1] + low[::-1] - 0.5).tolist() for ring in find_contours(np.pad(box == number, 1), 0.5)]
        features.append({"type": "Feature", "geometry": {"type": "Polygon", "coordinates": rings}, "properties": {}})
    return json.dumps({"type": "FeatureCollection", "features": features}).encode()


def by_pycocotools(found: Objects) -> bytes:
    """From a mask as large as the image for each object, as its documentation shows; of a few of them."""
    counts = [coco_masks.encode(np.asfortranarray(found.labels == number, dtype=np.uint8)) for number in range(1, SOME + 1)]
    return b"".join(one["counts"] for one in counts)


def others(flat: SegmentationResult, solid: SegmentationResult) -> dict[str, tuple[str, Callable[[], bytes], float]]:
    """Per format the other way: its name, itself, and what to multiply it with."""
    mask, found, scores = flat.mask.classes, flat.mask.objects, flat.mask.scores
    source = solid.source
    if found is None or scores is None or not isinstance(source, Volume) or source.affine is None or solid.mask.objects is None:
        raise TypeError("the two products are made whole")
    pixels, numbers = flat.source.values if flat.source else mask, solid.mask.objects.labels
    eight, wide = np.rint(scores[0].astype(np.float32) * 255).astype(np.uint8), found.labels.astype(np.uint16)
    affine = TO_LPS @ source.affine
    return {
        "png": ("Pillow", lambda: by_pillow(mask), 1),
        "png1": ("Pillow", lambda: by_pillow(mask > 0), 1),
        "tiff": ("tifffile", lambda: by_tifffile(mask), 1),
        "npz": ("numpy.savez_compressed", lambda: by_numpy(mask=mask, probabilities=scores), 1),
        "npz8": ("numpy.savez_compressed", lambda: by_numpy(mask=mask, probabilities=eight), 1),
        "png16": ("Pillow", lambda: by_pillow(np.rint(scores[0].astype(np.float32) * 65535).astype(np.uint16)), 1),
        "labels_png": ("Pillow", lambda: by_pillow(wide), 1),
        "labels_tiff": ("tifffile", lambda: by_tifffile(wide), 1),
        "scores_tiff": ("tifffile", lambda: by_tifffile(eight), 1),
        "geojson": ("skimage.find_contours, json", lambda: by_contours(found), 1),
        "geojson_gz": ("the same, gzip", lambda: gzip.compress(by_contours(found)), 1),
        "coco": (f"pycocotools, from {SOME} objects", lambda: by_pycocotools(found), len(found) / SOME),
        "overlay": ("the same pixels by Pillow", lambda: by_pillow(draw(Image(pixels), flat.mask, COLORS)), 1),
        "picture": ("Pillow", lambda: by_pillow(displayed(pixels)), 1),
        "nifti": ("nibabel", lambda: by_nibabel(solid.mask.classes, source), 1),
        "labels_nifti": ("nibabel", lambda: by_nibabel(numbers, source), 1),
        "nrrd": ("pynrrd", lambda: by_pynrrd(solid.mask.classes, affine), 1),
    }


def timed(make: Callable[[], bytes], repeats: int) -> tuple[float, int]:
    """Seconds of the fastest run, and bytes; what takes long is run once."""
    spent: list[float] = []
    while not spent or (len(spent) < repeats and spent[0] < LONG):
        start = time.perf_counter()
        body = make()
        spent.append(time.perf_counter() - start)
    return min(spent), len(body)


def main() -> None:
    """Measures, prints, writes results/encoders.{md,json}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    flat, solid = image(), volume()
    alternatives = others(flat, solid)
    facts: list[dict[str, Any]] = []
    for name, row in track(list(ENCODERS.items()), "formats"):
        product = flat if "image" in row.kinds else solid
        make = statistics_of if name == "json" else row.encode
        # Each time a product of its own, as some keep what they have made.
        seconds, size = timed(lambda make=make, product=product: make(dataclasses.replace(product)), arguments.repeats)  # type: ignore[misc]
        fact: dict[str, Any] = {"format": name, "of": "image" if product is flat else "volume", "seconds": seconds, "bytes": size}
        fact["goal_seconds"] = POLYGONS_GOAL if name in POLYGONS else MASK_GOAL
        if name in alternatives:
            other, differently, times = alternatives[name]
            spent, length = timed(differently, arguments.repeats)
            fact["other"] = {"name": other, "seconds": spent * times, "bytes": round(length * times)}
        facts.append(fact)
    rows = [
        [
            fact["format"], fact["of"], f"{fact['seconds']:.3f}", f"{fact['bytes'] / 1e6:.2f}",
            f"{fact['goal_seconds']:g}" + ("" if fact["seconds"] <= fact["goal_seconds"] else " (missed)"),
            *((fact["other"]["name"], f"{fact['other']['seconds']:.3f}", f"{fact['other']['bytes'] / 1e6:.2f}") if "other" in fact else ("", "", "")),
        ]
        for fact in facts
    ]  # fmt: skip
    count = len(flat.mask.objects or ())
    finding, _ = timed(lambda: bytes(len(find_objects(flat.mask.classes, flat.mask.head_std))), arguments.repeats)
    caption = (
        f"Seconds per format: an image of {SIDE} × {SIDE} pixels with {count:,} objects, a volume of {VOXELS}³ voxels; the fastest of "
        f"{arguments.repeats}. Formats of objects need them found, which takes {finding:.3f} s more, once. The other way is that of a notebook, at its defaults."
    )
    write("encoders", caption, ["format", "of", "s", "MB", "goal s", "the other way", "s", "MB"], rows, facts)


if __name__ == "__main__":
    main()
