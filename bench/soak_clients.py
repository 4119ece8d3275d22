"""The clients of `bench.soak`: what they send, what they expect of the answers, and the ledger that they keep.

A client is an endless row of steps. All of a step's randomness comes from (seed, client, step).
"""

import contextlib
import functools
import gzip
import http.client
import io
import itertools
import json
import random
import re
import socket
import struct
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import imagecodecs
import nibabel
import numpy as np
import tifffile
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from skimage import data

from bench.serving import ROOT

BAD_INPUTS = ROOT.parent / "shared" / "data" / "bad_inputs"
IMAGES, VOLUMES = "nuclei", "hippocampus"

# Of the server. Tight, so that the steps meet every limit within minutes: places, pixels, the queue and the disk of jobs, stalled
# uploads.
ENVIRONMENT = {
    "UNETPP_HTTP__MAX_IN_FLIGHT": "4", "UNETPP_LIMITS__MAX_BODY_MB": "12", "UNETPP_LIMITS__MAX_PIXELS": "2000000",
    "UNETPP_LIMITS__MAX_VOXELS": "2000000", "UNETPP_LIMITS__PIXELS_IN_FLIGHT": "2000000", "UNETPP_LIMITS__IDLE_UPLOAD_S": "5",
    "UNETPP_JOBS__MAX_QUEUED": "2", "UNETPP_JOBS__MAX_DISK_MB": "6", "UNETPP_JOBS__KEEP_RESULTS_H": "0.05",
    "UNETPP_HTTP__DRAIN_S": "1", "UNETPP_QUALITY__AGREEMENT_SHARE": "0.1",
}  # fmt: skip

PLACES = int(ENVIRONMENT["UNETPP_HTTP__MAX_IN_FLIGHT"])
KEEP_S = float(ENVIRONMENT["UNETPP_JOBS__KEEP_RESULTS_H"]) * 3600

LEAVES = 0  # the status of a request whose client did not wait for its answer
LOST = -1  # and of one whose client waited in vain
PATIENCE_S = 120  # for one answer, and for the end of a job


@dataclass(frozen=True)
class Input:
    """A file to be segmented.

    Attributes:
        size: (H, W) or (X, Y, Z), which the answer must have.
        labels: a reference for it, in the same format or as PNG.
        fixed: a name, if this very input is sent again and again.
    """

    body: bytes
    media_type: str
    size: tuple[int, ...]
    labels: bytes
    fixed: str = ""


@functools.cache
def photographs() -> list[np.ndarray]:
    """(H, W) or (H, W, 3) uint8, real ones; tissue first."""
    return [data.immunohistochemistry(), data.astronaut(), data.coins(), data.camera(), data.cell()]


def image(draw: random.Random, most: int = 1400, fixed: str = "") -> Input:
    """A crop of a photograph as PNG, TIFF or JPEG, grey or RGB, 8 or 16 bits; mostly small."""
    low, high = draw.choices([(1, 64), (64, 200), (200, 400), (400, 700), (700, 1400)], [20, 50, 20, 8, 2])[0]
    height, width = (min(most, draw.randint(low, high)) for _ in "HW")
    return encoded(draw, crop(draw.choice(photographs()), height, width, draw.randrange(400)), fixed)


def crop(picture: np.ndarray, height: int, width: int, begin: int = 0) -> np.ndarray:
    """Of any size: the picture is repeated."""
    rows, columns = (np.arange(begin, begin + n) % side for n, side in zip((height, width), picture.shape[:2], strict=True))
    return picture[np.ix_(rows, columns)]


def encoded(draw: random.Random, pixels: np.ndarray, fixed: str = "") -> Input:
    """An image file of uint8 pixels, which may lose its colours or gain eight bits."""
    labels = bytes(imagecodecs.png_encode((pixels.reshape(*pixels.shape[:2], -1).mean(-1) < 120).astype(np.uint8), level=1))
    if pixels.ndim == 3 and draw.random() < 0.3:
        pixels = np.ascontiguousarray(pixels[..., 1])
    form = draw.choice(("png", "png", "tiff", "jpeg"))
    if form != "jpeg" and draw.random() < 0.25:
        pixels = pixels.astype(np.uint16) * 257
    if form == "tiff":
        out = io.BytesIO()
        compression = draw.choice((None, "zlib"))
        tifffile.imwrite(out, pixels, photometric="rgb" if pixels.ndim == 3 else "minisblack", compression=compression)
        body = out.getvalue()
    else:
        body = bytes(imagecodecs.png_encode(pixels, level=1) if form == "png" else imagecodecs.jpeg8_encode(pixels, level=90))
    return Input(body, f"image/{form}", pixels.shape[:2], labels, fixed)


