"""Batches of decoded tiles over the Open Inference Protocol, against a bare loop of the same engine and other servers.

    python -m bench.peers --install            (once: the peers' virtual environments, in var/peers)
    python -m bench.open_inference --rounds 5 --seconds 8

Tiles of 96² at L1, 64 in one request, both as bytes: (64, 96, 96, 3) in, (64, 96, 96) masks out, two requests at once. `ours`
runs ONNX Runtime at fp32 on two threads, as the peers do, and `ours, auto` what the server's rule picks. The bare loop runs the
engine of each with arrays that are ready, in three sizes of batch, of which the best counts. All take turns in each round, in
another order each time, and servers that wait are suspended, so that ratios within a round hold on a machine whose speed
varies. Every server's masks are compared with those of POST /segment, or of the bare loop, before the load.
"""

import argparse
import base64
import contextlib
import functools
import http.client
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import psutil
from jaxtyping import UInt8
from numpy import ndarray
from skimage import data

from bench.inputs import png_of
from bench.peers.contenders import HOME, installed
from bench.serving import ROOT, free_port, running, serve_command, tree, wait_until_idle
from bench.table import RESULTS, write
from server.api.open_inference.messages import HEADER, pack
from server.api.open_inference.tensors import Tensor
from server.arrays import Tiles
from server.runtime.deployment import read_deployment
from server.runtime.engines import ENGINES, Engine
from server.segment.registry import resolve_target
from server.segment.request import SegmentParams
from server.segment.tile_batch import cut
from server.settings import BatchingSettings, RuntimeSettings

BUNDLE = ROOT / "bundles" / "nuclei"
SIDE, BATCH, THREADS, CONNECTIONS = 96, 64, 2, 2
SAME = ", same batches"
SAME_AS_PEERS = {"engine": "onnxruntime", "precision": "fp32", "threads": THREADS}
AUTO: dict[str, Any] = {}
START_UP_S = 120

# (above, below, least): throughput of the first over that of the second.
GOALS = (
    ("ours", "bare", 0.85),
    ("ours", "bare, same batches", 0.85),
    ("ours, auto", "bare, auto", 0.85),
    ("ours, auto", "bare, auto, same batches", 0.85),
    ("ours", "best peer", 1.5),
    ("ours, auto", "best peer", 1.5),
)


class Rates(NamedTuple):
    """Tiles per second of wall-clock time, and per second of processor time of the server or the loop."""

    wall: float
    cpu: float


@dataclass
class Contender:
    """A server that takes part.

    Attributes:
        command: argv for (port, an empty folder).
        path: path of the URL.
        body: one request.
        headers: its headers.
        masks: function from the body of an answer to (N, H, W) masks.
        environment: variables of its process.
        port: TCP port, once it runs.
        pid: process id, once it runs.
    """

    command: Callable[[int, Path], list[str]]
    path: str
    body: bytes
    headers: dict[str, str]
    masks: Callable[[bytes], UInt8[ndarray, "N H W"]]
    environment: dict[str, str] = field(default_factory=dict)
    port: int = 0
    pid: int = 0


def tiles() -> UInt8[ndarray, "N H W 3"]:
    """Parts of a real picture, each from another place."""
    picture, rng = data.immunohistochemistry(), np.random.default_rng(0)
    places = rng.integers(0, len(picture) - SIDE, (BATCH, 2))
    return np.stack([picture[y : y + SIDE, x : x + SIDE] for y, x in places])


def engine_of(runtime: dict[str, Any]) -> tuple[Engine, Any]:
    """The engine that the server opens for L1 by these settings, and its target."""
    deployment = read_deployment(BUNDLE, RuntimeSettings(**runtime), BatchingSettings())
    target = resolve_target(deployment, SegmentParams(level=1))
    chosen = target.instance.choice.candidate
    opened = ENGINES[chosen.engine].open(
        target.instance.path, chosen.precision, chosen.provider, deployment.threads
    )
    return opened, target


