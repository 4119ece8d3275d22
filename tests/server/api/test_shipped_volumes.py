"""The shipped network for volumes, over HTTP: real volumes in, masks on their own grids out."""

import csv
import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pytest
from nibabel import orientations
from SimpleITK import GetArrayFromImage, ReadImage

from tests.support.files import picture_bytes
from tests.support.server import serving
from tests.support.service import quiet_settings


@pytest.fixture(scope="module")
def client(volume_bundle: Path) -> Iterator[httpx.Client]:
    """A client of the shipped bundle at fp32."""
    from server.app import create_app

    settings = quiet_settings(bundles=volume_bundle, runtime={"precision": "fp32"})
    with serving(create_app(settings)) as client:
        yield client


@pytest.fixture(scope="module")
def sample() -> bytes:
    """A small MR volume that comes with nibabel."""
    return (Path(nib.__file__).parent / "tests" / "data" / "anatomical.nii").read_bytes()


def mask_of(body: bytes) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(body))


@pytest.mark.parametrize("query", ["mode=fast&level=1", "mode=fast&level=2", "mode=accurate"])
def test_mask_lies_where_the_volume_lies(
    client: httpx.Client, sample: bytes, query: str, tmp_path: Path
) -> None:
    answer = client.post(f"/segment?model=hippocampus&{query}", content=sample).raise_for_status()
    (tmp_path / "mask.nii.gz").write_bytes(answer.content)
    (tmp_path / "volume.nii").write_bytes(sample)
    mask, volume = (ReadImage(str(tmp_path / name)) for name in ("mask.nii.gz", "volume.nii"))
    for fact in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(mask, fact)() == getattr(volume, fact)()
    assert set(np.unique(GetArrayFromImage(mask))) <= {0, 1, 2}
    assert answer.headers["content-disposition"] == 'inline; filename="mask.nii.gz"'


def test_image_for_a_network_of_volumes_is_refused(
    client: httpx.Client, ihc: np.ndarray, problem: Callable[..., Any]
) -> None:
    answer = client.post("/segment?model=hippocampus", content=picture_bytes(ihc[:64, :64]))
    problem(answer, 422, "invalid-parameter")


def rows(data: Path, split: str) -> list[str]:
    with (data / "index.csv").open(newline="") as file:
        return [row["id"] for row in csv.DictReader(file) if row["split"] == split]


@pytest.mark.parametrize(("query", "least"), [("level=1", 0.83), ("level=2", 0.85), ("mode=accurate", 0.85)])
def test_network_finds_the_hippocampus_on_held_out_volumes(
    client: httpx.Client, hippocampus_data: Path, query: str, least: float
) -> None:
    dice = []
    for name in rows(hippocampus_data, "test")[:4]:
        files = {
            "file": (hippocampus_data / "images" / f"{name}.nii.gz").read_bytes(),
            "reference": (hippocampus_data / "labels" / f"{name}.nii.gz").read_bytes(),
        }
        answer = client.post(
            f"/segment?model=hippocampus&{query}&format=json", files=files
        ).raise_for_status()
        report = answer.json()
        assert [row["name"] for row in report["classes"]] == ["anterior hippocampus", "posterior hippocampus"]
        assert all(1 < row["volume_ml"] < 3 for row in report["classes"])
        dice.append(float(answer.headers["x-segment-dice"]))
    assert np.mean(dice) > least


@pytest.mark.parametrize("codes", ["LPS", "PIR", "SAL"])
def test_turned_volume_has_the_turned_mask(client: httpx.Client, hippocampus_data: Path, codes: str) -> None:
    image = nib.load(hippocampus_data / "images" / f"{rows(hippocampus_data, 'test')[0]}.nii.gz")
    turn = orientations.ornt_transform(
        orientations.io_orientation(image.affine), orientations.axcodes2ornt(codes)
    )
    straight, turned = (
        mask_of(
            client.post("/segment?model=hippocampus&level=2", content=volume.to_bytes())
            .raise_for_status()
            .content
        )
        for volume in (image, image.as_reoriented(turn))
    )
    assert np.array_equal(np.asarray(straight.as_reoriented(turn).dataobj), np.asarray(turned.dataobj))


def test_job_gives_the_same_mask(client: httpx.Client, sample: bytes) -> None:
    posted = client.post("/jobs?model=hippocampus&level=2&preview=true", content=sample)
    assert posted.status_code == 202
    with client.stream("GET", f"{posted.headers['location']}/events") as events:
        told = [line for line in events.iter_lines() if line.startswith("event:")]
    assert told[-1] == "event: done"
    result = client.get(f"{posted.headers['location']}/result").raise_for_status()
    straight = client.post("/segment?model=hippocampus&level=2", content=sample).raise_for_status()
    assert result.content == straight.content
    assert result.headers["x-segment-level"] == "2"
    preview = client.get(f"{posted.headers['location']}/preview").raise_for_status()
    assert (
        preview.content
        == client.post("/segment?model=hippocampus&level=1", content=sample).raise_for_status().content
    )
