"""The cost of HAProxy before one server: the same requests with it and without, in turns.

python -m bench.haproxy [--rounds 6] [--seconds 4]
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from bench.cluster_lab import haproxy_config, haproxy_program
from bench.inputs import bodies
from bench.peers.load import Target, closed_loop, summarise
from bench.serving import ROOT, free_port, running, serve_command, wait_until_ready
from bench.table import RESULTS, write

SIDE, CONNECTIONS = 96, (1, 8)
WITHOUT, WITH = "without", "through HAProxy"


def measure(rounds: int, seconds: float) -> dict[tuple[int, str], list[float]]:
    """Median milliseconds of a request, a value for each round, by connections and road."""
    figures: dict[tuple[int, str], list[float]] = {}
    public, ops, port = free_port(), free_port(), free_port()
    command = serve_command(ROOT / "bundles" / "nuclei", public)
    with (
        tempfile.TemporaryDirectory() as folder,
        running(command, {"UNETPP_HTTP__OPS_PORT": str(ops)}) as process,
    ):
        wait_until_ready(f"http://127.0.0.1:{ops}", process)
        config = Path(folder, "haproxy.cfg")
        config.write_text(haproxy_config(port, {"one": (public, ops)}))
        with running([haproxy_program(), "-f", str(config)]):
            roads = {WITHOUT: f"http://127.0.0.1:{public}", WITH: f"http://127.0.0.1:{port}"}
            targets = {
                name: Target(f"{url}/segment?level=1", bodies(SIDE), "image/png")
                for name, url in roads.items()
            }
            for number in range(rounds + 1):
                for connections in CONNECTIONS:
                    for name in [*targets][:: 1 if number % 2 else -1]:
                        summary = summarise(closed_loop(targets[name], connections, seconds))
                        if summary.errors:
                            raise SystemExit(f"{name}: {summary.errors}")
                        # The first round warms.
                        if number:
                            figures.setdefault((connections, name), []).append(summary.p50)
    return figures


def main() -> None:
    """Measures, prints, writes results/haproxy.{md,json}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    figures = measure(options.rounds, options.seconds)
    rows = []
    for connections in CONNECTIONS:
        without, through = (figures[connections, name] for name in (WITHOUT, WITH))
        added = [more - less for more, less in zip(through, without, strict=True)]
        rows.append(
            [
                f"{connections}",
                f"{statistics.median(without):.2f}",
                f"{statistics.median(through):.2f}",
                f"{statistics.median(added):.2f} ({min(added):.2f} to {max(added):.2f})",
            ]
        )
    caption = (
        f"L1 on PNG of {SIDE}², precision auto, on one server; medians of {options.rounds} rounds of {options.seconds:g} s in turns, "
        "of which each value is a median."
    )
    headings = ["requests at once", "without, ms", "through HAProxy, ms", "added, ms (range of rounds)"]
    write("haproxy", caption, headings, rows, {f"{c} {n}": v for (c, n), v in figures.items()}, options.out)


if __name__ == "__main__":
    main()
