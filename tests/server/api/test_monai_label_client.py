"""MONAI Label's own Python client, which 3D Slicer's extension contains, against the shipped bundles.

The client is one file of MONAI Label's wheel. The wheel itself is not installed for it, because it brings torch, and a folder
`tests` that would hide this one. For this test: pip download --no-deps monailabel; unzip 'monailabel-*.whl' 'monailabel/client/*'
-d FOLDER; PYTHONPATH=FOLDER.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pytest
from SimpleITK import GetArrayFromImage, ReadImage

from tests.support.server import serving
from tests.support.service import fake_app, quiet_settings

# The client leaves its sockets and files open.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def monai() -> ModuleType:
    """The module of the client, without the package around it."""
    found = importlib.util.find_spec("monailabel")
    places = [
        Path(place) / "client" / "client.py" for place in (found and found.submodule_search_locations) or []
    ]
    place = next((place for place in places if place.exists()), None)
    if place is None:
        pytest.skip("needs client.py of MONAI Label's wheel on the path (see the docstring of this file)")
    spec = importlib.util.spec_from_file_location("monai_label_client", place)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        # It imports cgi, which Python 3.13 no longer has.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            spec.loader.exec_module(module)
        except ModuleNotFoundError as error:
            pytest.skip(f"the client of MONAI Label needs the module {error.name}")
    return module


@pytest.fixture(scope="module")
def server(volume_bundle: Path) -> Iterator[httpx.Client]:
    from server.app import create_app

    settings = quiet_settings(bundles=volume_bundle.parent, runtime={"precision": "fp32"})
    with serving(create_app(settings)) as client:
        yield client


@pytest.fixture
def client(monai: ModuleType, server: httpx.Client, tmp_path: Path) -> Any:
    return monai.MONAILabelClient(str(server.base_url), str(tmp_path), "user-xyz")


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A small MR volume that comes with nibabel, as Slicer saves it."""
    path = tmp_path / "tmp3l2k.nii.gz"
    nib.save(nib.load(Path(nib.__file__).parent / "tests" / "data" / "anatomical.nii"), path)
    return path


def slicer_params(**config: Any) -> dict[str, Any]:
    """What Slicer's module sends beside the values of its table of options."""
    return config | {"result_extension": ".nrrd", "result_dtype": "uint8"}


def segmented(server: httpx.Client, volume: Path, query: str) -> bytes:
    return server.post(f"/segment?{query}", content=volume.read_bytes()).raise_for_status().content


def test_info_lists_the_levels_of_every_bundle_volumes_first(client: Any) -> None:
    info = client.info()
    # Slicer takes a server whose answer has this member for one that is too old.
    assert not info.get("config")
    names = [*info["models"]]
    assert names[:2] == ["hippocampus-accurate", "hippocampus-auto"]
    assert {"hippocampus-L1", "hippocampus-L4", "nuclei-L1", "nuclei-accurate"} <= {*names}
    assert info["models"]["hippocampus-L2"] == {
        "type": "segmentation",
        "labels": {"anterior hippocampus": 1, "posterior hippocampus": 2},
        "dimension": 3,
        "description": info["models"]["hippocampus-L2"]["description"],
        "config": info["models"]["hippocampus-L2"]["config"],
    }
    assert info["models"]["nuclei-L1"]["dimension"] == 2
    # OHIF appends to it.
    assert isinstance(info["labels"], list)


@pytest.mark.parametrize(
    ("model", "query"),
    [
        ("hippocampus-L1", "model=hippocampus&level=1"),
        ("hippocampus-L4", "model=hippocampus&level=4"),
        ("hippocampus-accurate", "model=hippocampus"),
        ("hippocampus-auto", "model=hippocampus&mode=auto"),
        ("nuclei-L1", "model=nuclei&level=1"),
    ],
)
def test_run_of_slicer_is_the_mask_of_segment(
    client: Any, server: httpx.Client, volume: Path, model: str, query: str
) -> None:
    """Slicer's button Run: upload under the name of the volume, then infer with the options of its table."""
    assert client.auth_enabled() is False
    config = {
        name: v[0] if isinstance(v, list) else v
        for name, v in client.info()["models"][model]["config"].items()
    }
    client.upload_image(str(volume), "MR head")
    file, params = client.infer(model, "MR head", slicer_params(**config))
    assert file.endswith(".nrrd")
    assert Path(file).read_bytes() == segmented(server, volume, f"{query}&format=mask.nrrd")
    labels = client.info()["models"][model]["labels"]
    assert params["label_names"] == labels
    mask, source = ReadImage(file), ReadImage(str(volume))
    for fact in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(mask, fact)(), getattr(source, fact)(), atol=1e-5)
    assert set(np.unique(GetArrayFromImage(mask))) <= {0, *labels.values()}


