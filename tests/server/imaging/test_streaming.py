import bz2
import gzip
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest

from server.errors import TooLarge, Unreadable
from server.imaging.streaming import (
    GZIP,
    MAX_MEMBERS,
    Inflater,
    Stream,
    finish,
    open_bzip2,
    open_gzip,
    open_zlib,
    read_exactly,
    read_values,
)
from tests.support.files import Sent

OPEN: dict[str, Callable[[bytes], AbstractContextManager[Stream]]] = {
    "plain": lambda data: nullcontext(Sent(data)),
    "gzip": lambda data: nullcontext(open_gzip(Sent(gzip.compress(data)))),
    "bzip2": lambda data: nullcontext(open_bzip2(Sent(bz2.compress(data)))),
    "zlib": lambda data: nullcontext(open_zlib(Sent(zlib.compress(data)), chunk_bytes=7)),
}
VALUES = np.random.default_rng(0).integers(0, 200, (63, 3))


@pytest.mark.parametrize("kind", OPEN)
@pytest.mark.parametrize("stored", ["uint8", ">i2", ">f8"])
def test_read_values_in_several_blocks_are_the_values(kind: str, stored: str) -> None:
    data = VALUES.astype(stored).tobytes()
    dtype = np.dtype(stored if stored == "uint8" else np.float32)
    with OPEN[kind](data) as stream:
        values, nonfinite = read_values(stream, np.dtype(stored), dtype, 63, channels=3, block_bytes=64)
    assert np.array_equal(values, VALUES)
    assert nonfinite == 0
    with OPEN[kind](data) as stream:
        selected = slice(1, 2)
        values, _ = read_values(
            stream, np.dtype(stored), dtype, 63, channels=3, selected=selected, block_bytes=64
        )
    assert np.array_equal(values, VALUES[:, 1:2])


@pytest.mark.parametrize("kind", OPEN)
def test_read_values_of_a_truncated_stream_is_refused(kind: str) -> None:
    with OPEN[kind](bytes(99)) as stream, pytest.raises(Unreadable) as caught:
        read_values(stream, np.dtype("uint8"), np.dtype("uint8"), 100, block_bytes=64)
    assert caught.value.fields == {"reason": "truncated", "part": "voxels"}


MEMBERS = {
    "one": gzip.compress(bytes(range(100))),
    "two": gzip.compress(bytes(range(40))) + gzip.compress(bytes(range(40, 100))),
    "with a name": b"\x1f\x8b\x08\x08\0\0\0\0\0\x03a.nii\0" + gzip.compress(bytes(range(100)))[10:],
    "single bytes": b"".join(gzip.compress(bytes([value])) for value in range(100)),
    "empty ones between": gzip.compress(b"").join(gzip.compress(bytes([value])) for value in range(100)),
    "zeros between": gzip.compress(bytes(range(40))) + bytes(513) + gzip.compress(bytes(range(40, 100))),
}
BEHIND = {
    "nothing": (b"", False),
    "zeros": (bytes(10240), False),
    "another member": (gzip.compress(b"more"), True),
    "an empty member": (gzip.compress(b""), False),
    "an empty member and text": (gzip.compress(b"") + b"x", True),
    "a magic and text": (b"\x1f\x8bjunk", True),
    "half a member": (gzip.compress(b"more")[:15], True),
    "a damaged member": (gzip.compress(b"")[:-8] + b"damaged!", True),
    "text": (b"trailing", True),
    "line feed": (b"\n", True),
    "half a magic": (b"\x1f", True),
    "zeros and text": (bytes(40_000) + b"x", True),
    "signature": (b"-----BEGIN SIGNATURE-----" * 5000, True),
}


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("chunk_bytes", [1, 7, 32 * 1024])
def test_gzip_is_read_to_its_end_and_no_further(name: str, behind: str, chunk_bytes: int) -> None:
    more, noted = BEHIND[behind]
    stream = Inflater(Sent(MEMBERS[name] + more), GZIP, chunk_bytes=chunk_bytes)
    values, note = whole_values(stream)
    assert values == bytes(range(100))
    assert bool(note) == noted


def whole_values(stream: Stream) -> tuple[bytes, str]:
    return read_exactly(stream, 100, "voxels"), finish(stream)


@pytest.mark.parametrize("pack", [bz2.compress, zlib.compress])
@pytest.mark.parametrize(
    "behind", [b"", bytes(99), b"x", b"trailing" * 9999, b"BZhjunk", bytes(40_000) + b"x"]
)
def test_bytes_behind_bzip2_and_zlib_are_read_over_and_noted(
    pack: Callable[[bytes], bytes], behind: bytes
) -> None:
    opened = open_bzip2 if pack is bz2.compress else open_zlib
    values, note = whole_values(opened(Sent(pack(bytes(range(100))) + behind)))
    assert values == bytes(range(100))
    assert bool(note) == bool(behind.strip(b"\0"))


def test_bzip2_of_several_members_is_one_stream() -> None:
    data = b"".join(bz2.compress(bytes(range(first, first + 20))) for first in range(0, 100, 20))
    assert whole_values(open_bzip2(Sent(data))) == (bytes(range(100)), "")
    assert whole_values(open_bzip2(Sent(data + bz2.compress(b""))))[1] == ""
    assert whole_values(open_bzip2(Sent(data + bz2.compress(b"more"))))[1]


@pytest.mark.parametrize("name", ["one", "two", "with a name"])
def test_gzip_that_is_cut_anywhere_is_refused(name: str) -> None:
    whole = MEMBERS[name]
    for length in range(len(whole)):
        with pytest.raises(Unreadable) as caught:
            whole_values(open_gzip(Sent(whole[:length])))
        assert caught.value.fields == {"reason": "truncated", "part": "voxels"}


def test_gzip_of_endless_empty_members_is_not_inflated_to_its_end() -> None:
    stream = open_gzip(Sent(MEMBERS["one"] + gzip.compress(b"") * (MAX_MEMBERS + 1)))
    assert whole_values(stream)[1]


def test_gzip_of_too_many_members_is_refused() -> None:
    member = gzip.compress(b"")
    with pytest.raises(TooLarge) as caught:
        open_gzip(Sent(member * (MAX_MEMBERS + 1))).read(1)
    assert caught.value.fields == {"limit": MAX_MEMBERS, "unit": "members"}
