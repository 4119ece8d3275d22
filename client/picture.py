"""The masks of several graphs side by side over the input."""

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

# Pixels of the longer side of a panel, between panels, and of the line of text under each.
SIDE, GAP, TEXT = 360, 8, 34
OPACITY = 0.5


def flat(values: NDArray[Any], mask: NDArray[Any], *, volume: bool) -> NDArray[Any]:
    """The plane of a volume or stack in which a mask has most foreground; an image as it is.

    Args:
        values: what is shown, on the mask's grid; channels may follow.
        mask: (H, W), (S, H, W) of a stack, or (X, Y, Z).
        volume: whether it is one, whose planes lie along the last axis and are shown upright.
    """
    if mask.ndim == 2:
        return values
    axis = 2 if volume else 0
    counts = np.count_nonzero(mask, axis=tuple(a for a in range(3) if a != axis))
    # Of an empty one the middle.
    plane = int(counts.argmax()) if counts.any() else len(counts) // 2
    found = values.take(plane, axis=axis)
    return np.rot90(found) if volume else found


def backdrop(path: Path, mask: NDArray[Any]) -> NDArray[Any]:
    """The input as 8 bits, (*grid, 3); black where it cannot be read here."""
    values: NDArray[Any] = np.zeros(0)
    # Only for looking at: what the server could read is segmented, whether or not it can be shown.
    with contextlib.suppress(Exception):
        values = _read(path)
    if values.shape[: mask.ndim] != mask.shape:
        return np.zeros((*mask.shape, 3), np.uint8)
    values = values.reshape(*mask.shape, -1).astype(np.float32)
    low, high = np.nanpercentile(values, (0.5, 99.5))
    grey = np.clip((np.nan_to_num(values) - low) / max(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
    return grey[..., :3] if grey.shape[-1] >= 3 else np.repeat(grey[..., :1], 3, axis=-1)


def _read(path: Path) -> NDArray[Any]:
    if path.name.lower().endswith((".nii", ".nii.gz")):
        import nibabel as nib

        return np.asanyarray(nib.load(os.fspath(path)).dataobj)
    if path.suffix.lower() in (".tif", ".tiff"):
        import tifffile

        return np.asarray(tifffile.imread(path))
    from PIL import Image, ImageOps

    with Image.open(path) as picture:
        upright = ImageOps.exif_transpose(picture)
        return np.asarray(upright if upright.mode in ("L", "RGB", "I;16") else upright.convert("RGB"))


def over(pixels: Pixels, mask: NDArray[Any], colors: Mapping[int, str]) -> Pixels:
    """A mask over (H, W, 3) pixels."""
    shown = pixels.astype(np.float32)
    for value, color in colors.items():
        here = mask == value
        shown[here] = shown[here] * (1 - OPACITY) + np.array(list(bytes.fromhex(color.removeprefix("#")))) * OPACITY
    return shown.astype(np.uint8)


def side_by_side(panels: Sequence[tuple[str, Pixels]]) -> bytes:
    """A PNG of pictures of one size, each with a line or two of text below it."""
    from PIL import Image, ImageDraw

    height, width = panels[0][1].shape[:2]
    scale = SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Text needs room also under a narrow picture.
    step = max(size[0], SIDE // 2) + GAP
    sheet = Image.new("RGB", (step * len(panels) + GAP, size[1] + TEXT + 2 * GAP), "white")
    draw = ImageDraw.Draw(sheet)
    # Enlarged pixels stay pixels.
    way = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    for number, (text, pixels) in enumerate(panels):
        left = GAP + number * step
        sheet.paste(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, way), (left, GAP))
        draw.multiline_text((left, size[1] + GAP + 4), text, fill="black")
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()
