"""Seconds per output format, beside the same file written by the usual library at the fastest compression that it documents.

    python -m bench.encoders [--repeats 5]     (about 1 minute)

One image of 4096 × 4096 pixels with 30,000 objects, one volume of 256³ voxels; both ways get the same arrays
in the same process. Formats without a usual library have no rival: those of objects, where outlining each one
in a mask of its own, as tutorials do, takes minutes and compares nothing.

| library | setting | its documentation |
|---|---|---|
| Pillow | compress_level=1 | "1 gives best speed" |
| tifffile | zlib, level 1 | compressionargs of imagecodecs' zlib, 1 the fastest |
| numpy | savez_compressed | has no setting |
| nibabel | level 1 | `Opener.default_compresslevel` |
| pynrrd | level 1 | level 1 "is the fastest" |
"""

import argparse
import functools
import gzip
import io
import time
from collections.abc import Callable
from typing import Any

import nrrd
import numpy as np
import tifffile
from jaxtyping import Float16, Int32
from nibabel.nifti1 import Nifti1Image
from PIL import Image as Pillow
from rich.progress import track
from scipy import ndimage

from bench.inputs import picture
from bench.table import write
from server.arrays import Image, LabelledMask, Volume
from server.imaging.encode import ENCODERS, SegmentationResult
from server.segment.labels import connected_components, measure
from server.segment.report import encode_response

SIDE, OBJECTS, VOXELS = 4096, 30_000, 256
# Goals of the project in seconds: for a mask, and for outlines of all objects.
MASK_GOAL_S, OUTLINES_GOAL_S = 0.25, 1.5
# A run that takes longer, in seconds, is not repeated.
LONG_S = 2.0
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
    present, inverse = np.unique(labels, return_inverse=True)
    compact: Int32[np.ndarray, "H W"] = np.arange(len(present), dtype=np.int32)[inverse.reshape(labels.shape)]
    return compact


def probabilities(inside: np.ndarray) -> np.ndarray:
    """(1, ...) float16: a blurred mask with noise where it is neither 0 nor 1."""
    scores = ndimage.gaussian_filter(inside.astype(np.float32), 1.5)
    noise = np.random.default_rng(2).normal(0, 0.002, scores.shape).astype(np.float32)
    grainy: Float16[np.ndarray, "*size"] = np.clip(
        scores + noise * ((scores > 0.01) & (scores < 0.99)), 0, 1
    ).astype(np.float16)
    return grainy[None]


def masked(labels: np.ndarray) -> LabelledMask:
    """A mask with everything that a format may need; its uncertainty is 0 where the scores are."""
    inside = (
        np.asfortranarray(labels > 0, dtype=np.uint8) if labels.ndim == 3 else (labels > 0).astype(np.uint8)
    )
    scores = probabilities(inside)
    head_std = (scores[0] * (1 - scores[0])).astype(np.float16)
    return LabelledMask(
        inside, scores, head_std, objects=measure(labels, int(labels.max()), inside, scores[0])
    )


