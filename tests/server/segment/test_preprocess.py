import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.arrays import Image, InputHeader, Volume
from server.errors import InvalidParameter
from server.imaging.geometry import unit_mm
from server.segment import normalization
from server.segment.normalization import image_statistics
from server.segment.preprocess import (
    check_pixel_size,
    decode_options,
    decode_upload,
    note_resampling,
    place,
    read_headers,
    spacing_mm,
    with_channels,
    with_pixel_size,
)
from server.segment.request import SegmentParams, Upload
from server.settings import LimitsSettings
from tests.support.files import Sent, nifti_bytes, picture_bytes
from tests.support.service import manifest

PIXELS, VOXELS = np.zeros((4, 5, 1), np.uint8), np.zeros((4, 5, 6, 1), np.uint8)


@st.composite
def laid_out(draw: st.DrawFn) -> np.ndarray:
    """Pixels of an image or a volume, in any memory order, perhaps with gaps."""
    axes = draw(st.integers(2, 3))
    size = [draw(st.integers(1, 12)) for _ in range(axes)] + [draw(st.integers(1, 3))]
    order, steps = (
        draw(st.permutations(range(axes + 1))),
        tuple(slice(None, None, draw(st.sampled_from([1, 1, 2, -1]))) for _ in size),
    )
    values = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 256, size)
    stored = np.ascontiguousarray(values.transpose(order)).astype(
        draw(st.sampled_from(["uint8", "uint16", "int16", "float32"]))
    )
    return stored.transpose(np.argsort(order))[steps]


