import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.errors import BundleDamaged
from server.runtime.bundle import Manifest, find_bundles, read_bundle
from tests.support.bundles import rewrite_hashes
from tests.support.service import calibrated, manifest


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle whose files are small and nonsense, but as the manifest says."""
    from server.runtime.bundle import FileEntry, sha256

    folder = tmp_path / "fake"
    folder.mkdir()
    made = manifest()
    for name in made.files:
        # An empty graph, again and again, is an ONNX file to whoever does not run it.
        (folder / name).write_bytes(b"\x3a\x00" * 50 if name.endswith(".onnx") else name.encode() * 50)
    files = {name: FileEntry(sha256=sha256(folder / name), bytes=(folder / name).stat().st_size) for name in made.files}
    (folder / "manifest.json").write_text(made.model_copy(update={"files": files}).model_dump_json(exclude_none=True))
    return folder


HEAD_STD = {
    "name": "head_std", "level": 4, "divisor": 16, "parameters": 1, "macs_per_pixel": 4.0, "files": {"fp32": "head_std.onnx"},
}  # fmt: skip


NAMES = sorted(manifest().files)


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def damaged(folder: Path, *mentioned: str) -> str:
    with pytest.raises(BundleDamaged) as caught:
        read_bundle(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in mentioned), text
    return text


def test_a_good_bundle(bundle: Path) -> None:
    opened = read_bundle(bundle)
    assert opened.manifest.levels == (1, 2, 3, 4)
    assert opened.path("L3", "bf16") == bundle / "L3.onnx"
    assert opened.golden == bundle / "golden.npz"


def test_the_shipped_bundle(shipped_bundle: Path) -> None:
    assert read_bundle(shipped_bundle).manifest.levels == (1, 2, 3, 4)


@pytest.mark.parametrize("name", NAMES)
def test_truncated(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes((bundle / name).read_bytes()[:-1])
    damaged(bundle, str(bundle / name), "differs from the manifest")


@pytest.mark.parametrize("name", NAMES)
def test_one_bit_flipped(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    damaged(bundle, str(bundle / name), "SHA-256")


@pytest.mark.parametrize("name", [*NAMES, "manifest.json"])
def test_missing(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    damaged(bundle, str(bundle / name))


@pytest.mark.parametrize("name", [NAMES[0], "manifest.json"])
def test_a_folder_in_its_place(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    (bundle / name).mkdir()
    damaged(bundle, str(bundle / name))


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '{"format": 1}', "\0\0", '{"format": "unetpp.bundle/2"}'])
def test_broken_manifest(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_text(text)
    damaged(bundle, "manifest.json")


def test_manifest_that_is_not_text(bundle: Path) -> None:
    (bundle / "manifest.json").write_bytes(b"\xff\xfe\x00")
    damaged(bundle, "manifest.json")


def test_unknown_field(bundle: Path) -> None:
    change(bundle, lambda d: d.update(colour="blue"))
    damaged(bundle, "manifest.json", "colour")


def test_missing_field_of_a_later_format_is_named(bundle: Path) -> None:
    change(bundle, lambda d: d.pop("channels"))
    damaged(bundle, "manifest.json", "channels")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".hidden", "", "a\\b", "a\nb"])
def test_file_names_stay_inside(bundle: Path, name: str) -> None:
    change(bundle, lambda d: d["files"].update({name: {"sha256": "0" * 64, "bytes": 0}}))
    damaged(bundle, "manifest.json", "stay inside")


def test_a_link_that_leads_out(bundle: Path, tmp_path: Path) -> None:
    name = NAMES[0]
    outside = tmp_path / "outside"
    shutil.move(bundle / name, outside)
    (bundle / name).symlink_to(outside)
    damaged(bundle, name, "leads out")


@pytest.mark.parametrize("other", ["../outside/data.bin", "/etc/hostname123456", "weights.safetensorz"])
def test_a_graph_that_points_at_another_file(copied_bundle: Path, other: str) -> None:
    graph = copied_bundle / "L1.onnx"
    data, weights = graph.read_bytes(), b"\x12\x13weights.safetensors"
    assert weights in data
    graph.write_bytes(data.replace(weights, b"\x12" + bytes([len(other)]) + other.encode(), 1))
    rewrite_hashes(copied_bundle)
    damaged(copied_bundle, "L1.onnx", "only weights.safetensors may hold them")


def test_a_graph_that_hides_where_it_points(copied_bundle: Path) -> None:
    """The value before the key."""
    graph = copied_bundle / "L1.onnx"
    hidden = b"\x12\x13weights.safetensorz\x0a\x08location"
    graph.write_bytes(graph.read_bytes().replace(b"\x0a\x08location\x12\x13weights.safetensors", hidden, 1))
    rewrite_hashes(copied_bundle)
    damaged(copied_bundle, "L1.onnx", "only weights.safetensors may hold them")


def test_a_bundle_behind_a_link_is_read(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    read_bundle(tmp_path / "link")


@pytest.mark.parametrize(
    ("edit", "mentioned"),
    [
        (lambda d: d["files"].pop("L1.onnx"), "L1.onnx"),
        (lambda d: d["files"].pop("golden.npz"), "golden.npz"),
        (lambda d: d["window"].update(size=[64]), "one number per axis"),
        (lambda d: d["window"].update(size=[64, 72]), "divisor"),
        (lambda d: d["window"].update(overlap=0.9), "overlap"),
        (lambda d: d["graphs"][0].update(files={"fp16": "L1.onnx"}), "fp32"),
        (lambda d: d["graphs"][0].update(name="L9"), "graphs"),
        (lambda d: d.update(graphs=[]), "graphs"),
        (lambda d: d.update(classes=[]), "classes"),
        (lambda d: d.update(name="Bad Name"), "name"),
        (lambda d: d["classes"][0].update(value=0), "value"),
        (lambda d: d["classes"][0].update(color="red"), "color"),
        (lambda d: d.update(calibration=calibrated([], recommended=5)), "recommended level"),
        (lambda d: d["graphs"][2].update(level=2), "L3"),
        (lambda d: d.update(graphs=d["graphs"][:4]), "accurate"),
        (lambda d: d["graphs"].append(d["graphs"][0]), "L1"),
        (lambda d: d["classes"].append(d["classes"][0]), "classes"),
        (lambda d: d["classes"][0].update(value=255), "values of classes must be 1, 2, ...: [255]"),
        (lambda d: d["classes"].append(d["classes"][0] | {"value": 2}), "sigmoid means exactly one class"),
        (lambda d: (d["classes"][0].update(value=2), d.update(activation="softmax")), "classes"),
        (lambda d: d["graphs"].append(d["graphs"][4] | {"name": "head_std"}), "name and level differ"),
        (lambda d: d.update(head_std=d["graphs"][4]), "head_std must be named"),
        (lambda d: d.update(head_std=d["graphs"][4] | {"name": "head_std", "level": 3}), "head_std must be named"),
        (lambda d: d.update(head_std=HEAD_STD | {"files": {"fp16": "L1.onnx"}}), "in fp32 alone"),
        (lambda d: d.update(head_std=HEAD_STD), "head_std.onnx"),
    ],
)
def test_fields_that_contradict(bundle: Path, edit: Callable[[dict[str, Any]], object], mentioned: str) -> None:
    change(bundle, edit)
    damaged(bundle, "manifest.json", mentioned)


def test_recommended_level() -> None:
    assert manifest().recommended_level == 4
    assert manifest(calibration=calibrated([], recommended=2)).recommended_level == 2


class TestRow:
    rows = manifest(
        calibration=calibrated([("L1", "int8", 0.8, "a"), ("L1", "int8", 0.7, "b"), ("L1", "int8", 0.9, "c"), ("L2", "int8", 0.1)])
    ).calibration

    @pytest.mark.parametrize(("engine", "iou"), [("a", 0.8), ("b", 0.7), ("c", 0.9), ("not measured", 0.7), (None, 0.7)])
    def test_of_the_engine_or_else_the_worst(self, engine: str | None, iou: float) -> None:
        assert self.rows is not None
        row = self.rows.row("L1", "int8", engine)
        assert row is not None
        assert row.iou == iou

    def test_not_measured(self) -> None:
        assert self.rows is not None
        assert self.rows.row("L1", "fp16") is None
        assert self.rows.row("L3", "int8", "a") is None


def test_spread_is_a_graph_beside_the_others(shipped_bundle: Path) -> None:
    with_it = manifest(head_std=HEAD_STD)
    assert with_it.graph("head_std").files == {"fp32": "head_std.onnx"}
    assert with_it.graphs == manifest().graphs
    assert with_it.graph_precisions == manifest().graph_precisions
    assert with_it.levels == (1, 2, 3, 4)
    assert read_bundle(shipped_bundle).path("head_std", "fp32").is_file()


def test_several_classes_with_softmax() -> None:
    classes = [{"value": value, "name": "x", "color": "#000000"} for value in (1, 2)]
    assert len(manifest(classes=classes, activation="softmax").classes) == 2


def test_manifest_survives_json() -> None:
    made = manifest(calibration=calibrated([("L1", "fp32", 0.5)]))
    assert Manifest.model_validate_json(made.model_dump_json(exclude_none=True)) == made


class TestFindBundles:
    def test_itself(self, bundle: Path) -> None:
        assert find_bundles(bundle) == [bundle]

    def test_by_name(self, bundle: Path) -> None:
        for name in ("b", "a"):
            shutil.copytree(bundle, bundle.parent / name)
        (bundle.parent / "no-bundle").mkdir()
        (bundle.parent / "file").write_text("")
        assert [path.name for path in find_bundles(bundle.parent)] == ["a", "b", "fake"]

    @pytest.mark.parametrize("there", ["missing", "empty", "file"])
    def test_none(self, tmp_path: Path, there: str) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").write_text("")
        with pytest.raises(BundleDamaged, match="UNETPP_BUNDLES") as caught:
            find_bundles(tmp_path / there)
        assert there in str(caught.value)
