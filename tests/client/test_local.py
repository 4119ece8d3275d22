import asyncio
import math
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from client import Local
from server import errors
from server.segment.request import QoS, Response, SegmentParams, Upload
from tests.client.conftest import zipped
from tests.support.files import Sent, picture_bytes

MASK = np.eye(4, dtype=np.uint8)
TARGET = SimpleNamespace(model="fake", mode="fast", level=2, precision="fp32")


@dataclass
class FakeService:
    """A service that gives one response.

    Attributes:
        response: what it gives; raised if it is an error.
        calls: bytes of the input and of the reference, file name, parameters and QoS of each request.
    """

    response: Any
    calls: list[tuple[bytes, bytes | None, str, SegmentParams, QoS]] = field(default_factory=list)
    registry: Any = field(default_factory=lambda: SimpleNamespace(default="fake", deployments={}))
    closed: bool = False

    async def segment(self, upload: Upload, params: SegmentParams, qos: QoS, on_progress: Any) -> Response:
        reference = upload.reference.read() if upload.reference else None
        self.calls.append((upload.file.read(), reference, upload.name, params, qos))
        if isinstance(self.response, BaseException):
            raise self.response
        await asyncio.sleep(0)
        on_progress("infer", 1, 2)
        return self.response  # type: ignore[no-any-return]

    def close(self) -> None:
        self.closed = True


def response(
    body: Any = None, media_type: str = "image/png", filename: str = "mask.png", **facts: Any
) -> Response:
    target: Any = TARGET
    timings = {"decode": 0.001, "infer": 0.02}
    return Response(body or picture_bytes(MASK), media_type, filename, target, target, "", timings, **facts)


def test_segment_hands_request_to_service(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(picture_bytes(MASK))
    service = FakeService(response())
    begun = time.monotonic()
    with Local(service=service) as local:
        local.segment(path, reference=MASK, level=2, deadline_ms=5000)
        local.segment(MASK)
    (file, reference, name, params, qos), (_, none, unnamed, _, endless) = service.calls
    assert (file, reference, name) == (path.read_bytes(), file and service.calls[1][0], "x.png")
    assert (params.level, params.format, params.deadline_ms) == (2, "mask,json", 5000)
    assert 5 <= qos.deadline - begun <= 10
    assert (none, unnamed, endless.deadline) == (None, "", math.inf)
    assert service.closed


def test_segment_gives_what_the_service_answers() -> None:
    overlap: Any = SimpleNamespace(iou=0.123456, dice=0.5)
    with Local(service=FakeService(response(note="a note", overlaps={1: overlap}))) as local:
        result = local.segment(MASK)
    assert np.array_equal(result.mask, MASK)
    assert (result.model, result.mode, result.level, result.precision) == ("fake", "fast", 2, "fp32")
    assert (result.iou, result.dice, result.note, result.degraded) == (0.1235, 0.5, "a note", "")
    assert result.timings_ms == {"decode": 1, "infer": 20}


def test_segment_of_zip_reads_and_closes_temporary_file() -> None:
    body = Sent(
        zipped({"a_mask.png": picture_bytes(MASK), "report.json": b'{"images": [{"name": "a.png"}]}'})
    )
    with Local(service=FakeService(response(body, "application/zip", "mask.zip"))) as local:
        result = local.segment(b"PK")
    assert list(result.files) == ["a_mask.png", "report.json"]
    assert result.images == [{"name": "a.png"}]
    assert body.closed


def test_segment_calls_progress_in_the_calling_thread() -> None:
    with Local(service=FakeService(response())) as local:
        seen: list[Any] = []
        local.segment(MASK, progress=lambda *step: seen.append((step, local.models())))
    assert seen == [(("infer", 1, 2), [])]


def test_errors_are_those_of_the_service() -> None:
    with Local(service=FakeService(errors.TooLarge("words", limit=1))) as local:
        with pytest.raises(errors.TooLarge):
            local.segment(MASK)
        with pytest.raises(errors.InvalidParameter):
            local.segment(MASK, level="x")


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import client.cli", "httpx numpy rich scipy torch server.app starlette"),
        (
            "from client import AsyncClient, Client; import client.remote",
            "onnxruntime scipy torch starlette server.app server.imaging",
        ),
        (
            "from client import Local; import client.batch, client.report, client.display",
            "httpx torch rich starlette server.app",
        ),
    ],
    ids=["cli", "http", "local"],
)
def test_import_brings_only_what_is_needed(code: str, absent: str) -> None:
    code += f"\nimport sys\nprint(*(name for name in {absent.split()} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == []
