"""Memory of the server process: after start, after 1,000 requests, and for an 8192 × 8192 image.

python -m bench.memory [--requests 1000]
"""

import argparse
import io
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from bench.inputs import picture, png_of
from bench.levels import BUNDLE
from bench.serving import Server, serving, wait_until_idle
from bench.table import write

LARGE = 8192
CONCURRENCY = 8
# The limit that the project set itself for the large image at L1.
GOAL_MB = 1500


def large_png() -> bytes:
    """8192 × 8192 RGB: the real image of the other benchmarks, repeated."""
    tile = picture(512)
    out = io.BytesIO()
    Image.fromarray(np.tile(tile, (LARGE // 512, LARGE // 512, 1))).save(out, "PNG", compress_level=1)
    return out.getvalue()


def mix(server: Server) -> Iterator[Callable[[], object]]:
    """Requests without end: every graph and precision, mostly small images, some that are tiled."""
    card = server.client.get("/models").json()[0]
    modes = [*(f"mode=fast&level={level}" for level in card["levels"]), "mode=accurate"]
    small = [png_of(picture(side)) for side in (96, 129, 200, 256)]
    large = [
        png_of(np.tile(picture(512), (2, 3, 1))[:height, :width])
        for height, width in ((512, 512), (700, 513), (1040, 1388))
    ]
    for count, (precision, mode) in enumerate(itertools.cycle(itertools.product(card["precisions"], modes))):
        body = large[count // 20 % len(large)] if count % 20 == 0 else small[count % len(small)]
        query = f"/segment?{mode}&precision={precision}"
        yield lambda query=query, body=body: server.client.post(query, content=body).raise_for_status()  # type: ignore[misc]


def main() -> None:
    """Measures, prints, writes results/memory.{md,json}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    arguments = parser.parse_args()
    rows: list[tuple[str, float, float]] = []
    with serving(arguments.bundle) as server:
        rows.append(("when ready", server.memory("VmRSS"), server.memory("VmHWM")))
        wait_until_idle(server.pid)
        rows.append(("after start, once idle", server.memory("VmRSS"), server.memory("VmHWM")))
        work = list(itertools.islice(mix(server), arguments.requests))
        marks = [arguments.requests // 10, arguments.requests // 2, arguments.requests]
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            for begin, end in itertools.pairwise([0, *marks]):
                list(track(pool.map(lambda send: send(), work[begin:end]), "requests", total=end - begin))
                rows.append((f"after {end:,} requests", server.memory("VmRSS"), server.memory("VmHWM")))
    with serving(arguments.bundle) as server:
        server.client.post("/segment?mode=fast&level=1", content=large_png()).raise_for_status()
        rows.append(
            (
                "fresh server, after one 8192 × 8192 RGB image at L1",
                server.memory("VmRSS"),
                server.memory("VmHWM"),
            )
        )
    caption = f"Memory of the server process; requests from {CONCURRENCY} clients, all levels and precisions (goal: peak below {GOAL_MB} MB for 8192 × 8192 at L1)."
    table = [(what, f"{now:.0f}", f"{peak:.0f}") for what, now, peak in rows]
    write(
        "memory",
        caption,
        ["when", "RSS MB", "peak RSS MB"],
        table,
        [dict(zip(("when", "rss_mb", "peak_mb"), r, strict=True)) for r in rows],
    )


if __name__ == "__main__":
    main()