def bare_loop(engine: Engine, whole: Tiles, sizes: Sequence[int], seconds: float) -> dict[int, Rates]:
    """Rates of the engine alone by size of its batches."""
    rates: dict[int, Rates] = {}
    for size in sizes:
        part = Tiles(
            np.ascontiguousarray(whole.pixels[:size], np.float32), whole.mean[:size], whole.inverse_std[:size]
        )
        engine.run(part)
        count, start, used = 0, time.perf_counter(), time.process_time()
        while (now := time.perf_counter()) - start < seconds / len(sizes):
            engine.run(part)
            count += size
        rates[size] = Rates(count / (now - start), count / (time.process_time() - used))
    return rates


def closed_loop(one: Contender, seconds: float) -> Rates:
    """Rates with `CONNECTIONS` requests in flight; the processor time is that of the server's processes."""
    counts: list[int] = []
    used, start = cpu_s(one.pid), time.perf_counter()

    def connection() -> None:
        link, count = http.client.HTTPConnection("127.0.0.1", one.port, timeout=120), 0
        while time.perf_counter() - start < seconds:
            link.request("POST", one.path, one.body, one.headers)
            answer = link.getresponse()
            answer.read()
            if answer.status != 200:
                raise SystemExit(f"{one.path} answered {answer.status}")
            count += BATCH
        link.close()
        counts.append(count)

    threads = [threading.Thread(target=connection) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(counts) < CONNECTIONS:
        raise SystemExit(f"a request to {one.path} failed")
    return Rates(sum(counts) / (time.perf_counter() - start), sum(counts) / (cpu_s(one.pid) - used))


def contenders(pixels: UInt8[ndarray, "N H W 3"]) -> dict[str, Contender]:
    """The servers by name."""
    parts, length = pack(
        {"outputs": [{"name": "mask", "parameters": {"binary_data": True}}]},
        "inputs",
        [(Tensor.of("image", pixels), True)],
    )
    ours = {HEADER: f"{length}"}
    settings = {f"UNETPP_RUNTIME__{name.upper()}": f"{value}" for name, value in SAME_AS_PEERS.items()}
    boundary = "b8c1d4"
    form = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'.encode()
        + pixels.tobytes()
        + f"\r\n--{boundary}--\r\n".encode()
    )
    tensor = {
        "name": "image",
        "shape": [1, 1],
        "datatype": "BYTES",
        "parameters": {"content_type": "base64"},
        "data": [base64.b64encode(pixels.tobytes()).decode()],
    }
    path, body = "/v2/models/nuclei-l1/infer", b"".join(parts)
    return {
        "ours": Contender(_serve, path, body, ours, _our_masks, settings),
        "ours, auto": Contender(_serve, path, body, ours, _our_masks),
        "LitServe": Contender(
            _litserve,
            "/segment",
            form,
            {"Content-Type": f"multipart/form-data; boundary={boundary}"},
            _reshaped,
        ),
        "MLServer": Contender(
            _mlserver,
            "/v2/models/segment/infer",
            json.dumps({"inputs": [tensor]}).encode(),
            {"Content-Type": "application/json"},
            lambda answer: _reshaped(base64.b64decode(json.loads(answer)["outputs"][0]["data"][0])),
        ),
    }


def _serve(port: int, folder: Path) -> list[str]:
    kept = {"UNETPP_JOBS__FOLDER": folder / "jobs", "UNETPP_RUNTIME__TUNING_FOLDER": folder / "tuning"}
    return ["env", *(f"{name}={value}" for name, value in kept.items()), *serve_command(BUNDLE, port)]


def _litserve(port: int, _: Path) -> list[str]:
    values = {"--graph": BUNDLE / "L1.onnx", "--threads": THREADS, "--max-batch": SIDE, "--port": port}
    python = HOME / "litserve" / "bin" / "python"
    return [
        str(python),
        "-m",
        "bench.peers.litserve_batch",
        *(str(x) for pair in values.items() for x in pair),
    ]