class TestStatistics:
    @settings(max_examples=60)
    @given(laid_out(), st.sampled_from([1, 7, 10**9]))
    def test_image_statistics_are_numpys_over_any_blocks(self, pixels: np.ndarray, block: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(normalization, "STATISTICS_PIXELS", block)
            mean, inverse_std = image_statistics(pixels)
        axes = tuple(range(pixels.ndim - 1))
        assert mean.shape == inverse_std.shape == (pixels.shape[-1],)
        assert np.allclose(mean, pixels.mean(axis=axes, dtype=float), rtol=1e-9)
        std = pixels.std(axis=axes, dtype=float)
        assert np.allclose(inverse_std, np.where(std > 0, 1 / np.where(std > 0, std, 1), 1), rtol=1e-9)

    @pytest.mark.parametrize("value", [0, 1, 0.1, 65535, 1e-30, -1e20, 3e38])
    @pytest.mark.parametrize("size", [(33, 47), (3, 11, 47)])
    def test_image_statistics_constant_channel_is_left_alone(
        self, value: float, size: tuple[int, ...]
    ) -> None:
        pixels = np.full((*size, 3), value, dtype=np.float32)
        pixels[..., 1] = np.linspace(0, 1, 47)
        _, inverse_std = image_statistics(pixels)
        assert inverse_std[0] == inverse_std[2] == 1 < inverse_std[1]

    @pytest.mark.parametrize("size", [(2000, 2000), (2000, 2000, 1), (1, 2000, 2000), (2, 2000, 1000)])
    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("dtype", ["uint8", "uint16"])
    def test_image_statistics_memory_is_bounded(self, size: tuple[int, ...], order: Any, dtype: str) -> None:
        pixels = np.zeros(size, dtype, order)[..., None]
        tracemalloc.start()
        try:
            image_statistics(pixels)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 20e6  # as float64 it would take 32 MB, twice


class TestChannels:
    @pytest.mark.parametrize("size", [(2, 3), (2, 3, 4)])
    def test_with_channels_repeats_grey_without_a_copy(self, size: tuple[int, ...]) -> None:
        pixels = np.arange(math.prod(size), dtype=np.uint8).reshape(*size, 1)
        colour = with_channels(pixels, 3)
        assert colour.shape == (*size, 3)
        assert np.shares_memory(colour, pixels)
        for three, (one,) in zip(image_statistics(colour), image_statistics(pixels), strict=True):
            assert np.array_equal(three, [one] * 3)

    def test_with_channels_averages_colours(self) -> None:
        grey = with_channels(np.array([[[0, 100, 255]]], dtype=np.uint8), 1)
        assert (grey.dtype, grey[0, 0, 0]) == (np.float32, pytest.approx(355 / 3))

    def test_with_channels_another_number_is_refused(self) -> None:
        pixels = np.zeros((2, 2, 3), dtype=np.uint8)
        assert with_channels(pixels, 3) is pixels
        with pytest.raises(InvalidParameter) as caught:
            with_channels(pixels, 2)
        assert caught.value.fields == {"parameter": "channel", "actual": 3, "limit": 2}


class TestPixelSize:
    def test_with_pixel_size_of_an_image(self) -> None:
        plain = Image(PIXELS)
        assert spacing_mm(plain) is unit_mm(plain) is None
        sized = with_pixel_size(plain, "0.5x0.25")
        assert spacing_mm(sized) == (0.0005, 0.00025)
        assert unit_mm(sized) == pytest.approx(1.25e-7)
        assert spacing_mm(with_pixel_size(sized, "2")) == (0.002, 0.002)
        assert with_pixel_size(plain, None) is plain

    def test_with_pixel_size_of_a_stack_goes_along_x_y_z(self) -> None:
        plain = Volume(VOXELS, None)
        sized = with_pixel_size(plain, "0.5x0.25x2")
        assert spacing_mm(sized) == (0.00025, 0.0005, 0.002)
        assert unit_mm(sized) == pytest.approx(2.5e-10)
        # The page distance of the file stays.
        assert spacing_mm(with_pixel_size(sized, "1")) == (0.001, 0.001, 0.002)
        with pytest.raises(InvalidParameter) as caught:
            with_pixel_size(plain, "0.5")
        assert caught.value.fields == {"parameter": "pixel_size_um", "value": "0.5"}

    def test_with_pixel_size_of_pages_that_are_times_has_no_third_axis(self) -> None:
        times = Volume(VOXELS, None, time_slices=1)
        sized = with_pixel_size(times, "0.5x0.25")
        assert spacing_mm(sized) == (0.00025, 0.0005)
        assert unit_mm(sized) == pytest.approx(1.25e-7)
        with pytest.raises(InvalidParameter):
            check_pixel_size("1x1x1", times.input_header)

    def test_spacing_of_a_volume_is_that_of_its_affine(self) -> None:
        affine = np.diag([1.0, 2.0, 3.0, 1.0])
        affine[0, 1] = 0.5  # sheared: the voxel is no box, and its volume stays
        volume = Volume(VOXELS, affine)
        assert unit_mm(volume) == pytest.approx(6)
        assert spacing_mm(volume) == pytest.approx((1, np.sqrt(4.25), 3))

    @pytest.mark.parametrize(
        ("text", "size"),
        [
            (text, (4, 5))
            for text in ("", "a", "1x", "0", "-1", "nan", "inf", "1e-9", "1e9", "1x2x3", "1;2", " ", "0x1")
        ]
        + [(text, (4, 5)) for text in ("1,3", "0.5,0.25", ",")]
        + [("1x2x3x4", (4, 5, 6))],
    )
    def test_check_pixel_size_refuses_what_is_no_size(self, text: str, size: tuple[int, ...]) -> None:
        with pytest.raises(InvalidParameter) as caught:
            check_pixel_size(text, InputHeader(size))
        assert (caught.value.fields["parameter"], caught.value.fields["value"]) == ("pixel_size_um", text)

    def test_check_pixel_size_of_a_volume_is_in_its_header(self) -> None:
        check_pixel_size(None, InputHeader((4, 5, 6), affine=np.eye(4)))
        check_pixel_size("1x2x3", InputHeader((4, 5, 6)))
        with pytest.raises(InvalidParameter) as caught:
            check_pixel_size("1", InputHeader((4, 5, 6), affine=np.eye(4)))
        assert caught.value.fields == {"parameter": "pixel_size_um", "kind": "volume"}


IMAGE, STACK, VOLUME = (
    InputHeader((4, 5)),
    InputHeader((4, 5, 6)),
    InputHeader((4, 5, 6), affine=np.diag([1.0, 3, 1, 1])),
)


@pytest.mark.parametrize(
    ("header", "dims", "axis", "size", "flat"),
    [
        (IMAGE, 2, "auto", (4, 5), False),
        (STACK, 2, "auto", (6, 5, 4), True),
        # The slices of a volume go along its coarsest spacing.
        (VOLUME, 2, "auto", (5, 6, 4), True),
        (VOLUME, 2, "0", (4, 6, 5), True),
        (VOLUME, 3, "auto", (4, 5, 6), False),
    ],
)
def test_place_by_kind_and_dimensions(
    header: InputHeader, dims: int, axis: str, size: tuple[int, ...], flat: bool
) -> None:
    placement = place(header, manifest(dims=dims), axis)
    assert (placement.size, placement.flat) == (size, flat)


@pytest.mark.parametrize(
    ("header", "dims", "axis", "fields"),
    [
        (IMAGE, 2, "1", {"parameter": "axis", "value": "1"}),
        (VOLUME, 3, "1", {"parameter": "axis", "value": "1"}),
        (IMAGE, 3, "auto", {"parameter": "model", "value": "fake", "kind": "image"}),
        (STACK, 3, "auto", {"parameter": "model", "value": "fake", "kind": "stack"}),
    ],
)
def test_place_refuses_what_does_not_fit(
    header: InputHeader, dims: int, axis: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(InvalidParameter) as caught:
        place(header, manifest(dims=dims), axis)
    assert caught.value.fields == fields


def decoded(data: bytes, reference: bytes | None = None, **params: Any) -> Any:
    parsed, upload = SegmentParams(**params), Upload(Sent(data), Sent(reference) if reference else None)
    options = decode_options(parsed, LimitsSettings())
    headers = read_headers(upload, options)
    return headers, decode_upload(upload, parsed, options)


def test_decode_upload_is_what_the_headers_promise() -> None:
    (header, truth), (source, reference) = decoded(
        picture_bytes(PIXELS[..., 0]), picture_bytes(PIXELS[..., 0]), pixel_size_um="2"
    )
    assert (header.size, truth.size, source.size, reference.size) == ((4, 5),) * 4
    assert source.spacing_mm == (0.002, 0.002)
    assert decoded(nifti_bytes(VOXELS[..., 0]))[1][1] is None


def test_decode_upload_reference_in_colour_is_refused() -> None:
    grey, colour = np.zeros((4, 4), np.uint8), np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    with pytest.raises(InvalidParameter) as caught:
        decoded(picture_bytes(grey), picture_bytes(colour))
    assert caught.value.fields == {"parameter": "reference", "channels": 3}
    # Grey that is written as colour is as good as grey.
    assert decoded(picture_bytes(grey), picture_bytes(np.repeat(grey[..., None], 3, axis=2)))


def test_decode_upload_reference_of_another_size_is_refused() -> None:
    with pytest.raises(InvalidParameter):
        decoded(picture_bytes(np.zeros((4, 4), np.uint8)), picture_bytes(np.zeros((4, 5), np.uint8)))


@pytest.mark.parametrize(
    ("step", "noted"), [(1.0, False), (0.15, False), (7.5, False), (0.1, True), (5e-5, True), (20.0, True)]
)
def test_volume_of_another_size_than_the_networks_is_noted(step: float, noted: bool) -> None:
    affine = np.diag([step, step, step, 1.0])
    source = Volume(np.zeros((40, 40, 40, 1), np.uint8), affine, note="before")
    network = manifest(dims=3, spacing=(1.0, 1.0, 1.0))
    placement = place(source.input_header, network, "auto")
    note = note_resampling(source, placement, network).note
    assert note.startswith("before")
    assert ("resampled to" in note) == noted
    free = manifest(dims=3, spacing=None)
    assert note_resampling(source, place(source.input_header, free, "auto"), free).note == "before"
