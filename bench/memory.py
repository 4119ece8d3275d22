"""Memory of the server process: after start, after 1,000 requests, and for an 8192 × 8192 image.

python -m bench.memory [--requests 1000]
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from bench.levels import BUNDLE, picture, png_of
from bench.serving import serving
from bench.table import write

LARGE = 8192
# The limit that the project set itself for the large image at L1.
GOAL_MB = 1500


def large_png() -> bytes:
    """8192 × 8192 RGB: the real image of the other benchmarks, repeated."""
    tile = picture(512)
    out = io.BytesIO()
    Image.fromarray(np.tile(tile, (LARGE // 512, LARGE // 512, 1))).save(out, "PNG", compress_level=1)
    return out.getvalue()


def main() -> None:
    """Measures, prints, writes results/memory.{md,json}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    arguments = parser.parse_args()
    queries = ["mode=fast&level=1", "mode=fast&level=2", "mode=fast&level=3", "mode=fast&level=4", "mode=accurate"]
    bodies = [png_of(picture(side)) for side in (96, 129, 256)]
    rows: list[tuple[str, float, float]] = []
    with serving(arguments.bundle) as server:
        rows.append(("after start, all graphs open", server.memory("VmRSS"), server.memory("VmHWM")))
        for count in track(range(1, arguments.requests + 1), "requests"):
            url = f"/segment?{queries[count % len(queries)]}"
            server.client.post(url, content=bodies[count % len(bodies)]).raise_for_status()
            if count in (arguments.requests // 10, arguments.requests // 2, arguments.requests):
                rows.append((f"after {count:,} mixed requests", server.memory("VmRSS"), server.memory("VmHWM")))
    with serving(arguments.bundle) as server:
        server.client.post("/segment?mode=fast&level=1", content=large_png()).raise_for_status()
        rows.append(("fresh server, after one 8192 × 8192 RGB image at L1", server.memory("VmRSS"), server.memory("VmHWM")))
    caption = f"Memory of the server process (goal: peak below {GOAL_MB} MB for 8192 × 8192 at L1)."
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
