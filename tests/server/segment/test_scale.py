import numpy as np
import pytest

from server.arrays import Image, InputHeader, Volume
from server.errors import InvalidParameter
from server.imaging.geometry import unit_mm
from server.segment import scale

PIXELS, VOXELS = np.zeros((4, 5, 1), np.uint8), np.zeros((4, 5, 6, 1), np.uint8)


def test_of_an_image() -> None:
    plain = Image(PIXELS)
    assert scale.steps_mm(plain) is None
    assert unit_mm(plain) is None
    sized = scale.sized(plain, "0.5x0.25")
    assert scale.steps_mm(sized) == (0.0005, 0.00025)
    assert unit_mm(sized) == pytest.approx(1.25e-7)
    assert scale.steps_mm(scale.sized(sized, "2")) == (0.002, 0.002)
    assert scale.sized(plain, None) is plain


def test_of_a_stack() -> None:
    plain = Volume(VOXELS, None)
    assert unit_mm(plain) is None
    # Along X, Y, Z.
    sized = scale.sized(plain, "0.5x0.25x2")
    assert scale.steps_mm(sized) == (0.00025, 0.0005, 0.002)
    assert unit_mm(sized) == pytest.approx(2.5e-10)
    # The page distance of the file stays.
    assert scale.steps_mm(scale.sized(sized, "1")) == (0.001, 0.001, 0.002)
    with pytest.raises(InvalidParameter, match=r"does not say how far apart the pages .* give height x width x page"):
        scale.sized(plain, "0.5")


def test_of_a_volume() -> None:
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    affine[0, 1] = 0.5  # sheared: the voxel is no box, and its volume stays
    volume = Volume(VOXELS, affine)
    assert unit_mm(volume) == pytest.approx(6)
    assert scale.steps_mm(volume) == pytest.approx((1, np.sqrt(4.25), 3))
    with pytest.raises(InvalidParameter, match="pixel_size_um is for images and stacks"):
        scale.check("1", volume.input_header)


@pytest.mark.parametrize("text", ["", "a", "1x", "0", "-1", "nan", "inf", "1e-9", "1e9", "1x2x3", "1;2", " ", "0x1"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(
        InvalidParameter, match=r"is not one number of .*, or height x width, as 0.5x0.25, each between 0.001 and 100000"
    ):
        scale.check(text, InputHeader((4, 5)))


def test_a_stack_may_have_three() -> None:
    scale.check("1x2x3", InputHeader((4, 5, 6)))
    with pytest.raises(InvalidParameter, match=r"height x width x page, as 0\.5x0\.25x2"):
        scale.check("1x2x3x4", InputHeader((4, 5, 6)))


@pytest.mark.parametrize("text", ["1,3", "0.5,0.25", "1,2,3", ","])
def test_a_comma_may_be_a_decimal_point(text: str) -> None:
    with pytest.raises(InvalidParameter, match=r"has a comma, which may mean two things; write 0.5 .* as 0.5x0.25"):
        scale.check(text, InputHeader((4, 5)))


def test_of_pages_that_are_times() -> None:
    times = Volume(VOXELS, None, time_slices=1)
    sized = scale.sized(times, "0.5x0.25")
    assert scale.steps_mm(sized) == (0.00025, 0.0005)
    assert unit_mm(sized) == pytest.approx(1.25e-7)
    with pytest.raises(InvalidParameter, match=r"or height x width, as 0\.5x0\.25, each"):
        scale.check("1x1x1", times.input_header)
