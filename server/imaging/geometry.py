"""How the network's axes lie in the caller's array. One view serves both ways, so what goes in mirrored comes back mirrored.

Voxels are read through a view with the network's axes, and the mask is written through the same kind of view into an
array with the caller's: there is no inverse to get wrong.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Shaped
from nibabel import Nifti1Header, Nifti2Header, orientations
from numpy import ndarray
from scipy import ndimage

from server.arrays import Image, Volume
from server.errors import InvalidParameter, Unreadable

# A spacing this near to the network's is not resampled: it would only blur.
SAME_SPACING = 0.01

# mm; outside of it an affine is a mistake, such as metres or micrometres without their unit.
LEAST_SPACING, MOST_SPACING = 1e-4, 100.0

# mm per unit of length, as formats and microscopes write it, in small letters.
MM = {
    **dict.fromkeys(("nm", "nanometer", "nanometers"), 1e-6),
    **dict.fromkeys(("µm", "μm", "um", "micron", "microns", "micrometer", "micrometers", "\\u00b5m", "\\u03bcm", "\\xb5m"), 1e-3),
    **dict.fromkeys(("mm", "millimeter", "millimeters"), 1.0),
    **dict.fromkeys(("cm", "centimeter", "centimeters"), 10.0),
    **dict.fromkeys(("m", "meter", "meters"), 1e3),
    **dict.fromkeys(("inch", "inches", "in"), 25.4),
}

# By how much the axes of a rotation may miss right angles: what rounding in headers makes.
RIGID = 1e-4

# Voxels by which two affines may differ and still mean the same place: what rounding in headers makes.
SAME_PLACE = 0.1


@dataclass(frozen=True)
class Placement:
    """The network's grid in the caller's array.

    Attributes:
        order: network axis k is axis order[k] of the caller's.
        mirrored: which network axes run against the caller's.
        size: voxels of the network's grid, along its axes.
        native: voxels of the caller's grid along the network's axes; another size means resampling.
        flat: the first axis counts slices for a network of two dimensions.
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
        """The caller's array along the network's axes: no copy, what is written here is written there.

        Args:
            array: `leading` other axes, the caller's spatial axes, perhaps further axes.
            leading: axes before the spatial ones, e.g. 1 for scores (K, X, Y, Z).
        """
        first, last = range(leading), range(leading + len(self.order), array.ndim)
        turned = array.transpose(*first, *(leading + axis for axis in self.order), *last)
        steps = (slice(None, None, -1 if mirrored else 1) for mirrored in self.mirrored)
        return turned[(*(slice(None) for _ in first), *steps)]

    def resample(self, voxels: Shaped[ndarray, "*native C"]) -> Shaped[ndarray, "*size C"]:
        """A view's voxels on the network's grid, linearly; the same array where the grids agree."""
        if not self.resampled:
            return voxels
        factors = [size / native for size, native in zip(self.size, self.native, strict=True)]
        resampled = np.empty((*self.size, voxels.shape[-1]), dtype=np.float32)
        for channel in range(voxels.shape[-1]):
            # grid_mode: voxels are boxes and the boxes' outer faces stay in place.
            ndimage.zoom(
                voxels[..., channel], factors, output=resampled[..., channel], order=1, mode="nearest", grid_mode=True
            )  # fmt: skip
        return resampled


def place_image(size: tuple[int, ...]) -> Placement:
    """An image for a network of two dimensions: as it is."""
    return Placement((0, 1), (False, False), size, size)


def place_stack(size: tuple[int, ...], affine: Float64[ndarray, "4 4"] | None, axis: str) -> Placement:
    """A volume as slices for a network of two dimensions; columns run along the first remaining axis, as viewers show it.

    Args:
        size: (X, Y, Z).
        affine: tells the spacing; None for a stack of pages.
        axis: along which slices follow each other: "0", "1", "2", or "auto": the pages of a stack; an axis of one voxel, else
            the coarsest, else the last.

    Raises:
        InvalidParameter: no such axis.
    """
    if axis not in ("auto", "0", "1", "2"):
        raise InvalidParameter(f"axis={axis!r:.20} does not exist; slices can follow each other along axis 0, 1, 2 or auto")
    if axis != "auto":
        chosen = int(axis)
    elif affine is None:
        chosen = 2
    elif size.count(1) == 1:
        chosen = size.index(1)
    else:
        mm = spacing(affine)
        coarsest = max(mm)
        chosen = max(k for k in range(3) if mm[k] > coarsest * (1 - SAME_SPACING))
    columns, rows = (k for k in range(3) if k != chosen)
    order = (chosen, rows, columns)
    native = tuple(size[k] for k in order)
    return Placement(order, (False, False, False), native, native, flat=True)


