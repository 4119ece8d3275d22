"""A small segmentation server on loopback, written with Starlette alone, and the command line on it."""

import contextlib
import io
import json
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import typer
import uvicorn
from PIL import Image as Pillow
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from typer.testing import CliRunner, Result

from client import cli
from server.cli_utils import report_errors
from tests.support.files import picture_bytes

CARD = {
    "name": "fake",
    "title": "A fake",
    "sha256": "0" * 64,
    "default": True,
    "levels": [1, 2],
    "classes": [{"value": 1}],
    "serving": [
        {
            "graph": "accurate",
            "precision": "fp32",
            "engine": "onnxruntime",
            "provider": "CPUExecutionProvider",
        }
    ],
}
HEADERS = {
    "X-Segment-Model": "fake",
    "X-Segment-Mode": "accurate",
    "X-Segment-Level": "2",
    "X-Segment-Precision": "fp32",
    "Server-Timing": "decode;dur=1.50, infer;dur=20",
    "X-Request-Id": "abc",
}


def problem(
    status: int, code: str = "test", headers: dict[str, str] | None = None, **fields: Any
) -> Response:
    """A problem document."""
    document = {
        "type": f"/errors#{code}",
        "title": "Test",
        "status": status,
        "code": code,
        "detail": "a sentence",
        **fields,
    }
    return JSONResponse(
        document, status, {"X-Request-Id": "abc"} | (headers or {}), "application/problem+json"
    )


def answer(files: dict[str, bytes] | None = None, **headers: str) -> Response:
    """A successful answer: the only file, or a zip of several."""
    files = files or {"mask.png": picture_bytes(np.eye(4, dtype=np.uint8))}
    (name, body), media_type = next(iter(files.items())), "image/png"
    if len(files) > 1:
        name, body, media_type = "mask.zip", zipped(files), "application/zip"
    disposition = {"Content-Disposition": f'inline; filename="{name}"', "Content-Type": media_type}
    return Response(
        body, headers=HEADERS | disposition | {key.replace("_", "-"): value for key, value in headers.items()}
    )


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def segmented(data: bytes, formats: list[str]) -> dict[str, bytes]:
    """What the fake server makes of a file: foreground is what is brighter than the mean."""
    pages = (
        tifffile.imread(io.BytesIO(data))
        if data[:2] == b"II"
        else np.asarray(Pillow.open(io.BytesIO(data)).convert("L"))
    )
    mask = (pages > pages.mean()).astype(np.uint8)
    flat = mask if mask.ndim == 2 else mask[0]
    tiff = io.BytesIO()
    tifffile.imwrite(tiff, mask, photometric="minisblack")
    made = {
        "mask": ("mask.png", picture_bytes(mask)) if mask.ndim == 2 else ("mask.tiff", tiff.getvalue()),
        "json": ("statistics.json", json.dumps({"pixels": int(mask.sum())}).encode()),
        "overlay": ("overlay.png", picture_bytes(flat * 255)),
        "picture": ("picture.png", picture_bytes(flat * 200)),
    }
    return dict(made[name] for name in formats)


