"""What the process keeps of the memory that it has freed: by default the C library (glibc) keeps it per thread, for good."""

import contextlib
import ctypes

# Parameters of mallopt(3), as malloc.h numbers them.
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8

# Decoded pixels, scores and activations are larger than this, and go back to the system as soon as they are freed. Unless it is set,
# the library raises it to the largest of them, and keeps what is freed in heaps that fragment.
LARGE_BYTES = 1_000_000
# Threads share so many heaps; by default each thread gets its own, and keeps in it the most that it ever needed.
ARENAS = 2


def limit_malloc_arenas() -> None:
    """To be called before threads are started; does nothing where the C library is another."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((ARENA_MAX, ARENAS), (MMAP_THRESHOLD, LARGE_BYTES), (TRIM_THRESHOLD, LARGE_BYTES)):
            mallopt(parameter, value)


def malloc_trim() -> None:
    """Gives back what is free in all heaps, which else happens only at their end."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
