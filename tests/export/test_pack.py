"""Writing a bundle: what is refused, and that a failure leaves the old bundle as it was."""

import json
from pathlib import Path

import onnx
import pytest
import torch

from export import pack
from export.pack import ExportError, add_uncertainty, export, read_card, write_manifest
from export.verify import verify
from model import checkpoint
from model.baselines import UNet
from model.checkpoint import CheckpointError
from model.config import UNetPlusPlusConfig
from server.errors import BundleDamaged
from server.runtime.bundle import Class, Window, read_bundle


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_files_of_a_bundle(small_kept, small_checkpoint):
    names = {f"{graph}{suffix}.onnx" for graph in ("L1", "L2", "accurate") for suffix in ("", ".fp16", ".int8")}
    assert set(content(small_kept)) == names | {"head_std.onnx", "weights.safetensors", "golden.npz", "manifest.json"}
    manifest = read_bundle(small_kept).manifest
    assert manifest.name == "small"
    assert manifest.graph_precisions == ("fp32", "fp16", "int8")
    assert (manifest.normalization, manifest.activation, manifest.dims) == ("zscore", "sigmoid", 2)
    assert manifest.calibration is manifest.held_out is None
    # Nothing is left beside it, and whoever serves may read it.
    assert list(small_kept.parent.iterdir()) == [small_kept]
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in small_kept.iterdir())
    # The trained notes travel along.
    assert checkpoint.load(small_kept / "weights.safetensors")[1] == {"trained": {"epoch": 7}}


def test_the_checkpoint_is_left_alone(small_checkpoint):
    assert checkpoint.load(small_checkpoint)[0].config.norm == "batch"


@pytest.fixture
def exported(small_checkpoint, card, small_bundle):
    """A function that exports over an existing bundle and checks that a failure leaves no trace."""
    before = content(small_bundle.folder)

    def failing(error, match, source=small_checkpoint, card=card, data=None):
        with pytest.raises(error, match=match):
            export(source, card, small_bundle.folder, data)
        assert content(small_bundle.folder) == before
        assert list(small_bundle.folder.parent.glob(".small*")) == []

    return failing


@pytest.mark.parametrize("victim", ["write_golden", "write_manifest", "read_bundle", "point_at_weights"])
def test_a_failed_export_leaves_the_bundle_untouched(exported, monkeypatch, victim):
    class Enough(Exception):
        pass

    def fail(*args):
        raise Enough("no space")

    # The graphs themselves are not at stake: one that is there already will do.
    monkeypatch.setattr(pack, "GRAPH_PRECISIONS", dict.fromkeys(("fp32", "fp16"), lambda graph, tiles: torch_free_proto()))
    monkeypatch.setattr(pack, victim, fail)
    exported(Enough, "no space")


def torch_free_proto():
    from onnx import helper

    return helper.make_model(helper.make_graph([], "empty", [], []))


def test_a_new_bundle_replaces_the_old_one_whole(small_checkpoint, card, small_bundle, monkeypatch):
    monkeypatch.setattr(pack, "GRAPH_PRECISIONS", dict.fromkeys(("fp32", "fp16"), lambda graph, tiles: torch_free_proto()))
    steps = []
    bundle = export(small_checkpoint, card.model_copy(update={"title": "new"}), small_bundle.folder, None, steps.append)
    assert bundle.folder == small_bundle.folder
    assert read_bundle(small_bundle.folder).manifest.title == "new"
    # No int8 without data, and no files left of the bundle before.
    assert not [name for name in content(small_bundle.folder) if "int8" in name]
    assert [p.name for p in small_bundle.folder.parent.iterdir()] == ["small"]
    assert steps == ["L1.onnx", "L1.fp16.onnx", "L2.onnx", "L2.fp16.onnx", "accurate.onnx", "accurate.fp16.onnx", "head_std.onnx"]


def test_a_failing_rename_puts_the_old_bundle_back(exported, small_bundle, monkeypatch):
    out, rename = small_bundle.folder, Path.rename

    def fail(self, target):
        if (self.name, target) == (out.name, out):
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(pack, "GRAPH_PRECISIONS", dict.fromkeys(("fp32", "fp16"), lambda graph, tiles: torch_free_proto()))
    monkeypatch.setattr(Path, "rename", fail)
    exported(OSError, "no space")


def test_a_unet_is_refused(exported, tmp_path):
    checkpoint.save(UNet(UNetPlusPlusConfig(in_channels=3, widths=(2, 3))), tmp_path / "unet.safetensors")
    exported(ExportError, r"unet\.safetensors holds a UNet; only UNet\+\+", source=tmp_path / "unet.safetensors")


def test_a_bundle_for_volumes_says_where_its_axes_point(volume_kept):
    manifest = read_bundle(volume_kept).manifest
    assert (manifest.dims, manifest.orientation, manifest.spacing) == (3, "RAS", (1, 1, 1))
    assert (manifest.activation, manifest.score_channels) == ("softmax", 3)
    assert manifest.graph_precisions == ("fp32", "fp16", "int8")


def test_wrong_channels_and_classes(exported, card):
    two = (Class(value=1, name="a", color="#000000"), Class(value=2, name="b", color="#ffffff"))
    exported(ExportError, "names 1 channels, the network takes 3", card=card.model_copy(update={"channels": ("grey",)}))
    exported(ExportError, "names 2 foreground classes, the network has 1", card=card.model_copy(update={"classes": two}))
    exported(ExportError, r"values .* must be 1, 2, .*\[2\]", card=card.model_copy(update={"classes": two[1:]}))


