"""The finished mask as the caller wants it: encoded, with a report where the format has one."""

import base64
import dataclasses
from typing import Any

import numpy as np

from server.arrays import Image, Mask, Volume
from server.imaging import encode as encoding
from server.imaging import geometry
from server.imaging.encode import ENCODERS, Encoded, Product
from server.runtime.bundle import Manifest
from server.segment import quality, statistics


def encode(
    mask: Mask,
    source: Image | Volume,
    manifest: Manifest,
    formats: tuple[str, ...],
    facts: dict[str, Any],
    overlaps: dict[int, quality.Overlap],
    seconds: dict[str, float],
    *,
    include_mask: bool,
) -> Encoded:
    """The answer.

    Args:
        mask: the answer.
        source: the decoded input.
        manifest: for names and colours.
        formats: see `encoding.choose`.
        facts: what was served, for the report.
        overlaps: with the reference, per class value; empty without one.
        seconds: per phase so far.
        include_mask: whether the report carries the mask too, in base64.
    """
    names = {c.value: c.name for c in manifest.classes}
    product = Product(mask, {c.value: rgb(c.color) for c in manifest.classes}, names, source)
    if "report" not in encoding.needs(formats):
        return encoding.encode(formats, product)
    affine = source.affine if isinstance(source, Volume) else None
    # By the determinant: the axes of a tilted gantry are not at right angles.
    voxel_mm3 = None if affine is None else float(abs(np.linalg.det(affine[:3, :3])))
    report = facts | {
        "size": dict(zip(("height", "width") if isinstance(source, Image) else ("x", "y", "z"), source.size, strict=True)),
        "classes": statistics.describe(mask.classes, names, voxel_mm3),
    }
    if affine is not None:
        report["spacing_mm"] = dict(zip("xyz", geometry.spacing(affine), strict=True))
    if overlaps:
        report["reference"] = {names[value]: {"iou": q.iou, "dice": q.dice} for value, q in overlaps.items()}
    if source.note:
        report["note"] = source.note
    if include_mask:
        like = encoding.DEFAULTS[source.extent.kind]
        report[f"mask_{like}"] = base64.b64encode(ENCODERS[like].encode(product)).decode()
    report["timings_ms"] = {phase: round(spent * 1e3, 2) for phase, spent in seconds.items()}
    return encoding.encode(formats, dataclasses.replace(product, report=report))


def rgb(color: str) -> tuple[int, int, int]:
    """Three bytes of "#rrggbb"."""
    red, green, blue = bytes.fromhex(color.removeprefix("#"))
    return red, green, blue
