"""The regular volume that placed frames form: their order along the normal and one affine, or the reason why there is none."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from server.errors import Unreadable
from server.imaging.dicom_frames import Frame
from server.imaging.dicom_stream import FORMAT
from server.imaging.geometry import AFFINE_TOLERANCE_VOXELS, check_affine

# Difference of two direction cosines, and of two spacings as a share, that rounding in headers causes.
COSINE_TOLERANCE, SPACING_TOLERANCE = 1e-3, 1e-3
# Distance in mm below which two slices have the same position.
SAME_MM = 1e-3

# Left, posterior, superior to right, anterior, superior.
SIGNS = np.array([-1.0, -1.0, 1.0, 1.0])
ADVICE = "ImagePositionPatient, ImageOrientationPatient, PixelSpacing"


def alike(one: Frame, other: Frame) -> bool:
    """Returns whether two frames have the same orientation and spacing."""
    return bool(
        np.abs(np.subtract(one.orientation, other.orientation)).max() < COSINE_TOLERANCE  # type: ignore[arg-type]
        and np.allclose(one.spacing, other.spacing, rtol=SPACING_TOLERANCE)  # type: ignore[arg-type]
    )


def normal(frame: Frame) -> tuple[Float64[ndarray, " 3"], Float64[ndarray, " 3"], Float64[ndarray, " 3"]]:
    """Returns the unit vectors along a row, along a column, and of their cross product.

    Raises:
        Unreadable: The directions are not unit vectors at right angles.
    """
    row, column = np.array(frame.orientation[:3]), np.array(frame.orientation[3:])  # type: ignore[index]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    cosine = abs(float(row @ column))
    if not all(abs(length - 1) < 0.01 for length in lengths) or cosine > COSINE_TOLERANCE:
        raise Unreadable(
            f"ImageOrientationPatient holds directions of lengths {lengths[0]:.4g} and {lengths[1]:.4g} and cosine {cosine:.2g}; "
            "they are unit vectors at right angles. Repair the header",
            reason="orientation",
            format=FORMAT,
            field="ImageOrientationPatient",
        )
    row = row / lengths[0]
    column = column - (column @ row) * row
    column = column / np.linalg.norm(column)
    return row, column, np.cross(row, column)


def check_alike(frames: Sequence[Frame]) -> None:
    """Refuses frames of several orientations or spacings.

    Raises:
        Unreadable: Gives the number of frames of each.
    """
    kinds: list[Frame] = []
    counts: Counter[int] = Counter()
    for frame in frames:
        kind = next((k for k, other in enumerate(kinds) if alike(frame, other)), len(kinds))
        if kind == len(kinds):
            kinds.append(frame)
        counts[kind] += 1
        if len(kinds) > 20:
            break
    if len(kinds) == 1:
        return
    shown = "; ".join(
        f"{counts[k]} of orientation {_numbers(kinds[k].orientation)} and spacing {_numbers(kinds[k].spacing)} mm"
        for k in range(min(len(kinds), 3))
    )
    more = f"; and {len(kinds) - 3} more kinds" if len(kinds) > 3 else ""
    raise Unreadable(
        f"the slices do not form one volume, because their orientations or spacings differ: {shown}{more}. Send the slices of "
        "one stack",
        reason="mixed-orientations",
        format=FORMAT,
        limit=1,
        actual=len(kinds),
        unit="orientations",
    )


def stack(frames: Sequence[Frame]) -> tuple[list[int], Float64[ndarray, "4 4"]]:
    """Returns the order of frames along the normal, and the affine of their volume in RAS.

    Args:
        frames: Two or more frames of one orientation and spacing, in any order.

    Raises:
        Unreadable: Positions are twice there, missing, or shifted against each other (gantry tilt).
    """
    # The result does not depend on the order of the files.
    ranked = sorted(frames, key=_place)
    check_alike(ranked)
    first = ranked[0]
    row, column, across = normal(first)
    positions = np.array([frame.position for frame in frames])
    depths = positions @ across
    order = np.argsort(depths, kind="stable")
    depths, positions = depths[order], positions[order]
    _check_steps(depths)
    step = float(depths[-1] - depths[0]) / (len(frames) - 1)
    spacing = first.spacing or (1.0, 1.0)
    _check_tilt(positions - positions[0], row, column, across, spacing)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * spacing[1], column * spacing[0], across * step
    affine[:3, 3] = positions[0]
    # Zero is added because -0 is written in reports.
    affine = SIGNS[:, None] * affine + 0.0
    check_affine(affine, ADVICE)
    return [int(index) for index in order], affine


def _place(frame: Frame) -> tuple[tuple[float, ...], ...]:
    return frame.position or (), frame.orientation or (), frame.spacing or ()


def _check_steps(depths: Float64[ndarray, " n"]) -> None:
    """Refuses positions that are not evenly spaced."""
    steps = np.diff(depths)
    if same := int((steps < SAME_MM).sum()):
        distinct = len(depths) - same
        raise Unreadable(
            f"{len(depths)} slices lie at {distinct} positions, of which one at {depths[int(np.argmin(steps))]:.4g} mm along the normal "
            "is there several times (several times, echoes or phases?); send one slice for each position",
            reason="duplicate-positions",
            format=FORMAT,
            limit=distinct,
            actual=len(depths),
            unit="slices",
        )
    median = float(np.median(steps))
    regular = np.linspace(depths[0], depths[-1], len(depths))
    even = (depths[-1] - depths[0]) / (len(depths) - 1)
    if np.abs(depths - regular).max() <= AFFINE_TOLERANCE_VOXELS * even:
        return
    worst = int(np.argmax(np.abs(steps - median)))
    missing = round(float(steps[worst]) / median) - 1
    hint = f" ({missing} missing?)" if missing > 0 else ""
    raise Unreadable(
        f"the slices are not evenly spaced: slices {worst + 1} and {worst + 2} of {len(depths)} are {steps[worst]:.4g} mm apart{hint}, "
        f"most others {median:.4g} mm. Send all slices of the stack, or resample it",
        reason="gap",
        format=FORMAT,
        limit=round(median, 4),
        actual=round(float(steps[worst]), 4),
        unit="mm",
    )


def _check_tilt(
    offsets: Float64[ndarray, "n 3"],
    row: Float64[ndarray, " 3"],
    column: Float64[ndarray, " 3"],
    across: Float64[ndarray, " 3"],
    spacing: Sequence[float],
) -> None:
    """Refuses slices that are shifted along their rows or columns, as those of a tilted gantry."""
    shifts = np.stack([offsets @ row / spacing[1], offsets @ column / spacing[0]], axis=1)
    if np.abs(shifts).max() <= AFFINE_TOLERANCE_VOXELS:
        return
    sideways = np.linalg.norm(np.stack([offsets @ row, offsets @ column], axis=1), axis=1)
    worst = int(np.argmax(sideways))
    degrees = float(np.degrees(np.arctan2(sideways[worst], abs(float(offsets[worst] @ across)))))
    raise Unreadable(
        f"the slices are shifted sideways by up to {sideways[worst]:.4g} mm against the normal of the stack (gantry tilt of {degrees:.3g} "
        "degrees?), so that they form no volume of right angles; resample the series (dcm2niix does) and send that",
        reason="gantry-tilt",
        format=FORMAT,
        limit=AFFINE_TOLERANCE_VOXELS,
        actual=round(float(np.abs(shifts).max()), 3),
        unit="pixels",
        remedy="dcm2niix",
    )


def _numbers(values: Sequence[float] | None) -> str:
    return " ".join(f"{value:.4g}" for value in values or ())