def _mlserver(port: int, folder: Path) -> list[str]:
    ports = {"http_port": port, "grpc_port": free_port(), "metrics_port": free_port()}
    server = {"debug": False, "host": "127.0.0.1", **ports, "metrics_dir": str(folder), "parallel_workers": 1}
    extra = {"threads": THREADS, "side": SIDE}
    model = {
        "name": "segment",
        "implementation": "bench.peers.mlserver_batch.Segment",
        "parameters": {"uri": str(BUNDLE / "L1.onnx"), "extra": extra},
    }
    (folder / "settings.json").write_text(json.dumps(server))
    (folder / "model-settings.json").write_text(json.dumps(model))
    return [str(HOME / "mlserver" / "bin" / "mlserver"), "start", str(folder)]


def _reshaped(answer: bytes) -> UInt8[ndarray, "N H W"]:
    return np.frombuffer(answer, np.uint8).reshape(-1, SIDE, SIDE)


def _our_masks(answer: bytes) -> UInt8[ndarray, "N H W"]:
    return _reshaped(answer[-BATCH * SIDE * SIDE :])


@contextlib.contextmanager
def started(one: Contender, name: str) -> Iterator[UInt8[ndarray, "N H W"]]:
    """Runs a server, and yields its masks; it is suspended then."""
    one.port = free_port()
    HOME.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = one.command(one.port, Path(folder))
        log = HOME / f"{name.replace(', ', '_').lower()}_batch.log"
        with running(command, {"PYTHONPATH": ".", **one.environment}, log) as process:
            one.pid = process.pid
            masks = None
            until = time.perf_counter() + START_UP_S
            while masks is None:
                if process.poll() is not None or time.perf_counter() > until:
                    raise SystemExit(f"{name} did not start; see {log}")
                with contextlib.suppress(httpx.HTTPError):
                    url = f"http://127.0.0.1:{one.port}{one.path}"
                    answer = httpx.post(url, content=one.body, headers=one.headers, timeout=60)
                    masks = one.masks(answer.content) if answer.status_code == 200 else None
                time.sleep(0.1)
            wait_until_idle(process.pid, calm_s=1, timeout_s=30)
            suspend(one)
            try:
                yield masks
            finally:
                resume(one)


def cpu_s(pid: int) -> float:
    """Processor time of a process and its children so far, in seconds."""
    return sum(sum(process.cpu_times()[:2]) for process in tree(pid))


def suspend(one: Contender) -> None:
    """Stops the processes of a server for a while."""
    for process in tree(one.pid):
        process.suspend()


def resume(one: Contender) -> None:
    """Lets the processes of a server run."""
    for process in tree(one.pid):
        process.resume()


def segment_masks(one: Contender, pixels: UInt8[ndarray, "N H W 3"]) -> UInt8[ndarray, "N H W"]:
    """The masks of POST /segment for the same tiles."""
    from bench.peers.contenders import png_mask

    url = f"http://127.0.0.1:{one.port}/segment?level=1&format=mask.png"
    return np.stack([png_mask(httpx.post(url, content=png_of(tile), timeout=60).content) for tile in pixels])


def check(
    servers: dict[str, Contender], masks: dict[str, Any], pixels: UInt8[ndarray, "N H W 3"]
) -> dict[str, float]:
    """Share of pixels that agree with POST /segment (ours) or with `ours` (peers).

    Raises:
        SystemExit: one of ours differs from its own POST /segment at all, or a peer by more than rounding.
    """
    agreement = {}
    for name, one in servers.items():
        if name.startswith("ours"):
            resume(one)
            expected, least = segment_masks(one, pixels), 1.0
            suspend(one)
        else:
            expected, least = masks["ours"], 0.999
        agreement[name] = float(np.mean(masks[name] == expected))
        if agreement[name] < least:
            raise SystemExit(f"{name}: masks agree in only {agreement[name]:.4%} of the pixels")
    return agreement


def run_round(
    number: int,
    seconds: float,
    servers: dict[str, Contender],
    loops: Mapping[str, Callable[[], dict[int, Rates]]],
) -> dict[str, Any]:
    """Tiles per second of all, in an order that depends on the round."""
    order = [*servers, *loops]
    random.Random(number).shuffle(order)  # noqa: S311 - an order, not a secret
    rates: dict[str, Any] = {}
    for name in order:
        if name in loops:
            rates[name] = loops[name]()
            continue
        one = servers[name]
        resume(one)
        closed_loop(one, min(1.0, seconds / 4))
        rates[name] = closed_loop(one, seconds)
        suspend(one)
    return rates


