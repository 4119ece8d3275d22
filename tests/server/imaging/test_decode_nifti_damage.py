"""NIfTI that is damaged, or inflates without end."""

import contextlib
import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.errors import TooLarge, UnetppError, Unreadable
from tests.server.imaging.conftest import assert_refused, header, nifti, read
from tests.server.imaging.test_decode_nifti import FAR, ONES, TURNED, VALUES, dim, packed, voxels
from tests.support.memory import memory_stays_below


def doubles(side: int) -> bytes:
    """The start of a volume of doubles."""
    return nifti(np.zeros((2, 2, 2)), TURNED, dim=dim(side, side, side))


PLAIN = nifti(np.arange(600, dtype=np.int16).reshape(10, 10, 6), TURNED)
PACKED = packed(PLAIN)
NAMED = PACKED[:3] + b"\x18" + PACKED[4:10] + b"volume.nii\0a comment\0" + PACKED[10:]


@pytest.mark.parametrize("data", [PLAIN, PACKED], ids=["plain", "gzip"])
def test_truncated_file_is_refused(data: bytes) -> None:
    for length in [*range(360), *range(360, len(data), 7), *range(len(data) - 20, len(data))]:
        with pytest.raises(UnetppError):
            read(data[:length])
    for whole in (PLAIN[:-1], doubles(464), packed(doubles(464))):
        with memory_stays_below(40):
            assert_refused(whole, Unreadable, {"reason": "truncated", "part": "voxels"})
    assert_refused(PLAIN[:300], Unreadable, {"reason": "truncated", "part": "header"})


GOOD = {
    **{
        f"offset {n}": PLAIN[:108] + struct.pack("<f", n) + PLAIN[112:352].ljust(n - 112, b"\0") + PLAIN[352:]
        for n in (353, 9999)
    },
    "offset 0": PLAIN[:108] + bytes(4) + PLAIN[112:],
    "trailing bytes": PLAIN + b"garbage" * 99,
    "trailing bytes inside": packed(PLAIN + b"garbage" * 99),
    "tape blocks": PACKED + bytes(100),
    "members": b"".join(packed(PLAIN[first : first + 100]) for first in range(0, len(PLAIN), 100)),
    "a name and a comment": NAMED,
}


@pytest.mark.parametrize("name", GOOD)
def test_odd_but_sound_file_is_read(name: str) -> None:
    assert np.array_equal(voxels(GOOD[name]), np.arange(600).reshape(10, 10, 6))


@pytest.mark.parametrize("behind", [b"garbage" * 99, b"\n", b"\x1f", b"<html>"])
def test_bytes_behind_gzip_are_read_over_and_noted(behind: bytes) -> None:
    decoded = read(PACKED + behind)
    assert np.array_equal(decoded.values[..., 0], np.arange(600).reshape(10, 10, 6))
    assert "behind the end" in decoded.note
    assert read(PACKED + bytes(99)).note == read(PACKED).note == ""


@pytest.mark.parametrize("at", range(-8, 0))
def test_gzip_with_a_wrong_end_is_refused(at: int) -> None:
    noise = np.random.default_rng(0).integers(0, 9999, (30, 30, 30), dtype=np.uint16)
    for packed_file in (PACKED, packed(nifti(noise, TURNED))):
        data = bytearray(packed_file)
        data[at] ^= 1
        assert_refused(bytes(data), Unreadable, "damaged")


def test_gzip_with_changed_bytes_is_refused_or_read_right() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(PACKED)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(0, 256)
        with contextlib.suppress(UnetppError):
            assert np.array_equal(read(bytes(data)).values[..., 0], np.arange(600).reshape(10, 10, 6))


def test_nibabel_stays_silent(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        read(nifti(VALUES, TURNED, pixdim=[0, -1, 0, 2, 1, 1, 1, 1], qform_code=77))
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def endless() -> bytes:
    """The second member of a gzip file: 300 MB of zeros."""
    packer, zeros = zlib.compressobj(1, zlib.DEFLATED, 31), bytes(10**6)
    return b"".join(packer.compress(zeros) for _ in range(300)) + packer.flush()


def test_bomb_is_inflated_no_further_than_its_header_promises(endless: bytes) -> None:
    with memory_stays_below(60):
        assert voxels(packed(nifti(ONES, TURNED)) + endless).all()


def test_bomb_of_doubles_takes_no_more_than_the_decoded_voxels(endless: bytes) -> None:
    side = 300
    with memory_stays_below(4e-6 * side**3 + 80):
        assert read(packed(doubles(side)[:352]) + endless).size == (side, side, side)


@pytest.mark.parametrize(
    ("start", "error", "expected"),
    [
        (nifti(ONES, TURNED, dim=dim(1500, 1500, 1300)), TooLarge, {"unit": "voxels"}),
        (nifti(ONES, TURNED, vox_offset=3e9)[:352], TooLarge, FAR),
        (b"", Unreadable, "gzip-without-nifti"),
    ],
    ids=["voxels", "header", "no header"],
)
def test_bomb_over_a_limit_is_refused(
    start: bytes, error: type[UnetppError], expected: Any, endless: bytes
) -> None:
    with memory_stays_below(60):
        assert_refused(packed(start) + endless, error, expected)


@pytest.mark.filterwarnings("ignore")  # decoders warn about what they tolerate
@pytest.mark.parametrize(
    "family", ["go-fuzz", "image-png", "image-rs", "libpng", "nibabel", "nifti-rs", "pillow"]
)
def test_bad_inputs_raise_nothing_but_domain_errors(bad_inputs: Path, family: str) -> None:
    files = sorted(path for path in (bad_inputs / family).rglob("*") if path.is_file())
    assert files
    with memory_stays_below(700):
        for path in files:
            for data in (path.read_bytes(), packed(path.read_bytes())):
                with contextlib.suppress(UnetppError):
                    read(data, limit=20_000_000, voxels=20_000_000, zero_nonfinite=True)
                with contextlib.suppress(UnetppError):
                    header(data)
