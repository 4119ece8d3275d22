"""Memory of this process (Linux)."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path


def resident_mb() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


@contextlib.contextmanager
def memory_stays_below(megabytes: float) -> Iterator[None]:
    """Fails where the process's peak grows by more within the block (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mb()
    yield
    peak = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    assert int(peak.split()[1]) / 1e3 - before < megabytes
