"""The clients of `bench.soak`: what they send, what they check of each answer, and the record that they keep."""

import contextlib
import gzip
import hashlib
import io
import itertools
import random
import socket
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import httpx
import nibabel
import numpy as np
from PIL import Image
from skimage import data

from bench.inputs import png_of

IMAGES, VOLUMES = "nuclei", "hippocampus"
TIMEOUT_S = 120
LEFT, LOST = "left", "lost"


@dataclass(frozen=True)
class Input:
    """A file to be segmented, and the size of its answer: (H, W) or (X, Y, Z)."""

    model: str
    body: bytes
    size: tuple[int, ...]


@dataclass
class Ledger:
    """Record of all requests; safe for threads.

    Attributes:
        statuses: count per (kind of step, status as text, "left" or "lost").
        faults: findings per check.
        answered: count of answers to POST /segment per status.
    """

    statuses: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    answered: Counter[int] = field(default_factory=Counter)
    _digests: dict[tuple[str, ...], bytes] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def settle(self, kind: str, status: str, *, segment: bool = False) -> None:
        """Records the end of a request."""
        with self._lock:
            self.statuses[kind, status] += 1
            if segment and status.isdigit():
                self.answered[int(status)] += 1

    def fault(self, check: str, text: str) -> None:
        """Records that a check failed."""
        with self._lock:
            self.faults[check].append(text)

    def same(self, key: tuple[str, ...], body: bytes, where: str) -> None:
        """Compares an answer with the first one to the same request."""
        digest = hashlib.sha256(body).digest()
        with self._lock:
            first = self._digests.setdefault(key, digest)
        if first != digest:
            self.fault("same bytes", f"{where}: {key}")


def image(draw: random.Random) -> Input:
    """A crop of a photograph as PNG, mostly small."""
    low, high = draw.choices([(1, 64), (64, 200), (200, 400), (400, 900)], [20, 50, 25, 5])[0]
    height, width = (draw.randint(low, high) for _ in "HW")
    pixels = draw.choice((data.immunohistochemistry, data.astronaut, data.camera))()
    rows, columns = (np.arange(n) % side for n, side in zip((height, width), pixels.shape[:2], strict=True))
    return Input(IMAGES, png_of(pixels[np.ix_(rows, columns)]), (height, width))


def volume(draw: random.Random) -> Input:
    """A bright blob in noise, 20 to 48 voxels a side, as .nii.gz."""
    size = tuple(draw.randint(20, 48) for _ in "XYZ")
    distance = sum(
        ((axis - side / 2) / (side / 4)) ** 2 for axis, side in zip(np.indices(size), size, strict=True)
    )
    noise = np.random.default_rng(draw.getrandbits(32)).uniform(0, 60, size)
    values = (120 * np.exp(-distance) + noise).astype(np.int16)
    return Input(VOLUMES, gzip.compress(nibabel.Nifti1Image(values, np.eye(4)).to_bytes(), 1, mtime=0), size)


def size_of(body: bytes, media_type: str) -> tuple[int, ...]:
    """Size of a mask: PNG or NIfTI."""
    if media_type == "application/gzip":
        return tuple(np.asarray(nibabel.Nifti1Image.from_bytes(gzip.decompress(body)).dataobj).shape)
    with Image.open(io.BytesIO(body)) as picture:
        picture.load()
        return picture.size[::-1]


