"""Pixel sizes of TIFF in the units that ImageJ and OME write, nanometres and less among them."""

import numpy as np
import pytest

from tests.server.imaging.builders import SIDES, described, written
from tests.server.imaging.conftest import read

LENGTHS = {"T": 2, "Z": 3, "C": 4}
RNG = np.random.default_rng(0)


def random(*lengths: int) -> np.ndarray:
    return RNG.integers(0, 255, (*lengths, *SIDES), dtype=np.uint8)


# µ is written as one of two letters, by itself or as Java and Python escape it.
MICRONS = ["micron", "um", "µm", "μm", "\\u00B5m", "\\xb5m", "microns", "micrometre", " um "]
# Å too is one of two letters.
ANGSTROMS = ["Å", "\u212b", "\\u00C5", "angstrom"]
OTHERS = {
    "pm": 1e-9,
    "nm": 1e-6,
    "nanometer": 1e-6,
    "mm": 1.0,
    "cm": 10.0,
    "m": 1e3,
    "inch": 25.4,
    "in": 25.4,
}
UNITS = [(unit, 1e-3) for unit in MICRONS] + [(unit, 1e-7) for unit in ANGSTROMS] + list(OTHERS.items())


def lengths(mm: float, *numbers: float) -> tuple[float, ...]:
    """Numbers of a unit that are lengths from 0.1 nm to 10 mm, and those in mm."""
    factor = {1e-9: 1e4, 1e-7: 1e2, 1e3: 1e-5, 25.4: 1e-2}.get(mm, 1.0)
    return tuple(number * factor for number in numbers)


@pytest.mark.parametrize(("unit", "mm"), UNITS)
def test_spacing_of_imagej(unit: str, mm: float) -> None:
    x, y, z = lengths(mm, 0.25, 0.5, 2.5)
    text = f"ImageJ=1.53t\nimages=6\nslices=6\nunit={unit}\nspacing={z}\n"
    stack = read(described(text.encode(), resolution=(1 / x, 1 / y)))
    assert stack.spacing_mm == pytest.approx((x * mm, y * mm, z * mm))
    if "\u212b" not in text:
        latin = text.replace("=6", "=1").replace("μ", "µ").encode("latin-1")
        assert read(described(latin, 1, resolution=(1 / x, 1 / y))).spacing_mm == pytest.approx(
            (y * mm, x * mm)
        )


# As ImageJ 1.52i writes them for pixels of 0.1 µm, 1/300 inch, 50 nm and 0.108 µm: no spacing where it is 1.
BY_IMAGEJ: dict[str, tuple[tuple[int, int], int, tuple[float, ...]]] = {
    "slices=3\nunit=cm\nloop=false": ((2147399999, 21474), 3, (1e-4, 1e-4, 10.0)),
    "slices=3\nunit=inch\nloop=false": ((300000000, 1000000), 2, (25.4 / 300, 25.4 / 300, 25.4)),
    "slices=3\nunit=nm\nspacing=120.0\nloop=false": ((20000, 1000000), 1, (5e-5, 5e-5, 1.2e-4)),
    "frames=3\nunit=\\u00B5m\nfinterval=2.5\nspacing=0.3\nloop=false": (
        (9259259, 1000000),
        1,
        (1.08e-4, 1.08e-4),
    ),
}


@pytest.mark.parametrize("lines", BY_IMAGEJ)
def test_spacing_as_imagej_writes_it(lines: str) -> None:
    resolution, unit, spacing_mm = BY_IMAGEJ[lines]
    text = f"ImageJ=1.53t\nimages=3\n{lines}\nmin=186.0\nmax=6531.0".encode()
    data = described(text, 3, resolution=(resolution, resolution), resolutionunit=unit)
    assert read(data).spacing_mm == pytest.approx(spacing_mm)


@pytest.mark.parametrize(("unit", "mm"), [*UNITS, ("", 1e-3)])
def test_spacing_of_ome(unit: str, mm: float) -> None:
    x, y, z = lengths(mm, 0.25, 0.5, 3.0)
    units = "".join(f' PhysicalSize{axis}Unit="{unit}"' for axis in "XYZ") if unit else ""
    sizes = f'PhysicalSizeX="{x}" PhysicalSizeY="{y}" PhysicalSizeZ="{z}"{units}'
    pixels = 'SizeX="7" SizeY="9" SizeZ="3" SizeC="1" SizeT="1" DimensionOrder="XYZCT"'
    data = described(f"<OME><Image><Pixels {pixels} {sizes}/></Image></OME>".encode(), 3)
    assert read(data).spacing_mm == pytest.approx((x * mm, y * mm, z * mm))
    assert read(data, axes="CYX").spacing_mm == pytest.approx((y * mm, x * mm))


@pytest.mark.parametrize("um", [1e-4, 0.05, 0.108, 325.0, 1e5])
def test_pixels_from_a_tenth_of_a_nanometre_to_ten_centimetres_are_read(um: float) -> None:
    """By tifffile in both dialects; half and twice the limits count as unknown."""
    for factor, known in ((1.0, True), (0.5, um > 1e-4), (2.0, um < 1e5)):
        sizes = {f"PhysicalSize{axis}": um * factor for axis in "XYZ"}
        by_ome = written(random(3), "ZYX", ome=True, metadata=sizes)
        words = {"unit": "um", "spacing": um * factor}
        per_um = 1 / (um * factor)
        by_imagej = written(random(3), "ZYX", imagej=True, resolution=(per_um, per_um), metadata=words)
        expected = pytest.approx((um * factor / 1e3,) * 3, rel=1e-5) if known else None
        assert read(by_ome).spacing_mm == expected
        assert read(by_imagej).spacing_mm == expected


@pytest.mark.parametrize(("axes", "known"), [("TYX", 2), ("TZYX", 3), ("ZYX", 3)])
def test_spacing_of_times_is_no_distance(axes: str, known: int) -> None:
    tags = {"imagej": True, "resolution": (4, 2), "metadata": {"spacing": 3.0, "unit": "um"}}
    data = written(random(*(LENGTHS[letter] for letter in axes[:-2])), axes, **tags)
    assert read(data).spacing_mm == pytest.approx((0.25e-3, 0.5e-3, 3e-3)[:known])


OME_SIZE = (
    '<OME><Image><Pixels SizeX="7" SizeY="9" SizeZ="1" SizeC="1" SizeT="1" DimensionOrder="XYZCT" '
    'PhysicalSizeX="{}" PhysicalSizeY="1"/></Image></OME>'
)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            *(f"ImageJ=1.53t\nimages=1\nunit={unit}\n" for unit in ("", "pixel", "pixels", "inches?", "sec")),
        ),
        *(OME_SIZE.format(number) for number in ("0", "-1", "nan", "inf", "1e300", "1e-300", "x", "")),
    ],
)
def test_spacing_that_is_no_length_is_unknown(text: str) -> None:
    assert read(described(text, 1, resolution=(4.0, 2.0), resolutionunit="INCH")).spacing_mm is None
