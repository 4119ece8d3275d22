"""The training loop on tiny discs and balls: it learns, refuses what cannot work, and measures as by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from model import checkpoint, train
from model.baselines import ARCHITECTURES, UNet
from model.config import UNetPlusPlusConfig
from model.data import Split
from model.network import UNetPlusPlus
from model.reading import DataError, read_index
from model.recipe import OptimisationConfig, RecipeError, TrainConfig, read_recipe
from model.train import learning_rate
from tests.model.runs import VOLUMES, assert_same_run, recipe, rows_of, volume_recipe

pytestmark = pytest.mark.filterwarnings("ignore:Num foregrounds:UserWarning")


# --- a run ---


def test_the_loss_falls_and_discs_are_found(tmp_path, discs_kept):
    wanted = recipe(
        epochs=10, learning_rate=3e-2, schedule="one-cycle", data={"tile": 32, "invert": 0, "scale": 0.1}
    )
    best = train.train(wanted, discs_kept, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert [row["epoch"] for row in rows] == list(range(1, 11))
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert max(row["dice_accurate"] for row in rows) > 0.9
    assert best == tmp_path / "run" / "best.safetensors"


def test_what_a_run_writes(finished):
    assert {p.name for p in finished.iterdir()} == {
        "best.safetensors",
        "last.safetensors",
        "log.csv",
        "curve.png",
        "recipe.json",
    }
    assert TrainConfig.model_validate_json((finished / "recipe.json").read_text()) == recipe(
        schedule="one-cycle", weight_decay=1e-2
    )
    with Image.open(finished / "curve.png") as curve:
        assert curve.format == "PNG"
    rows = rows_of(finished)
    assert list(rows[0]) == ["epoch", "loss", "dice_L1", "dice_L2", "dice_accurate"]
    assert all(0 <= row[name] <= 1 for row in rows for name in row if name.startswith("dice"))


def test_best_is_the_best_epoch(finished, discs_kept):
    rows = rows_of(finished)
    best = max(rows, key=lambda row: (row["dice_accurate"], -row["epoch"]))
    network, notes = checkpoint.load(finished / "best.safetensors")
    assert notes["epoch"] == best["epoch"]
    assert notes["validation"] == {name: best[name] for name in best if name.startswith("dice")}
    assert TrainConfig.model_validate(notes["recipe"]) == recipe(schedule="one-cycle", weight_decay=1e-2)
    # The checkpoint alone gives the logged scores again.
    split = Split("val", read_index(discs_kept)["val"], 1, 1)
    again = train.evaluate(network, split, torch.device("cpu"), "fp32")
    assert again == pytest.approx(notes["validation"], abs=1e-3)


def test_a_run_repeats_itself(tmp_path, discs_kept, finished):
    train.train(recipe(schedule="one-cycle", weight_decay=1e-2), discs_kept, tmp_path / "again")
    assert_same_run(tmp_path / "again", finished)


def test_loader_processes_draw_the_same(tmp_path, discs_kept):
    for workers in (0, 2):
        train.train(recipe(epochs=1, workers=workers), discs_kept, tmp_path / str(workers))
    one, other = (load_file(tmp_path / str(w) / "last.safetensors") for w in (0, 2))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_unet_trains_the_same_way(tmp_path, discs_kept):
    best = train.train(recipe(epochs=1, architecture="unet"), discs_kept, tmp_path)
    assert isinstance(checkpoint.load(best)[0], UNet)
    assert list(rows_of(tmp_path)[0]) == ["epoch", "loss", "dice_L2", "dice_accurate"]


def test_several_classes_and_bfloat16(tmp_path, discs):
    for file in (discs / "labels").iterdir():
        label = (np.asarray(Image.open(file)) > 0).astype(np.uint8)
        label[:, 16:] *= 2
        Image.fromarray(label).save(file)
    train.train(recipe(epochs=2, network={"classes": 3}, precision="bf16"), discs, tmp_path / "run")
    assert checkpoint.load(tmp_path / "run" / "best.safetensors")[0].config.classes == 3
    assert np.isfinite([row["loss"] for row in rows_of(tmp_path / "run")]).all()


# --- volumes ---


@pytest.mark.parametrize("architecture", ["unetpp", "unet"])
def test_a_run_on_volumes(tmp_path, balls_kept, architecture):
    wanted = volume_recipe(architecture=architecture, precision="bf16", data={"spacing": (1.5, 1.0, 1.0)})
    best = train.train(wanted, balls_kept, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "best.safetensors",
        "last.safetensors",
        "log.csv",
        "curve.png",
        "recipe.json",
    }
    rows = rows_of(tmp_path)
    levels = ["dice_L1", "dice_L2"] if architecture == "unetpp" else ["dice_L2"]
    assert list(rows[0]) == ["epoch", "loss", *levels, "dice_accurate"]
    assert np.isfinite([row["loss"] for row in rows]).all()
    network, notes = checkpoint.load(best)
    assert (network.config.dims, network.config.classes) == (3, 3)
    assert TrainConfig.model_validate(notes["recipe"]) == wanted
    # The checkpoint alone gives the logged scores again; the sides of these volumes are no multiples of 4.
    split = Split("val", read_index(balls_kept, 3)["val"], 1, 3, dims=3, spacing=(1.5, 1.0, 1.0))
    assert any(side % 4 for side in split.images[0].shape[1:])
    again = train.evaluate(network, split, torch.device("cpu"), "fp32")
    assert again == pytest.approx(notes["validation"], abs=2e-2)


def test_balls_are_found_and_their_halves_told_apart(tmp_path, balls_kept):
    wanted = volume_recipe(
        epochs=8,
        learning_rate=3e-2,
        schedule="one-cycle",
        network={"widths": (4, 6, 8)},
        data={"invert": 0, "scale": 0.1, "rotate_degrees": 10},
    )
    train.train(wanted, balls_kept, tmp_path)
    rows = rows_of(tmp_path)
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    # Halves that are not told apart give 2/3 at most.
    assert max(row["dice_accurate"] for row in rows) > 0.75


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CPUs only")
@pytest.mark.parametrize(("architecture", "deepest"), [("unetpp", "nodes.2_0."), ("unet", "encoder.2.")])
def test_the_deepest_row_trains_in_fp32(tmp_path, balls_kept, monkeypatch, architecture, deepest):
    seen = {}

    def watched(config):
        network = ARCHITECTURES[architecture](config)
        for name, module in network.named_modules():
            if isinstance(module, torch.nn.Conv3d | torch.nn.ConvTranspose3d):
                module.register_forward_hook(
                    lambda _, __, out, name=name: seen.setdefault(name, set()).add(out.dtype)
                )
        return network

    monkeypatch.setattr(train, "ARCHITECTURES", {architecture: watched})
    train.train(volume_recipe(epochs=1, architecture=architecture, precision="bf16"), balls_kept, tmp_path)
    in_fp32 = {name for name, dtypes in seen.items() if dtypes == {torch.float32}}
    assert in_fp32 == {f"{deepest}0", f"{deepest}3"}
    assert all(dtypes == {torch.bfloat16} for name, dtypes in seen.items() if name not in in_fp32)
    assert len(seen) > 8


def test_the_shared_volumes_are_trained_on(tmp_path, hippocampus_data):
    rows = (hippocampus_data / "index.csv").read_text().splitlines()
    of = {split: [row for row in rows if row.endswith(f",{split}")] for split in ("train", "val")}
    (tmp_path / "index.csv").write_text("\n".join([rows[0], *of["train"][:2], *of["val"][:1]]) + "\n")
    for folder in ("images", "labels"):
        (tmp_path / folder).symlink_to(hippocampus_data / folder)
    small = [
        "network.widths=[2, 3, 4]",
        "data.tiles_per_image=1",
        "optimisation.batch=2",
        "optimisation.epochs=1",
        "optimisation.workers=0",
    ]
    train.train(read_recipe(VOLUMES, small), tmp_path, tmp_path / "run")
    assert np.isfinite(rows_of(tmp_path / "run")[0]["loss"])


# --- early stop ---


def test_early_stop(tmp_path, discs_kept, monkeypatch):
    scores = iter([0.5, 0.7, 0.7, 0.6, 0.9])
    monkeypatch.setattr(
        train, "evaluate", lambda *args: {"dice_L1": 0.0, "dice_L2": 0.0, "dice_accurate": next(scores)}
    )
    out = tmp_path / "run"
    train.train(recipe(epochs=9, patience=2), discs_kept, out)
    # The best was epoch 2; 3 equals it, which is no improvement, and 4 is worse: stop.
    assert [row["dice_accurate"] for row in rows_of(out)] == [0.5, 0.7, 0.7, 0.6]
    assert checkpoint.load(out / "best.safetensors")[1]["epoch"] == 2
    train.train(recipe(epochs=9, patience=2), discs_kept, out)
    assert len(rows_of(out)) == 4


# --- what is refused before the first step ---


@pytest.fixture
def no_step(monkeypatch):
    def step(*args):
        raise AssertionError("a step was made")

    monkeypatch.setattr(train, "deep_supervision_loss", step)


@pytest.mark.usefixtures("no_step")
class TestRefused:
    def test_bad_data(self, discs, tmp_path):
        (discs / "images" / "val1.png").write_bytes(b"")
        with pytest.raises(DataError, match=r"val1\.png"):
            train.train(recipe(), discs, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_no_validation_data(self, discs, tmp_path):
        (discs / "index.csv").write_text("id,split\ntrain0,train\n")
        with pytest.raises(DataError, match="'val' has no samples"):
            train.train(recipe(), discs, tmp_path / "run")

    def test_images_for_a_network_of_volumes_and_the_other_way_round(self, discs_kept, balls_kept, tmp_path):
        with pytest.raises(DataError, match="12 files named"):
            train.train(volume_recipe(), discs_kept, tmp_path / "run")
        with pytest.raises(DataError, match="12 files named"):
            train.train(recipe(), balls_kept, tmp_path / "run")

    @pytest.mark.parametrize(("wanted", "match"), [
        (volume_recipe(network={"in_channels": 3}), r"network\.in_channels: volumes have one channel, the network 3"),
        (volume_recipe(data={"tile": (16, 16)}), r"data\.tile: \[16, 16\] has 2 axes, the network 3"),
        (recipe(data={"tile": (16, 16, 16)}), r"data\.tile: \[16, 16, 16\] has 3 axes, the network 2"),
        (volume_recipe(data={"tile": (16, 16, 18)}), r"data\.tile: 18 is not a multiple of 4, which a network of depth 2 needs"),
        (volume_recipe(data={"tile": (16, 0, 16)}), r"data\.tile: 0 is not a multiple of 4"),
        (volume_recipe(data={"tile": 18}), r"data\.tile: 18 is not a multiple of 4"),
        (recipe(data={"tile": 18}), r"data\.tile.*18.*multiple of 4"),
        (volume_recipe(data={"flip": (0, 3)}), r"data\.flip: there is no axis 3 in 3 dimensions; axes count from 0"),
        (volume_recipe(data={"flip": (-1,)}), r"data\.flip: there is no axis -1 in 3 dimensions"),
        (recipe(data={"flip": (2,)}), r"data\.flip: there is no axis 2 in 2 dimensions"),
        (volume_recipe(data={"tile": (16, 32, 16), "rotate90": True}),
         r"data\.rotate90: no quarter turns where the first two sides of data\.tile differ, 16 and 32"),
        (recipe(data={"tile": (16, 32)}), r"data\.rotate90: no quarter turns"),
        (recipe(data={"large_tile": 18}), r"data\.large_tile: 18 is smaller than data\.tile, or no multiple of 4"),
        (recipe(data={"tile": 32, "large_tile": 16}), r"data\.large_tile: 16 is smaller than data\.tile"),
        (recipe(network={"classes": 3}, data={"small_object_weight": 2.0}), r"data\.small_object_weight needs a network of one class"),
        (recipe(network={"classes": 3}, data={"touching_weight": 2.0}), r"data\.touching_weight needs a network of one class"),
        (volume_recipe(data={"small_object_weight": 2.0}), r"data\.small_object_weight needs a network of one class, this one has 3"),
    ])  # fmt: skip
    def test_recipes_whose_network_and_tiles_do_not_fit(
        self, discs_kept, balls_kept, tmp_path, wanted, match
    ):
        with pytest.raises(RecipeError, match=match):
            train.train(wanted, balls_kept if wanted.network.dims == 3 else discs_kept, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_an_epoch_of_large_tiles_without_a_batch(self, discs_kept, tmp_path):
        wanted = recipe(batch=16, data={"large_tile": 64, "tiles_per_image": 1})
        with pytest.raises(DataError, match="a batch of 16 tiles is more than one epoch holds"):
            train.train(wanted, discs_kept, tmp_path / "run")
        wanted = recipe(batch=4, data={"large_tile": 64, "tiles_per_image": 1})
        with pytest.raises(DataError, match="a batch of 1 tiles is more than one epoch holds"):
            train.train(wanted, discs_kept, tmp_path / "run")

    def test_labels_that_number_no_objects(self, discs_kept, tmp_path):
        for wanted in (
            recipe(network={"objects": ("distance",)}),
            recipe(data={"small_object_weight": 2.0}),
            recipe(data={"touching_weight": 2.0}),
        ):
            with pytest.raises(
                DataError, match=r"numbers more than one object.*are these maps of object numbers"
            ):
                train.train(wanted, discs_kept, tmp_path / "run")

    def test_a_batch_larger_than_an_epoch(self, discs_kept, tmp_path):
        with pytest.raises(DataError, match="a batch of 17 tiles is more than one epoch holds"):
            train.train(recipe(batch=17), discs_kept, tmp_path / "run")


# --- average and channels of objects ---


def test_the_kept_weights_are_the_moving_average_of_those_of_the_steps(tmp_path, discs_kept, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def observed(self):
        step(self)
        seen.append(self.param_groups[0]["params"][0].detach().clone())

    monkeypatch.setattr(torch.optim.AdamW, "step", observed)
    train.train(recipe(epochs=1, ema_decay=0.5), discs_kept, tmp_path)
    expected = seen[0]
    for weights in seen[1:]:
        expected = 0.5 * expected + 0.5 * weights
    kept, _ = checkpoint.load(tmp_path / "best.safetensors")
    torch.testing.assert_close(next(kept.parameters()).detach(), expected)
    assert not torch.equal(expected, seen[-1])


def test_volumes_have_an_average_whose_deepest_node_is_its_own(tmp_path, balls_kept, monkeypatch):
    seen = []
    measure = train.evaluate

    def observed(network, *rest):
        seen.append(network)
        return measure(network, *rest)

    monkeypatch.setattr(train, "evaluate", observed)
    train.train(volume_recipe(epochs=1, ema_decay=0.5), balls_kept, tmp_path)
    kept, _ = checkpoint.load(tmp_path / "best.safetensors")
    [network] = seen
    # The one that was measured answers as its weights do, in every node.
    with torch.no_grad():
        network.eval()
        for a, b in zip(
            network(torch.ones(1, 1, 16, 16, 16)), kept(torch.ones(1, 1, 16, 16, 16)), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_a_channel_of_objects_is_learnt_beside_the_class(tmp_path, halves_kept):
    options = recipe(epochs=6, network={"objects": ("distance",)}, data={"invert": 0.0})
    train.train(options, halves_kept, tmp_path)
    network, _ = checkpoint.load(tmp_path / "best.safetensors")
    split = Split("val", read_index(halves_kept)["val"], 1, 1)
    score = torch.sigmoid(network(torch.from_numpy(split.images[0])[None])[-1])[0]
    assert score.shape == (2, 32, 32)
    label = torch.from_numpy(split.labels[0])
    assert score[1][label == 1].mean() > score[1][label == 0].mean() + 0.1


def test_channels_of_objects_need_one_class():
    with pytest.raises(ValueError, match="objects needs a network of one class, this one has 3"):
        UNetPlusPlusConfig(classes=3, objects=("distance",))


# --- learning rate ---


def test_constant():
    options = OptimisationConfig(learning_rate=0.2)
    assert {learning_rate(options, step, 50) for step in range(50)} == {0.2}


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 100, 1234])
def test_one_cycle(steps):
    options = OptimisationConfig(learning_rate=0.2, schedule="one-cycle")
    rates = [learning_rate(options, step, steps) for step in range(steps)]
    warm_up = max(steps // 10, 1)
    assert all(0 < rate <= 0.2 + 1e-12 for rate in rates)
    # Linear up to the full rate, never zero at the first step.
    np.testing.assert_allclose(rates[:warm_up], [0.2 * (n + 1) / warm_up for n in range(warm_up)])
    assert rates[warm_up:] == sorted(rates[warm_up:], reverse=True)
    if steps >= 100:
        assert rates[warm_up] == 0.2
        assert rates[(steps + warm_up) // 2] == pytest.approx(0.1, rel=0.02)
        assert rates[-1] < 0.2 * 1e-3


def test_the_run_follows_the_schedule(tmp_path, discs_kept, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (seen.append(self.param_groups[0]["lr"]), step(self))
    )
    options = recipe(epochs=3, schedule="one-cycle")
    train.train(options, discs_kept, tmp_path)
    # 4 images x 4 tiles in batches of 4: four steps in each of three epochs.
    assert seen == [learning_rate(options.optimisation, n, 12) for n in range(12)]


# --- evaluation ---


def constant_network(probability, classes=1):
    network = UNetPlusPlus(UNetPlusPlusConfig(widths=(2, 3), classes=classes)).eval()
    for parameter in network.parameters():
        parameter.data.zero_()
    network.heads["1"].bias.data[-1] = float(np.log(probability / (1 - probability)))
    return network


def labelled_split(*labels):
    split = object.__new__(Split)
    split.labels = [np.asarray(label, np.uint8) for label in labels]
    split.images = [np.zeros((1, *label.shape), np.float32) for label in split.labels]
    return split


def test_dice_by_hand():
    full, empty = np.ones((5, 7)), np.zeros((5, 7))
    quarter = np.zeros((8, 8))
    quarter[:4, :4] = 1
    cpu = torch.device("cpu")
    # Everything foreground: Dice is 1, 0 and 2 * 16 / (64 + 16) = 0.4. An odd size is padded, and cropped
    # again.
    scores = train.evaluate(constant_network(0.9), labelled_split(full, empty, quarter), cpu, "fp32")
    assert scores == {"dice_L1": pytest.approx(1.4 / 3), "dice_accurate": pytest.approx(1.4 / 3)}
    # Nothing foreground: 0, both empty counts 1, 0.
    scores = train.evaluate(constant_network(0.1), labelled_split(full, empty, quarter), cpu, "fp32")
    assert scores["dice_accurate"] == pytest.approx(1 / 3)


def test_dice_of_several_classes_leaves_the_background_out():
    label = np.zeros((8, 8))
    label[:4] = 2
    # Class 2 everywhere: Dice of class 2 is 2 * 32 / (64 + 32) = 2/3, of class 1 (in neither) 1.
    scores = train.evaluate(
        constant_network(0.9, classes=3), labelled_split(label), torch.device("cpu"), "fp32"
    )
    assert scores["dice_L1"] == pytest.approx((2 / 3 + 1) / 2)


def test_accurate_is_the_mean_of_the_probabilities_not_of_the_masks():
    network = UNetPlusPlus(UNetPlusPlusConfig(widths=(2, 3, 4))).eval()
    for parameter in network.parameters():
        parameter.data.zero_()
    # Heads say 0.4 and 0.7: the mean 0.55 is foreground, though one head is not.
    for head, probability in zip(network.heads.values(), (0.4, 0.7), strict=True):
        head.bias.data.fill_(float(np.log(probability / (1 - probability))))
    scores = train.evaluate(network, labelled_split(np.ones((4, 4))), torch.device("cpu"), "fp32")
    assert scores == {"dice_L1": 0, "dice_L2": 1, "dice_accurate": 1}