def volume(draw: random.Random, fixed: str = "") -> Input:
    """A bright blob in noise, 20 to 48 voxels a side, as .nii.gz."""
    size = tuple(draw.randint(20, 48) for _ in "XYZ")
    noise = np.random.default_rng(draw.getrandbits(32))
    distance = sum(((axis - side / 2) / (side / 4)) ** 2 for axis, side in zip(np.indices(size), size, strict=True))
    blob = np.exp(-distance)
    values = (120 * blob + noise.uniform(0, 60, size)).astype(draw.choice((np.uint8, np.int16, np.float32)))
    affine = np.diag([*draw.choice(((1.0, 1.0, 1.0), (0.8, 0.8, 1.5))), 1.0])
    body, labels = (
        gzip.compress(nibabel.Nifti1Image(voxels, affine).to_bytes(), 1, mtime=0)
        for voxels in (values, (blob > 0.5).astype(np.uint8))
    )
    return Input(body, "application/gzip", size, labels, fixed)


@functools.cache
def fixed_inputs() -> list[tuple[str, Input]]:
    """(Model, input) of those that are sent again and again."""
    pictures = [(IMAGES, image(random.Random(number), 400, f"image {number}")) for number in range(4)]  # noqa: S311
    return [*pictures, *((VOLUMES, volume(random.Random(number), f"volume {number}")) for number in range(2))]  # noqa: S311


@functools.cache
def bad_files() -> list[Path]:
    """Crash and fuzz files of other readers, where they lie beside the project."""
    return sorted(path for path in BAD_INPUTS.rglob("*") if path.is_file())


