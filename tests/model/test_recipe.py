"""Recipes, their overrides, and the command that trains by them."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from model import train
from model.baselines import ARCHITECTURES
from model.recipe import RecipeError, TrainConfig, read_recipe
from server.cli import app
from tests.model.runs import RECIPE, VOLUMES, interrupted_at

pytestmark = pytest.mark.filterwarnings("ignore:Num foregrounds:UserWarning")


# --- recipes ---


def test_the_shipped_recipe_is_valid():
    config = read_recipe(RECIPE, [])
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config
    assert config.architecture == "unetpp"
    assert config.network.widths == (32, 64, 128, 256, 512)
    assert config.data.tile % config.network.divisor(config.network.depth) == 0


def test_the_shipped_recipe_for_volumes_is_valid():
    config = read_recipe(VOLUMES, [])
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config
    train._check_tile(config)
    # Anterior and posterior are the classes, and must not be mirrored into each other.
    assert (config.network.classes, config.data.flip, config.data.rotate90) == (3, (0,), False)
    with torch.device("meta"):
        network = ARCHITECTURES[config.architecture](config.network)
        heads = network(torch.empty(1, 1, *config.data.tile_shape(3)))
    assert not any(isinstance(module, torch.nn.Conv2d) for module in network.modules())
    assert [head.shape for head in heads] == [(1, 3, 32, 48, 32)] * 4


def test_the_recipe_has_a_channel_for_objects_and_can_do_without():
    config = read_recipe(RECIPE, [])
    train._check_tile(config)
    assert (config.network.objects, config.network.head_channels) == (("distance",), 2)
    told = [
        line for line in RECIPE.read_text().splitlines() if "--set" in line and "architecture" not in line
    ]
    plain = read_recipe(RECIPE, re.findall(r"--set (\S+?)[,.]?(?=\s|$)", "\n".join(told)))
    assert plain.network.objects == ()
    assert not plain.data.weighs_objects


def test_overrides():
    config = read_recipe(
        RECIPE,
        [
            "architecture=unet",
            "optimisation.epochs=3",
            "optimisation.schedule=constant",
            'data.balance="a=b"',
            "network.widths=[2, 3]",
        ],
    )
    assert (config.architecture, config.optimisation.epochs, config.optimisation.schedule) == (
        "unet",
        3,
        "constant",
    )
    assert (config.data.balance, config.network.widths) == ("a=b", (2, 3))
    assert config.optimisation.batch == read_recipe(RECIPE, []).optimisation.batch


@pytest.mark.parametrize(("override", "match"), [
    ("optimisation.epochs", "expected section.key=value"),
    ("optimisation.epoch=3", r"optimisation\.epoch: Extra inputs"),
    ("nowhere.key=3", "nowhere: Extra inputs"),
    ("optimisation.epochs=many", r"optimisation\.epochs: Input should be a valid integer"),
    ("optimisation.epochs=0", r"optimisation\.epochs: .*greater than or equal to 1"),
    ("optimisation.seed=-1", r"optimisation\.seed: .*greater than or equal to 0"),
    ("data.tile=8", r"data\.tile.*: Input should be greater than or equal to 16"),
    ("data.spacing=[1.0, 0.0, 1.0]", r"data\.spacing\.1: Input should be greater than 0"),
    ("data.rotate_degrees=181", r"data\.rotate_degrees: .*less than or equal to 180"),
    ("architecture=resnet", "architecture: Input should be 'unetpp' or 'unet'"),
    ("network.widths=[1]", "widths must list 2 to 6"),
    ("architecture.name=unet", r"override 'architecture\.name=unet': architecture is no section"),
    ("optimisation.epochs.max=3", r"optimisation\.epochs is no section"),
])  # fmt: skip
def test_wrong_overrides(override, match):
    with pytest.raises(RecipeError, match=match):
        read_recipe(RECIPE, [override])


@pytest.mark.parametrize("content", [None, b"not toml", b"\xff\xfe", b"[network]\nwidth = [3, 4]\n"])
def test_wrong_recipes(tmp_path, content):
    if content is not None:
        (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(RecipeError, match=r"a\.toml"):
        read_recipe(tmp_path / "a.toml", [])
    # An empty one is good: a section that it leaves out can be given by an override.
    (tmp_path / "a.toml").write_text("")
    assert read_recipe(tmp_path / "a.toml", ["optimisation.epochs=3"]).optimisation.epochs == 3


# --- the console ---


ARGUMENTS = ["--set", "network.widths=[4, 6]", "--set", "network.in_channels=1", "--set", "data.tile=16", "--set", "data.large_tile=16", "--set", "data.tiles_per_image=1",
             "--set", "network.objects=[]", "--set", "data.small_object_weight=1", "--set", "data.touching_weight=1",
             "--set", "optimisation.batch=4", "--set", "optimisation.workers=0", "--set", "optimisation.epochs=1"]  # fmt: skip


def test_command(tmp_path, discs_kept):
    out = tmp_path / "run"
    result = CliRunner().invoke(
        app, ["train", str(RECIPE), "--data", str(discs_kept), "--out", str(out), *ARGUMENTS]
    )
    assert result.exit_code == 0, result.output
    assert str(out / "best.safetensors") in result.output
    assert "4 training and 2 validation images" in result.output
    assert "epoch 1: loss" in result.output
    assert json.loads((out / "recipe.json").read_text())["network"]["widths"] == [4, 6]


@pytest.mark.parametrize(("arguments", "text"), [
    (["--set", "optimisation.epoch=1"], "optimisation.epoch"),
    (["--set", "network.dims=3"], "files named in index.csv are missing"),
])  # fmt: skip
def test_command_says_what_is_wrong(tmp_path, discs_kept, arguments, text):
    out = str(tmp_path / "run")
    result = CliRunner().invoke(
        app, ["train", str(RECIPE), "--data", str(discs_kept), "--out", out, *ARGUMENTS, *arguments]
    )
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert text in result.stderr
    assert "Traceback" not in result.output


def test_command_on_bad_data_and_interrupted(tmp_path, discs_kept, monkeypatch):
    (tmp_path / "empty").mkdir()
    arguments = ["train", str(RECIPE), "--out", str(tmp_path / "run"), *ARGUMENTS, "--data"]
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "empty")])
    assert (result.exit_code, "index.csv: not found" in result.stderr) == (1, True)
    interrupted_at(monkeypatch, 1)
    monkeypatch.setattr(
        train, "deep_supervision_loss", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    result = CliRunner().invoke(app, [*arguments, str(discs_kept)])
    assert (result.exit_code, "error: interrupted; the same command goes on" in result.stderr) == (1, True)
