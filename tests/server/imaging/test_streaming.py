import bz2
import gzip
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest

from server.errors import Unreadable
from server.imaging.streaming import Stream, open_bzip2, open_gzip, open_zlib, read_values
from tests.support.files import Sent

OPEN: dict[str, Callable[[bytes], AbstractContextManager[Stream]]] = {
    "plain": lambda data: nullcontext(Sent(data)),
    "gzip": lambda data: open_gzip(Sent(gzip.compress(data))),
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
