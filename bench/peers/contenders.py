"""Contenders: how each is installed and started, and how its requests look.

| peer | a batch waits | what else was set, and why |
|---|---|---|
| LitServe | 2 ms | request timeout 600 s, not 30 s: a long queue is not an error; its queue for many requests |
| BentoML | adaptive | max_latency_ms stays at its default of 60 s: a lower one answers 503 sooner; no access log |
| Ray Serve | 2 ms | max_ongoing_requests 1000, not 5; the documented throughput flags; no dashboard |
| MLServer | 2 ms | debug off; one parallel worker, its default: inference in the server's own process (0) was slower at 96² |
| FastAPI + torch | no batches | as many pool threads as cores, not 40; channels first or last, whichever is faster |

Each peer has one worker process, with the same number of threads of the same ONNX Runtime, which do not spin (faster: common.py).

The largest batch is `Case.max_batch`, the same for all peers. Batches of these networks gain little on a CPU, and large ones
take longer than one by one, and much memory. So each peer may batch, up to where it does not harm.

The wait is no longer than the shortest run, so that a lone request pays little for it; under load requests wait together
for the run before theirs anyway. LitServe cannot do without: with its default, 0, an idle worker polls and takes one core.

Requests are as each project's documentation sends files: the bare body (ours, Ray Serve), a multipart form (LitServe, BentoML,
FastAPI), or base64 in JSON (MLServer, whose batches are formed for the Open Inference Protocol only). The bodies are prepared
before the load starts.
"""

import base64
import io
import json
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench.peers.common import BATCH_WAIT_S
from bench.serving import ROOT, free_port, serve_command

BUNDLE = ROOT / "bundles" / "nuclei"
# Virtual environments of the peers, whose requirements contradict each other and ours.
HOME = ROOT / "var" / "peers"

# What `--install` installs, by name and version; none of it requires torch. Beside the peers themselves: LitServe's forms need
# python-multipart; MLServer's worker does not start with uvloop 0.22 and later, which make an event loop on request only.
COMMON = ("onnxruntime==1.31.1", "numpy==2.4.6", "pillow==13.0.0")
PEERS = {
    "litserve": ("litserve==0.2.19", "python-multipart==0.0.34"),
    "bentoml": ("bentoml==1.4.39",),
    "ray": ("ray[serve]==2.60.0",),
    "mlserver": ("mlserver==1.7.1", "uvloop==0.21.0"),
}


@dataclass(frozen=True)
class Case:
    """A level at a size.

    Attributes:
        max_batch: images in one run, for servers that ask.
    """

    level: int
    side: int
    max_batch: int

    @property
    def name(self) -> str:
        """In the table."""
        return f"L{self.level} {self.side}²"

    @property
    def graph(self) -> Path:
        """The level's ONNX file."""
        return BUNDLE / f"L{self.level}.onnx"


CASES = {f"L{case.level}": case for case in (Case(1, 96, 16), Case(3, 256, 4), Case(4, 512, 2))}


def raw(body: bytes) -> tuple[bytes, str]:
    """The file is the body."""
    return body, "image/png"


def form(name: str) -> Callable[[bytes], tuple[bytes, str]]:
    """The file is a field of a multipart form."""
    head = f'--peer\r\nContent-Disposition: form-data; name="{name}"; filename="image.png"\r\nContent-Type: image/png\r\n\r\n'
    return lambda body: (head.encode() + body + b"\r\n--peer--\r\n", "multipart/form-data; boundary=peer")


def inference_protocol(body: bytes) -> tuple[bytes, str]:
    """Open Inference Protocol: JSON with the file as base64."""
    text = base64.b64encode(body).decode()
    tensor = {
        "name": "image",
        "shape": [1, 1],
        "datatype": "BYTES",
        "parameters": {"content_type": "base64"},
        "data": [text],
    }
    return json.dumps({"inputs": [tensor]}).encode(), "application/json"


def png_mask(answer: bytes) -> NDArray[np.uint8]:
    """Indices of a PNG."""
    return np.asarray(Image.open(io.BytesIO(answer)))


def json_mask(answer: bytes) -> NDArray[np.uint8]:
    """A list with one PNG in base64."""
    return png_mask(base64.b64decode(json.loads(answer)[0]))


def protocol_mask(answer: bytes) -> NDArray[np.uint8]:
    """Open Inference Protocol."""
    return png_mask(base64.b64decode(json.loads(answer)["outputs"][0]["data"][0]))


