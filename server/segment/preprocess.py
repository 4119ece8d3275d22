"""A decoded input as the network sees it: its pixel size, its axes and channels, and statistics over all of it."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float64, Shaped, UInt8
from numpy import ndarray
from PIL import Image as Pillow

from server.arrays import Image, InputHeader, Volume
from server.errors import InvalidParameter
from server.imaging import decode, geometry
from server.imaging.decode_options import DecodeOptions, join_notes
from server.imaging.geometry import Placement
from server.runtime.bundle import Manifest
from server.segment import postprocess, quality
from server.segment.request import SegmentParams, Upload
from server.settings import LimitsSettings

# Micrometres from pixel to pixel, as in files. A number outside of this range is in another unit.
MIN_PIXEL_UM, MAX_PIXEL_UM = 1e-4, 1e5

# Factor between the spacing of a volume and that of the network above which their sizes have nothing in common.
FAR = 8

# Pixels that statistics are computed over at a time, which bounds memory.
STATISTICS_PIXELS = 1_000_000

# Values per channel that percentiles are computed over at most; they are copied and sorted.
PERCENTILE_VALUES = 16_000_000


def decode_options(params: SegmentParams, limits: LimitsSettings) -> DecodeOptions:
    """Makes the decoding options of the input."""
    return DecodeOptions(
        limits.max_pixels,
        limits.max_voxels,
        zero_nonfinite=params.nonfinite == "zero",
        axes=params.axes,
        channel=params.channel,
        series=params.series,
        max_files=limits.max_zip_images,
        max_file_bytes=limits.max_body_mb * 1024 * 1024,
    )


def _label_options(options: DecodeOptions) -> DecodeOptions:
    """Makes the decoding options of a reference: labels come as one stack, whatever axes and channels the input has."""
    return dataclasses.replace(
        options, labels=True, zero_nonfinite=True, axes="", channel=None, series=None, header=None
    )


def read_headers(upload: Upload, options: DecodeOptions) -> tuple[InputHeader, InputHeader | None]:
    """Reads the headers of the input and of the reference, before any pixel is decoded.

    Raises:
        Unreadable, UnsupportedType, TooLarge: a file is broken, of no known format, or an image over the
            limit.
    """
    header = decode.read_header(upload.file, options)
    return header, decode.read_header(upload.reference, _label_options(options)) if upload.reference else None


def decode_upload(
    upload: Upload, params: SegmentParams, options: DecodeOptions, header: InputHeader | None = None
) -> tuple[Image | Volume, Image | Volume | None]:
    """Decodes the input, with the pixel size that the caller gives, and the reference if there is one.

    Args:
        upload: encoded files.
        params: request parameters.
        options: limits and choices.
        header: header of the input, if it was read.

    Raises:
        CallerError: a file is broken, or does not fit the parameters or the other file.
    """
    source = with_pixel_size(
        decode.decode(upload.file, dataclasses.replace(options, header=header)), params.pixel_size_um
    )
    postprocess.check_unit(params, source.input_header, geometry.unit_mm(source))
    return source, _decode_reference(upload, source, options)


def _decode_reference(
    upload: Upload, source: Image | Volume, options: DecodeOptions
) -> Image | Volume | None:
    """Decodes the reference, whose labels must lie on the grid of the input; None without one.

    Raises:
        InvalidParameter: it is a colour picture, or lies on another grid.
    """
    if upload.reference is None:
        return None
    reference = decode.decode(upload.reference, _label_options(options))
    if reference.values.shape[-1] != 1 and np.ptp(reference.values, axis=-1).any():
        raise InvalidParameter(
            "the reference is a colour picture; send labels (one value per pixel)",
            parameter="reference",
            channels=reference.values.shape[-1],
        )
    # Once more, because an image is now upright.
    quality.check_grid(source.input_header, reference.input_header)
    return reference


def spacing_mm(source: Image | Volume) -> tuple[float, ...] | None:
    """Millimetres from pixel to pixel along each axis of the mask; None where it is not known."""
    if isinstance(source, Volume) and source.affine is not None:
        return geometry.spacing(source.affine)
    return source.spacing_mm


def check_pixel_size(pixel_size_um: str | None, header: InputHeader) -> None:
    """Refuses a pixel size that does not fit the input, before it is decoded.

    Raises:
        InvalidParameter: the input is a volume, or the text is not a size.
    """
    if pixel_size_um is None:
        return
    if header.kind == "volume":
        raise InvalidParameter(
            "pixel_size_um is for images and stacks; the header of a volume gives the spacing: leave it out",
            parameter="pixel_size_um",
            kind="volume",
        )
    _parse_pixel_size(pixel_size_um, 2 if header.planar else 3)


def with_pixel_size(source: Image | Volume, pixel_size_um: str | None) -> Image | Volume:
    """Gives an image or a stack the pixel size of the request, which replaces that of its file.

    Raises:
        InvalidParameter: neither the text nor the file gives the distance of a stack's pages.
    """
    if pixel_size_um is None:
        return source
    planar = source.input_header.planar
    height, width, *page = (um / 1e3 for um in _parse_pixel_size(pixel_size_um, 2 if planar else 3))
    if isinstance(source, Image):
        return dataclasses.replace(source, spacing_mm=(height, width))
    if planar:
        return dataclasses.replace(source, spacing_mm=(width, height))
    between = page or (source.spacing_mm or ())[2:]
    if not between:
        raise InvalidParameter(
            f"pixel_size_um={pixel_size_um!r:.40} does not tell how far apart the pages of the stack are, nor does the file; "
            "give height x width x page, e.g. pixel_size_um=0.5x0.5x2",
            parameter="pixel_size_um",
            value=pixel_size_um,
        )
    return dataclasses.replace(source, spacing_mm=(width, height, between[0]))


def _parse_pixel_size(text: str, axes: int) -> tuple[float, ...]:
    """Height, width and perhaps page distance in micrometres; one number is both height and width."""
    if "," in text:
        # Half of the world writes 1,3 for one and three tenths.
        raise InvalidParameter(
            f"pixel_size_um={text!r:.40} has a comma, which may mean two things; write 0.5 with a point, and height x width as "
            "0.5x0.25",
            parameter="pixel_size_um",
            value=text[:40],
        )
    try:
        sizes = tuple(float(part) for part in text.split("x"))
    except ValueError:
        sizes = ()
    if not 1 <= len(sizes) <= axes or not all(MIN_PIXEL_UM <= um <= MAX_PIXEL_UM for um in sizes):
        form = "height x width, as 0.5x0.25" if axes == 2 else "height x width x page, as 0.5x0.25x2"
        raise InvalidParameter(
            f"pixel_size_um={text!r:.40} is not one number of micrometres, or {form}, each between {MIN_PIXEL_UM:g} and "
            f"{MAX_PIXEL_UM:g}",
            parameter="pixel_size_um",
            value=text[:40],
            limit=[MIN_PIXEL_UM, MAX_PIXEL_UM],
        )
    return sizes * 2 if len(sizes) == 1 else sizes


def place(header: InputHeader, manifest: Manifest, axis: str) -> Placement:
    """Places the network's axes in the input.

    Args:
        header: header of the input.
        manifest: manifest of the network.
        axis: axis of the slices, for a volume that goes through a network of two dimensions; "auto" picks it.

    Raises:
        InvalidParameter: the network takes another kind of input.
    """
    if manifest.dims == 2:
        if header.kind == "image":
            if axis != "auto":
                raise InvalidParameter(
                    "axis is for volumes and stacks; the input is one image", parameter="axis", value=axis
                )
            return geometry.place_image(header.size)
        return geometry.place_stack(header.size, header.affine, axis)
    if header.affine is None:
        what = "an image" if header.kind == "image" else "a stack of pages, whose spacing is not known"
        raise InvalidParameter(
            f"model={manifest.name!r} takes volumes (NIfTI), and the input is {what}; choose another model",
            parameter="model",
            value=manifest.name,
            kind=header.kind,
        )
    if axis != "auto":
        raise InvalidParameter(
            f"axis is for models that work slice by slice; {manifest.name!r} takes whole volumes",
            parameter="axis",
            value=axis,
        )
    return geometry.place_volume(header.size, header.affine, manifest.orientation or "RAS", manifest.spacing)


def note_resampling(source: Image | Volume, placement: Placement, manifest: Manifest) -> Image | Volume:
    """Notes that the voxels are of another size than those the network was trained on, by orders of magnitude."""
    factors = (size / native for size, native in zip(placement.size, placement.native, strict=True))
    if all(1 / FAR <= factor <= FAR for factor in factors):
        return source
    here, there = (" x ".join(map(str, size)) for size in (placement.native, placement.size))
    mm = " x ".join(f"{step:g}" for step in manifest.spacing or ())
    note = (
        f"model {manifest.name!r} works on voxels of {mm} mm, so that {here} voxels were resampled to {there}; "
        "choose a model for this size, or repair the unit of the spacing"
    )
    return dataclasses.replace(source, note=join_notes(source.note, note))


def with_channels(pixels: Shaped[ndarray, "*size have"], channels: int) -> Shaped[ndarray, "*size want"]:
    """The pixels with as many channels as the network takes, without copying where possible.

    Grey is repeated for a colour network; colours are averaged for a grey one.

    Raises:
        InvalidParameter: the network takes another number of channels.
    """
    have = pixels.shape[-1]
    if have == channels:
        return pixels
    if have == 1:
        return np.broadcast_to(pixels, (*pixels.shape[:-1], channels))
    if channels == 1:
        grey: Shaped[ndarray, "*size 1"] = pixels.mean(axis=-1, keepdims=True, dtype=np.float32)
        return grey
    raise InvalidParameter(
        f"the image has {have} channels, the model takes {channels}",
        parameter="channel",
        actual=have,
        limit=channels,
    )


def normalization(
    pixels: Shaped[ndarray, "*size C"],
    kind: str,
    percentiles: tuple[float, float] | None = None,
    stored: np.dtype[Any] | None = None,
) -> tuple[Float64[ndarray, " C"], Float64[ndarray, " C"]]:
    """Returns the value that is subtracted from each channel, and the one that it is multiplied with then, of the whole input.

    Args:
        pixels: decoded input.
        kind: normalization of the manifest.
        percentiles: percentiles of the manifest.
        stored: data type of the file, because resampling and averaging make floats; None for that of the pixels.
    """
    channels = pixels.shape[-1]
    if kind == "zscore":
        return image_statistics(pixels)
    if kind == "percentile":
        return _percentiles(pixels, percentiles or (0, 100))
    dtype = stored or pixels.dtype
    largest = np.iinfo(dtype).max if kind == "unit" and np.issubdtype(dtype, np.integer) else 1
    return np.zeros(channels), np.full(channels, 1 / largest)


def _percentiles(
    pixels: Shaped[ndarray, "*size C"], bounds: tuple[float, float]
) -> tuple[Float64[ndarray, " C"], Float64[ndarray, " C"]]:
    """The lower percentile, and the inverse of the distance to the higher one, per channel.

    Of more than `PERCENTILE_VALUES` values every n-th is taken, which bounds memory.
    """
    channels = pixels.shape[-1]
    if pixels.strides[-1] == 0:
        pixels = pixels[..., :1]
    # Along the longest axis, because others may be one pixel thin.
    step = math.ceil(math.prod(pixels.shape[:-1]) / PERCENTILE_VALUES)
    longest = int(np.argmax(pixels.shape[:-1]))
    sample = pixels[(slice(None),) * longest + (slice(None, None, step),)].reshape(-1, pixels.shape[-1])
    low, high = np.percentile(sample, bounds, axis=0)
    distance = np.where(high > low, high - low, 1)
    return np.broadcast_to(low, channels), np.broadcast_to(1 / distance, channels)


def image_statistics(
    pixels: Shaped[ndarray, "*size C"],
) -> tuple[Float64[ndarray, " C"], Float64[ndarray, " C"]]:
    """Mean and inverse standard deviation per channel of the whole input, in bounded memory."""
    channels = pixels.shape[-1]
    if pixels.strides[-1] == 0:
        # A grey image repeated by `with_channels`: one channel tells all.
        pixels = pixels[..., :1]
    mean, variance = (
        _moments_of_bytes(pixels) if pixels.dtype == np.uint8 and pixels.ndim == 3 else _moments(pixels)
    )
    # Rounding leaves a constant channel with a variance of a few ulps; it must not be blown up to noise.
    constant = variance <= np.square(1e-6 * np.maximum(np.abs(mean), 1e-30))
    inverse_std = np.where(constant, 1.0, 1.0 / np.sqrt(np.where(constant, 1.0, variance)))
    return np.broadcast_to(mean, channels), np.broadcast_to(inverse_std, channels)


def _moments(pixels: Shaped[ndarray, "*size C"]) -> tuple[Float64[ndarray, " C"], Float64[ndarray, " C"]]:
    """Mean and variance per channel, block by block."""
    axes, count, none = (
        tuple(range(pixels.ndim - 1)),
        math.prod(pixels.shape[:-1]),
        np.zeros(pixels.shape[-1]),
    )
    mean = sum((block.sum(axis=axes, dtype=np.float64) for block in _blocks(pixels)), none) / count
    squares = (np.square(block.astype(np.float64) - mean).sum(axis=axes) for block in _blocks(pixels))
    return mean, sum(squares, none) / count


def _blocks(pixels: Shaped[ndarray, "*size C"]) -> Iterator[Shaped[ndarray, "..."]]:
    """The pixels in parts of `STATISTICS_PIXELS` at most, halved where they lie widest apart in memory."""
    if math.prod(pixels.shape[:-1]) <= STATISTICS_PIXELS:
        yield pixels
        return
    axis = max(
        (k for k in range(pixels.ndim - 1) if pixels.shape[k] > 1), key=lambda k: abs(pixels.strides[k])
    )
    for half in np.array_split(pixels, 2, axis):
        yield from _blocks(half)


def _moments_of_bytes(
    pixels: UInt8[ndarray, "H W C"],
) -> tuple[Float64[ndarray, " C"], Float64[ndarray, " C"]]:
    """Mean and variance of each channel from its histogram: exact, and faster (Pillow counts in C, without a float per pixel)."""
    values = np.arange(256, dtype=np.float64)
    moments = []
    for channel in range(pixels.shape[2]):
        histogram = np.array(
            Pillow.fromarray(np.ascontiguousarray(pixels[..., channel])).histogram(), dtype=np.float64
        )
        mean = histogram @ values / histogram.sum()
        moments.append((mean, histogram @ np.square(values - mean) / histogram.sum()))
    means, variances = np.array(moments).T
    return means, variances
