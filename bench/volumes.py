"""Whole volumes, from file to file: ours at each level against torch with MONAI's sliding windows, in one run.

    python -m bench.volumes --brain ../data/volumes/brain_t1_full.nii.gz

Both sides read the same .nii.gz, run the same network (the shipped hippocampus bundle as a load; what it finds in a head
or a CT means nothing) with the same window, overlap and weights, and write the classes as .nii.gz on the file's grid. Each
contender has a process of its own, whose peak memory is read at its end; the two sides of a line run one after the other.
The last lines are of an untrained network with 25 classes, for memory.
"""

import argparse
import asyncio
import dataclasses
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from bench.table import write
from server.runtime.bundle import WEIGHTS, Bundle, Manifest, read_bundle

BUNDLE = Path("bundles/hippocampus")
MANY_CLASSES = 25
CT_SIZE = (512, 512, 400)


def synthetic_ct(path: Path) -> None:
    """512 × 512 × 400 int16 at 1 mm: an ellipse of tissue with blobs in it, in air, with noise."""
    import nibabel as nib

    random = np.random.default_rng(0)
    x, y = np.ogrid[-1 : 1 : CT_SIZE[0] * 1j, -1 : 1 : CT_SIZE[1] * 1j]
    body = (x / 0.8) ** 2 + (y / 0.6) ** 2 < 1
    voxels = np.empty(CT_SIZE, dtype=np.int16)
    for z in range(CT_SIZE[2]):
        blob = (x - 0.4 * np.sin(z / 40)) ** 2 + (y - 0.3 * np.cos(z / 60)) ** 2 < 0.02
        voxels[..., z] = np.where(body, 40 + 200 * blob, -1000) + random.normal(0, 15, CT_SIZE[:2]).astype(np.int16)
    nib.Nifti1Image(voxels, np.eye(4)).to_filename(path)


def ours(bundle: Bundle, volume: Path, graph: str, precision: str, out: Path) -> dict[str, Any]:
    """The server's request line without HTTP, with the one engine that the request needs."""
    from server.runtime.engines import ENGINES
    from server.runtime.opening import OpenBundle, cores
    from server.segment.pipeline import Segmenter, SegmentRequest
    from server.settings import Settings

    settings = Settings()
    path = bundle.path(graph, precision)
    engine = ENGINES["openvino"].open(path, precision, "cpu", cores())
    # On the file's own grid, as the other side.
    plain = Bundle(bundle.folder, bundle.manifest.model_copy(update={"spacing": None}))
    opened = OpenBundle(plain, {(graph, precision): engine}, {graph: precision})
    segmenter = Segmenter({"load": opened}, "load", settings.batching, settings.limits, workers=4)
    mode, level = ("accurate", None) if graph == "accurate" else ("fast", int(graph[1:]))
    wanted = SegmentRequest(mode=mode, level=level)
    windows = 0

    def count(stage: str, done: int, total: int) -> None:
        nonlocal windows
        del stage, done
        windows = total

    begun = time.perf_counter()
    with volume.open("rb") as file:
        answer = asyncio.run(segmenter.segment(file, wanted, progress=count))
    out.write_bytes(answer.body)
    seconds = time.perf_counter() - begun
    segmenter.close()
    return {"seconds": seconds, "windows": windows, "phases": answer.seconds}


def theirs(bundle: Bundle, volume: Path, graph: str, precision: str, out: Path) -> dict[str, Any]:
    """nibabel, torch eager in float32 and MONAI's sliding_window_inference, as MONAI's tutorials write it."""
    import nibabel as nib
    import torch
    from monai.inferers import sliding_window_inference

    from export.graph import level_networks
    from model import checkpoint
    from model.network import UNetPlusPlus

    del precision
    network, _ = checkpoint.load(bundle.folder / WEIGHTS)
    if not isinstance(network, UNetPlusPlus):
        raise SystemExit("the bundle's weights are not a UNet++")
    pruned = level_networks(network)[graph][1].eval()
    windows = 0

    def predict(tiles: torch.Tensor) -> torch.Tensor:
        nonlocal windows
        windows += len(tiles)
        heads: list[torch.Tensor] = pruned(tiles)
        return torch.stack([torch.softmax(head, 1) for head in heads]).mean(0)

    begun = time.perf_counter()
    image = nib.load(volume)
    voxels = nib.as_closest_canonical(image).get_fdata(dtype=np.float32)
    tensor = torch.from_numpy((voxels - voxels.mean()) / voxels.std())[None, None]
    window = bundle.manifest.window
    with torch.inference_mode():
        scores = sliding_window_inference(
            tensor, window.size, sw_batch_size=4, predictor=predict, overlap=window.overlap, mode="gaussian", sigma_scale=0.125
        )
        classes = scores.argmax(1)[0].to(torch.uint8).numpy()
    turned = nib.as_closest_canonical(image)
    back = nib.orientations.ornt_transform(nib.io_orientation(turned.affine), nib.io_orientation(image.affine))
    nib.save(nib.Nifti1Image(nib.apply_orientation(classes, back), image.affine, image.header, dtype=np.uint8), out)
    return {"seconds": time.perf_counter() - begun, "windows": windows, "phases": {}}


SIDES = {"ours": ours, "theirs": theirs}


def child(order: dict[str, str]) -> None:
    """Runs one contender in this process and prints what it took."""
    gc.collect()
    facts = SIDES[order["side"]](
        read_bundle(Path(order["bundle"])), Path(order["volume"]), order["graph"], order["precision"], Path(order["out"])
    )
    status = Path("/proc/self/status").read_text().splitlines()
    facts["peak_mb"] = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1e3
    print(json.dumps(facts))


