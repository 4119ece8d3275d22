"""Every decoder meets files that were good once: bytes changed, cut out, doubled, cut off; then checksums repaired, so that
more is read.

What comes out is an image, a volume or a domain error, in bounded memory.
`python -m tests.server.imaging.test_fuzz 1000000` goes on for longer and shows what took long.
"""

import functools
import gzip
import io
import json
import os
import random
import resource
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import SimpleITK
import tifffile
from PIL import Image as Pillow

from server.arrays import Image
from server.errors import CallerError
from server.imaging.decode import DECODERS
from tests.server.imaging.builders import tiff
from tests.server.imaging.conftest import header, nifti, read
from tests.server.imaging.encoders import encoded, masked
from tests.server.imaging.itk import by_itk
from tests.server.imaging.tiff_by_hand import lsm, stk
from tests.support.files import nifti_bytes, picture_bytes
from tests.support.memory import memory_stays_below

pytestmark = pytest.mark.filterwarnings("ignore")  # decoders warn about what they tolerate

ROOT = Path(__file__).parents[3]

# Pixels or voxels that are decoded; beyond it the header alone must be enough.
LIMIT = 1_000_000
# RGB in float32, the copies on the way there, and the file itself.
MEMORY_MB = 150

# What lengths, counts and offsets are made of.
ODD = [
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**63 - 1,
    2**64 - 1,
]

GREY = np.arange(40 * 30, dtype=np.uint8).reshape(40, 30)
COLOUR = np.stack([GREY, GREY.T.reshape(40, 30), 255 - GREY], axis=-1)
DEEP = GREY.astype(np.uint16) * 200


def rasters() -> list[bytes]:
    exif, indexed = Pillow.Exif(), Pillow.fromarray(COLOUR).quantize(8)
    exif[0x0112] = 6
    frames = [Pillow.fromarray(255 - COLOUR)]
    return [
        *(picture_bytes(pixels) for pixels in (GREY, COLOUR, DEEP, GREY > 40, indexed)),
        *(picture_bytes(COLOUR, kind) for kind in ("JPEG", "BMP", "WEBP")),
        *(picture_bytes(COLOUR, kind, exif=exif.tobytes()) for kind in ("JPEG", "PNG", "WEBP")),
        *(picture_bytes(GREY, "JPEG", progressive=True), picture_bytes(indexed, "BMP")),
        picture_bytes(COLOUR, save_all=True, append_images=frames),
        *(imagecodecs.png_encode(np.dstack([DEEP] * channels)) for channels in (2, 3, 4)),
        picture_bytes(COLOUR * np.array([0, 0, 1], np.uint8), "JPEG"),
    ]


def tiffs() -> list[bytes]:
    names = (None, "lzw", "deflate", "packbits", "zstd")
    return [
        *(
            tiff(pixels, compression=name)
            for pixels in (GREY, COLOUR, GREY / np.float32(3))
            for name in names
        ),
        *(picture_bytes(GREY > 40, "TIFF", compression=name) for name in ("tiff_ccitt", "group3", "group4")),
        tiff(DEEP, tile=(16, 16), compression="lzw", byteorder=">", bigtiff=True),
        tiff(np.moveaxis(COLOUR, -1, 0), planarconfig="separate", photometric="rgb"),
        tiff(np.stack([GREY] * 3), photometric="minisblack"),
    ]


def stacks() -> list[bytes]:
    values = np.stack([GREY] * 6).reshape(3, 2, 40, 30)
    # Named because tifffile draws one by chance.
    ome = {"ome": True, "metadata": {"UUID": "urn:uuid:0", "axes": "TZYX", "PhysicalSizeX": 0.5}}
    imagej = {"imagej": True, "resolution": (4, 2), "metadata": {"axes": "ZCYX", "unit": "um"}}
    return [tiff(values, byteorder=order, **options) for options in (ome, imagej) for order in "<>"]


def microscopes() -> list[bytes]:
    planes = np.stack([GREY, GREY.T.reshape(40, 30)] * 2).astype(np.uint16)
    times = stk(planes, times_ms=[0, 5, 10, 15], pixel=(0.25, "um"))
    slices = lsm(planes[:, None], GREY[:8, :8], axes="TZ", lengths={"T": 2, "Z": 2}, interval_s=1)
    pyramid = io.BytesIO()
    with tifffile.TiffWriter(pyramid) as file:
        file.write(GREY[::4, ::4], subifds=1, subfiletype=1, extratags=[(274, 3, 1, 6, True)])
        file.write(GREY, resolution=(4, 2))
    return [times, slices, pyramid.getvalue()]


def niftis() -> list[bytes]:
    values = np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4)
    return [nifti_bytes(values)] + [
        nifti(values.astype(dtype), np.eye(4), version=version, order=order, scl_slope=slope)
        for dtype in (np.uint8, np.int16, np.float32, np.float64)
        for version, order, slope in ((1, "<", 1), (1, ">", 2), (2, "<", 0))
    ]


def itks() -> list[bytes]:
    images = (
        SimpleITK.GetImageFromArray(np.stack([DEEP] * 3)),
        SimpleITK.GetImageFromArray(COLOUR, isVector=True),
    )
    suffixes = [(suffix, packed) for suffix in (".nrrd", ".mha") for packed in (False, True)]
    return [by_itk(image, suffix, packed=packed) for image in images for suffix, packed in suffixes]


