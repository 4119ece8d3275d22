"""Shared fixtures: a tiny network, the shipped bundles, real servers, and the data beside the project."""

from collections.abc import Iterator
from pathlib import Path

from jaxtyping import install_import_hook

# Shapes and dtypes in annotations are checked, in tests only; before anything of ours is imported.
install_import_hook(
    ["server.segment", "server.imaging", "server.arrays", "export.golden"], "beartype.beartype"
)

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# How long an example takes is the machine's business.
hypothesis.settings.register_profile("unetpp", deadline=None)
hypothesis.settings.load_profile("unetpp")

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def hippocampus_data() -> Path:
    """Folder with images/, labels/ (NIfTI) and index.csv."""
    return _shared("hippocampus")


@pytest.fixture(scope="session")
def bad_inputs() -> Path:
    """Folder of crash and fuzz files."""
    return _shared("bad_inputs")


@pytest.fixture(scope="session")
def dicom_data() -> Path:
    """Folder of DICOM series, of which those in must_refuse are no regular volumes."""
    return _shared("dicom")


def _shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs the data folder {name} beside the project")
    return SHARED / name


@pytest.fixture(scope="session")
def shipped_bundle() -> Path:
    """The nuclei bundle of the repository."""
    return ROOT / "bundles" / "nuclei"


@pytest.fixture(scope="session")
def volume_bundle() -> Path:
    """The hippocampus bundle of the repository."""
    return ROOT / "bundles" / "hippocampus"


@pytest.fixture(scope="session")
def tiny_network() -> "torch.nn.Module":  # type: ignore[name-defined]
    """UNet++ of depth 4 with few channels, batch normalisation and statistics that are not the identity."""
    import torch

    from model.config import UNetPlusPlusConfig
    from model.network import UNetPlusPlus

    torch.manual_seed(0)
    network = UNetPlusPlus(UNetPlusPlusConfig(in_channels=3, widths=(4, 6, 8, 12, 16), norm="batch"))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
            module.momentum = 1.0
    with torch.no_grad():
        # As after training: statistics of real activations, so that no layer is dead and every head decides.
        network.train()(torch.randn(4, 3, 64, 64))
        network.eval()
        for head, logits in zip(network.heads.values(), network(torch.randn(4, 3, 64, 64)), strict=True):
            head.bias.sub_(logits.mean())
    return network


@pytest.fixture(scope="session")
def app(shipped_bundle: Path) -> "fastapi.FastAPI":  # type: ignore[name-defined]
    """The application on the shipped bundle, at fp32 so that answers are exact."""
    from server.app import create_app
    from tests.support.service import quiet_settings

    return create_app(quiet_settings(bundles=shipped_bundle, runtime={"precision": "fp32"}))


@pytest.fixture(scope="session")
def client(app: object) -> Iterator["httpx.Client"]:  # type: ignore[name-defined]
    """A client of the application on a real socket."""
    from tests.support.server import serving

    with serving(app) as client:
        yield client


@pytest.fixture
def rng() -> np.random.Generator:
    """Seeded."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def ihc() -> np.ndarray:
    """A real microscopy image that ships with scikit-image: (512, 512, 3) uint8, nuclei blue, stain brown."""
    from skimage import data

    return data.immunohistochemistry()
