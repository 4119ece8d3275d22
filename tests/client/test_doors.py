"""The same answer through every door, from the shipped bundle."""

import importlib.util
from pathlib import Path

import httpx
import numpy as np
import pytest

from client import Client, Local
from client.inputs import ANSWERS, SUFFIXES
from client.result import DECODERS
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


def test_auto_is_the_same_through_every_door(
    client: httpx.Client, shipped_bundle: Path, ihc: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "tissue.png"
    path.write_bytes(picture_bytes(ihc[:100, :120]))
    options = {"formats": "mask", "mode": "auto", "max_loss": 0.5, "precision": "fp32"}
    with Client(str(client.base_url)) as remote:
        expected = remote.segment(path, **options)
    with Local(shipped_bundle) as local:
        result = local.segment(path, **options)
    run(
        "segment",
        path,
        "--mode",
        "auto",
        "--max-loss",
        0.5,
        "--precision",
        "fp32",
        "--bundles",
        shipped_bundle,
    )
    assert (result.mode, result.level, result.files) == ("auto", expected.level, expected.files)
    assert (tmp_path / "tissue_mask.png").read_bytes() == expected.files["mask.png"]


def test_every_picture_of_the_server_is_decoded_and_known_as_an_answer() -> None:
    from server.imaging.encode import ENCODERS

    if not hasattr(next(iter(ENCODERS.values())), "filename"):
        pytest.skip("needs the encoders that are named by their file")
    files = {row.filename for row in ENCODERS.values()}
    # Answers in DICOM are for archives and are kept as they are.
    pictures = {name for name in files if not name.endswith(("json", "csv", "dcm"))}
    assert all(name.endswith(tuple(DECODERS)) for name in pictures)
    assert {name.partition(".")[0] for name in pictures if name.endswith(SUFFIXES)} <= set(ANSWERS)
