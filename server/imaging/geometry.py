"""Maps the axes of a network to the axes of the caller's array, and back.

Voxels are read through a view that has the network's axes, and the mask is written through the same kind of
view of an array that has the caller's axes. Both directions share one mapping, so a mirrored input comes back
mirrored.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import scipy
from jaxtyping import Float32, Float64, Shaped
from nibabel import Nifti1Header, Nifti2Header, orientations
from numpy import ndarray

from server.arrays import Image, Volume
from server.errors import InvalidParameter, Unreadable

# Relative difference of two spacings below which voxels are not resampled, because that would only blur them.
SPACING_TOLERANCE = 0.01

# A spacing outside of these limits is a mistake, such as metres or micrometres without their unit. The pixels
# of electron microscopes are tenths of a nanometre.
MIN_SPACING_MM, MAX_SPACING_MM = 1e-7, 100.0

# Length in mm of each unit that formats and microscopes write, in lower case.
MM_PER_UNIT = {
    **dict.fromkeys(("å", "å", "angstrom", "angstroms"), 1e-7),
    **dict.fromkeys(("nm", "nanometer", "nanometers", "nanometre", "nanometres"), 1e-6),
    **dict.fromkeys(("µm", "μm", "um", "micron", "microns"), 1e-3),
    **dict.fromkeys(("micrometer", "micrometers", "micrometre", "micrometres"), 1e-3),
    # µ as Java and Python escape it.
    **dict.fromkeys(("\\u00b5m", "\\u03bcm", "\\xb5m"), 1e-3),
    **dict.fromkeys(("mm", "millimeter", "millimeters", "millimetre", "millimetres"), 1.0),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), 10.0),
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1e3),
    **dict.fromkeys(("inch", "inches", "in"), 25.4),
    **dict.fromkeys(("pm", "picometer", "picometers", "picometre", "picometres"), 1e-9),
}

# Deviation from right angles, as a cosine, that rounding in headers causes.
RIGHT_ANGLE_TOLERANCE = 1e-4

# Distance in voxels that rounding in headers causes between two affines of the same place.
AFFINE_TOLERANCE_VOXELS = 0.1

# Volume of the parallelepiped of the axes' unit vectors below which the axes count as linearly dependent.
MIN_DETERMINANT = 1e-3


@dataclass(frozen=True)
class Placement:
    """Describes the network's grid in the caller's array.

    Attributes:
        order: Axis of the caller's array per network axis.
        mirrored: Whether each network axis runs against the caller's.
        size: Voxels of the network's grid, along the network's axes.
        native: Voxels of the caller's grid, along the network's axes; a difference from `size` means
            resampling.
        flat: Whether the first axis counts slices for a network of two dimensions.
    """

    order: tuple[int, ...]
    mirrored: tuple[bool, ...]
    size: tuple[int, ...]
    native: tuple[int, ...]
    flat: bool = False

    @property
    def resampled(self) -> bool:
        """Whether the two grids have different voxels."""
        return self.size != self.native

    def view(self, array: Shaped[ndarray, "..."], leading: int = 0) -> Shaped[ndarray, "..."]:
        """Returns the caller's array along the network's axes, without a copy: writing to the view writes to the array.

        Args:
            array: Array of `leading` other axes, then the caller's spatial axes, then any further axes.
            leading: Number of axes before the spatial ones, e.g. 1 for scores (K, X, Y, Z).
        """
        first, last = range(leading), range(leading + len(self.order), array.ndim)
        transposed = array.transpose(*first, *(leading + axis for axis in self.order), *last)
        directions = (slice(None, None, -1 if mirrored else 1) for mirrored in self.mirrored)
        return transposed[(*(slice(None) for _ in first), *directions)]

    def resample(self, voxels: Shaped[ndarray, "*native C"]) -> Shaped[ndarray, "*size C"]:
        """Resamples a view's voxels linearly to the network's grid; returns the same array where the grids agree."""
        if not self.resampled:
            return voxels
        factors = [size / native for size, native in zip(self.size, self.native, strict=True)]
        resampled = np.empty((*self.size, voxels.shape[-1]), dtype=np.float32)
        for channel in range(voxels.shape[-1]):
            # grid_mode treats voxels as boxes, so the outer faces of the volume stay in place.
            scipy.ndimage.zoom(
                voxels[..., channel],
                factors,
                output=resampled[..., channel],
                order=1,
                mode="nearest",
                grid_mode=True,
            )
        return resampled


def place_image(size: tuple[int, ...]) -> Placement:
    """Places an image for a network of two dimensions: without any change."""
    return Placement((0, 1), (False, False), size, size)


def place_stack(size: tuple[int, ...], affine: Float64[ndarray, "4 4"] | None, axis: str) -> Placement:
    """Places a volume as slices for a network of two dimensions.

    Columns of a slice run along the first remaining axis, because viewers show slices so.

    Args:
        size: (X, Y, Z) in voxels.
        affine: (4, 4) voxel index to mm, of which the spacing is used; None for a stack of pages.
        axis: Axis along which slices follow each other: "0", "1", "2" or "auto". "auto" takes the pages of a
            stack; of a volume the only axis of one voxel, else the axis of the coarsest spacing, the last of
            several.

    Raises:
        InvalidParameter: The axis does not exist.
    """
    if axis not in ("auto", "0", "1", "2"):
        raise InvalidParameter(
            f"axis={axis!r:.20} does not exist; slices can follow each other along axis 0, 1, 2 or auto",
            parameter="axis",
            value=axis[:20],
            allowed=["auto", "0", "1", "2"],
        )
    slice_axis = _slice_axis(size, affine) if axis == "auto" else int(axis)
    columns, rows = (k for k in range(3) if k != slice_axis)
    order = (slice_axis, rows, columns)
    native = tuple(size[k] for k in order)
    return Placement(order, (False, False, False), native, native, flat=True)


def _slice_axis(size: tuple[int, ...], affine: Float64[ndarray, "4 4"] | None) -> int:
    """Returns the axis along which the slices of a volume follow each other."""
    if affine is None:
        return 2
    if size.count(1) == 1:
        return size.index(1)
    spacing_mm = spacing(affine)
    return max(k for k in range(3) if spacing_mm[k] > max(spacing_mm) * (1 - SPACING_TOLERANCE))


def place_volume(
    size: tuple[int, ...],
    affine: Float64[ndarray, "4 4"],
    orientation: str,
    network_spacing: tuple[float, ...] | None,
) -> Placement:
    """Places a volume for a network of three dimensions.

    Args:
        size: (X, Y, Z) in voxels.
        affine: (4, 4) voxel index to mm along right, anterior, superior.
        orientation: Directions of the network's axes, e.g. "RAS".
        network_spacing: Spacing along the network's axes in mm; None for any.
    """
    # A row per axis of the array: the network's axis, and 1 or -1.
    transform = orientations.ornt_transform(
        orientations.io_orientation(affine), orientations.axcodes2ornt(tuple(orientation))
    )
    order = tuple(int(np.flatnonzero(transform[:, 0] == k)[0]) for k in range(3))
    mirrored = tuple(bool(transform[axis, 1] < 0) for axis in order)
    native = tuple(size[axis] for axis in order)
    if network_spacing is None:
        return Placement(order, mirrored, native, native)
    spacing_mm = [spacing(affine)[axis] for axis in order]
    ratios = [here / there for here, there in zip(spacing_mm, network_spacing, strict=True)]
    resampled = tuple(
        n if abs(ratio - 1) <= SPACING_TOLERANCE else max(1, round(n * ratio))
        for n, ratio in zip(native, ratios, strict=True)
    )
    return Placement(order, mirrored, resampled, native)


def spacing(affine: Float64[ndarray, "4 4"]) -> tuple[float, float, float]:
    """Returns the distance in mm from voxel to voxel along each axis of the array."""
    with np.errstate(over="ignore"):
        x, y, z = np.sqrt(np.square(affine[:3, :3]).sum(axis=0)).tolist()
    return x, y, z


def decimals(step: float, least: int) -> int:
    """Returns how many decimals tell lengths apart that differ by a hundredth of a step, but at least `least`."""
    return max(least, 2 - math.floor(math.log10(step)))


def unit_mm(source: Image | Volume) -> float | None:
    """Returns the size of one pixel in mm² (also where each page is a time) or of one voxel in mm³; None if unknown."""
    if isinstance(source, Volume) and source.affine is not None:
        # The determinant is used because the axes of a tilted gantry are not at right angles.
        return float(abs(np.linalg.det(source.affine[:3, :3])))
    return None if source.spacing_mm is None else math.prod(source.spacing_mm)


def nifti_header(affine: Float64[ndarray, "4 4"], size: tuple[int, ...], unit: str = "mm") -> Nifti1Header:
    """Builds the header of NIfTI answers to volumes that came without one.

    Args:
        affine: (4, 4) voxel index to `unit`.
        size: (X, Y, Z) in voxels.
        unit: Unit of length as nibabel names it.
    """
    header = (Nifti1Header if max(size) < 2**15 else Nifti2Header)()
    header.set_data_shape(size)
    header.set_xyzt_units(unit)
    header.set_zooms(spacing(affine))
    if not is_sheared(affine):
        # A qform cannot express shear.
        header.set_qform(affine, "scanner")
    header.set_sform(affine, "scanner")
    return header


def is_sheared(affine: Float64[ndarray, "4 4"]) -> bool:
    """Returns whether the axes of a volume are not at right angles, as those of a tilted gantry."""
    directions = affine[:3, :3] / spacing(affine)
    return not np.abs(directions.T @ directions - np.eye(3)).max() < RIGHT_ANGLE_TOLERANCE


def max_displacement(size: tuple[int, ...], a: Float64[ndarray, "4 4"], b: Float64[ndarray, "4 4"]) -> float:
    """Returns the largest distance between the places of one voxel under two affines, in their unit.

    Only the corners of the volume are compared, because the distance is largest at one of them.
    """
    corners = np.array([(*corner, 1.0) for corner in itertools.product(*((0, side - 1) for side in size))])
    return float(np.linalg.norm(corners @ (a - b).T, axis=1).max())


def check_affine(affine: Float64[ndarray, "4 4"], fields: str) -> None:
    """Refuses an affine that places voxels nowhere.

    Args:
        affine: (4, 4) voxel index to mm.
        fields: Fields of the header that it comes from, for the message.

    Raises:
        Unreadable: It is not finite, its spacing is absurd, or its axes are linearly dependent.
    """
    if not np.isfinite(affine).all():
        raise Unreadable(
            f"the file's affine holds values that are not finite; repair it in the header ({fields})",
            reason="affine-nonfinite",
        )
    spacing_mm = spacing(affine)
    if not all(MIN_SPACING_MM <= mm <= MAX_SPACING_MM for mm in spacing_mm):
        shown = " × ".join(f"{mm:.4g}" for mm in spacing_mm)
        raise Unreadable(
            f"the voxels are {shown} mm apart; between {MIN_SPACING_MM:g} and {MAX_SPACING_MM:g} mm is read. Repair the "
            f"spacing or its unit in the header ({fields})",
            reason="spacing",
            # JSON cannot represent infinity.
            actual=[mm if math.isfinite(mm) else None for mm in spacing_mm],
            limit=[MIN_SPACING_MM, MAX_SPACING_MM],
            unit="mm",
        )
    if abs(np.linalg.det(affine[:3, :3] / np.array(spacing_mm))) < MIN_DETERMINANT:
        raise Unreadable(
            f"the file's affine is flat: two axes point the same way; repair it in the header ({fields})",
            reason="affine-flat",
        )


def lerp(
    array: Float32[ndarray, "K *rest"], size: int, axis: int, part: slice = slice(None)
) -> Float32[ndarray, "K *changed"]:
    """Resamples one axis linearly, on the same convention as `Placement.resample`.

    Args:
        array: (K, ...) values.
        size: Length of the resampled axis.
        axis: Axis to resample, at least 1.
        part: Indices of the resampled axis that are computed.
    """
    lower, weight = (values[part] for values in linear_weights(array.shape[axis], size))
    low: Float32[ndarray, "K *changed"] = np.take(array, lower, axis)
    if array.shape[axis] == size:
        return low
    upper = np.minimum(lower + 1, array.shape[axis] - 1)
    weight = weight.reshape(-1, *(1,) * (array.ndim - 1 - axis)).astype(np.float32)
    resampled: Float32[ndarray, "K *changed"] = low + (np.take(array, upper, axis) - low) * weight
    return resampled


def linear_weights(
    source: int, target: int
) -> tuple[Shaped[ndarray, " target"], Float64[ndarray, " target"]]:
    """Returns the lower neighbour of each target voxel among the source voxels, and the weight of the upper one.

    Args:
        source: Number of voxels along an axis.
        target: Number of voxels that fill the same extent.
    """
    position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    lower = position.astype(np.intp)
    return lower, position - lower