def test_session_is_used_twice_and_ended(client: Any, server: httpx.Client, volume: Path) -> None:
    session = client.create_session(str(volume))["session_id"]
    assert client.get_session(session)["name"] == session
    for level in (1, 2):
        file, params = client.infer(f"hippocampus-L{level}", "ignored", {}, session_id=session)
        assert params["level"] == level
        # As MITK, which names no extension and reads NIfTI.
        assert file.endswith(".nii.gz")
        assert Path(file).read_bytes() == segmented(server, volume, f"model=hippocampus&level={level}")
    client.remove_session(session)
    for call in (client.get_session, client.remove_session):
        with pytest.raises(Exception, match=r"Status: 404; Response: .*no session") as error:
            call(session)
        assert error.value.status_code == 404


def test_image_that_comes_with_the_request(client: Any, server: httpx.Client, volume: Path) -> None:
    file, _ = client.infer("hippocampus-L1", "x", slicer_params(), file=str(volume))
    assert Path(file).read_bytes() == segmented(server, volume, "model=hippocampus&level=1&format=mask.nrrd")


@pytest.mark.parametrize(
    ("call", "status", "text"),
    [
        (lambda c: c.infer("hippocampus-L9", "x", {}), 404, "hippocampus-L4"),
        (lambda c: c.infer("hippocampus-L1", "1.2.840.113", slicer_params()), 404, "no datastore"),
        (lambda c: c.infer("hippocampus-L1", "x", {"foreground": [[1, 2, 3]]}), 422, "clicks"),
        (lambda c: c.infer("hippocampus-L1", "x", {"result_extension": ".doc"}), 422, ".nii.gz"),
        (lambda c: c.next_sample("random", {}), 501, "active learning"),
        (lambda c: c.train_start("hippocampus-L1", {}), 501, "training"),
        (lambda c: c.train_status(), 501, "training"),
        (lambda c: c.train_stop(), 501, "training"),
        (lambda c: c.download_label("x", "final"), 501, "datastore"),
        (lambda c: c.wsi_infer("nuclei-L1", "x"), 501, "whole-slide"),
    ],
)
def test_error_of_the_client_shows_what_is_wrong(
    client: Any, call: Callable[[Any], Any], status: int, text: str
) -> None:
    with pytest.raises(Exception, match=f"Status: {status}; Response") as error:
        call(client)
    # What Slicer shows of it.
    assert text in error.value.msg


def test_slicer_believes_that_nothing_trains_and_nothing_waits_for_annotation(client: Any) -> None:
    assert client.train_status(check_if_running=True) is False
    assert client.datastore() == {"objects": {}}


def test_label_is_not_kept(client: Any, volume: Path) -> None:
    with pytest.raises(Exception, match="Status: 501"):
        client.save_label("x", str(volume))


def test_user_of_slicer_enters_a_key_as_password(monai: ModuleType, tmp_path: Path) -> None:
    from server.api.auth import make

    key, line = make("lab")
    (tmp_path / "keys").write_text(line)
    with serving(fake_app(auth={"keys_file": tmp_path / "keys"})) as server:
        client = monai.MONAILabelClient(str(server.base_url), str(tmp_path))
        assert client.auth_enabled()
        with pytest.raises(Exception, match=r"Status: 401; Response: .*API key"):
            client.info()
        assert client.auth_valid_token() is False
        with pytest.raises(Exception, match=r"Status: 401; Response: .*API key"):
            client.auth_token("somebody", "wrong")
        client.update_auth(client.auth_token("somebody", key))
        assert client.auth_valid_token()
        assert next(iter(client.info()["models"])) == "fake-accurate"
