import asyncio
import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import Client, Local, errors
from server.settings import Settings
from tests.client.conftest import served
from tests.support.files import picture_bytes

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 20), dtype=np.uint8)
IMAGE = picture_bytes(PIXELS)


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("server.app.open_bundles", lambda settings: fake_bundles())
    with Local() as opened:
        yield opened


def test_is_what_a_server_answers(local: Local) -> None:
    with served() as url, Client(url) as client:
        assert local.models() == client.models()
        assert local.model("fake") == client.model("fake")
        for asked in ({}, {"level": 1}, {"formats": ("tiff", "json")}, {"reference": PIXELS > 99, "mode": "fast"}):
            here, there = (one.segment(PIXELS, **asked) for one in (local, client))
            assert np.array_equal(here.mask, there.mask)
            assert here.files.keys() == there.files.keys()
            assert here.timings_ms.keys() == there.timings_ms.keys()
            for name in ("model", "mode", "level", "precision", "iou", "dice", "note", "degraded"):
                assert getattr(here, name) == getattr(there, name), name


@pytest.mark.parametrize(
    "asked",
    [{"level": 9}, {"levle": 1}, {"level": "x"}, {"precision": "fp8"}, {"model": "lungs"}, {"formats": "gif"}, {"formats": "nifti"},
     {"include_mask": "perhaps"}, {"deadline_ms": -1}],
)  # fmt: skip
def test_refuses_what_a_server_refuses(local: Local, asked: dict[str, Any]) -> None:
    with served() as url, Client(url) as client:
        found = []
        for one in (local, client):
            with pytest.raises(errors.SegmentError) as caught:
                one.segment(IMAGE, **asked)
            found.append((type(caught.value), caught.value.status, caught.value.type))
    assert found[0] == found[1]


def test_says_what_a_server_logs(tmp_path: Path) -> None:
    with pytest.raises(errors.Failed, match="no bundle there"):
        Local(tmp_path)
    with pytest.raises(errors.NotFound, match="UNETPP_DEFAULT_MODEL"):
        Local(
            settings=Settings(
                bundles=Path("bundles/nuclei"), default_model="lungs", runtime={"precision": "fp32", "engine": "onnxruntime"}
            )
        )


def test_progress(local: Local) -> None:
    seen: list[tuple[str, int, int]] = []
    local.segment(np.zeros((200, 200), np.uint8), progress=lambda *step: seen.append(step))
    assert seen[0][0] == "decode"
    assert seen[-1][1] == seen[-1][2] > 1


def test_inside_of_a_running_loop(local: Local) -> None:
    """As in a notebook."""

    async def cell() -> Any:
        return local.segment(IMAGE)

    assert asyncio.run(cell()).model == "fake"


def test_needs_no_httpx_and_no_torch() -> None:
    code = "import sys\nfor name in ('httpx', 'torch'): sys.modules[name] = None\nfrom client import Local, Result, SegmentError\nimport client.cli"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr


def test_a_client_needs_no_server() -> None:
    code = (
        "import sys\nfor name in ('server', 'onnxruntime', 'torch', 'fastapi'): sys.modules[name] = None\n"
        "from client import AsyncClient, Client\nimport client.remote, client.batch, client.compare"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr


def test_a_zip_of_images(local: Local) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as held:
        held.writestr("a/x.png", IMAGE)
        held.writestr("b/x.png", IMAGE)
    with served() as url, Client(url) as client:
        here, there = (one.segment(out.getvalue(), formats="mask") for one in (local, client))
    assert list(here.files) == list(there.files) == ["a/x_mask.png", "b/x_mask.png", "report.json"]
    assert here.files["a/x_mask.png"] == there.files["b/x_mask.png"]
    for one in (here, there):
        assert [(row["name"], row["status"]) for row in one.images] == [("a/x.png", "ok"), ("b/x.png", "ok")]
        assert one.array("a/x_mask.png").shape == one.array(one.images[1]["files"][0]).shape
        # What was asked for is there, but not once.
        with pytest.raises(LookupError, match=r"a zip of images has a file for each.*\.array\(.a/x_mask\.png"):
            _ = one.mask
        with pytest.raises(LookupError, match="has a file for each"):
            _ = one.statistics
    assert local.segment(IMAGE).images == []