@dataclass
class Ledger:
    """What was sent and what came of it. Safe for threads.

    Attributes:
        statuses: how often by (kind of step, status); LEAVES and LOST are such.
        outcomes: of segment requests, in the words of the metrics.
        unsure: segment requests of which the server alone knows the outcome, or whether it ever saw them.
        jobs: of jobs, in the words of the metrics.
        unsure_jobs: as `unsure`.
        too_short: requests whose deadline not even an idle server could meet.
        faults: by goal, each with the step that it came from.
    """

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    unsure: int = 0
    jobs: Counter[str] = field(default_factory=Counter)
    unsure_jobs: int = 0
    sent: int = 0
    too_short: int = 0
    repeated: int = 0
    masks: int = 0
    faults: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    _first: dict[tuple[str, ...], tuple[bytes, str]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def sends(self) -> None:
        """A request is about to be sent."""
        with self._lock:
            self.sent += 1

    def settles(self, kind: str, route: str, status: int, *, model_info: bool = True) -> None:
        """An answer came, or will not; `counted`: it got as far as the route, e.g. POST /segment, which counts it."""
        with self._lock:
            self.statuses[kind, status] += 1
            if status in (LEAVES, LOST) or not model_info:
                self.unsure += route == "POST /segment"
                self.unsure_jobs += route == "POST /jobs"
            elif route == "POST /segment":
                self.outcomes[outcome(status)] += 1
            elif route == "POST /jobs" and status in (429, 503, 507):
                self.jobs["refused"] += 1

    def job_ends(self, state: str) -> None:
        """A job of ours is done, failed or cancelled."""
        with self._lock:
            self.jobs[state] += 1

    def is_too_short(self) -> None:
        """A deadline was refused as one that could never be met."""
        with self._lock:
            self.too_short += 1

    def has_mask(self) -> None:
        """A mask came, and is looked at."""
        with self._lock:
            self.masks += 1

    def fault(self, goal: str, what: str) -> None:
        """A goal is missed."""
        with self._lock:
            self.faults[goal].append(what)
        print(f"{goal}: {what}", flush=True)

    def same(self, key: tuple[str, ...], body: bytes, where: str) -> None:
        """The same question must have the same answer each time."""
        with self._lock:
            self.repeated += 1
            first, before = self._first.setdefault(key, (body, where))
        if first != body:
            self.fault("same bytes", f"{where}: {' '.join(key)} is answered unlike in {before}")


def outcome(status: int) -> str:
    """The label under which the metrics count an answer of POST /segment."""
    named = {200: "ok", 429: "refused", 503: "refused", 504: "late"}
    return named.get(status, "client_error" if status < 500 else "error")


def size_of(body: bytes, media_type: str) -> tuple[int, ...]:
    """(H, W) or (X, Y, Z) of an encoded mask, which is decoded to its end."""
    if media_type == "application/json":
        return tuple(json.loads(body)["size"].values())
    if media_type == "application/gzip":
        return tuple(np.asarray(nibabel.Nifti1Image.from_bytes(gzip.decompress(body)).dataobj).shape)
    if media_type == "application/x-npz":
        with np.load(io.BytesIO(body)) as arrays:
            return tuple(arrays["mask"].shape)
    if media_type == "image/tiff":
        return tuple(tifffile.imread(io.BytesIO(body)).shape)
    with Image.open(io.BytesIO(body)) as picture:
        picture.load()
        return picture.size[::-1]


def total(text: str, name: str, label: str) -> Counter[str]:
    """The sums of a metric by one of its labels."""
    sums: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for line in family.samples:
            if line.name == name:
                sums[line.labels.get(label, "")] += int(line.value)
    return sums


class Client:
    """One of several, each in its own thread.

    Args:
        name: its number.
        seed: of the whole soak.
        url: of the server.
        ledger: where everything is written down.
    """

    def __init__(self, name: str, seed: int, url: httpx.URL, ledger: Ledger) -> None:
        self._name = name
        self._seed = seed
        self._url = url
        self._http = httpx.Client(base_url=url, timeout=PATIENCE_S)
        self._ledger = ledger
        self._number = 0
        self._kind = "warm-up"
        self._where = name
        self.draw = random.Random(f"{seed}/{name}")  # noqa: S311 - an order, not a secret

    def __enter__(self) -> "Client":
        """Keeps its connection open."""
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def run(self, until: float) -> None:
        """Steps until a time of `time.monotonic`."""
        for number in itertools.count():
            if time.monotonic() >= until:
                return
            self.step(number)
            time.sleep(self.draw.uniform(0, 0.1))

    def step(self, number: int) -> None:
        """One step, the same for the same seed, client and number."""
        self.draw = random.Random(f"{self._seed}/{self._name}/{number}")  # noqa: S311
        self._kind = self.draw.choices(list(STEPS), [weight for weight, _ in STEPS.values()])[0]
        self._where = f"step {self._name}/{number} ({self._kind})"
        try:
            STEPS[self._kind][1](self)
        except Exception:
            # Most likely an answer that is not what it says it is.
            self._ledger.fault("answers", f"{self._where}: {traceback.format_exc(limit=-3)}")

    # Steps.

    def image(self) -> None:
        """Any image, any choices."""
        self.segment(image(self.draw), self._query(IMAGES, ("png", "tiff", "json", "npz", "png16", "overlay")))

    def volume(self) -> None:
        """A volume, for the model of volumes or slice by slice for that of images."""
        if self.draw.random() < 0.1:
            slices = {"model": IMAGES, "level": "1", "axis": self.draw.choice(("auto", "0", "2"))}
            self.segment(volume(self.draw), slices)
        else:
            self.segment(volume(self.draw), self._query(VOLUMES, ("nifti", "json", "npz")))

    def fixed(self) -> None:
        """One of the inputs whose answers are known already, or will be."""
        model, sent = self.draw.choice(fixed_inputs())
        query = self._query(model, ("npz",))
        self.segment(sent, query)

    def segment(self, sent: Input, query: Mapping[str, str]) -> None:
        """A good request: its answer must fit it."""
        reference = self.draw.random() < 0.25
        how, asked = self._body(sent, reference), dict(query)
        expected = [200, 429, *((422, 504) if "deadline_ms" in query else ())]
        if "deadline_ms" in query and self.draw.random() < 0.3:
            how["headers"] = how.get("headers", {}) | {"X-Deadline-Ms": asked.pop("deadline_ms")}
        answer = self._ask("POST", "/segment", expected, params=asked, **how)
        if answer is None or answer.status_code != 200:
            if answer is not None and answer.status_code == 422:
                self._ledger.is_too_short()
                if answer.json()["type"] != "urn:unetpp:deadline-too-short":
                    self._ledger.fault("answers", f"{self._where}: a good request is refused: {answer.text}")
            return
        self._check_mask(answer, sent)
        self._check_level(answer, query)
        if reference and "X-Segment-IoU" not in answer.headers:
            self._ledger.fault("masks", f"{self._where}: sent a reference and got no X-Segment-IoU")
        if sent.fixed and answer.headers["Content-Type"] != "application/json":  # which holds timings
            names = ("X-Segment-Mode", "X-Segment-Level", "X-Segment-Precision", "Content-Type")
            self._ledger.same((sent.fixed, *(answer.headers[name] for name in names)), answer.content, self._where)

    def job(self) -> None:
        """A job, through one of its possible lives."""
        model, make = self.draw.choice(((IMAGES, image), (VOLUMES, volume), (VOLUMES, volume)))
        sent, query = make(self.draw), self._query(model, ("json", "npz"), deadline=False)
        if broken := self.draw.random() < 0.1:
            sent = Input(sent.body[: len(sent.body) * 3 // 4], sent.media_type, sent.size, sent.labels)
        preview = self.draw.random() < 0.3
        expected = [202, 429, 507, *([422] if broken else [])]
        parameters = {**query, "preview": str(preview).lower()}
        accepted = self._ask(
            "POST", "/jobs", expected, params=parameters, **self._body(sent, not broken and self.draw.random() < 0.2)
        )
        if accepted is None or accepted.status_code != 202:
            return
        path = f"/jobs/{accepted.json()['id']}"
        if not broken and self.draw.random() < 0.3:
            time.sleep(self.draw.uniform(0, 0.5))
            self._cancel(path)
        else:
            self._follow(path, sent, broken=broken)

    def full_disk(self) -> None:
        """A job that the quota has no room for."""
        noise = self.draw.randbytes(7_000_000)
        self._ask(
            "POST", "/jobs", [507, 429], content=noise, headers={"Content-Type": "application/gzip"}, params={"model": VOLUMES}
        )

    def bad(self) -> None:
        """A request that cannot be answered with a mask, or at best by chance."""
        sent = image(self.draw, 300)
        body, files = sent.body, {"file": ("image", sent.body, sent.media_type)}
        cut = body[: self.draw.randrange(max(1, len(body) * 3 // 4))]
        form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + cut
        wrong = self.draw.choice((
            {"level": "9"}, {"level": "abc"}, {"mode": "slow"}, {"precision": "fp8"}, {"format": "xyz"}, {"format": "nifti"},
            {"depth": "3"}, {"model": "none"}, {"model": VOLUMES}, {"mode": "accurate", "level": "2"}, {"nonfinite": "keep"},
        ))  # fmt: skip
        requests: list[dict[str, Any]] = [
            {"content": b""},
            {"content": self.draw.randbytes(self.draw.randint(1, 5000))},
            {"content": b"\x89PNG\r\n\x1a\n" + self.draw.randbytes(500)},
            {"content": gzip.compress(self.draw.randbytes(500), mtime=0)},
            {"content": body, "params": wrong},
            {"content": body, "params": wrong},
            {"content": body, "headers": {"Content-Type": self.draw.choice(("text/html", "application/json", "video/mp4"))}},
            {"content": body, "headers": {"Accept": "audio/ogg"}},
            {"content": form, "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
            {"content": body, "headers": {"Content-Type": "multipart/form-data"}},
            {"files": {"picture": files["file"]}},
            {"files": files, "data": {"mode": "fast"}},
            {"files": files | {"reference": ("reference", imagecodecs.png_encode(np.zeros((3, 5), np.uint8)), "image/png")}},
            {"content": (bytes(1_000_000) for _ in range(14))},
        ]  # fmt: skip
        if sent.media_type != "image/jpeg":  # whose readers make the best of what there is
            requests.append({"content": cut})
        request = self.draw.choice(requests)
        self._ask("POST", "/segment", [404, 406, 413, 415, 422, 429], **request)

    def bad_file(self) -> None:
        """A crash or fuzz file, some of which can be read."""
        if files := bad_files():
            path = self.draw.choice(files)
            self._where += f" {path.name}"
            query = {"level": "1", "model": self.draw.choice((IMAGES, IMAGES, VOLUMES)) if "nii" in path.name else IMAGES}
            self._ask("POST", "/segment", [200, 413, 415, 422, 429], content=path.read_bytes(), params=query)

    def look(self) -> None:
        """What orchestrators, Prometheus and the curious ask for; and what is not there."""
        path, status = self.draw.choice((
            ("/health/live", 200), ("/health/ready", 200), ("/metrics", 200), ("/models", 200), (f"/models/{VOLUMES}", 200),
            ("/", 200), ("/models/none", 404), ("/nowhere", 404), ("/segment", 405), ("/jobs/none", 404),
        ))  # fmt: skip
        answer = self._ask("GET", path, [status])
        if answer is not None and path == "/metrics" and total(answer.text, "unetpp_requests_in_flight", "")[""] > PLACES:
            self._ledger.fault("metrics", f"{self._where}: more requests in flight than there are places")

    def odd(self) -> None:
        """What is hardly HTTP, or refused by its head alone."""
        head = self._head("/segment", "image/png", 10)
        kind = self.draw.randrange(4)
        if kind == 0:
            self._answered(head.replace(b"Content-Length: 10", b"Content-Length: 13000000"), [413], model_info=False)
        elif kind == 1:
            # Refused, unless it comes in one piece: then it is a request whose body does not come.
            self._answered(head[:-2] + b"X-Long: " + b"x" * 200_000 + b"\r\n\r\n", [400, 408, 429, 431], ours=False)
        elif kind == 2:
            self._answered(b"\x16\x03\x01 no HTTP at all\r\n\r\n", [400], ours=False)
        else:
            self._leaves(head[: self.draw.randrange(len(head))], 0, "")

    def stalls(self) -> None:
        """An upload that comes to a halt; the server gives it up."""
        sent = image(self.draw, 300)
        self._answered(self._head("/segment", sent.media_type, len(sent.body) + 1) + sent.body, [408, 429])

    def leaves(self) -> None:
        """A connection that breaks off: within the body, before the answer, or within it."""
        path = self.draw.choice(("/segment", "/segment", "/jobs"))
        model, make = self.draw.choice(((IMAGES, image), (VOLUMES, volume)))
        sent = make(self.draw)
        query = {**self._query(model, ("npz",), deadline=False), "format": "npz"}
        whole = self._head(path, sent.media_type, len(sent.body), query) + sent.body
        part = self.draw.choice((1.0, 1.0, self.draw.random()))
        self._leaves(whole[: int(len(whole) * part)], self.draw.choice((0, 0, 1, 1000)), path)

    # Their parts.

    def _query(self, model: str, formats: Collection[str], *, deadline: bool = True) -> dict[str, str]:
        """Any choices that a good request may make."""
        draw = self.draw
        query = {} if model == IMAGES else {"model": model}
        level = draw.choices(range(5), [1, 4, 3, 2, 1])[0]
        if level:
            query |= {"level": str(level)}
        elif draw.random() < 0.5:
            query |= {"mode": "accurate"}
        if draw.random() < 0.5:
            query["precision"] = draw.choice(("fp32", "bf16", "int8"))
        if draw.random() < 0.5:
            query["format"] = draw.choice(tuple(formats))
        if deadline and draw.random() < 0.3:
            query["deadline_ms"] = str(draw.choice((1, 30, 100, 300, 1000, 30_000)))
        if deadline and draw.random() < 0.3:
            query["min_level"] = str(draw.randint(1, level or 4))
        return query

    def _body(self, sent: Input, reference: bool) -> dict[str, Any]:
        """The file as it is, or as a form, which alone may hold a reference."""
        if not reference and self.draw.random() < 0.6:
            kind = self.draw.choice((sent.media_type, "application/octet-stream"))
            return {"content": sent.body, "headers": {"Content-Type": kind}}
        files = {"file": ("file", sent.body, sent.media_type)}
        return {"files": files | ({"reference": ("reference", sent.labels)} if reference else {})}

    def _ask(self, method: str, path: str, expected: Collection[int], **how: Any) -> httpx.Response | None:
        """Sends a request and waits for its answer, which is None where none came."""
        with self._asking(method, path, expected, **how) as answer:
            if answer is not None:
                answer.read()
            return answer

    @contextlib.contextmanager
    def _asking(self, method: str, path: str, expected: Collection[int], **how: Any) -> Iterator[httpx.Response | None]:
        """The same for an answer that comes bit by bit."""
        how["headers"] = how.get("headers", {}) | {"X-Request-Id": self._new_id()}
        status = LOST
        self._ledger.sends()
        try:
            with self._http.stream(method, path, **how) as answer:
                if answer.status_code >= 400:
                    answer.read()
                status = answer.status_code
                self._check(answer.status_code, answer.headers, answer.content if status >= 400 else b"", expected)
                yield answer
        except httpx.HTTPError as error:
            self._ledger.fault("answers", f"{self._where}: {method} {path}: {error!r}")
            if status == LOST:
                yield None
        finally:
            self._ledger.settles(self._kind, f"{method} {path}", status)

    def _new_id(self) -> str:
        self._number += 1
        return f"{self._name}-{self._number}"

    def _check(self, status: int, headers: Mapping[str, str], body: bytes, expected: Collection[int]) -> None:
        """That an answer is ours, one that may be, and well explained where it is a refusal."""
        fault = self._ledger.fault
        if status not in expected:
            fault("5xx" if status >= 500 else "answers", f"{self._where}: {status}, not one of {expected}: {body[:300]!r}")
        if headers.get("X-Request-Id") != f"{self._name}-{self._number}":
            fault("answers", f"{self._where}: the answer to another request came, {headers.get('X-Request-Id')}")
        if status < 400:
            return
        if headers.get("Content-Type") != "application/problem+json" or json.loads(body)["status"] != status:
            fault("problems", f"{self._where}: {status} without a problem document: {body[:300]!r}")
        if status in (429, 503, 507) and not re.fullmatch("[1-9][0-9]*", headers.get("Retry-After", "")):
            fault("problems", f"{self._where}: {status} without a Retry-After, but {headers.get('Retry-After')!r}")

    def _check_mask(self, answer: httpx.Response, sent: Input) -> None:
        """That it has the input's size."""
        self._ledger.has_mask()
        size = size_of(answer.content, answer.headers["Content-Type"])
        if size != sent.size:
            self._ledger.fault("masks", f"{self._where}: sent {sent.size} and got {size}")

    def _check_level(self, answer: httpx.Response, query: Mapping[str, str]) -> None:
        """That what was asked for is served, or what `min_level` allows, and then said."""
        served, asked = int(answer.headers["X-Segment-Level"]), int(query.get("level", 4))
        why = answer.headers.get("X-Segment-Degraded")
        good = (
            served == asked if why is None else int(query.get("min_level", 99)) <= served <= asked and why in ("deadline", "load")
        )
        if not good:
            self._ledger.fault("masks", f"{self._where}: asked for {dict(query)} and got level {served} (degraded: {why})")

    def _follow(self, path: str, sent: Input, *, broken: bool) -> None:
        """Waits for a job's end by its events or by asking, fetches what there is, and has it forgotten."""
        if self.draw.random() < 0.6:
            self._listen(path, patient=self.draw.random() < 0.7)
        state = self._poll(path)
        if state not in ("done", "failed"):
            self._ledger.fault("jobs", f"{self._where}: the job is {state} after {PATIENCE_S} s")
            return
        self._ledger.job_ends(state)
        if state == "failed" and not broken:
            self._ledger.fault("jobs", f"{self._where}: nothing is wrong with the input, and the job failed")
        result = self._ask("GET", f"{path}/result", [200 if state == "done" else 422])
        if result is not None and result.status_code == 200:
            self._check_mask(result, sent)
            self._ask("GET", f"{path}/result", [206], headers={"Range": "bytes=0-9"})
            self._ask("GET", f"{path}/preview", [200, 409])
        self._ask("DELETE", path, [204])
        self._ask("GET", path, [404])

    def _listen(self, path: str, *, patient: bool) -> None:
        """Hears a job's events until the last, or the first."""
        with self._asking("GET", f"{path}/events", [200]) as stream:
            for line in stream.iter_lines() if stream else ():
                if not patient and line.startswith("event:"):
                    return

    def _poll(self, path: str) -> str:
        """A job's state, when it has ended or patience has."""
        until = time.monotonic() + PATIENCE_S
        while True:
            answer = self._ask("GET", path, [200])
            state = str(answer.json()["state"]) if answer is not None and answer.status_code == 200 else "unknown"
            if state not in ("queued", "running") or time.monotonic() > until:
                return state
            time.sleep(0.2)

    def _cancel(self, path: str) -> None:
        """A job that has just ended is forgotten instead; which of both it was is asked afterwards."""
        self._ask("DELETE", path, [204])
        after = self._ask("GET", path, [200, 404])
        if after is not None and after.status_code == 200:
            state = str(after.json()["state"])
            if state != "cancelled":
                self._ledger.fault("jobs", f"{self._where}: deleted, and now {state}")
            self._ledger.job_ends("cancelled")
            self._ask("DELETE", path, [204])
        elif after is not None:
            # It had ended before it could be deleted: well, as nothing is wrong with it.
            self._ledger.job_ends("done")

    def _head(self, path: str, media_type: str, length: int, query: Mapping[str, str] = {}) -> bytes:
        lines = (f"POST {path}?{urlencode(query)} HTTP/1.1", f"Host: {self._url.host}", f"X-Request-Id: {self._new_id()}",
                 f"Content-Type: {media_type}", f"Content-Length: {length}", "", "")  # fmt: skip
        return "\r\n".join(lines).encode()

    def _connection(self) -> socket.socket:
        return socket.create_connection((self._url.host, self._url.port or 80), PATIENCE_S)

    def _answered(self, request: bytes, expected: Collection[int], *, model_info: bool = True, ours: bool = True) -> None:
        """Sends bytes as they are and reads the answer; `ours`: it does not come from the HTTP library below us."""
        self._ledger.sends()
        status = LOST
        try:
            with self._connection() as connection:
                with contextlib.suppress(ConnectionError):  # it may be answered before all is sent
                    connection.sendall(request)
                answer = http.client.HTTPResponse(connection)
                with closing(answer):
                    answer.begin()
                    status, headers, body = answer.status, dict(answer.getheaders()), answer.read()
        except (OSError, http.client.HTTPException) as error:
            if ours:
                self._ledger.fault("answers", f"{self._where}: {error!r}")
            else:
                status = LEAVES  # the library below hangs up on what is still being sent, and its answer may be lost with that
        self._ledger.settles(self._kind, "POST /segment", status, model_info=model_info and ours)
        if status > 0 and ours:
            self._check(status, httpx.Headers(headers), body, expected)
        elif status > 0 and status not in expected:
            self._ledger.fault("answers", f"{self._where}: {status}, not one of {expected}")

    def _leaves(self, request: bytes, reads: int, path: str) -> None:
        """Sends bytes as they are, reads a few of the answer, and is gone, sometimes without a word (RST)."""
        self._ledger.sends()
        with contextlib.suppress(OSError), self._connection() as connection:
            connection.sendall(request)
            if reads:
                connection.settimeout(5)
                connection.recv(reads)
            else:
                time.sleep(self.draw.uniform(0, 0.3))
            if self.draw.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._ledger.settles(self._kind, f"POST {path}", LEAVES)


STEPS: dict[str, tuple[int, Callable[[Client], None]]] = {
    "image": (30, Client.image), "volume": (10, Client.volume), "fixed": (15, Client.fixed), "job": (10, Client.job),
    "full disk": (1, Client.full_disk), "bad": (12, Client.bad), "bad file": (8, Client.bad_file), "look": (8, Client.look),
    "odd": (3, Client.odd), "stalls": (1, Client.stalls), "leaves": (12, Client.leaves),
}  # fmt: skip