def place_volume(
    size: tuple[int, ...], affine: Float64[ndarray, "4 4"], orientation: str, wanted: tuple[float, ...] | None
) -> Placement:
    """A volume for a network of three dimensions.

    Args:
        size: (X, Y, Z).
        affine: voxel index to mm.
        orientation: where the network's axes point, e.g. "RAS".
        wanted: mm per voxel along them, or None for any.
    """
    here = orientations.io_orientation(affine)
    there = orientations.axcodes2ornt(tuple(orientation))
    # Row per axis of the caller's: the network's axis, and 1 or -1.
    transform = orientations.ornt_transform(here, there)
    order = tuple(int(np.flatnonzero(transform[:, 0] == k)[0]) for k in range(3))
    mirrored = tuple(bool(transform[axis, 1] < 0) for axis in order)
    native = tuple(size[axis] for axis in order)
    network = native
    if wanted is not None:
        mm = [spacing(affine)[axis] for axis in order]
        ratios = [1.0 if abs(m / w - 1) <= SAME_SPACING else m / w for m, w in zip(mm, wanted, strict=True)]
        network = tuple(max(1, round(n * ratio)) for n, ratio in zip(native, ratios, strict=True))
    return Placement(order, mirrored, network, native)


def spacing(affine: Float64[ndarray, "4 4"]) -> tuple[float, float, float]:
    """Mm from voxel to voxel along each axis of the array."""
    with np.errstate(over="ignore"):
        x, y, z = np.sqrt(np.square(affine[:3, :3]).sum(axis=0)).tolist()
    return x, y, z


def unit_mm(source: Image | Volume) -> float | None:
    """Mm² of a pixel, also where each page is a time, or mm³ of a voxel, where it is known."""
    if isinstance(source, Volume) and source.affine is not None:
        # By the determinant: the axes of a tilted gantry are not at right angles.
        return float(abs(np.linalg.det(source.affine[:3, :3])))
    return None if source.spacing_mm is None else math.prod(source.spacing_mm)


def nifti_header(affine: Float64[ndarray, "4 4"], size: tuple[int, ...]) -> Nifti1Header:
    """A header that answers in NIfTI are written with, for volumes that came without one."""
    header = (Nifti1Header if max(size) < 2**15 else Nifti2Header)()
    header.set_data_shape(size)
    header.set_xyzt_units("mm")
    header.set_zooms(spacing(affine))
    if not sheared(affine):
        # A qform knows no shear.
        header.set_qform(affine, "scanner")
    header.set_sform(affine, "scanner")
    return header


def sheared(affine: Float64[ndarray, "4 4"]) -> bool:
    """Whether axes of the volume are not at right angles, as a tilted gantry leaves them."""
    turned = affine[:3, :3] / spacing(affine)
    return not np.abs(turned.T @ turned - np.eye(3)).max() < RIGID


def apart(size: tuple[int, ...], a: Float64[ndarray, "4 4"], b: Float64[ndarray, "4 4"]) -> float:
    """How far two affines place the same voxel from each other at most, in their unit: at a corner of the volume."""
    corners = np.array([(*corner, 1.0) for corner in itertools.product(*((0, side - 1) for side in size))])
    return float(np.linalg.norm(corners @ (a - b).T, axis=1).max())


def check_affine(affine: Float64[ndarray, "4 4"]) -> None:
    """Refuses an affine that places voxels nowhere.

    Raises:
        Unreadable: says what is odd.
    """
    if not np.isfinite(affine).all():
        raise Unreadable("the file's affine holds values that are not finite; repair its qform and sform")
    steps = spacing(affine)
    if not all(LEAST_SPACING <= step <= MOST_SPACING for step in steps):
        shown = " × ".join(f"{step:.4g}" for step in steps)
        raise Unreadable(
            f"the voxels are {shown} mm apart; between {LEAST_SPACING:g} and {MOST_SPACING:g} mm is read. Repair the spacing "
            "(pixdim, sform) or its unit (xyzt_units) in the header"
        )
    if abs(np.linalg.det(affine[:3, :3] / np.array(steps))) < 1e-3:
        raise Unreadable("the file's affine is flat: two axes point the same way; repair its qform and sform")


def lerp(array: Float32[ndarray, "K *rest"], size: int, axis: int, part: slice = slice(None)) -> Float32[ndarray, "K *changed"]:
    """Resizes one axis linearly to `size`, of which `part` is computed; on the same convention as `Placement.resample`."""
    lower, share = (values[part] for values in between(array.shape[axis], size))
    if array.shape[axis] == size:
        whole: Float32[ndarray, "K *changed"] = np.take(array, lower, axis)
        return whole
    upper = np.minimum(lower + 1, array.shape[axis] - 1)
    share = share.reshape(-1, *(1,) * (array.ndim - 1 - axis)).astype(np.float32)
    low = np.take(array, lower, axis)
    resized: Float32[ndarray, "K *changed"] = low + (np.take(array, upper, axis) - low) * share
    return resized


def between(source: int, target: int) -> tuple[Shaped[ndarray, " target"], Float64[ndarray, " target"]]:
    """Where each of `target` voxels lies among `source` voxels of the same extent: the lower neighbour, and how far beyond it."""
    position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    lower = position.astype(np.intp)
    return lower, position - lower