class FakeServer:
    """The routes of a segmentation server.

    Attributes:
        requests: path and file name of each upload.
        queries: request parameters of each upload.
        hold: requests with a body wait while it is not set, after the first `free` ones.
        held: set while a request waits.
        key: API key that is required, if any.
        cancelled: set when a client leaves a request that is held.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.queries: list[dict[str, str]] = []
        self.jobs: dict[str, Response] = {}
        self.hold, self.held, self.cancelled = threading.Event(), threading.Event(), threading.Event()
        self.hold.set()
        self.key: str | None = None
        self.free = 0
        self.url = ""
        routes = [
            Route("/models", self._models),
            Route("/models/{name}", self._models),
            Route("/segment", self._segment, methods=["POST"]),
            Route("/jobs", self._submit, methods=["POST"]),
            Route("/jobs/{id}", self._job, methods=["GET", "DELETE"]),
            Route("/jobs/{id}/events", self._events),
            Route("/jobs/{id}/result", self._result),
        ]
        self.app = Starlette(routes=routes)

    async def _models(self, request: Request) -> Response:
        if self.key and request.headers.get("x-api-key") != self.key:
            return problem(401, "unauthorized")
        name = request.path_params.get("name")
        return (
            JSONResponse([CARD])
            if name is None
            else JSONResponse(CARD)
            if name == "fake"
            else problem(404, "unknown-model")
        )

    async def _segment(self, request: Request) -> Response:
        import asyncio

        if self.key and request.headers.get("x-api-key") != self.key:
            return problem(401, "unauthorized")
        async with request.form() as form:
            upload = form["file"]
            data, name, scored = await upload.read(), str(upload.filename), "reference" in form  # type: ignore[union-attr]
        self.requests.append((request.url.path, name))
        self.queries.append(dict(request.query_params))
        while not self.hold.is_set() and len(self.requests) > self.free:
            self.held.set()
            if await request.is_disconnected():
                self.cancelled.set()
            await asyncio.sleep(0.01)
        formats = request.query_params.get("format", "mask").split(",")
        try:
            if data[:2] == b"PK":
                return _archive(data, formats)
            scores = {"X_Segment_IoU": "1.0000", "X_Segment_Dice": "1.0000"} if scored else {}
            return answer(segmented(data, formats), **scores)
        except OSError:
            return problem(415, "unsupported-type")

    async def _submit(self, request: Request) -> Response:
        made = await self._segment(request)
        if made.status_code == 200:
            self.jobs["j1"] = made
        return JSONResponse(document("queued"), 202) if made.status_code == 200 else made

    async def _job(self, request: Request) -> Response:
        if request.path_params["id"] not in self.jobs:
            return problem(404, "unknown-job")
        if request.method == "DELETE":
            del self.jobs[request.path_params["id"]]
            return Response(status_code=204)
        return JSONResponse(document("done", 4))

    async def _events(self, request: Request) -> Response:
        return StreamingResponse(
            iter([event("queued"), event("running", 2), event("done", 4)]), media_type="text/event-stream"
        )

    async def _result(self, request: Request) -> Response:
        return self.jobs.get(request.path_params["id"]) or problem(404, "unknown-job")


def _archive(data: bytes, formats: list[str]) -> Response:
    files: dict[str, bytes] = {}
    rows: list[dict[str, Any]] = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in archive.namelist():
            try:
                made = {
                    f"{name[:-4]}_{file}": body
                    for file, body in segmented(archive.read(name), formats).items()
                }
                rows.append({"name": name, "status": "ok", "files": [*made]})
                files |= made
            except OSError:
                rows.append({"name": name, "status": "failed", "detail": "not an image"})
    return answer(files | {"report.json": json.dumps({"images": rows}).encode()})


def document(state: str, done: int = 0, **members: Any) -> dict[str, Any]:
    """The document of a job."""
    return {
        "id": "j1",
        "state": state,
        "stage": "infer",
        "windows": {"done": done, "total": 4},
        "error": None,
    } | members


def event(state: str, done: int = 0, **members: Any) -> bytes:
    """One server-sent event of a job."""
    return f"event: progress\ndata: {json.dumps(document(state, done, **members))}\n\n".encode()


@contextlib.contextmanager
def running(app: Any, **options: Any) -> Iterator[str]:
    """Serves an application on loopback and gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none", **options))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = server.force_exit = True
        thread.join(10)


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    server = FakeServer()
    with running(server.app) as address:
        server.url = f"http://{address}"
        yield server
        server.hold.set()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four small images, two of them in a folder of the folder."""
    home = tmp_path / "images"
    (home / "day 2").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.png", "day 2/a.png", "day 2/ü.tif"]):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 7 + number), dtype=np.uint8)
        (home / name).write_bytes(picture_bytes(pixels, "TIFF" if name.endswith("tif") else "PNG"))
    return home


app = typer.Typer(pretty_exceptions_enable=False)
app.command()(report_errors(cli.segment))
app.command()(report_errors(cli.compare))


def run(*arguments: object, code: int = 0) -> Result:
    """Runs `unetpp` with arguments and checks its exit status."""
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result
