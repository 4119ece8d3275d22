"""Training that begins from given weights."""

import pytest
import torch

from export.graph import fold_batch_norm, round_to_fp16
from model import checkpoint, train
from model.baselines import UNet
from model.config import UNetPlusPlusConfig
from model.network import UNetPlusPlus
from model.recipe import RecipeError
from model.start import begin_from
from server.runtime.bundle import sha256
from tests.model.runs import recipe

pytestmark = pytest.mark.filterwarnings("ignore:Num foregrounds:UserWarning")
CONFIG = UNetPlusPlusConfig(widths=(4, 6, 8), norm="batch", convs_per_node=2)


def trained(path, network):
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.normal_(module.bias)
            torch.nn.init.normal_(module.running_mean)
    checkpoint.save(network.eval(), path)
    return network


def test_a_checkpoint_is_taken_over_to_the_bit(tmp_path):
    source = trained(tmp_path / "a.safetensors", UNetPlusPlus(CONFIG))
    network = UNetPlusPlus(CONFIG)
    begin_from(tmp_path / "a.safetensors", network, torch.zeros(1, 1, 8, 8))
    for name, tensor in source.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name


@pytest.mark.parametrize("convolutions", [1, 2])
def test_weights_of_a_bundle_give_the_same_answer_with_normalisation(tmp_path, convolutions):
    config = CONFIG.model_copy(update={"convs_per_node": convolutions, "up": "linear"})
    folded = round_to_fp16(fold_batch_norm(trained(tmp_path / "b.safetensors", UNetPlusPlus(config))))
    checkpoint.save(folded, tmp_path / "folded.safetensors")
    network = UNetPlusPlus(config.model_copy(update={"objects": ("distance",)}))
    images = torch.randn(3, 1, 16, 16)
    begin_from(tmp_path / "folded.safetensors", network, images)
    with torch.no_grad():
        for mine, theirs in zip(network(images), folded(images), strict=True):
            torch.testing.assert_close(mine[:, :1], theirs, atol=1e-4, rtol=1e-4)
            assert mine.shape[1] == 2


def test_another_network_is_refused(tmp_path):
    checkpoint.save(UNetPlusPlus(CONFIG), tmp_path / "a.safetensors")
    for network in (UNetPlusPlus(CONFIG.model_copy(update={"widths": (4, 6)})), UNet(CONFIG)):
        with pytest.raises(RecipeError, match="only classes and objects may differ"):
            begin_from(tmp_path / "a.safetensors", network, torch.zeros(1, 1, 8, 8))
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(RecipeError, match="not a readable safetensors file"):
        begin_from(tmp_path / "no.safetensors", UNetPlusPlus(CONFIG), torch.zeros(1, 1, 8, 8))


def test_a_run_begins_there_and_resumes_without(tmp_path, discs_kept):
    train.train(recipe(epochs=2), discs_kept, tmp_path / "first")
    weights = tmp_path / "first" / "best.safetensors"
    options = recipe(epochs=1, learning_rate=1e-9)
    train.train(options, discs_kept, tmp_path / "second", weights=weights)
    before, _ = checkpoint.load(weights)
    after, _ = checkpoint.load(tmp_path / "second" / "best.safetensors")
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert checkpoint.load(tmp_path / "second" / "best.safetensors")[1]["start"] == sha256(weights)
    # The run that is found goes on, with the weights named or not, and from no others.
    longer = recipe(epochs=2, learning_rate=1e-9)
    with pytest.raises(RecipeError, match="did not begin from"):
        train.train(longer, discs_kept, tmp_path / "second", weights=tmp_path / "first" / "last.safetensors")
    train.train(longer, discs_kept, tmp_path / "second")


def test_channels_that_mean_something_else_keep_their_random_ones(tmp_path):
    source = UNetPlusPlus(CONFIG.model_copy(update={"objects": ("distance",)}))
    checkpoint.save(source, tmp_path / "a.safetensors")
    for changes, same in (
        ({"classes": 3, "objects": ()}, 0),
        ({"objects": ("boundary",)}, 1),
        ({}, 2),
        ({"objects": ()}, 1),
    ):
        network = UNetPlusPlus(CONFIG.model_copy(update={"objects": ("distance",)} | changes))
        begin_from(tmp_path / "a.safetensors", network, torch.zeros(1, 1, 8, 8))
        mine, theirs = network.heads["1"].weight, source.heads["1"].weight
        assert torch.equal(mine[:same], theirs[:same])
        assert not any(torch.equal(one, other) for one in mine[same:] for other in theirs)
