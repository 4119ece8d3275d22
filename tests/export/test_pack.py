"""Writing a bundle: what is refused, and that a failure leaves the old bundle as it was."""

import json
from pathlib import Path

import onnx
import pytest
from onnx import helper

from export import pack
from export.card import ExportError, read_card
from export.pack import add_uncertainty, export, write_manifest
from export.verify import verify
from model import checkpoint
from model.baselines import UNet
from model.checkpoint import CheckpointError
from model.config import UNetPlusPlusConfig
from server.errors import BundleDamaged
from server.runtime.bundle import Class, Window, read_bundle

TWO = (Class(value=1, name="a", color="#000000"), Class(value=2, name="b", color="#ffffff"))


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def empty_graphs(monkeypatch):
    """Graphs without nodes, because the graphs themselves are not at stake."""
    proto = helper.make_model(helper.make_graph([], "empty", [], []))
    monkeypatch.setattr(pack, "GRAPH_PRECISIONS", dict.fromkeys(("fp32", "fp16"), lambda source: proto))
    monkeypatch.setattr(pack, "serve", lambda *arguments, **options: proto)


def test_export_writes_a_whole_bundle(small_kept, small_checkpoint):
    names = {
        f"{graph}{suffix}.onnx" for graph in ("L1", "L2", "accurate") for suffix in ("", ".fp16", ".int8")
    }
    assert set(content(small_kept)) == names | {
        "head_std.onnx",
        "network.onnx",
        "weights.safetensors",
        "golden.npz",
        "manifest.json",
    }
    manifest = read_bundle(small_kept).manifest
    assert (manifest.name, manifest.graph_precisions) == ("small", ("fp32", "fp16", "int8"))
    assert (manifest.normalization, manifest.activation, manifest.dims) == ("zscore", "sigmoid", 2)
    assert manifest.calibration is manifest.held_out is None
    # Nothing is left beside it, and the server's user may read it.
    assert list(small_kept.parent.iterdir()) == [small_kept]
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in small_kept.iterdir())
    # The checkpoint is left alone.
    assert checkpoint.load(small_checkpoint)[0].config.norm == "batch"


def test_export_of_volumes_says_where_axes_point(volume_kept):
    manifest = read_bundle(volume_kept).manifest
    assert (manifest.dims, manifest.orientation, manifest.spacing) == (3, "RAS", (1, 1, 1))
    assert (manifest.activation, manifest.score_channels) == ("softmax", 3)


def test_export_keeps_the_axes_that_training_mirrored(volume_kept, small_kept):
    assert read_bundle(volume_kept).manifest.mirror_axes == (0,)
    assert read_bundle(small_kept).manifest.mirror_axes is None


def test_export_of_another_network_verifies(tmp_path, make_network, card):
    """Softmax over three classes, instance normalisation, strided and interpolated, one channel, one head."""
    fields = {
        "in_channels": 1,
        "classes": 3,
        "widths": (4, 6),
        "norm": "instance",
        "down": "strided",
        "up": "linear",
    }
    checkpoint.save(
        make_network(**fields, up_conv=False, activation="leaky_relu"), tmp_path / "a.safetensors"
    )
    card = card.model_copy(update={"channels": ("grey",), "classes": TWO})
    bundle = export(tmp_path / "a.safetensors", card, tmp_path / "a", None)
    assert bundle.manifest.activation == "softmax"
    assert {v.graph for v in verify(bundle)} == {"L1", "accurate"}
    # Of one head there is no standard deviation.
    assert bundle.manifest.head_std is None
    before = content(bundle.folder)
    with pytest.raises(ExportError, match="one head"):
        add_uncertainty(bundle.folder)
    assert content(bundle.folder) == before