@dataclass(frozen=True)
class Contender:
    """A server that takes part.

    Attributes:
        label: in the table.
        command: argv for (case, threads, port, an empty folder).
        path: path of the URL, for a case.
        request: a PNG file as it wants it: body and content type.
        mask: the mask in its answer.
        environment: variables for its process.
        tolerance: share of pixels that may differ from the bare loop's mask.
        ours: whether it is our server.
    """

    label: str
    command: Callable[[Case, int, int, Path], list[str]]
    path: Callable[[Case], str] = lambda _: "/segment"
    request: Callable[[bytes], tuple[bytes, str]] = raw
    mask: Callable[[bytes], NDArray[np.uint8]] = png_mask
    environment: Mapping[str, str] = field(default_factory=dict)
    tolerance: float = 0.001
    ours: bool = False


def python(name: str) -> Path:
    """A peer's own interpreter."""
    return HOME / name / "bin" / "python"


def installed(name: str) -> bool:
    """Whether a contender can be started; only peers with a virtual environment may be missing."""
    return name not in PEERS or python(name).exists()


def install(names: Collection[str] = ()) -> None:
    """Makes the virtual environments of some peers, or of all, with the versions above."""
    for name, packages in ((name, PEERS[name]) for name in names or PEERS):
        subprocess.run([sys.executable, "-m", "venv", "--clear", HOME / name], check=True)
        subprocess.run(
            [python(name), "-m", "pip", "install", "--quiet", "--quiet", *packages, *COMMON], check=True
        )


def script(name: str, interpreter: Path | str) -> Callable[[Case, int, int, Path], list[str]]:
    """A peer that is a script with the arguments of `common.arguments`."""

    def command(case: Case, threads: int, port: int, _: Path) -> list[str]:
        given = {"--graph": case.graph, "--threads": threads, "--max-batch": case.max_batch, "--port": port}
        return [
            str(interpreter),
            "-m",
            f"bench.peers.{name}",
            *(str(part) for pair in given.items() for part in pair),
        ]

    return command


def bentoml(case: Case, threads: int, port: int, _: Path) -> list[str]:
    """`bentoml serve` with the arguments of its service."""
    given = {"graph": case.graph, "threads": threads, "max_batch": case.max_batch}
    options = [part for name, value in given.items() for part in ("--arg", f"{name}={value}")]
    command = [
        str(python("bentoml").parent / "bentoml"),
        "serve",
        "bench.peers.bentoml:Segment",
        "--working-dir",
        str(ROOT),
    ]
    return [*command, "--host", "127.0.0.1", "--port", str(port), "--quiet", *options]


def mlserver(case: Case, threads: int, port: int, folder: Path) -> list[str]:
    """`mlserver start` on a folder with its two files of settings."""
    server = {
        "debug": False, "host": "127.0.0.1", "http_port": port, "grpc_port": free_port(), "metrics_port": free_port(),
        "metrics_dir": str(folder), "parallel_workers": 1,
    }  # fmt: skip
    model = {
        "name": "segment", "implementation": "bench.peers.mlserver.Segment", "max_batch_size": case.max_batch, "max_batch_time": BATCH_WAIT_S,
        "parameters": {"uri": str(case.graph), "extra": {"threads": threads}},
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(server))
    (folder / "model-settings.json").write_text(json.dumps(model))
    return [str(python("mlserver").parent / "mlserver"), "start", str(folder)]


def ours(case: Case) -> str:
    """Path with the level in its query."""
    return f"/segment?mode=fast&level={case.level}"


def settings(threads: int) -> dict[str, str]:
    """The peers' engine and precision."""
    return {
        "UNETPP_RUNTIME__ENGINE": "onnxruntime",
        "UNETPP_RUNTIME__PRECISION": "fp32",
        "UNETPP_RUNTIME__THREADS": str(threads),
    }


def contenders(threads: int) -> dict[str, Contender]:
    """All that take part, by the name that `--contenders` knows."""

    def serve(_: Case, __: int, port: int, folder: Path) -> list[str]:
        return ["env", f"UNETPP_JOBS__FOLDER={folder / 'jobs'}", *serve_command(BUNDLE, port)]

    # Another engine and precision may differ at the edges of nuclei.
    auto = Contender("ours, auto", serve, ours, tolerance=0.02, ours=True)
    ray_flags = {
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return {
        "ours": Contender("ours", serve, ours, environment=settings(threads), ours=True),
        "auto": auto,
        "litserve": Contender("LitServe", script("litserve", python("litserve")), request=form("image")),
        "bentoml": Contender(
            "BentoML", bentoml, request=form("images"), mask=json_mask, environment={"BENTOML_DO_NOT_TRACK": "True"}
        ),
        "ray": Contender("Ray Serve", script("ray", python("ray")), environment=ray_flags),
        "mlserver": Contender(
            "MLServer", mlserver, lambda _: "/v2/models/segment/infer", inference_protocol, protocol_mask
        ),
        "torch": Contender("FastAPI + torch", script("torch_eager", sys.executable), request=form("image")),
    }  # fmt: skip