def shipped() -> list[bytes]:
    """Real files that come with other people's packages."""
    import nibabel
    import skimage

    volumes, pictures = (
        Path(nibabel.__file__).parent / "tests" / "data",
        Path(skimage.__file__).parent / "data",
    )
    names = ("anatomical.nii", "example_nifti2.nii.gz", "standard.nii.gz", "functional.nii")
    paths = [*(volumes / name for name in names), *(pictures / f"multipage{end}.tif" for end in ("", "_rgb"))]
    return [path.read_bytes() for path in paths]


def starts() -> list[bytes]:
    """Magics with noise behind."""
    magics = [
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"BM",
        b"II*\0",
        b"MM\0*",
        b"II+\0",
        b"\x5c\x01\0\0",
        b"\x1f\x8b",
    ]
    magics += [b"RIFF\0\0\0\0WEBP", b"NRRD0004\n", b"ObjectType = Image\n", b"NDims = 3\n"]
    return [magic + random.Random(0).randbytes(500) for magic in magics]  # noqa: S311 - no secret


KINDS = {
    made.__name__: functools.cache(made)
    for made in (rasters, tiffs, stacks, microscopes, niftis, itks, shipped, starts)
}


def mutated(data: bytes, draw: Callable[[int], int]) -> bytes:
    """Some changes; `draw` gives a number below another one."""
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
    """Right checksums of PNG chunks; NIfTI may be wrapped in a sound gzip."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        out, at = bytearray(data), 8
        while at + 12 <= len(out):
            end = at + 8 + int.from_bytes(out[at : at + 4], "big")
            if end + 4 > len(out):
                break
            out[end : end + 4] = struct.pack(">I", zlib.crc32(out[at + 4 : end]))
            at = end + 4
        return bytes(out)
    if squeeze and DECODERS["nifti"].sniff(data[:16]) and data[:2] != b"\x1f\x8b":
        return gzip.compress(data, 1, mtime=0)
    return data


def check(data: bytes, labels: bool, zero: bool) -> None:
    """What the server does with a file, in this order."""
    # Of the files whose axes can be named, some.
    axes = "ZYX" if labels and zero and DECODERS["tiff"].sniff(data[:16]) else ""
    values, refusal = None, ""
    try:
        header(data, limit=LIMIT, voxels=LIMIT, axes=axes)
        choices = {"labels": labels, "zero_nonfinite": zero, "axes": axes}
        source = read(data, limit=LIMIT, voxels=LIMIT, **choices)
        values = source.values
    except CallerError as error:
        # As a problem document: JSON, which knows no infinity.
        refusal = json.dumps({"detail": str(error), **error.fields}, allow_nan=False)
    if values is None:
        # Of the server's insides it says nothing.
        assert not any(word in refusal for word in ("Error", "upload.tif", "/tmp", "site-packages"))  # noqa: S108
        return
    # Numbers of objects are as stored.
    numbers = labels and values.dtype.kind in "iu"
    assert numbers or values.dtype in (np.uint8, np.uint16, np.int16, np.float32)
    assert values.size <= 3 * LIMIT
    assert np.isfinite(values).all()
    # Notes are headers of HTTP, and none repeats a text of the file.
    assert source.note.isascii()
    assert source.note.isprintable()
    if isinstance(source, Image) or source.affine is None:
        # What a TIFF answer repeats of its source must never fail it.
        assert encoded("mask.tiff", masked(np.zeros(source.size, np.uint8), source))


def attack(goods: list[bytes], rounds: Iterable[int]) -> None:
    """Each round is made of its number, so that it can be had again."""
    slowest = 0.2
    for number in rounds:
        draw = random.Random(number).randrange  # noqa: S311 - no secret
        changed = repaired(mutated(goods[draw(len(goods))], draw), bool(draw(2)))
        begun = time.perf_counter()
        try:
            check(changed, bool(draw(2)), bool(draw(2)))
        except BaseException as error:
            error.add_note(f"in round {number}")
            raise
        took = time.perf_counter() - begun
        if took > slowest:
            slowest = took
            print(f"round {number}: {took:.2f} s, {len(changed):,} bytes, {changed[:16]!r}")  # noqa: T201


@pytest.mark.parametrize("kind", KINDS)
def test_decoders_only_ever_refuse(kind: str) -> None:
    goods = KINDS[kind]()
    with memory_stays_below(MEMORY_MB):
        attack(goods, range(200))


def test_decoders_only_ever_refuse_without_checked_types() -> None:
    """Under pytest wrong types are caught at once, inside of what turns every exception into a sentence; here as served."""
    command = [sys.executable, "-m", "tests.server.imaging.test_fuzz", "2000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # noqa: TID251 - of a child
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "2,000 rounds, types unchecked" in ran.stdout
    assert checks_types()


def checks_types() -> bool:
    """Whether this process has what `tests/conftest.py` installs."""
    return any(type(finder).__module__.startswith("jaxtyping") for finder in sys.meta_path)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    count = int(sys.argv[1])
    attack([good for make in KINDS.values() for good in make()], range(count))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    types = "checked" if checks_types() else "unchecked"
    print(f"{count:,} rounds, types {types}, at most {peak_mb:,} MB")  # noqa: T201
