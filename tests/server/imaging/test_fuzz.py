"""Every decoder meets files that were good once: bytes changed, cut out, doubled, cut off; then checksums repaired, so that more is read.

What comes out is an image, a volume or a domain error, in bounded memory. `python -m tests.server.imaging.test_fuzz 1000000` goes on
for longer and shows what took long.
"""

import functools
import gzip
import io
import os
import random
import resource
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from server.arrays import Image
from server.errors import CallerError
from server.imaging.decode import DECODERS
from tests.server.imaging.conftest import input_header, nifti, read
from tests.server.imaging.itk import by_itk
from tests.support.files import nifti_bytes, pages_bytes, picture_bytes
from tests.support.memory import memory_stays_below

pytestmark = pytest.mark.filterwarnings("ignore")  # decoders warn about what they tolerate

ROOT = Path(__file__).parents[3]

# Of an image or volume that is decoded; beyond it the header alone must be enough.
MOST = 1_000_000
# RGB in float32, the copies on the way there, and the file itself.
MEMORY_MB = 150

# What lengths, counts and offsets are made of.
ODD = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FF8000000000000, 2**64 - 1]


def seeds() -> dict[str, list[bytes]]:
    """Small good files of every kind, by their decoder."""
    grey = np.arange(40 * 30, dtype=np.uint8).reshape(40, 30)
    colour = np.stack([grey, grey.T.reshape(40, 30), 255 - grey], axis=-1)
    deep = grey.astype(np.uint16) * 200
    rasters = [
        *(picture_bytes(pixels) for pixels in (grey, colour, deep, grey > 40)), picture_bytes(Pillow.fromarray(colour).quantize(8)),
        picture_bytes(colour, "JPEG"), picture_bytes(colour, "JPEG", progressive=True, exif=exif()), picture_bytes(grey, "JPEG"),
        picture_bytes(colour, "BMP"), picture_bytes(Pillow.fromarray(colour).quantize(4), "BMP"), picture_bytes(colour, "WEBP"),
        picture_bytes(colour, "WEBP", lossless=True, exif=exif()), picture_bytes(colour, exif=exif()), animation(colour),
    ]  # fmt: skip
    tiffs = [pages_bytes(np.stack([grey] * 3)), pages_bytes(grey[None])]
    for pixels in (grey, colour, deep, grey / np.float32(3)):
        tiffs.extend(tiff(pixels, compression=name) for name in (None, "lzw", "deflate", "packbits", "zstd"))
        tiffs.append(tiff(pixels, tile=(16, 16), compression="lzw", byteorder=">", bigtiff=True))
    tiffs.append(tiff(np.moveaxis(colour, -1, 0), planarconfig="separate", photometric="rgb"))
    shape = np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4)
    niftis = [
        nifti(shape.astype(kind), np.eye(4), version=version, order=order, scl_slope=slope)
        for kind in (np.uint8, np.int16, np.float32, np.float64)
        for version, order, slope in ((1, "<", 1), (1, ">", 2), (2, "<", 0))
    ]
    stacks = [
        tiff(np.stack([grey] * 6).reshape(3, 2, 40, 30), **{kind: True}, metadata={"axes": axes}, **options)
        for kind in ("imagej", "ome") for axes in ("ZCYX", "TZYX") for options in ({}, {"byteorder": ">"}, {"resolution": (4, 2)})
    ]  # fmt: skip
    stacks.append(tiff(np.stack([colour] * 3), ome=True, photometric="rgb", metadata={"axes": "ZYXS", "PhysicalSizeX": 0.5}))
    written = [SimpleITK.GetImageFromArray(np.stack([deep] * 3)), SimpleITK.GetImageFromArray(colour, isVector=True)]
    itk = [by_itk(image, suffix, packed=packed) for image in written for suffix in (".nrrd", ".mha") for packed in (False, True)]
    return {
        "raster": rasters, "tiff": tiffs, "stacks": stacks, "nifti": [*niftis, nifti_bytes(shape)], "itk": itk, **shipped(),
    }  # fmt: skip


def exif() -> bytes:
    made = Pillow.Exif()
    made[0x0112] = 6
    return made.tobytes()


def animation(colour: np.ndarray) -> bytes:
    return picture_bytes(colour, "PNG", save_all=True, append_images=[Pillow.fromarray(255 - colour)])


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, pixels, **options)
    return out.getvalue()


def shipped() -> dict[str, list[bytes]]:
    """Real files that come with other people's packages."""
    import nibabel
    import skimage

    volumes, pictures = Path(nibabel.__file__).parent / "tests" / "data", Path(skimage.__file__).parent / "data"
    niftis = [volumes / name for name in ("anatomical.nii", "example_nifti2.nii.gz", "standard.nii.gz", "functional.nii")]
    tiffs = [pictures / name for name in ("multipage.tif", "multipage_rgb.tif")]
    return {"their nifti": [path.read_bytes() for path in niftis], "their tiff": [path.read_bytes() for path in tiffs]}


