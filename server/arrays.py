"""The values that travel along the request line; all frozen. Axes are written in storage order.

N tiles, C channels, K score channels, H W the image, X Y Z the volume as stored, h w[ d] the tile.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64, Shaped, UInt8
from numpy import ndarray


@dataclass(frozen=True)
class DicomSource:
    """The DICOM instances that an input was made from; answers in DICOM repeat their patient, study and geometry.

    The first axis of the volume is the column index of the instances, the second the row index, and the third
    counts slices in ascending projection on the normal (row cosine x column cosine). Of an image the axes are
    (row, column), and there is one slice.

    Attributes:
        datasets: pydicom datasets of the instances without pixel data: one per slice of a series of
            single-frame instances, in the order of the slices; one alone of a multi-frame instance.
        frames: for each slice its index in `datasets`, and its frame number from 1.
    """

    datasets: tuple[Any, ...]
    frames: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class InputHeader:
    """Facts that the header of a file gives before any pixel is decoded.

    Attributes:
        size: pixels or voxels per axis: (H, W) of an image, (X, Y, Z) of a volume or a stack.
        channels: number of channels after decoding.
        sample_bytes: bytes of one decoded value.
        affine: (4, 4) matrix from voxel index to mm along right, anterior, superior; None for images and
            stacks.
        family: format family of a volume: "nifti", or "nrrd" for NRRD and MetaImage.
        time_slices: slices of each time of a time-lapse; None for other inputs.
        stored_affine: the affine in the unit of the file, as readers see it that take every number for mm;
            None where the file counts in mm.
        dicom: the instances of a DICOM input; None for other formats.
        count: images of this kind that are segmented in one piece.
    """

    size: tuple[int, ...]
    channels: int = 1
    sample_bytes: int = 1
    affine: Float64[ndarray, "4 4"] | None = None
    family: str = "nifti"
    time_slices: int | None = None
    stored_affine: Float64[ndarray, "4 4"] | None = None
    dicom: DicomSource | None = None
    count: int = 1

    @property
    def planar(self) -> bool:
        """Whether objects have an area, as in images and in pages that are times, rather than a volume."""
        return len(self.size) == 2 or self.time_slices == 1

    @property
    def kind(self) -> str:
        """One of "image", "volume" (with a place in space) or "stack" (pages)."""
        return "image" if len(self.size) == 2 else "stack" if self.affine is None else "volume"


@dataclass(frozen=True)
class Calibration:
    """Sizes, times and places that a TIFF tells, in its own words; an answer as TIFF repeats them.

    Attributes:
        dialect: "imagej" or "ome" by the program whose words they are, "" where only plain tags tell.
        values: lines of ImageJ's description, or attributes of OME's Pixels, that tell sizes, units and times.
        planes: attributes of OME's Planes that tell when and where each was taken.
        resolution: pixels per unit along X and Y, each as numerator and denominator; None if unknown.
        resolution_unit: TIFF's number of that unit: 1 none or another, 2 inch, 3 cm.
        orientation: TIFF's number of the way a viewer should turn the pixels; 1 is as stored.
        tags: other tags of the first page, each as (code, type, count, value, True).
        spacing_mm: the source's `spacing_mm` that these words give.
    """

    dialect: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    planes: tuple[Mapping[str, str], ...] = ()
    resolution: tuple[tuple[int, int], tuple[int, int]] | None = None
    resolution_unit: int = 1
    orientation: int = 1
    tags: tuple[tuple[int, int, int, Any, bool], ...] = ()
    spacing_mm: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Image:
    """A decoded image.

    Attributes:
        pixels: (H, W, C) uint8, uint16 or float32, all finite; C = 1 grey or 3 red, green, blue.
        note: remark on the decoding for the caller, e.g. that only the first page was read.
        spacing_mm: distances in mm from row to row and from column to column; None where the file gives none.
        calibration: sizes and times that a TIFF tells, in its words; None for other formats.
        dicom: the instance of a DICOM input; None for other formats.
    """

    pixels: Shaped[ndarray, "H W C"]
    note: str = ""
    spacing_mm: tuple[float, float] | None = None
    calibration: Calibration | None = None
    dicom: DicomSource | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def values(self) -> Shaped[ndarray, "*size C"]:
        """The pixels, by the name that images and volumes share."""
        return self.pixels

    @property
    def input_header(self) -> InputHeader:
        """Header of this image."""
        return InputHeader(self.size, self.pixels.shape[-1], self.pixels.itemsize, dicom=self.dicom)


@dataclass(frozen=True)
class Volume:
    """A decoded volume, in the axes and voxels of its file.

    Attributes:
        voxels: (X, Y, Z, C) uint8, uint16, int16 or float32, all finite. The pages of a stack follow each
            other along Z.
        affine: (4, 4) matrix from voxel index to mm along right, anterior, superior; None for a stack of
            pages.
        file_header: the file's own header, which the answer is written with; None for a stack of pages.
        note: remark on the decoding for the caller, e.g. that only some pages were read.
        spacing_mm: distances in mm between the pixels of a stack along X, Y and, unless each page is a time,
            Z; None where the file gives none, and for a volume, because its affine holds them.
        family: format of a volume's answer unless the request names one: "nifti", or "nrrd" for NRRD and
            MetaImage.
        time_slices: slices of each time of a time-lapse, because objects do not span two times; None for
            other inputs.
        stored_affine: the affine in the unit of the file; None where the file counts in mm.
        nrrd_place: lines of an NRRD header that place the volume, in the words of the source; empty where
            the affine says the same.
        calibration: sizes and times that a TIFF tells, in its words; None for other formats.
        dicom: the instances of a DICOM input; None for other formats.
    """

    voxels: Shaped[ndarray, "X Y Z C"]
    affine: Float64[ndarray, "4 4"] | None
    file_header: Any = None
    note: str = ""
    spacing_mm: tuple[float, ...] | None = None
    family: str = "nifti"
    time_slices: int | None = None
    stored_affine: Float64[ndarray, "4 4"] | None = None
    nrrd_place: tuple[str, ...] = ()
    calibration: Calibration | None = None
    dicom: DicomSource | None = None

    @property
    def size(self) -> tuple[int, int, int]:
        """(X, Y, Z)."""
        x, y, z, _ = self.voxels.shape
        return x, y, z

    @property
    def values(self) -> Shaped[ndarray, "*size C"]:
        """The voxels, by the name that images and volumes share."""
        return self.voxels

    @property
    def input_header(self) -> InputHeader:
        """Header of this volume or stack."""
        return InputHeader(
            self.size,
            self.voxels.shape[-1],
            self.voxels.itemsize,
            self.affine,
            self.family,
            self.time_slices,
            self.stored_affine,
            self.dicom,
        )


@dataclass(frozen=True)
class Tiles:
    """Windows cut from one or several images, all of one size.

    Attributes:
        pixels: (N, C, h, w[, d]) uint8, uint16, int16 or float32, raw values.
        mean: (N, C, 1, 1[, 1]) float32, subtracted by the graph; of the whole image or volume, never of the
            tile.
        inverse_std: (N, C, 1, 1[, 1]) float32, multiplied by the graph.
    """

    pixels: Shaped[ndarray, "N C *tile"]
    mean: Float32[ndarray, "N C *ones"]
    inverse_std: Float32[ndarray, "N C *ones"]

    def __len__(self) -> int:
        return len(self.pixels)

    def one(self, index: int) -> "Tiles":
        """The tile at `index`, as a stack of one."""
        at = slice(index, index + 1)
        return Tiles(self.pixels[at], self.mean[at], self.inverse_std[at])

    @staticmethod
    def stack(parts: Sequence["Tiles"]) -> "Tiles":
        """One stack of tiles of one size; mixed dtypes become float32."""
        if len(parts) == 1:
            return parts[0]
        pixels = [part.pixels for part in parts]
        dtype = pixels[0].dtype if len({p.dtype for p in pixels}) == 1 else np.dtype(np.float32)
        return Tiles(
            np.concatenate(pixels, dtype=dtype, casting="unsafe"),
            np.concatenate([part.mean for part in parts]),
            np.concatenate([part.inverse_std for part in parts]),
        )


Scores = Float32[ndarray, "N K *tile"]
"""Probabilities in [0, 1]: K = 1 for a sigmoid class, else one channel per class, background first."""


@dataclass(frozen=True)
class Objects:
    """The separate objects of a mask: object k + 1 is row k of every column.

    Attributes:
        labels: (H, W) or (X, Y, Z) int32, object number per pixel; 0 is background.
        value: class value of each object.
        pixels: number of pixels or voxels of each object.
        centroid: mean index of its pixels, along the axes of `labels`.
        low: first index of its bounding box.
        high: end of its bounding box, one beyond its last pixel.
        mean_score: mean over its pixels of the probability of its class; NaN where scores are unknown.
        touches_border: whether its box reaches the border, so that the object may continue outside.
        time_slices: number of slices of each time of a time-lapse, else None.
    """

    labels: Int32[ndarray, "*size"]
    value: UInt8[ndarray, " N"]
    pixels: Int64[ndarray, " N"]
    centroid: Float64[ndarray, "N axes"]
    low: Int64[ndarray, "N axes"]
    high: Int64[ndarray, "N axes"]
    mean_score: Float32[ndarray, " N"]
    touches_border: Bool[ndarray, " N"]
    time_slices: int | None = None

    @property
    def planar(self) -> bool:
        """Whether objects have an area, as in images and in pages that are times, rather than a volume."""
        return self.labels.ndim == 2 or self.time_slices == 1

    def __len__(self) -> int:
        return len(self.value)


@dataclass(frozen=True)
class Mask:
    """A class per pixel, on the grid of the input. Optional arrays are None where neither an output format nor the post-processing needs them.

    Attributes:
        classes: (H, W) or (X, Y, Z) uint8, class value per pixel; 0 is background.
        scores: (K, H, W) or (K, X, Y, Z) float16 probabilities.
        head_std: (H, W) or (X, Y, Z) float16, standard deviation of the foreground probability over the
            heads.
        confidence: (H, W) or (X, Y, Z) float16, score of the best foreground class.
        interior: (H, W) or (X, Y, Z) float16, the higher the farther a pixel lies inside its object, as the network sees it.
    """

    classes: UInt8[ndarray, "*size"]
    scores: Shaped[ndarray, "K *size"] | None = None
    head_std: Shaped[ndarray, "*size"] | None = None
    confidence: Shaped[ndarray, "*size"] | None = None
    interior: Shaped[ndarray, "*size"] | None = None


@dataclass(frozen=True)
class LabelledMask(Mask):
    """A mask whose objects are numbered and measured.

    Attributes:
        objects: separate objects of the mask.
    """

    objects: Objects = field(kw_only=True)


@dataclass(frozen=True)
class Overlap:
    """Agreement of two masks of one class.

    Attributes:
        iou: intersection over union; 1 where both masks are empty.
        dice: twice the intersection over the sum of both sizes; 1 where both masks are empty.
        empty: whether both masks are empty, so that their agreement says little.
    """

    iou: float
    dice: float
    empty: bool = False