def best(row: Mapping[str, Any], name: str, measure: int) -> float:
    """A rate in a round, by index in `Rates`; of a bare loop that of its best batch, of the peers that of the best.

    `same batches` is the bare loop with batches of the size that the server makes, the second of the three sizes.
    """
    if name.endswith(SAME):
        return float([*row[name.removesuffix(SAME)].values()][1][measure])
    if name == "best peer":
        return max((row[peer][measure] for peer in ("LitServe", "MLServer") if peer in row), default=0.0)
    rates = [*row[name].values()] if isinstance(row[name], dict) else [row[name]]
    return float(max(one[measure] for one in rates))


def goal_rows(rounds: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row per goal: the ratio by wall-clock time, and by processor time."""
    rows = []
    for above, below, least in GOALS:
        cells = []
        for measure in (0, 1):
            pairs = [(best(row, above, measure), best(row, below, measure)) for row in rounds if above in row]
            ratios = [one / other for one, other in pairs if other]
            if not ratios:
                break
            middle = statistics.median(ratios)
            cells += [
                f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                "met" if middle >= least else "missed",
            ]
        if cells:
            rows.append([f"{above} / {below} ≥ {least:g}", *cells])
    return rows


def report(rounds: list[dict[str, Any]], agreement: dict[str, float], options: argparse.Namespace) -> None:
    """Prints and writes the tables."""
    speeds = []
    for name in sorted(rounds[0]):
        wall, cpu = (statistics.median(best(row, name, measure) for row in rounds) for measure in (0, 1))
        speeds.append(f"{name} {wall:.0f} and {cpu:.0f}")
    agreed = ", ".join(f"{name} {share:.2%}" for name, share in agreement.items())
    load = psutil.getloadavg()[1]
    caption = (
        f"L1, {BATCH} tiles of {SIDE}² per request, {CONNECTIONS} requests at once; rounds: {options.rounds}, {options.seconds:g} s "
        f"each; {THREADS} threads. `ours` and the peers: ONNX Runtime, fp32; `auto`: engine and precision by the server's rule. "
        "Ratios compare measurements of one round, of the bare loop its best size of batch; processor time is that of the server "
        f"or the loop, without the client. Load average of the machine at the end: {load:.1f}. Tiles per second and per second of "
        f"processor time, medians: {', '.join(speeds)}. Pixels that agree, ours with POST /segment for the same tile, peers with "
        f"ours: {agreed}."
    )
    facts = {"rounds": rounds, "agreement": agreement, "load_average": load}
    headings = ["throughput", "wall clock: median (rounds)", "", "processor time: median (rounds)", ""]
    write("open_inference", caption, headings, goal_rows(rounds), facts, options.out)


def main() -> None:
    """Measures, prints, writes open_inference.md and open_inference.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8, help="of one contender in one round")
    parser.add_argument("--without", nargs="*", default=[], help="servers that do not take part")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    pixels = tiles()
    chosen = {name: one for name, one in contenders(pixels).items() if name not in options.without}
    if missing := [name for name in chosen if not name.startswith("ours") and not installed(name.lower())]:
        raise SystemExit(f"not installed: {missing}; run `python -m bench.peers --install`")
    loops: dict[str, Callable[[], dict[int, Rates]]] = {}
    for name, runtime in {"bare": SAME_AS_PEERS, "bare, auto": AUTO}.items():
        engine, target = engine_of(runtime)
        sizes = sorted({1, target.instance.batch_limit((SIDE, SIDE)), BATCH})
        whole = cut(pixels, target)
        loops[name] = functools.partial(bare_loop, engine, whole, sizes, options.seconds)
    with contextlib.ExitStack() as stack:
        masks = {name: stack.enter_context(started(one, name)) for name, one in chosen.items()}
        agreement = check(chosen, masks, pixels)
        rounds = []
        for number in range(options.rounds):
            rounds.append(run_round(number, options.seconds, chosen, loops))
            print({name: round(best(rounds[-1], name, 0)) for name in rounds[-1]}, flush=True)
    report(rounds, agreement, options)


if __name__ == "__main__":
    main()