def mutated(data: bytes, draw: Callable[[int], int]) -> bytes:
    """Some changes.

    Args:
        data: a good file.
        draw: a number below another one.
    """
    out = bytearray(data)
    for _ in range(1 + draw(4)):
        # Headers decide; three of four changes are near the start or, where TIFF has its tags, near the end.
        span = max(1, min(len(out), (16, 400, len(out), 400)[draw(4)]))
        at = draw(span) if draw(4) else len(out) - 1 - draw(span)
        size = (1, 2, 4, 8)[draw(4)]
        match draw(7):
            case 0:
                out[at : at + 1] = bytes([draw(256)])
            case 1 | 2:
                value = ODD[draw(len(ODD))] & (2 ** (8 * size) - 1)
                out[at : at + size] = value.to_bytes(size, "little" if draw(2) else "big")
            case 3:
                out[at] ^= 1 << draw(8)
            case 4:
                del out[at : at + 1 + draw(16)]
            case 5:
                out[at:at] = out[at : at + 1 + draw(64)] * (1 + draw(4))
            case _:
                del out[max(1, at) :]
        if not out:
            return data[:1]
    return bytes(out)


def repaired(data: bytes, squeeze: bool) -> bytes:
    """Right checksums of PNG chunks; NIfTI may be wrapped in a sound gzip, as long as a stream of it may be mutated as well."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        out, at = bytearray(data), 8
        while at + 12 <= len(out):
            (length,) = struct.unpack(">I", out[at : at + 4])
            end = at + 8 + length
            if end + 4 > len(out):
                break
            out[end : end + 4] = struct.pack(">I", zlib.crc32(out[at + 4 : end]))
            at = end + 4
        return bytes(out)
    if squeeze and DECODERS["nifti"].recognises(data[:16]) and data[:2] != b"\x1f\x8b":
        return gzip.compress(data, 1)
    return data


@functools.cache
def cached_seeds() -> dict[str, list[bytes]]:
    return seeds()


def check(data: bytes, labels: bool, zero: bool) -> None:
    """What the server does with a file, in this order."""
    pixels, said = None, ""
    # Of the files whose axes can be named, some.
    axes = "ZYX" if labels and zero and DECODERS["tiff"].recognises(data[:16]) else ""
    try:
        input_header(data, MOST, axes=axes)
        pixels = read(data, limit=MOST, voxels=MOST, labels=labels, zero_nonfinite=zero, axes=axes)
    except CallerError as error:
        said = str(error)
    if pixels is None:
        # Of the server's insides it says nothing.
        assert said
        assert not any(word in said for word in ("Error", "upload.tif", "/tmp", "site-packages"))  # noqa: S108
        return
    values = pixels.pixels if isinstance(pixels, Image) else pixels.voxels
    assert values.dtype in (np.uint8, np.uint16, np.int16, np.float32)
    assert values.size <= 3 * MOST
    assert np.isfinite(values).all()


@pytest.mark.parametrize("kind", ["raster", "tiff", "stacks", "nifti", "itk", "their nifti", "their tiff"])
def test_decoders_only_ever_refuse(kind: str) -> None:
    with memory_stays_below(MEMORY_MB):

        @settings(max_examples=300, deadline=None, database=None)
        @given(st.data())
        def attack(data: st.DataObject) -> None:
            good = data.draw(st.sampled_from(cached_seeds()[kind]))
            draw = data.draw(st.randoms(use_true_random=False)).randrange
            changed = repaired(mutated(good, draw), bool(draw(2)))
            check(changed, bool(draw(2)), bool(draw(2)))

        attack()


@given(start=st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"\x5c\x01\0\0", b"\x1f\x8b", b"RIFF\0\0\0\0WEBP", b"NRRD0004\n", b"ObjectType = Image\n", b"NDims = 3\n"]),
       rest=st.binary(max_size=2000))  # fmt: skip
def test_nothing_but_a_start(start: bytes, rest: bytes) -> None:
    check(start + rest, False, True)


def test_without_checked_types() -> None:
    """Under pytest wrong types are caught at once, inside of what turns every exception into a sentence; here as in the server."""
    command = [sys.executable, "-m", "tests.server.imaging.test_fuzz", "3000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # noqa: TID251 - of a child
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "3,000 rounds, types unchecked" in ran.stdout
    assert checks_types()


def checks_types() -> bool:
    """Whether this process has what `tests/conftest.py` installs."""
    return any(type(finder).__module__.startswith("jaxtyping") for finder in sys.meta_path)


def main(rounds: int) -> None:
    """Each round is made of its number, so that it can be had again."""
    warnings.simplefilter("ignore")
    slowest = 0.0
    goods = [good for group in cached_seeds().values() for good in group]
    for number in range(rounds):
        draw = random.Random(number).randrange  # noqa: S311 - no secret
        changed = repaired(mutated(goods[draw(len(goods))], draw), bool(draw(2)))
        begun = time.perf_counter()
        try:
            check(changed, bool(draw(2)), bool(draw(2)))
        except BaseException:
            print("round", number)  # noqa: T201
            raise
        took = time.perf_counter() - begun
        if took > max(0.2, slowest):
            slowest = took
            print(f"round {number}: {took:.2f} s, {len(changed):,} bytes, {changed[:16]!r}")  # noqa: T201
    types = "checked" if checks_types() else "unchecked"
    print(f"{rounds:,} rounds, types {types}, at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024:,} MB")  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]))
