"""Whole volumes, from file to file: ours at each level against torch with MONAI's sliding windows, in one run.

    python -m bench.volumes --brain ../data/volumes/brain_t1_full.nii.gz

Both sides read the same .nii.gz, run the same network (the shipped hippocampus bundle as a load; what it
finds in a head or a CT means nothing) with the same window, overlap and weights, on the same number of
threads, and write the classes as .nii.gz on the file's grid. torch runs in its faster memory format (channels
last), in float32 and, for the brain, in bfloat16 too. Each contender has a process of its own, whose peak
memory is read at its end; those of a line run one after the other, in turning order, and the median of the
rounds is quoted. The last line is of an untrained network with 25 classes, for memory.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from bench.serving import serving
from bench.table import write
from export.pack import write_manifest
from server.runtime.bundle import WEIGHTS, Bundle, Manifest, read_bundle
from server.segment.request import Response

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
        voxels[..., z] = np.where(body, 40 + 200 * blob, -1000) + random.normal(0, 15, CT_SIZE[:2]).astype(
            np.int16
        )
    nib.Nifti1Image(voxels, np.eye(4)).to_filename(path)


def ours(bundle: Bundle, volume: Path, graph: str, precision: str, engine: str, out: Path) -> dict[str, Any]:
    """The server's service without HTTP, on the file's own grid, as the other side."""
    from server.segment.request import SegmentParams, Upload
    from server.service import open_service
    from server.settings import Settings

    folder = Path(shutil.copytree(bundle.folder, out.parent / f"{out.stem}-bundle", dirs_exist_ok=True))
    write_manifest(folder, bundle.manifest.model_copy(update={"spacing": None}))
    service = open_service(Settings(bundles=folder, runtime={"engine": engine, "precision": precision}))
    params = SegmentParams.parse({"mode": "accurate"} if graph == "accurate" else {"level": int(graph[1:])})
    windows = 0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal windows
        del done
        windows = total if stage == "infer" else windows

    async def request() -> Response:
        with volume.open("rb") as file:
            return await service.segment(Upload(file, name=volume.name), params, on_progress=progress)

    begun = time.perf_counter()
    response = asyncio.run(request())
    out.write_bytes(response.body if isinstance(response.body, bytes) else response.body.read())
    seconds = time.perf_counter() - begun
    service.close()
    phases = {name: spent for name, spent in response.timings.items() if name != "open"}
    return {"seconds": seconds - response.timings.get("open", 0), "windows": windows, "phases": phases}


def theirs(
    bundle: Bundle, volume: Path, graph: str, precision: str, engine_name: str, out: Path
) -> dict[str, Any]:
    """nibabel, torch eager and MONAI's sliding_window_inference, as MONAI's tutorials write it."""
    import nibabel as nib
    import torch
    from monai.inferers import sliding_window_inference

    from export.graph import level_networks
    from model import checkpoint
    from model.network import UNetPlusPlus

    del engine_name
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network, _ = checkpoint.load(bundle.folder / WEIGHTS)
    if not isinstance(network, UNetPlusPlus):
        raise SystemExit("the bundle's weights are not a UNet++")
    pruned = level_networks(network)[graph][1].eval().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    windows = 0

    def predict(tiles: torch.Tensor) -> torch.Tensor:
        nonlocal windows
        windows += len(tiles)
        heads: list[torch.Tensor] = pruned(tiles.to(memory_format=torch.channels_last_3d))
        return torch.stack([torch.softmax(head.float(), 1) for head in heads]).mean(0)

    begun = time.perf_counter()
    image = nib.load(volume)
    turned = nib.as_closest_canonical(image)
    voxels = turned.get_fdata(dtype=np.float32)
    tensor = torch.from_numpy((voxels - voxels.mean()) / voxels.std())[None, None]
    window = bundle.manifest.window
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        scores = sliding_window_inference(
            tensor,
            window.size,
            sw_batch_size=4,
            predictor=predict,
            overlap=window.overlap,
            mode="gaussian",
            sigma_scale=0.125,
        )
        classes = scores.argmax(1)[0].to(torch.uint8).numpy()
    back = nib.orientations.ornt_transform(
        nib.io_orientation(turned.affine), nib.io_orientation(image.affine)
    )
    nib.save(
        nib.Nifti1Image(nib.apply_orientation(classes, back), image.affine, image.header, dtype=np.uint8), out
    )
    return {"seconds": time.perf_counter() - begun, "windows": windows, "phases": {}}


SIDES = {"ours": ours, "theirs": theirs}


def child(order: dict[str, str]) -> None:
    """Runs one contender in this process and prints what it took."""
    facts = SIDES[order["side"]](
        read_bundle(Path(order["bundle"])), Path(order["volume"]), order["graph"], order["precision"], order["engine"],
        Path(order["out"]),
    )  # fmt: skip
    status = Path("/proc/self/status").read_text().splitlines()
    facts["peak_mb"] = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1e3
    print(json.dumps(facts))


Contender = tuple[str, str, str]
"""Side, precision, engine."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One volume and graph, and who runs it; the first contender is torch in float32."""

    volume: str
    path: Path
    bundle: Path
    graph: str
    contenders: tuple[Contender, ...]
    auto: str = ""


