"""Test-time augmentation: what tta=flips gains and costs at each level, over HTTP, in one run.

    python -m bench.tta --data DATA/nuclei --volumes DATA/hippocampus [--split test] [--rounds 3] [--inputs 80]

Each input is sent at each level with and without mirrors, in random order; the time of an input is the median
of the rounds.
"""

from bench.auto import BUNDLES, Measured, cases, folders, make_parser, measure
from bench.serving import serving
from bench.table import write
from server.runtime.bundle import Manifest, read_bundle


def queries(manifest: Manifest) -> dict[str, str]:
    """The query of each level and of mode accurate, without mirrors and with them ("L1 flips")."""
    plain = {f"L{level}": f"mode=fast&level={level}" for level in manifest.levels} | {
        "accurate": "mode=accurate"
    }
    return plain | {f"{name} flips": f"{query}&tta=flips" for name, query in plain.items()}


def table(model: str, by_name: dict[str, Measured]) -> list[list[str]]:
    """A row per level: time and IoU without and with mirrors, the factor and the gain."""
    rows = []
    for name, plain in by_name.items():
        flips = by_name.get(f"{name} flips")
        if flips:
            times = [f"{plain.ms:.1f}", f"{flips.ms:.1f}", f"{flips.ms / plain.ms:.1f}×"]
            ious = [
                f"{plain.iou * 100:.2f}",
                f"{flips.iou * 100:.2f}",
                f"{(flips.iou - plain.iou) * 100:+.2f}",
            ]
            rows.append([model, name, *times, *ious])
    return rows


def main() -> None:
    """Measures, prints, writes results/tta.{md,json}."""
    arguments = make_parser(__doc__).parse_args()
    rows, facts = [], []
    for model, data in folders(arguments).items():
        manifest = read_bundle(BUNDLES / model).manifest
        inputs = cases(data, arguments.split, manifest, arguments.inputs)
        with serving(BUNDLES / model) as server:
            measured = measure(server, manifest, inputs, arguments.rounds, queries(manifest), seconds=0.0)
        rows += table(model, {row.name: row for row in measured})
        facts.append({"model": model, "inputs": len(inputs), "modes": [vars(row) for row in measured]})
    counts = ", ".join(f"{one['inputs']} of {one['model']}" for one in facts)
    caption = (
        f"Requests over HTTP at precision=auto, one at a time; inputs of the {arguments.split} split ({counts}), medians of "
        f"{arguments.rounds} rounds in random order. IoU: foreground, mean over inputs and classes."
    )
    headings = ["model", "graph", "ms", "ms with flips", "price", "IoU %", "IoU % with flips", "gain"]
    write("tta", caption, headings, rows, facts, arguments.out)


if __name__ == "__main__":
    main()
