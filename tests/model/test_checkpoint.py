"""Weights and configuration in one file: what goes in comes out, and nothing else is accepted."""

import json
import pickle  # noqa: TID251 - to show that it is refused

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import save_file

from model import checkpoint
from model.baselines import ARCHITECTURES, UNet
from model.checkpoint import FORMAT, CheckpointError
from model.config import UNetPlusPlusConfig
from model.network import UNetPlusPlus


@pytest.fixture
def network():
    torch.manual_seed(0)
    return UNetPlusPlus(UNetPlusPlusConfig(widths=(2, 3, 4), norm="batch")).eval()


configs = st.builds(
    UNetPlusPlusConfig,
    dims=st.sampled_from([2, 3]),
    in_channels=st.integers(1, 3),
    classes=st.integers(1, 3),
    widths=st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple),
    convs_per_node=st.integers(1, 2),
    norm=st.sampled_from(["none", "batch", "instance"]),
    activation=st.sampled_from(["relu", "leaky_relu", "elu", "silu"]),
    down=st.sampled_from(["maxpool", "strided"]),
    up=st.sampled_from(["transposed", "linear", "nearest"]),
    up_conv=st.booleans(),
    deep_supervision=st.booleans(),
)
notes = st.dictionaries(
    st.text(), st.none() | st.integers() | st.floats(allow_nan=False) | st.text() | st.lists(st.booleans())
)


@settings(deadline=None, max_examples=30)
@given(config=configs, architecture=st.sampled_from(sorted(ARCHITECTURES)), notes=notes)
def test_round_trip(tmp_path_factory, config, architecture, notes):
    path = tmp_path_factory.getbasetemp() / "round_trip.safetensors"
    network = ARCHITECTURES[architecture](config)
    checkpoint.save(network, path, notes)
    again, read = checkpoint.load(path)
    assert type(again) is ARCHITECTURES[architecture]
    assert again.config == network.config
    assert read == notes
    assert not again.training
    expected = network.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.dtype == expected[name].dtype
    image = torch.randn(1, config.in_channels, *[2 ** (config.depth + 1)] * config.dims)
    with torch.no_grad():
        for a, b in zip(network.eval()(image), again(image), strict=True):
            assert torch.equal(a, b)


def test_metadata(network, tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(network, path, {"epoch": 3})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == FORMAT == "unetpp.checkpoint/1"
    assert metadata["architecture"] == "unetpp"
    assert UNetPlusPlusConfig.model_validate_json(metadata["config"]) == network.config
    assert json.loads(metadata["notes"]) == {"epoch": 3}


def test_half_precision_is_read_as_float32(network, tmp_path):
    checkpoint.save(network.half(), tmp_path / "half.safetensors")
    again, _ = checkpoint.load(tmp_path / "half.safetensors")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert again.state_dict()["nodes.0_0.1.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(again.nodes["0_0"][0].weight, network.nodes["0_0"][0].weight.float())


def test_channels_last_weights_come_back_in_place(network, tmp_path):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    checkpoint.save(network.to(memory_format=torch.channels_last), tmp_path / "a.safetensors")
    for name, tensor in checkpoint.load(tmp_path / "a.safetensors")[0].state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.is_contiguous()


def test_what_was_loaded_can_be_trained_and_saved(network, tmp_path):
    checkpoint.save(network, tmp_path / "a.safetensors")
    again, _ = checkpoint.load(tmp_path / "a.safetensors")
    again.train()(torch.randn(2, 1, 8, 8))[0].sum().backward()
    checkpoint.save(again, tmp_path / "a.safetensors")


# --- atomic ---


def test_a_failing_write_leaves_the_old_file_and_nothing_else(network, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    checkpoint.save(network, path)
    before = path.read_bytes()

    def half_way(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", half_way)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(network, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "a"
    with checkpoint.atomic(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
    # A service runs as another user than the training.
    assert path.stat().st_mode & 0o444 == 0o444


def test_an_interrupt_cleans_up_too(tmp_path):
    def write():
        with checkpoint.atomic(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


# --- what is refused ---


def refused(path, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / "none.safetensors", "not a readable safetensors file")
    refused(tmp_path, "not a readable safetensors file")


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\x00" * 100, b"\x08" + b"\x00" * 7 + b"not json", b"\xff" * 64]
)
def test_not_safetensors(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    refused(path, "not a readable safetensors file")


def test_truncated(network, tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(network, path)
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, "not a readable safetensors file")


def test_no_pickle_is_accepted_nor_executed(network, tmp_path):
    class Payload:
        def __reduce__(self):
            return ((tmp_path / "executed").touch, ())

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Payload()))
    torch.save(network.state_dict(), tmp_path / "state.pt")
    torch.save(network.state_dict(), tmp_path / "renamed.safetensors")
    for name in ("evil.pkl", "state.pt", "renamed.safetensors"):
        refused(tmp_path / name, "not a readable safetensors file")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"format": "unetpp.checkpoint/2"}])
def test_foreign_safetensors(tmp_path, metadata):
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata)
    refused(path, "not a UNet\\+\\+ checkpoint")


def rewritten(network, path, tensors=None, **metadata):
    base = checkpoint.metadata_of(network) | metadata
    save_file(
        network.state_dict() if tensors is None else tensors,
        path,
        {k: v for k, v in base.items() if v is not None},
    )
    return path


def test_tensors_that_do_not_fit(network, tmp_path):
    state = network.state_dict()
    path = tmp_path / "a.safetensors"
    name = "nodes.0_0.0.weight"
    refused(
        rewritten(network, path, {k: v for k, v in state.items() if k != name}),
        f"do not fit.*[\\s\\S]*{name}",
    )
    refused(rewritten(network, path, state | {name: torch.zeros(1, 2, 3, 4)}), f"do not fit[\\s\\S]*{name}")
    refused(rewritten(network, path, state | {"extra": torch.zeros(1)}), "do not fit[\\s\\S]*extra")


@pytest.mark.parametrize("metadata", [
    {"config": None},
    {"config": "{}{"},
    {"config": '{"widths": [2]}'},
    {"config": '{"widths": [2, 3, 4], "from_the_future": 1}'},
    {"architecture": None},
    {"architecture": "unet3+"},
    {"notes": "{"},
])  # fmt: skip
def test_damaged_metadata_is_a_checkpoint_error(network, tmp_path, metadata):
    refused(rewritten(network, tmp_path / "a.safetensors", **metadata), "metadata")


def test_only_our_networks_are_saved(tmp_path):
    with pytest.raises((TypeError, AttributeError)):
        checkpoint.save(torch.nn.Conv2d(1, 1, 1), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_unet_is_named(tmp_path):
    checkpoint.save(UNet(UNetPlusPlusConfig(widths=(2, 3))), tmp_path / "a.safetensors")
    assert isinstance(checkpoint.load(tmp_path / "a.safetensors")[0], UNet)