def test_a_card_that_makes_no_manifest(exported, card):
    exported(ExportError, "no valid manifest[\\s\\S]*name", card=card.model_copy(update={"name": "Not A Name"}))
    window = Window(size=(510, 510), overlap=0.25)
    exported(ExportError, "no valid manifest[\\s\\S]*window", card=card.model_copy(update={"window": window}))


def test_a_file_that_is_no_checkpoint(exported, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    exported(CheckpointError, r"a\.safetensors", source=tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["file", "folder", "empty folder"])
def test_out_is_no_bundle(small_checkpoint, card, tmp_path, kind):
    out = tmp_path / "precious"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "thesis.tex").write_text("mine")
    with pytest.raises(ExportError, match="precious exists and is not a bundle; choose another --out"):
        export(small_checkpoint, card, out, None)
    assert out.exists()
    assert kind != "folder" or (out / "thesis.tex").read_text() == "mine"


def test_other_networks_verify(tmp_path, make_network, card):
    """Softmax over three classes, instance normalisation, strided and interpolated, one channel."""
    network = make_network(
        in_channels=1,
        classes=3,
        widths=(4, 6),
        norm="instance",
        down="strided",
        up="linear",
        up_conv=False,
        activation="leaky_relu",
    )
    checkpoint.save(network, tmp_path / "a.safetensors")
    classes = (Class(value=1, name="a", color="#000000"), Class(value=2, name="b", color="#ffffff"))
    bundle = export(
        tmp_path / "a.safetensors", card.model_copy(update={"channels": ("grey",), "classes": classes}), tmp_path / "a", None
    )
    assert bundle.manifest.activation == "softmax"
    verdicts = verify(bundle)
    assert {v.graph for v in verdicts} == {"L1", "accurate"}


# --- cards ---


def test_the_shipped_card_is_valid():
    card = read_card(Path(pack.__file__).parent / "cards" / "nuclei.toml")
    assert card.name == "nuclei"
    assert len(card.channels) == 3


@pytest.mark.parametrize("text", [b"", b"not toml", b"\xff\xfe", b'name = "a"\ntitel = "b"\n'])
def test_a_wrong_card(tmp_path, text):
    (tmp_path / "card.toml").write_bytes(text)
    with pytest.raises(ExportError, match=r"card\.toml: not a valid card"):
        read_card(tmp_path / "card.toml")


# --- manifest ---


def test_write_manifest_takes_the_files_as_they_are(small_bundle):
    with (small_bundle.folder / "L1.onnx").open("ab") as file:
        file.write(onnx.ModelProto(doc_string="another one").SerializeToString())
    with pytest.raises(BundleDamaged, match=r"L1\.onnx"):
        read_bundle(small_bundle.folder)
    write_manifest(small_bundle.folder, small_bundle.manifest)
    assert read_bundle(small_bundle.folder).manifest.files["L1.onnx"] != small_bundle.manifest.files["L1.onnx"]
    assert json.loads((small_bundle.folder / "manifest.json").read_text())["format"] == "unetpp.bundle/1"


def test_write_and_read_are_inverse(small_bundle):
    write_manifest(small_bundle.folder, small_bundle.manifest)
    assert read_bundle(small_bundle.folder).manifest == small_bundle.manifest
    assert torch.is_tensor(checkpoint.load(small_bundle.folder / "weights.safetensors")[0].heads["1"].weight)


def test_the_spread_of_one_head(make_network, card, tmp_path):
    checkpoint.save(make_network(deep_supervision=False), tmp_path / "one.safetensors")
    bundle = export(tmp_path / "one.safetensors", card, tmp_path / "one", None)
    assert bundle.manifest.head_std is None
    before = content(tmp_path / "one")
    with pytest.raises(ExportError, match="one head"):
        add_uncertainty(tmp_path / "one")
    assert content(tmp_path / "one") == before


class TestAddSpread:
    @pytest.fixture
    def older(self, small_bundle):
        """As a version without the graph wrote it, and without fields that it did not know."""
        folder = small_bundle.folder
        document = json.loads((folder / "manifest.json").read_text())
        del document["head_std"], document["files"]["head_std.onnx"], document["comparison"]
        (folder / "manifest.json").write_text(json.dumps(document, indent=1) + "\n")
        (folder / "head_std.onnx").unlink()
        return folder

    def test_everything_else_stays(self, older, small_kept):
        before = content(older)
        bundle = add_uncertainty(older)
        after = content(older)
        assert {name for name in after if after[name] != before.get(name)} == {"head_std.onnx", "manifest.json"}
        # The same graph as the export writes, and the manifest but for its entries as it was.
        assert after["head_std.onnx"] == content(small_kept)["head_std.onnx"]
        lines = after["manifest.json"].decode().splitlines()
        document = json.loads(after["manifest.json"])
        assert document.pop("head_std") == bundle.manifest.head_std.model_dump()
        del document["files"]["head_std.onnx"]
        assert document == json.loads(before["manifest.json"])
        assert [line for line in before["manifest.json"].decode().splitlines() if line not in lines] == []
        assert all(v.passed for v in verify(bundle))

    def test_again_changes_nothing(self, older):
        add_uncertainty(older)
        before = content(older)
        add_uncertainty(older)
        assert content(older) == before

    def test_one_that_fails_leaves_the_old_bundle(self, older, monkeypatch):
        before = content(older)
        monkeypatch.setattr(pack, "point_at_weights", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            add_uncertainty(older)
        assert content(older) == before
