"""A decoded input as the network sees it: its pixel size, its axes and channels."""

import dataclasses

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray

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


def read_headers(
    upload: Upload | Image | Volume, options: DecodeOptions
) -> tuple[InputHeader, InputHeader | None]:
    """Reads the headers of the input and of the reference, before any pixel is decoded; of a decoded input its own.

    Raises:
        Unreadable, UnsupportedType, TooLarge: a file is broken, of no known format, or an image over the
            limit.
    """
    if not isinstance(upload, Upload):
        header = upload.input_header
        if header.kind == "image":
            options.check_image(*header.size)
        return header, None
    header = decode.read_header(upload.file, options)
    return header, decode.read_header(upload.reference, _label_options(options)) if upload.reference else None


def decode_upload(
    upload: Upload | Image | Volume,
    params: SegmentParams,
    options: DecodeOptions,
    header: InputHeader | None = None,
) -> tuple[Image | Volume, Image | Volume | None]:
    """Decodes the input, with the pixel size that the caller gives, and the reference if there is one.

    Args:
        upload: encoded files, or the input itself, decoded already.
        params: request parameters.
        options: limits and choices.
        header: header of the input, if it was read.

    Raises:
        CallerError: a file is broken, or does not fit the parameters or the other file.
    """
    source = (
        decode.decode(upload.file, dataclasses.replace(options, header=header))
        if isinstance(upload, Upload)
        else upload
    )
    source = with_pixel_size(source, params.pixel_size_um)
    postprocess.check_unit(params, source.input_header, geometry.unit_mm(source))
    return source, _decode_reference(upload, source, options) if isinstance(upload, Upload) else None


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
