"""The C library's heaps, in a process of their own: what mallopt sets cannot be taken back."""

import subprocess
import sys

import pytest

# Threads each free pixels and small things, as workers do between requests; then the rise of the process's
# memory in MB.
PROGRAM = """
import sys, threading
import numpy as np
from server.runtime import memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

if sys.argv[1] == "limited":
    memory.limit_malloc_arenas()
begun, barrier = resident(), threading.Barrier(8)

def work():
    large = [np.ones(4_000_000 // 8) for _ in range(5)]
    small = [bytearray(1000 + k % 7000) for k in range(2000)]
    barrier.wait()
    del large[:], small[::2]

for _ in range(3):
    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
if sys.argv[1] == "trimmed":
    memory.malloc_trim()
print(resident() - begun)
"""


def rise(how: str) -> float:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_limit_malloc_arenas_freed_pixels_go_back_to_the_system() -> None:
    # 160 MB were in use at once.
    assert rise("limited") < 40


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_malloc_trim_gives_back_what_heaps_keep() -> None:
    assert rise("trimmed") < 40
