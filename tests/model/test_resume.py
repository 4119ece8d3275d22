"""Interrupted training: a killed run goes on as if nothing had happened."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import train
from model.recipe import RecipeError
from tests.model.runs import ROOT, assert_same_run, interrupted_at, recipe, rows_of, volume_recipe

pytestmark = pytest.mark.filterwarnings("ignore:Num foregrounds:UserWarning")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resuming_on_volumes_is_exact(tmp_path, balls_kept, monkeypatch, precision):
    same = volume_recipe(precision=precision, schedule="one-cycle", weight_decay=1e-2)
    train.train(same, balls_kept, tmp_path / "a")
    with monkeypatch.context() as patch:
        interrupted_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train.train(same, balls_kept, tmp_path / "b")
    assert len(rows_of(tmp_path / "b")) == 1
    torch.manual_seed(99)
    train.train(same, balls_kept, tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_resuming_is_exact_after_every_epoch(tmp_path, discs_kept, finished, monkeypatch):
    same, out = recipe(schedule="one-cycle", weight_decay=1e-2), tmp_path / "run"
    for _ in range(3):
        with monkeypatch.context() as patch:
            interrupted_at(patch, 2)
            with pytest.raises(KeyboardInterrupt):
                train.train(same, discs_kept, out)
        torch.manual_seed(99)  # global state must not matter
    train.train(same, discs_kept, out)
    assert_same_run(out, finished)


@pytest.mark.parametrize("network", [
    {"norm": "instance", "activation": "silu", "up": "linear", "up_conv": False},
    {"norm": "none", "down": "strided", "classes": 2, "in_channels": 3},
])  # fmt: skip
def test_resuming_is_exact_for_other_networks(tmp_path, discs, monkeypatch, network):
    for file in (discs / "labels").iterdir():
        Image.fromarray((np.asarray(Image.open(file)) > 0).astype(np.uint8)).save(file)
    same = recipe(epochs=2, network=network, learning_rate=1e-3)
    train.train(same, discs, tmp_path / "a")
    with monkeypatch.context() as patch:
        interrupted_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train.train(same, discs, tmp_path / "b")
    train.train(same, discs, tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_resuming_is_exact_with_an_average_objects_and_large_tiles(tmp_path, halves_kept, monkeypatch):
    same = recipe(
        epochs=3,
        network={"objects": ("distance",)},
        data={
            "large_tile": 32,
            "small_object_weight": 2.0,
            "grid_distortion": 0.5,
            "colour": 0.5,
            "tiles_per_image": 4,
        },
        ema_decay=0.9,
    )
    train.train(same, halves_kept, tmp_path / "a")
    with monkeypatch.context() as patch:
        interrupted_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train.train(same, halves_kept, tmp_path / "b")
    torch.manual_seed(99)
    train.train(same, halves_kept, tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("victim", ["save_state", "log"])
def test_a_kill_between_the_files_of_the_last_epoch_loses_nothing(
    tmp_path, discs_kept, finished, monkeypatch, victim
):
    same, out = recipe(schedule="one-cycle", weight_decay=1e-2), tmp_path / "run"
    name = {"save_state": "_save_state", "log": "_write_log"}[victim]
    write, calls = getattr(train, name), [0]

    def killed(*args):
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, name, killed)
        with pytest.raises(KeyboardInterrupt):
            train.train(same, discs_kept, out)
    train.train(same, discs_kept, out)
    assert_same_run(out, finished)


def test_a_killed_process_goes_on(tmp_path, discs_kept, finished):
    """SIGKILL, without any chance to clean up."""
    out = tmp_path / "run"
    (tmp_path / "recipe.json").write_text(recipe(schedule="one-cycle", weight_decay=1e-2).model_dump_json())
    code = (
        "import sys; from pathlib import Path; from model.train import TrainConfig, train\n"
        "data, out, recipe = map(Path, sys.argv[1:])\n"
        "train(TrainConfig.model_validate_json(recipe.read_text()), data, out)"
    )
    command = [sys.executable, "-c", code, str(discs_kept), str(out), str(tmp_path / "recipe.json")]
    # As many threads as here, because sums depend on it.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # noqa: TID251 - of a child
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=environment)
    while not (out / "last.safetensors").exists():
        assert process.poll() is None, "the run ended before its first epoch"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    train.train(recipe(schedule="one-cycle", weight_decay=1e-2), discs_kept, out)
    assert_same_run(out, finished)


def test_a_finished_run_is_left_as_it_is(finished, discs_kept):
    before = {p.name: p.read_bytes() for p in finished.iterdir() if p.suffix != ".png"}
    assert (
        train.train(recipe(schedule="one-cycle", weight_decay=1e-2), discs_kept, finished)
        == finished / "best.safetensors"
    )
    assert {p.name: p.read_bytes() for p in finished.iterdir() if p.suffix != ".png"} == before


def test_another_recipe_is_not_resumed(finished, discs_kept):
    before = {p.name: p.read_bytes() for p in finished.iterdir()}
    with pytest.raises(RecipeError, match=r"holds a run of another recipe.*another --out"):
        train.train(recipe(schedule="one-cycle", weight_decay=1e-3), discs_kept, finished)
    assert {p.name: p.read_bytes() for p in finished.iterdir()} == before


def test_a_run_goes_on_with_another_number_of_epochs(tmp_path, discs_kept, finished):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    longer = recipe(schedule="one-cycle", weight_decay=1e-2, epochs=5)
    train.train(longer, discs_kept, out)
    assert [row["epoch"] for row in rows_of(out)] == [1, 2, 3, 4, 5]
    assert rows_of(out)[:4] == rows_of(finished)


@pytest.mark.parametrize("content", ["bytes", "checkpoint"])
def test_a_last_file_that_is_none(tmp_path, discs_kept, finished, content):
    data = b"damaged" if content == "bytes" else (finished / "best.safetensors").read_bytes()
    (tmp_path / "last.safetensors").write_bytes(data)
    with pytest.raises(RecipeError, match=r"last\.safetensors: no run can be resumed from it"):
        train.train(recipe(), discs_kept, tmp_path)
