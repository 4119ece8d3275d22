"""The same answer through every door, from the shipped bundle."""

import importlib.util
from pathlib import Path

import httpx
import numpy as np
import pytest

from client import Client, Local
from tests.client.conftest import run
from tests.support.files import picture_bytes

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("server.segment.service") is None, reason="needs server.segment.service"
)


def test_server_process_and_shell_give_the_same_mask(
    client: httpx.Client, shipped_bundle: Path, ihc: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "tissue.png"
    path.write_bytes(picture_bytes(ihc[:100, :120]))
    options = {"formats": "mask", "level": 1, "precision": "fp32"}
    with Client(str(client.base_url)) as remote:
        expected = remote.segment(path, **options)
    with Local(shipped_bundle) as local:
        result = local.segment(path, **options)
    run("segment", path, "--level", 1, "--precision", "fp32", "--bundles", shipped_bundle)
    assert result.mask.shape == (100, 120)
    assert result.files == expected.files
    assert (tmp_path / "tissue_mask.png").read_bytes() == expected.files["mask.png"]