@dataclasses.dataclass(frozen=True)
class Line:
    """One comparison."""

    volume: str
    path: Path
    bundle: Path
    graph: str
    precisions: tuple[str, ...]


def run(line: Line, side: str, precision: str, out: Path) -> dict[str, Any]:
    """One contender in a process of its own."""
    order = {
        "side": side, "bundle": str(line.bundle), "volume": str(line.path), "graph": line.graph, "precision": precision,
        "out": str(out),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "bench.volumes", "--one", json.dumps(order)], check=True, stdout=subprocess.PIPE)
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def many_classes(folder: Path, manifest: Manifest) -> Path:
    """A bundle of an untrained network of the shipped one's shape with 25 classes."""
    import torch

    from export.pack import Card, export
    from model import checkpoint
    from model.network import UNetPlusPlus

    network, _ = checkpoint.load(BUNDLE / WEIGHTS)
    torch.manual_seed(0)
    wide = UNetPlusPlus(network.config.model_copy(update={"classes": MANY_CLASSES, "norm": "none"}))  # type: ignore[union-attr, operator]
    checkpoint.save(wide, folder / "many.safetensors")
    classes = [{"value": value, "name": f"class {value}", "color": "#ff7f0e"} for value in range(1, MANY_CLASSES)]
    fields = {name: getattr(manifest, name) for name in Card.model_fields} | {"name": "many", "classes": classes}
    return export(folder / "many.safetensors", Card.model_validate(fields), folder / "many", None).folder


def auto_precisions() -> dict[str, str]:
    """What `precision=auto` serves for each graph on this machine."""
    from server.runtime.opening import open_bundle
    from server.settings import Settings

    return open_bundle(BUNDLE, Settings().runtime).auto


def main() -> None:
    """Measures, prints, writes results/volumes.{md,json}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brain", type=Path)
    parser.add_argument("--ct-levels", default="1", help="levels that the large CT is run at, e.g. 1,2")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        child(json.loads(arguments.one))
        return
    if arguments.brain is None:
        parser.error("--brain is needed: brain_t1_full.nii.gz")
    auto = auto_precisions()
    manifest = read_bundle(BUNDLE).manifest
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic_ct(folder / "ct.nii.gz")
        many = many_classes(folder, manifest)
        brain = [Line("brain 4.9M", arguments.brain, BUNDLE, g.name, _wanted(auto[g.name])) for g in manifest.graphs]
        levels = [f"L{level}" for level in arguments.ct_levels.split(",")]
        ct = [Line("CT 105M", folder / "ct.nii.gz", BUNDLE, level, _wanted(auto[level])) for level in levels]
        wide = [Line(f"CT 105M, {MANY_CLASSES} classes", folder / "ct.nii.gz", many, "L1", ("bf16",))]
        rows, facts = [], []
        for line in track([*brain, *ct, *wide], "volumes"):
            against = run(line, "theirs", "fp32", folder / "theirs.nii.gz")
            for precision in line.precisions:
                mine = run(line, "ours", precision, folder / "ours.nii.gz")
                fact = _fact(line, precision, precision == auto[line.graph], mine, against, folder)
                facts.append(fact)
                rows.append(_row(fact))
    caption = (
        "From .nii.gz to .nii.gz; torch eager fp32 with MONAI sliding windows against ours on OpenVINO (goals: 2.5 times faster "
        "at auto, 1.3 times at fp32, at most half of the memory with 25 classes, codec and restore at most 15 % of the time)."
    )
    headings = [
        "volume", "graph", "precision", "MONAI s", "ours s", "faster", "codec and restore", "MONAI windows", "ours", "MONAI peak MB",
        "ours", "same class",
    ]  # fmt: skip
    write("volumes", caption, headings, rows, facts)


def _wanted(auto: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(("fp32", auto)))


def _fact(line: Line, precision: str, auto: bool, mine: dict[str, Any], against: dict[str, Any], folder: Path) -> dict[str, Any]:
    import nibabel as nib

    found, expected = (np.asarray(nib.load(folder / f"{side}.nii.gz").dataobj) for side in SIDES)
    codec = sum(mine["phases"][phase] for phase in ("decode", "restore", "encode"))
    return {
        "volume": line.volume, "graph": line.graph, "precision": precision, "auto": auto,
        "monai_s": against["seconds"], "ours_s": mine["seconds"], "faster": against["seconds"] / mine["seconds"],
        "codec_share": codec / mine["seconds"], "phases": mine["phases"],
        "monai_windows": against["windows"], "windows": mine["windows"],
        "monai_peak_mb": against["peak_mb"], "peak_mb": mine["peak_mb"],
        "agreement": float((found == expected).mean()),
    }  # fmt: skip


def _row(fact: dict[str, Any]) -> list[str]:
    return [
        fact["volume"], fact["graph"], fact["precision"] + (" (auto)" if fact["auto"] else ""), f"{fact['monai_s']:.1f}",
        f"{fact['ours_s']:.1f}", f"{fact['faster']:.1f}×", f"{fact['codec_share']:.0%}", f"{fact['monai_windows']:,}",
        f"{fact['windows']:,}", f"{fact['monai_peak_mb']:,.0f}", f"{fact['peak_mb']:,.0f}", f"{fact['agreement']:.2%}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