class Client:
    """One client, in a thread of its own.

    Args:
        name: number of the client.
        seed: seed of the whole soak.
        url: address of the server.
        ledger: record of all clients.
    """

    def __init__(self, name: str, seed: int, url: httpx.URL, ledger: Ledger) -> None:
        self._name, self._seed, self._url, self._ledger = name, seed, url, ledger
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT_S)
        self._kind = self._where = ""
        self.draw = random.Random(0)  # noqa: S311 - an order, not a secret

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def run(self, until: float) -> None:
        """Takes steps until a time of `time.monotonic`."""
        for number in itertools.count():
            if time.monotonic() >= until:
                return
            self.step(number)

    def step(self, number: int, kind: str = "") -> None:
        """Takes one step, the same for the same seed, client and number."""
        self.draw = random.Random(f"{self._seed}/{self._name}/{number}")  # noqa: S311
        self._kind = kind or self.draw.choices(list(STEPS), [weight for weight, _ in STEPS.values()])[0]
        self._where = f"step {self._name}/{number} ({self._kind})"
        try:
            STEPS[self._kind][1](self)
        except Exception:
            self._ledger.fault("answers", f"{self._where}: {traceback.format_exc(limit=-3)}")

    def segment(self) -> None:
        """An image or volume with random parameters; every third is one of a few inputs that come again and again."""
        repeated = self.draw.random() < 0.33
        make = self.draw.choice((image, image, image, volume))
        sent = make(random.Random(self.draw.randrange(4))) if repeated else make(self.draw)  # noqa: S311
        params = self._params(sent.model)
        response = self._send("POST", "/segment", (200, 422, 429, 504), params=params, content=sent.body)
        if response is None or response.status_code != 200:
            return
        self._check_mask(response, sent)
        level, served = params.get("level", "4"), response.headers["X-Segment-Level"]
        if served != level and not (
            "X-Segment-Degraded" in response.headers and params.get("min_level", "9") <= served < level
        ):
            self._ledger.fault("masks", f"{self._where}: level {level} was requested, {served} served")
        if repeated:
            key = (
                hashlib.sha256(sent.body).hexdigest(),
                served,
                *(params.get(name, "") for name in ("mode", "precision")),
            )
            self._ledger.same(key, response.content, self._where)

    def job(self) -> None:
        """A job that is polled to its end, fetched and deleted, or cancelled."""
        sent = self.draw.choice((image, volume))(self.draw)
        response = self._send(
            "POST", "/jobs", (202, 429, 503, 507), params={"model": sent.model}, content=sent.body
        )
        if response is None or response.status_code != 202:
            return
        path = response.headers["Location"]
        if self.draw.random() < 0.2:
            self._send("DELETE", path, (204,))
            self._send("DELETE", path, (204, 404))
            return
        state, until = "queued", time.monotonic() + TIMEOUT_S
        while state in ("queued", "running") and time.monotonic() < until:
            time.sleep(0.2)
            response = self._send("GET", path, (200,))
            state = response.json()["state"] if response is not None else "unknown"
        if state != "done":
            self._ledger.fault("jobs", f"{self._where}: the job is {state}")
            return
        result = self._send("GET", f"{path}/result", (200,))
        if result is not None and result.status_code == 200:
            self._check_mask(result, sent)
        self._send("DELETE", path, (204,))

    def bad(self) -> None:
        """A request with one thing wrong."""
        body, params, statuses = self.draw.choice([
            (b"", {}, (415, 422)), (b"no image", {}, (415,)), (image(self.draw).body[:60], {}, (422,)),
            (image(self.draw).body, {"level": "9"}, (422,)), (image(self.draw).body, {"model": "none"}, (404,)),
            (image(self.draw).body, {"format": "none"}, (406,)), (image(self.draw).body, {"colour": "red"}, (422,)),
            (bytes(13 << 20), {}, (413, 415)),
        ])  # fmt: skip
        self._send("POST", "/segment", (*statuses, 429), params=params, content=body)

    def look(self) -> None:
        """A look at what operators and clients read."""
        path = self.draw.choice(
            ("/health/live", "/health/ready", "/metrics", "/models", "/openapi.json", "/")
        )
        self._send("GET", path, (200,))

    def leave(self) -> None:
        """A connection that breaks off within the body, or before the answer."""
        sent = self.draw.choice((image, volume))(self.draw)
        head = f"POST /segment?model={sent.model} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(sent.body)}\r\n\r\n".encode()
        request = head + sent.body
        with (
            contextlib.suppress(OSError),
            socket.create_connection((self._url.host, self._url.port or 80), TIMEOUT_S) as connection,
        ):
            connection.sendall(request[: int(len(request) * self.draw.choice((1.0, self.draw.random())))])
            time.sleep(self.draw.uniform(0, 0.3))
        self._ledger.settle(self._kind, LEFT)

    def _params(self, model: str) -> dict[str, str]:
        draw = self.draw
        params = {"model": model} | draw.choice(
            [{"mode": "accurate"}, *({"level": str(level)} for level in (1, 1, 2, 3, 4))]
        )
        if draw.random() < 0.5:
            params["precision"] = draw.choice(("fp32", "int8"))
        if draw.random() < 0.3:
            params["deadline_ms"] = str(draw.choice((1, 100, 1000, 30_000)))
        if draw.random() < 0.3 and "level" in params:
            params["min_level"] = "1"
        return params

    def _send(
        self, method: str, path: str, expected: Collection[int], **options: Any
    ) -> httpx.Response | None:
        """Sends a request and checks its answer, which is None where none came."""
        status = LOST
        try:
            response = self._http.request(method, path, **options)
            status = str(response.status_code)
        except httpx.HTTPError as error:
            self._ledger.fault("answers", f"{self._where}: {method} {path}: {error!r}")
            return None
        finally:
            self._ledger.settle(self._kind, status, segment=path == "/segment")
        if response.status_code not in expected:
            self._ledger.fault(
                "answers", f"{self._where}: {status}, not one of {expected}: {response.text[:300]}"
            )
        if response.status_code >= 400:
            if (
                response.headers["Content-Type"] != "application/problem+json"
                or response.json()["status"] != response.status_code
            ):
                self._ledger.fault(
                    "problems", f"{self._where}: {status} without a problem document: {response.text[:300]}"
                )
            if response.status_code in (429, 503) and not response.headers.get("Retry-After", "").isdigit():
                self._ledger.fault("problems", f"{self._where}: {status} without Retry-After")
        return response

    def _check_mask(self, response: httpx.Response, sent: Input) -> None:
        size = size_of(response.content, response.headers["Content-Type"])
        if size != sent.size:
            self._ledger.fault("masks", f"{self._where}: {size}, not {sent.size}")


STEPS: dict[str, tuple[int, Callable[[Client], None]]] = {
    "segment": (50, Client.segment), "job": (12, Client.job), "bad": (15, Client.bad), "look": (8, Client.look),
    "leave": (15, Client.leave),
}  # fmt: skip
