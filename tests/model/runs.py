"""Short training runs on tiny discs and balls, interrupted ones among them, and how two runs compare."""

import csv
from pathlib import Path

import torch
from safetensors.torch import load_file

from model import checkpoint, train
from model.config import UNetPlusPlusConfig
from model.data import DataConfig
from model.recipe import OptimisationConfig, TrainConfig

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "model" / "recipes" / "nuclei.toml"
VOLUMES = ROOT / "model" / "recipes" / "hippocampus.toml"


def recipe(epochs=4, architecture="unetpp", network=None, data=None, **optimisation):
    return TrainConfig(
        architecture=architecture,
        network=UNetPlusPlusConfig(**{"widths": (4, 6, 8), "norm": "batch", **(network or {})}),
        data=DataConfig(**{"tile": 16, "tiles_per_image": 4, **(data or {})}),
        optimisation=OptimisationConfig(
            **{
                "batch": 4,
                "epochs": epochs,
                "learning_rate": 1e-2,
                "precision": "fp32",
                "workers": 0,
                **optimisation,
            }
        ),
    )


def volume_recipe(epochs=2, data=None, network=None, **more):
    network = {"dims": 3, "classes": 3, "widths": (2, 3, 4), **(network or {})}
    return recipe(
        epochs,
        network=network,
        data={"tile": (16, 16, 16), "flip": (0,), "rotate90": False, **(data or {})},
        **more,
    )


def rows_of(out):
    with (out / "log.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def assert_same_run(a, b):
    for name in ("last.safetensors", "best.safetensors"):
        one, other = load_file(a / name), load_file(b / name)
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), key
    assert (a / "log.csv").read_bytes() == (b / "log.csv").read_bytes()
    assert checkpoint.load(a / "best.safetensors")[1] == checkpoint.load(b / "best.safetensors")[1]


# --- interrupted ---


def interrupted_at(monkeypatch, epoch):
    """Control-C in the middle of that epoch's steps."""
    loss, calls = train.deep_supervision_loss, [0]

    def interrupting(heads, labels, *more):
        calls[0] += 1
        # Four steps per epoch; the second step of the epoch.
        if calls[0] == 4 * (epoch - 1) + 2:
            raise KeyboardInterrupt
        return loss(heads, labels, *more)

    monkeypatch.setattr(train, "deep_supervision_loss", interrupting)
