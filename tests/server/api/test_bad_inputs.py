"""The crash and fuzz files of other readers, through a real server."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.files import GOOD
from tests.support.memory import resident_mb
from tests.support.server import serving
from tests.support.service import fake_app

pytestmark = pytest.mark.filterwarnings("ignore")  # decoders warn about what they tolerate

EXPECTED = (200, 413, 415, 422)


@pytest.fixture(scope="module")
def server() -> Iterator[httpx.Client]:
    """Real decoding and encoding; only the network is left out."""
    with serving(fake_app(limits={"max_pixels": 20_000_000})) as client:
        client.timeout = httpx.Timeout(30)
        yield client


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "family", ["go-fuzz", "image-png", "image-rs", "libpng", "nibabel", "nifti-rs", "pillow"]
)
def test_bad_file_is_no_server_fault(server: httpx.Client, bad_inputs: Path, family: str) -> None:
    assert files(bad_inputs / family)
    server.post("/segment", content=GOOD)
    before = resident_mb()
    for path in files(bad_inputs / family):
        answer = server.post("/segment?mode=fast&level=1", content=path.read_bytes())
        assert answer.status_code in EXPECTED, (path, answer.text)
        if answer.status_code != 200:
            assert answer.headers["content-type"] == "application/problem+json", path
            assert answer.json()["code"], path
        assert server.post("/segment", content=GOOD).status_code == 200, path
    assert resident_mb() - before < 400


def test_bad_reference_is_no_server_fault(server: httpx.Client, bad_inputs: Path) -> None:
    for path in files(bad_inputs / "pillow"):
        answer = server.post(
            "/segment?mode=fast&level=1", files={"file": GOOD, "reference": path.read_bytes()}
        )
        assert answer.status_code in EXPECTED, (path, answer.text)


def test_bad_file_on_the_shipped_network_is_no_server_fault(client: httpx.Client, bad_inputs: Path) -> None:
    for path in files(bad_inputs / "image-rs"):
        answer = client.post("/segment?mode=fast&level=1", content=path.read_bytes())
        assert answer.status_code in EXPECTED, (path, answer.text)