def image() -> SegmentationResult:
    """The 2D case: a real image enlarged eightfold, with the grain of a camera."""
    large = np.asarray(
        Pillow.fromarray(picture(SIDE // 8)).resize((SIDE, SIDE), Pillow.Resampling.BICUBIC), dtype=np.float32
    )
    photograph = np.clip(large + np.random.default_rng(3).normal(0, 2, large.shape), 0, 255).astype(np.uint8)
    return SegmentationResult(Image(photograph), masked(ellipses()), COLORS, NAMES)


def volume() -> SegmentationResult:
    """The 3D case: blobs, in the order of files."""
    smooth = ndimage.gaussian_filter(
        np.random.default_rng(4).normal(size=(VOXELS,) * 3).astype(np.float32), 6
    )
    labels = np.asfortranarray(ndimage.label(smooth > 0.02)[0], dtype=np.int32)
    header = Nifti1Image(np.zeros((VOXELS,) * 3, dtype=np.int16), np.diag([1, 1, 1.5, 1])).header
    source = Volume(smooth[..., None], affine=np.diag([1, 1, 1.5, 1.0]), file_header=header)
    return SegmentationResult(source, masked(labels), COLORS, NAMES)


def by_pillow(pixels: np.ndarray) -> bytes:
    """PNG."""
    out = io.BytesIO()
    Pillow.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()


def by_tifffile(pages: np.ndarray) -> bytes:
    """TIFF."""
    out = io.BytesIO()
    tifffile.imwrite(out, pages, compression="zlib", compressionargs={"level": 1})
    return out.getvalue()


def by_numpy(**arrays: np.ndarray) -> bytes:
    """NPZ."""
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


def by_nibabel(values: np.ndarray, affine: np.ndarray) -> bytes:
    """NIfTI, as `nibabel.save` writes .nii.gz."""
    return gzip.compress(Nifti1Image(values, affine).to_bytes(), 1)


def by_pynrrd(values: np.ndarray, affine: np.ndarray) -> bytes:
    """NRRD."""
    out = io.BytesIO()
    header = {
        "space": "left-posterior-superior",
        "space directions": affine[:3, :3].T,
        "space origin": affine[:3, 3],
    }
    nrrd.write(out, values, header, compression_level=1)
    return out.getvalue()


def rivals(flat: SegmentationResult, solid: SegmentationResult) -> dict[str, tuple[str, Callable[[], bytes]]]:
    """Library and function per format."""
    mask, scores, pixels = flat.mask.classes, flat.scores, flat.image.pixels
    eight = np.rint(scores[0].astype(np.float32) * 255).astype(np.uint8)
    wide = flat.objects.labels.astype(np.uint16)
    affine = solid.affine
    return {
        "mask.png": ("Pillow", lambda: by_pillow(mask)),
        "mask_1bit.png": ("Pillow", lambda: by_pillow(mask > 0)),
        "mask.tiff": ("tifffile", lambda: by_tifffile(mask)),
        "mask.nii.gz": ("nibabel", lambda: by_nibabel(solid.mask.classes, affine)),
        "mask.seg.nrrd": (
            "pynrrd",
            lambda: by_pynrrd(solid.mask.classes, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine),
        ),
        "labels.png": ("Pillow", lambda: by_pillow(wide)),
        "labels.tiff": ("tifffile", lambda: by_tifffile(wide)),
        "labels.nii.gz": ("nibabel", lambda: by_nibabel(solid.objects.labels, affine)),
        "scores.png": (
            "Pillow",
            lambda: by_pillow(np.rint(scores[0].astype(np.float32) * 65535).astype(np.uint16)),
        ),
        "scores.tiff": ("tifffile", lambda: by_tifffile(eight)),
        "scores.npz": ("numpy", lambda: by_numpy(mask=mask, probabilities=scores)),
        "scores_8bit.npz": ("numpy", lambda: by_numpy(mask=mask, probabilities=eight)),
        "picture": ("Pillow", lambda: by_pillow(pixels)),
    }


def timed(make: Callable[[], bytes], repeats: int) -> tuple[float, int]:
    """Seconds of the fastest run, and bytes; a run that takes long is not repeated."""
    spent: list[float] = []
    while not spent or (len(spent) < repeats and spent[0] < LONG_S):
        start = time.perf_counter()
        body = make()
        spent.append(time.perf_counter() - start)
    return min(spent), len(body)


def encoded(result: SegmentationResult, name: str) -> bytes:
    """The answer in one format."""
    return encode_response(result, (name,), {}).body


def main() -> None:
    """Measures, prints, writes results/encoders.{md,json}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    flat, solid = image(), volume()
    libraries = rivals(flat, solid)
    facts: list[dict[str, Any]] = []
    for name, row in track(list(ENCODERS.items()), "formats"):
        result = flat if "image" in row.kinds else solid
        seconds, size = timed(functools.partial(encoded, result, name), repeats)
        fact = {
            "format": name,
            "of": "image" if result is flat else "volume",
            "seconds": seconds,
            "bytes": size,
        }
        fact["goal_seconds"] = OUTLINES_GOAL_S if row.outlines else MASK_GOAL_S
        if name in libraries:
            library, function = libraries[name]
            fact |= dict(
                zip(
                    ("library", "library_seconds", "library_bytes"),
                    (library, *timed(function, repeats)),
                    strict=True,
                )
            )
        facts.append(fact)
    rows = [
        [
            fact["format"], fact["of"], f"{fact['seconds']:.3f}", f"{fact['bytes'] / 1e6:.2f}",
            f"{fact['goal_seconds']:g}" + ("" if fact["seconds"] <= fact["goal_seconds"] else " (missed)"), fact.get("library", ""),
            *(f"{fact[key] / scale:.{digits}f}" if key in fact else "" for key, scale, digits in (("library_seconds", 1, 3), ("library_bytes", 1e6, 2))),
        ]
        for fact in facts
    ]  # fmt: skip
    finding, _ = timed(lambda: bytes(len(connected_components(flat.mask.classes, flat.scores[0]))), repeats)
    caption = (
        f"Seconds per format: an image of {SIDE} × {SIDE} pixels with {len(flat.objects):,} objects, a volume of {VOXELS}³ voxels; the "
        f"fastest of {repeats}. Formats of objects need them found, which takes {finding:.3f} s more, once. Libraries at their fastest "
        "documented compression."
    )
    write("encoders", caption, ["format", "of", "s", "MB", "goal s", "library", "s", "MB"], rows, facts)


if __name__ == "__main__":
    main()