class TestFailure:
    @pytest.fixture
    def fails(self, small_checkpoint, card, small_bundle):
        """A function that exports over an existing bundle and checks that the failure leaves no trace."""
        before = content(small_bundle.folder)

        def check(error, match, source=small_checkpoint, card=card):
            with pytest.raises(error, match=match):
                export(source, card, small_bundle.folder, None)
            assert content(small_bundle.folder) == before
            assert list(small_bundle.folder.parent.glob(".small*")) == []

        return check

    @pytest.mark.usefixtures("empty_graphs")
    @pytest.mark.parametrize("victim", ["write_golden", "write_manifest", "read_bundle", "point_at_weights"])
    def test_export_that_fails_in_a_step_leaves_the_bundle(self, fails, monkeypatch, victim):
        def fail(*args):
            raise OSError("no space")

        monkeypatch.setattr(pack, victim, fail)
        fails(OSError, "no space")

    @pytest.mark.usefixtures("empty_graphs")
    def test_export_that_cannot_rename_puts_the_old_bundle_back(self, fails, small_bundle, monkeypatch):
        out, rename = small_bundle.folder, Path.rename

        def fail(self, target):
            if (self.name, target) == (out.name, out):
                raise OSError("no space")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail)
        fails(OSError, "no space")

    @pytest.mark.parametrize(("change", "match"), [
        ({"channels": ("grey",)}, "names 1 channels, the network takes 3"),
        ({"classes": TWO}, "names 2 foreground classes, the network has 1"),
        ({"classes": TWO[1:]}, r"values .* must be 1, 2, .*\[2\]"),
        ({"name": "Not A Name"}, "no valid manifest[\\s\\S]*name"),
        ({"window": Window(size=(510, 510), overlap=0.25)}, "no valid manifest[\\s\\S]*window"),
    ], ids=["channels", "classes", "values", "name", "window"])  # fmt: skip
    def test_export_refuses_a_card_that_does_not_fit(self, fails, card, change, match):
        fails(ExportError, match, card=card.model_copy(update=change))

    def test_export_refuses_other_sources(self, fails, tmp_path):
        checkpoint.save(UNet(UNetPlusPlusConfig(in_channels=3, widths=(2, 3))), tmp_path / "unet.safetensors")
        fails(ExportError, r"unet\.safetensors holds a UNet", source=tmp_path / "unet.safetensors")
        (tmp_path / "a.safetensors").write_bytes(b"nothing")
        fails(CheckpointError, r"a\.safetensors", source=tmp_path / "a.safetensors")

    @pytest.mark.parametrize(
        "files", [None, {}, {"thesis.tex": b"mine"}], ids=["file", "empty folder", "folder"]
    )
    def test_export_refuses_an_out_that_is_no_bundle(self, small_checkpoint, card, tmp_path, files):
        out = tmp_path / "precious"
        out.write_text("mine") if files is None else out.mkdir()
        for name, data in (files or {}).items():
            (out / name).write_bytes(data)
        with pytest.raises(ExportError, match="precious exists and is not a bundle"):
            export(small_checkpoint, card, out, None)
        assert out.read_text() == "mine" if files is None else content(out) == files


@pytest.mark.usefixtures("empty_graphs")
def test_export_replaces_the_old_bundle_whole(small_checkpoint, card, small_bundle):
    steps = []
    card = card.model_copy(update={"title": "new"})
    bundle = export(small_checkpoint, card, small_bundle.folder, None, steps.append)
    assert bundle.folder == small_bundle.folder
    assert read_bundle(small_bundle.folder).manifest.title == "new"
    # No int8 without data, and no files left of the bundle before.
    assert not [name for name in content(small_bundle.folder) if "int8" in name]
    assert [p.name for p in small_bundle.folder.parent.iterdir()] == ["small"]
    graphs = [f"{graph}{suffix}.onnx" for graph in ("L1", "L2", "accurate") for suffix in ("", ".fp16")]
    assert steps == [*graphs, "network.onnx", "head_std.onnx"]


def test_read_card_takes_the_shipped_one():
    card = read_card(Path(pack.__file__).parent / "cards" / "nuclei.toml")
    assert (card.name, len(card.channels)) == ("nuclei", 3)


@pytest.mark.parametrize("text", [b"", b"not toml", b"\xff\xfe", b'name = "a"\ntitel = "b"\n'])
def test_read_card_refuses_others(tmp_path, text):
    (tmp_path / "card.toml").write_bytes(text)
    with pytest.raises(ExportError, match=r"card\.toml: not a valid card"):
        read_card(tmp_path / "card.toml")


def test_write_manifest_takes_the_files_as_they_are(small_bundle):
    write_manifest(small_bundle.folder, small_bundle.manifest)
    assert read_bundle(small_bundle.folder).manifest == small_bundle.manifest
    with (small_bundle.folder / "L1.onnx").open("ab") as file:
        file.write(onnx.ModelProto(doc_string="another one").SerializeToString())
    with pytest.raises(BundleDamaged):
        read_bundle(small_bundle.folder)
    write_manifest(small_bundle.folder, small_bundle.manifest)
    assert (
        read_bundle(small_bundle.folder).manifest.files["L1.onnx"] != small_bundle.manifest.files["L1.onnx"]
    )


class TestAddUncertainty:
    @pytest.fixture
    def older(self, small_bundle):
        """As a version without the graph wrote it, and without fields that it did not know."""
        folder = small_bundle.folder
        document = json.loads((folder / "manifest.json").read_text())
        del document["head_std"], document["files"]["head_std.onnx"], document["comparison"]
        (folder / "manifest.json").write_text(json.dumps(document, indent=1) + "\n")
        (folder / "head_std.onnx").unlink()
        return folder

    def test_add_uncertainty_changes_nothing_else(self, older, small_kept):
        before = content(older)
        bundle = add_uncertainty(older)
        after = content(older)
        assert {name for name in after if after[name] != before.get(name)} == {
            "head_std.onnx",
            "manifest.json",
        }
        # The same graph as the export writes, and a manifest with the same lines as before.
        assert after["head_std.onnx"] == content(small_kept)["head_std.onnx"]
        document = json.loads(after["manifest.json"])
        assert document.pop("head_std") == bundle.manifest.head_std.model_dump()
        del document["files"]["head_std.onnx"]
        assert document == json.loads(before["manifest.json"])
        assert set(before["manifest.json"].splitlines()) <= set(after["manifest.json"].splitlines())
        # Once more changes nothing.
        add_uncertainty(older)
        assert content(older) == after

    def test_add_uncertainty_that_fails_leaves_the_old_bundle(self, older, monkeypatch):
        before = content(older)
        monkeypatch.setattr(pack, "serve", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            add_uncertainty(older)
        assert content(older) == before
