"""Contenders: how each is installed and started, and the form of its requests.

Each peer is set up as its documentation says, with one worker process and the same number of threads of the
same ONNX Runtime. MLServer keeps its one parallel worker, because inference in the server's own process (0)
was slower at 96². Both may batch up to `Case.max_batch`, because larger batches take longer than one by one
on a CPU, and much memory; a batch waits 2 ms, less than the shortest run, because under load requests wait
together for the run before theirs.

Requests are as each project's documentation sends files: the bare body (ours), a multipart form (LitServe),
or base64 in JSON (MLServer, whose batches are formed for the Open Inference Protocol only). The bodies are
prepared before the load starts.
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

# Packages that `--install` installs, by name and version. Beside the peers themselves: LitServe's forms need
# python-multipart; MLServer's worker does not start with uvloop 0.22 and later, which make an event loop on
# request only.
COMMON = ("onnxruntime==1.31.1", "numpy==2.4.6", "pillow==13.0.0")
PEERS = {
    "litserve": ("litserve==0.2.19", "python-multipart==0.0.34"),
    "mlserver": ("mlserver==1.7.1", "uvloop==0.21.0"),
}


@dataclass(frozen=True)
class Case:
    """A level at a size.

    Attributes:
        level: number of the level, from 1.
        side: height and width of the images, in pixels.
        max_batch: largest number of images in one run of a peer.
        open_loop: whether the case includes the open loop.
    """

    level: int
    side: int
    max_batch: int
    open_loop: bool = False

    @property
    def name(self) -> str:
        """Name in the table."""
        return f"L{self.level} {self.side}²"

    @property
    def graph(self) -> Path:
        """ONNX file of the level."""
        return BUNDLE / f"L{self.level}.onnx"


# At L1 the server is the cost, at L3 the network.
CASES = {"L1": Case(1, 96, 16, open_loop=True), "L3": Case(3, 256, 4)}


def raw(body: bytes) -> tuple[bytes, str]:
    """Sends the file as the body."""
    return body, "image/png"


def form(body: bytes) -> tuple[bytes, str]:
    """Sends the file as the field `image` of a multipart form."""
    head = b'--peer\r\nContent-Disposition: form-data; name="image"; filename="image.png"\r\nContent-Type: image/png\r\n\r\n'
    return head + body + b"\r\n--peer--\r\n", "multipart/form-data; boundary=peer"


def inference_protocol(body: bytes) -> tuple[bytes, str]:
    """Sends the file as base64 in JSON, in the Open Inference Protocol."""
    tensor = {
        "name": "image",
        "shape": [1, 1],
        "datatype": "BYTES",
        "data": [base64.b64encode(body).decode()],
    }
    inputs = [tensor | {"parameters": {"content_type": "base64"}}]
    return json.dumps({"inputs": inputs}).encode(), "application/json"


def png_mask(answer: bytes) -> NDArray[np.uint8]:
    """Reads the indices of a PNG."""
    return np.asarray(Image.open(io.BytesIO(answer)))


def protocol_mask(answer: bytes) -> NDArray[np.uint8]:
    """Reads the PNG in an answer of the Open Inference Protocol."""
    return png_mask(base64.b64decode(json.loads(answer)["outputs"][0]["data"][0]))


@dataclass(frozen=True)
class Contender:
    """A server that takes part.

    Attributes:
        label: name in the table.
        command: argv for (case, threads, port, an empty folder).
        path: path of the URL, for a case.
        request: function from a PNG file to body and content type.
        mask: function from the answer's body to the mask.
        environment: variables of its process.
        tolerance: share of pixels that may differ from the bare loop's mask.
        ours: True for our server.
    """

    label: str
    command: Callable[[Case, int, int, Path], list[str]]
    path: Callable[[Case], str] = lambda _: "/segment"
    request: Callable[[bytes], tuple[bytes, str]] = raw
    mask: Callable[[bytes], NDArray[np.uint8]] = png_mask
    environment: Mapping[str, str] = field(default_factory=dict)
    tolerance: float = 0.001
    ours: bool = False


def installed(name: str) -> bool:
    """Tells whether a contender can be started; only peers need a virtual environment."""
    return name not in PEERS or _program(name, "python").exists()


def install(names: Collection[str] = ()) -> None:
    """Makes the virtual environments of some peers, or of all, with the versions above."""
    for name in names or PEERS:
        subprocess.run([sys.executable, "-m", "venv", "--clear", HOME / name], check=True)
        pip = [str(_program(name, "python")), "-m", "pip", "install", "--quiet", "--quiet"]
        subprocess.run([*pip, *PEERS[name], *COMMON], check=True)


def _program(name: str, program: str) -> Path:
    return HOME / name / "bin" / program


def _litserve(case: Case, threads: int, port: int, _: Path) -> list[str]:
    values = {"--graph": case.graph, "--threads": threads, "--max-batch": case.max_batch, "--port": port}
    options = [str(part) for pair in values.items() for part in pair]
    return [str(_program("litserve", "python")), "-m", "bench.peers.litserve", *options]


def _mlserver(case: Case, threads: int, port: int, folder: Path) -> list[str]:
    ports = {"http_port": port, "grpc_port": free_port(), "metrics_port": free_port()}
    server = {"debug": False, "host": "127.0.0.1", **ports, "metrics_dir": str(folder), "parallel_workers": 1}
    model = {
        "name": "segment",
        "implementation": "bench.peers.mlserver.Segment",
        "max_batch_size": case.max_batch,
        "max_batch_time": BATCH_WAIT_S,
        "parameters": {"uri": str(case.graph), "extra": {"threads": threads}},
    }
    (folder / "settings.json").write_text(json.dumps(server))
    (folder / "model-settings.json").write_text(json.dumps(model))
    return [str(_program("mlserver", "mlserver")), "start", str(folder)]


def _serve(_: Case, __: int, port: int, folder: Path) -> list[str]:
    # An empty folder of tunings, because a developer's tuning would decide what `auto` means.
    settings = {"UNETPP_JOBS__FOLDER": folder / "jobs", "UNETPP_RUNTIME__TUNING_FOLDER": folder / "tuning"}
    return ["env", *(f"{name}={value}" for name, value in settings.items()), *serve_command(BUNDLE, port)]


def _ours(case: Case) -> str:
    return f"/segment?mode=fast&level={case.level}"


def contenders(threads: int) -> dict[str, Contender]:
    """Lists the servers, by the name that `--contenders` accepts, with threads of ONNX Runtime for all but `auto`."""
    same_as_peers = {
        "UNETPP_RUNTIME__ENGINE": "onnxruntime",
        "UNETPP_RUNTIME__PRECISION": "fp32",
        "UNETPP_RUNTIME__THREADS": str(threads),
    }
    return {
        "ours": Contender("ours", _serve, _ours, environment=same_as_peers, ours=True),
        # Another engine and precision may differ at the edges of nuclei.
        "auto": Contender("ours, auto", _serve, _ours, tolerance=0.02, ours=True),
        "litserve": Contender("LitServe", _litserve, request=form),
        "mlserver": Contender(
            "MLServer", _mlserver, lambda _: "/v2/models/segment/infer", inference_protocol, protocol_mask
        ),
    }
