"""Return of freed memory to the system, which the C library (glibc) by default keeps per thread for the life of the process."""

import contextlib
import ctypes

# Parameters of mallopt(3), as malloc.h numbers them.
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8

# Blocks above this size go back to the system as soon as they are freed: decoded pixels, scores and
# activations. It is set, because the library would raise it to the largest block ever freed, and keep the
# rest in heaps that fragment.
LARGE_BYTES = 1_000_000
# Heaps that threads share. By default each thread has its own, which keeps the most that it ever needed.
ARENAS = 2


def limit_malloc_arenas() -> None:
    """Limits the heaps; must be called before threads are started, and does nothing with another C library than glibc."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in (
            (ARENA_MAX, ARENAS),
            (MMAP_THRESHOLD, LARGE_BYTES),
            (TRIM_THRESHOLD, LARGE_BYTES),
        ):
            mallopt(parameter, value)


def malloc_trim() -> None:
    """Returns the free memory inside all heaps to the system; glibc itself only does so at their ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