def run(line: Line, contender: Contender, out: Path) -> dict[str, Any]:
    """One contender in a process of its own."""
    side, precision, engine = contender
    order = {
        "side": side, "bundle": str(line.bundle), "volume": str(line.path), "graph": line.graph, "precision": precision,
        "engine": engine, "out": str(out),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "bench.volumes", "--one", json.dumps(order)],
        check=True,
        stdout=subprocess.PIPE,
    )
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def measure(line: Line, rounds: int, folder: Path) -> dict[Contender, dict[str, Any]]:
    """The median round of each contender, whose mask stays in the folder."""
    taken: dict[Contender, list[dict[str, Any]]] = {contender: [] for contender in line.contenders}
    for turn in range(rounds):
        for contender in line.contenders[:: -1 if turn % 2 else 1]:
            taken[contender].append(run(line, contender, mask(folder, contender)))
    return {
        contender: sorted(facts, key=lambda f: f["seconds"])[len(facts) // 2]
        for contender, facts in taken.items()
    }


def mask(folder: Path, contender: Contender) -> Path:
    """Path of a contender's mask."""
    return folder / f"{'-'.join(contender)}.nii.gz"


def foreground_iou(a: Path, b: Path) -> float:
    """IoU of two masks, averaged over the foreground classes that either has."""
    import nibabel as nib

    from server.segment.quality import overlap

    first, second = (np.asarray(nib.load(path).dataobj) for path in (a, b))
    values = (set(np.unique(first)) | set(np.unique(second))) - {0}
    return (
        statistics.mean(overlap(first == value, second == value).iou for value in values) if values else 1.0
    )


def many_classes(folder: Path, manifest: Manifest) -> Path:
    """A bundle of an untrained network of the shipped one's shape with 25 classes."""
    import torch

    from export.card import Card
    from export.pack import export
    from model import checkpoint
    from model.network import UNetPlusPlus

    network, _ = checkpoint.load(BUNDLE / WEIGHTS)
    torch.manual_seed(0)
    wide = UNetPlusPlus(network.config.model_copy(update={"classes": MANY_CLASSES, "norm": "none"}))  # type: ignore[union-attr, operator]
    checkpoint.save(wide, folder / "many.safetensors")
    classes = [
        {"value": value, "name": f"class {value}", "color": "#ff7f0e"} for value in range(1, MANY_CLASSES)
    ]
    fields = {name: getattr(manifest, name) for name in Card.model_fields} | {
        "name": "many",
        "classes": classes,
    }
    return export(folder / "many.safetensors", Card.model_validate(fields), folder / "many", None).folder


def served() -> dict[str, list[tuple[str, str, bool]]]:
    """(precision, engine, whether `auto` means it) of fp32 and of `auto`, per graph, on this machine."""
    rows: dict[str, list[tuple[str, str, bool]]] = {}
    with serving(BUNDLE) as server:
        for row in server.client.get(f"/models/{BUNDLE.name}").json()["serving"]:
            if row["auto"] or row["precision"] == "fp32":
                rows.setdefault(row["graph"], []).append((row["precision"], row["engine"], row["auto"]))
    return {graph: sorted(choices, key=lambda choice: choice[0] != "fp32") for graph, choices in rows.items()}


def main() -> None:
    """Measures, prints, writes results/volumes.{md,json}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--brain", type=Path)
    parser.add_argument(
        "--rounds", type=int, default=3, help="runs of each contender on the brain; the CT is run once"
    )
    parser.add_argument("--ct-levels", default="1", help="levels that the large CT is run at, e.g. 1,2")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        child(json.loads(arguments.one))
        return
    if arguments.brain is None:
        parser.error("--brain is needed: brain_t1_full.nii.gz")
    rows, facts = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic_ct(folder / "ct.nii.gz")
        for line in track(list(lines(arguments, folder)), "volumes"):
            rounds = arguments.rounds if line.path == arguments.brain else 1
            found = _facts(line, measure(line, rounds, folder), rounds, folder)
            facts += found
            rows += [_row(fact) for fact in found]
    caption = (
        f"From .nii.gz to .nii.gz; torch eager with MONAI's sliding windows against ours. Brain: median of {arguments.rounds} "
        "rounds, CT: one. (Goals: 2.5 times faster at auto, 1.3 times at fp32, at most half of the memory with 25 classes, all but "
        "the network at most 15 % of the time.)"
    )
    headings = [
        "volume", "graph", "precision", "MONAI fp32 s", "MONAI bf16 s", "ours s", "faster", "not network", "MONAI windows", "ours",
        "MONAI peak MB", "ours", "IoU with MONAI's",
    ]  # fmt: skip
    write("volumes", caption, headings, rows, facts)


def lines(arguments: argparse.Namespace, folder: Path) -> Iterator[Line]:
    """All comparisons."""
    manifest, engines = read_bundle(BUNDLE).manifest, served()
    torch_fp32, torch_bf16 = ("theirs", "fp32", "torch"), ("theirs", "bf16", "torch")
    mine = {graph: tuple(("ours", p, engine) for p, engine, _ in rows) for graph, rows in engines.items()}
    auto = {graph: next(p for p, _, picked in rows if picked) for graph, rows in engines.items()}
    for graph, ours_ in mine.items():
        yield Line(
            "brain 4.9M", arguments.brain, BUNDLE, graph, (torch_fp32, torch_bf16, *ours_), auto[graph]
        )
    ct = folder / "ct.nii.gz"
    for graph in (f"L{level}" for level in arguments.ct_levels.split(",")):
        yield Line("CT 105M", ct, BUNDLE, graph, (torch_fp32, *mine[graph]), auto[graph])
    many = many_classes(folder, manifest)
    yield Line(
        f"CT 105M, {MANY_CLASSES} classes", ct, many, "L1", (torch_fp32, ("ours", "fp32", mine["L1"][0][2]))
    )


def _facts(
    line: Line, taken: dict[Contender, dict[str, Any]], rounds: int, folder: Path
) -> list[dict[str, Any]]:
    first = line.contenders[0]
    against = taken[first]
    other = next(
        (facts["seconds"] for (side, p, _), facts in taken.items() if (side, p) == ("theirs", "bf16")), None
    )
    found = []
    for contender, mine in taken.items():
        side, precision, engine = contender
        if side == "theirs":
            continue
        found.append({
            "volume": line.volume, "graph": line.graph, "precision": precision, "engine": engine, "auto": precision == line.auto,
            "rounds": rounds, "monai_s": against["seconds"], "monai_bf16_s": other, "ours_s": mine["seconds"],
            "faster": against["seconds"] / mine["seconds"],
            "not_network": sum(mine["phases"].get(phase, 0) for phase in ("decode", "restore", "postprocess", "encode")) / mine["seconds"],
            "phases": mine["phases"], "monai_windows": against["windows"], "windows": mine["windows"],
            "monai_peak_mb": against["peak_mb"], "peak_mb": mine["peak_mb"],
            "iou": foreground_iou(mask(folder, contender), mask(folder, first)),
        })  # fmt: skip
    return found


def _row(fact: dict[str, Any]) -> list[str]:
    bf16 = fact["monai_bf16_s"]
    return [
        fact["volume"], fact["graph"], fact["precision"] + (" (auto)" if fact["auto"] else ""), f"{fact['monai_s']:.1f}",
        f"{bf16:.1f}" if bf16 else "-", f"{fact['ours_s']:.1f}", f"{fact['faster']:.1f}×", f"{fact['not_network']:.0%}",
        f"{fact['monai_windows']:,}", f"{fact['windows']:,}", f"{fact['monai_peak_mb']:,.0f}", f"{fact['peak_mb']:,.0f}",
        f"{fact['iou']:.3f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
