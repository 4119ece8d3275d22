"""A small labelled data folder, and a bundle of depth 2 in all precisions."""

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from export.card import Card, read_card
from export.golden import synthetic_cells
from export.pack import export
from model import checkpoint
from model.config import UNetPlusPlusConfig
from model.losses import deep_supervision_loss
from model.network import UNetPlusPlus
from server.runtime.bundle import Bundle, Window, read_bundle

# The threads of OpenMP spin while they wait, which takes most of the time where tests share the cores.
torch.set_num_threads(1)

CARDS = Path(__file__).parents[2] / "export" / "cards"


@pytest.fixture(scope="session")
def card() -> Card:
    """Three channels, one class."""
    changes = {"name": "small", "objects": None, "min_object_px": 0, "min_object_score": 0.0}
    return read_card(CARDS / "nuclei.toml").model_copy(update=changes)


@pytest.fixture(scope="session")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright discs on dark ground: three training and two validation images of odd sizes."""
    root = tmp_path_factory.mktemp("data") / "discs"
    random = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    rows = ["id,split"]
    for split, sizes in {"train": [(48, 48), (40, 56), (33, 47)], "val": [(37, 50), (48, 32)]}.items():
        for n, (height, width) in enumerate(sizes):
            y, x = np.mgrid[:height, :width]
            disc = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (10 + n) ** 2
            picture = np.clip(
                60 + 120 * disc[..., None] + random.normal(0, 10, (height, width, 3)), 0, 255
            ).astype(np.uint8)
            Image.fromarray(picture).save(root / "images" / f"{split}{n}.png")
            Image.fromarray((disc * 255).astype(np.uint8)).save(root / "labels" / f"{split}{n}.png")
            rows.append(f"{split}{n},{split}")
    (root / "index.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="session")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ball whose front half is class 1 and back half class 2, in volumes of several orientations."""
    root = tmp_path_factory.mktemp("data") / "balls"
    random = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    rows = ["id,split"]
    for split, orientations in {"train": ["RAS", "LPS"], "val": ["RAS", "PIR"]}.items():
        for n, codes in enumerate(orientations):
            x, y, z = np.mgrid[:24, :20, :16]
            ball = (x - 12) ** 2 + (y - 10) ** 2 + (z - 8) ** 2 < 36
            label = ball * np.where(y > 10, 1, 2)
            voxels = 100 + 300 * ball + random.normal(0, 20, ball.shape)
            turn = nib.orientations.ornt_transform(
                nib.io_orientation(np.eye(4)), nib.orientations.axcodes2ornt(codes)
            )
            for folder, array in (("images", voxels.astype(np.int16)), ("labels", label.astype(np.uint8))):
                nib.Nifti1Image(array, np.eye(4)).as_reoriented(turn).to_filename(
                    root / folder / f"{split}{n}.nii.gz"
                )
            rows.append(f"{split}{n},{split}")
    (root / "index.csv").write_text("\n".join(rows) + "\n")
    return root


def lively(**fields: object) -> UNetPlusPlus:
    """A network whose every tensor differs from every other (the exporter merges those that are alike)."""
    torch.manual_seed(0)
    network = UNetPlusPlus(
        UNetPlusPlusConfig.model_validate({"in_channels": 3, "widths": (4, 6, 8)} | fields)
    ).eval()
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.ndim == 1:
            tensor.add_(torch.randn_like(tensor) * 0.2)
    # The mask of every head is neither empty nor full.
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        logits = network(torch.randn(4, network.config.in_channels, *[32] * network.config.dims))
        for head, answer in zip(network.heads.values(), logits, strict=True):
            head.bias.sub_(answer.mean())
    return network


@pytest.fixture(scope="session")
def make_network():
    """`lively`."""
    return lively


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Depth 2, batch normalisation."""
    path = tmp_path_factory.mktemp("checkpoints") / "small.safetensors"
    checkpoint.save(lively(norm="batch"), path, {"epoch": 7})
    return path


@pytest.fixture(scope="session")
def small_kept(
    tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path, card: Card, discs: Path
) -> Path:
    """Its bundle in fp32, fp16 and int8; do not write there."""
    out = tmp_path_factory.mktemp("bundles") / "small"
    export(small_checkpoint, card, out, discs)
    return out


@pytest.fixture(scope="session")
def volume_kept(tmp_path_factory: pytest.TempPathFactory, balls: Path) -> Path:
    """A bundle of depth 2 for volumes, of three exclusive classes, in fp32, fp16 and int8; do not write there."""
    folder = tmp_path_factory.mktemp("bundles")
    network = lively(dims=3, in_channels=1, classes=3, widths=(3, 4, 5), norm="batch")
    checkpoint.save(
        network,
        folder / "volume.safetensors",
        {"recipe": {"data": {"spacing": [1.0, 1.0, 1.0], "flip": [0]}}},
    )
    card = read_card(CARDS / "hippocampus.toml").model_copy(
        update={"name": "volume", "window": Window(size=(16, 16, 16), overlap=0.5)}
    )
    export(folder / "volume.safetensors", card, folder / "volume", balls)
    return folder / "volume"


@pytest.fixture
def small_bundle(small_kept: Path, tmp_path: Path) -> Bundle:
    """A copy of it, for tests that change it."""
    return read_bundle(Path(shutil.copytree(small_kept, tmp_path / "small")))


@pytest.fixture(scope="session")
def disc_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of discs, in a folder without an index."""
    root = tmp_path_factory.mktemp("images") / "discs"
    root.mkdir()
    for seed in range(6):
        Image.fromarray(synthetic_cells((64, 77), 3, seed)).save(root / f"{seed}.png")
    return root


@pytest.fixture(scope="session")
def deep_kept(tmp_path_factory: pytest.TempPathFactory, card: Card, disc_images: Path) -> Path:
    """A bundle of depth 3 whose loss stood on the last head alone, in fp32, fp16 and int8; do not write there."""
    folder = tmp_path_factory.mktemp("bundles")
    torch.manual_seed(0)
    config = UNetPlusPlusConfig(in_channels=3, widths=(4, 6, 8, 10), deep_supervision=False, norm="batch")
    network = UNetPlusPlus(config).train()
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(60):
        pixels = np.stack([synthetic_cells((48, 48), 3, 100 + 4 * step + k) for k in range(4)])
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        labels = (values.mean(1) > 70).long()
        spread, mean = torch.std_mean(values, dim=(2, 3), keepdim=True)
        loss = deep_supervision_loss(network((values - mean) / spread), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    checkpoint.save(network.eval(), folder / "deep.safetensors", {"epoch": 1})
    export(folder / "deep.safetensors", card, folder / "deep", disc_images)
    return folder / "deep"


@pytest.fixture
def deep(deep_kept: Path, tmp_path: Path) -> Bundle:
    """A copy of it."""
    return read_bundle(Path(shutil.copytree(deep_kept, tmp_path / "deep")))
