import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from server.errors import BundleDamaged
from server.runtime.bundle import Manifest, read_bundle
from server.runtime.deployment import find_bundles, read_deployment
from server.runtime.engines import ENGINES, Engine
from server.runtime.loader import open_engine
from server.settings import BatchingSettings, RuntimeSettings
from tests.support.bundles import rewrite_hashes, write_nonsense_bundle
from tests.support.service import calibrated, manifest

HEAD_STD = {
    "name": "head_std",
    "level": 4,
    "divisor": 16,
    "parameters": 1,
    "macs_per_pixel": 4.0,
    "files": {"fp32": "std.onnx"},
}
# A manifest lists a file per graph, the weights and the golden pairs; one of each kind will do.
NAMES = ("L1.onnx", "golden.npz", "weights.safetensors")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_nonsense_bundle(tmp_path / "fake")


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def damaged(folder: Path) -> dict[str, Any]:
    """The fields of the error with which a bundle is refused."""
    with pytest.raises(BundleDamaged) as caught:
        read_bundle(folder)
    assert "\n" not in str(caught.value)
    return caught.value.fields


def test_read_bundle_good_one(bundle: Path, shipped_bundle: Path) -> None:
    read = read_bundle(bundle)
    assert read.manifest.levels == (1, 2, 3, 4)
    assert (read.path("L3", "bf16"), read.golden) == (bundle / "L3.onnx", bundle / "golden.npz")
    assert read_bundle(shipped_bundle).path("head_std", "fp32").is_file()


def test_read_bundle_behind_a_link(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    assert read_bundle(tmp_path / "link").sha256 == read_bundle(bundle).sha256


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def move_out(path: Path) -> None:
    outside = path.parent.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


HARM: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "bit flipped": flip,
    "missing": Path.unlink,
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "link that leads out": move_out,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("harm", HARM)
def test_read_bundle_damaged_file_is_refused(bundle: Path, harm: str, name: str) -> None:
    HARM[harm](bundle / name)
    assert damaged(bundle) == {"file": name}


@pytest.mark.parametrize("harm", ["missing", "folder"])
def test_read_bundle_without_manifest_is_refused(bundle: Path, harm: str) -> None:
    HARM[harm](bundle / "manifest.json")
    assert damaged(bundle) == {"file": "manifest.json"}


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"null", b"[]", b'{"format": 1}', b"\0\0", b'{"format": "unetpp.bundle/2"}', b"\xff\xfe\0"],
)
def test_read_bundle_broken_manifest_is_refused(bundle: Path, text: bytes) -> None:
    (bundle / "manifest.json").write_bytes(text)
    assert damaged(bundle)["file"] == "manifest.json"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".hidden", "", "a\\b", "a\nb"])
def test_read_bundle_file_names_stay_inside(bundle: Path, name: str) -> None:
    change(bundle, lambda d: d["files"].update({name: {"sha256": "0" * 64, "bytes": 0}}))
    assert damaged(bundle) == {"file": "manifest.json"}


@pytest.mark.parametrize(
    ("edit", "parameter"),
    [
        (lambda d: d.update(colour="blue"), "colour"),
        (lambda d: d.pop("channels"), "channels"),
        (lambda d: d.update(name="Bad Name"), "name"),
        (lambda d: d.update(graphs=[]), "graphs"),
        (lambda d: d.update(classes=[]), "classes"),
        (lambda d: d["graphs"][0].update(name="L9"), "graphs.0.name"),
        (lambda d: d["window"].update(overlap=0.9), "window.overlap"),
        (lambda d: d["classes"][0].update(value=0), "classes.0.value"),
        (lambda d: d["classes"][0].update(color="red"), "classes.0.color"),
        # Fields that contradict each other.
        (lambda d: d["files"].pop("L1.onnx"), None),
        (lambda d: d["files"].pop("golden.npz"), None),
        (lambda d: (d["files"].update({"L1.xml": d["files"]["L1.onnx"]}), d["graphs"][0].update(files={"fp32": "L1.xml"})), None),
        (lambda d: d["window"].update(size=[64]), None),
        (lambda d: d["window"].update(size=[64, 72]), None),
        (lambda d: d["graphs"][0].update(files={"fp16": "L1.onnx"}), None),
        (lambda d: d["graphs"][2].update(level=2), None),
        (lambda d: d["graphs"].append(d["graphs"][0]), None),
        (lambda d: d["graphs"].append(d["graphs"][4] | {"name": "head_std"}), None),
        (lambda d: d.update(graphs=d["graphs"][:4]), None),
        (lambda d: d.update(calibration=calibrated([], recommended=5)), None),
        (lambda d: d["classes"].append(d["classes"][0]), None),
        (lambda d: d["classes"][0].update(value=255), None),
        (lambda d: d["classes"].append(d["classes"][0] | {"value": 2}), None),
        (lambda d: (d["classes"][0].update(value=2), d.update(activation="softmax")), None),
        (lambda d: d.update(head_std=d["graphs"][4]), None),
        (lambda d: d.update(head_std=d["graphs"][4] | {"name": "head_std", "level": 3}), None),
        (lambda d: d.update(head_std=HEAD_STD | {"files": {"fp16": "L1.onnx"}}), None),
        (lambda d: d.update(head_std=HEAD_STD), None),
        (lambda d: d.update(orientation="RAS"), None),
        (lambda d: d.update(spacing=[1, 1, 1]), None),
        (lambda d: d.update(dims=3, window={"size": [16] * 3, "overlap": 0}), None),
        (lambda d: d.update(dims=3, window={"size": [16] * 3, "overlap": 0}, orientation="RAL"), None),
        (lambda d: d.update(dims=3, window={"size": [16] * 3, "overlap": 0}, orientation="RAS", spacing=[1, 1, 0]), None),
    ],
)  # fmt: skip
def test_read_bundle_wrong_field_is_named(
    bundle: Path, edit: Callable[[dict[str, Any]], object], parameter: str | None
) -> None:
    change(bundle, edit)
    assert damaged(bundle) == {"file": "manifest.json"} | ({"parameter": parameter} if parameter else {})


def test_read_bundle_of_an_earlier_version_calls_the_graph_spread(bundle: Path) -> None:
    def earlier(document: dict[str, Any]) -> None:
        document["files"]["std.onnx"] = document["files"]["L1.onnx"]
        document["spread"] = HEAD_STD | {"name": "spread"}

    change(bundle, earlier)
    shutil.copy(bundle / "L1.onnx", bundle / "std.onnx")
    read = read_bundle(bundle)
    assert read.manifest.graph("head_std").name == "head_std"
    assert read.path("head_std", "fp32") == bundle / "std.onnx"
    change(bundle, lambda d: d.update(spread=None))
    assert read_bundle(bundle).manifest.head_std is None


# What a forger may do to a graph whose hash he writes anew. The copy of the weights beside the bundle would
# be as good.


def domain(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "evil"
    model.opset_import.append(onnx.helper.make_opsetid("evil", 1))


def path_to(location: str) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        tensor = next(one for one in model.graph.initializer if one.external_data)
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location

    return edit


FORGED = {
    "foreign operator": domain,
    "path upwards": path_to("../weights.safetensors"),
    "absolute path": path_to("/etc/passwd"),
    "link": path_to("link"),
}


def forge(folder: Path, edit: Callable[[onnx.ModelProto], None]) -> None:
    graph = folder / "L1.onnx"
    shutil.copy(folder / "weights.safetensors", folder.parent)
    (folder / "link").symlink_to(folder.parent / "weights.safetensors")
    model = onnx.load(graph, load_external_data=False)
    edit(model)
    graph.write_bytes(model.SerializeToString())
    rewrite_hashes(folder)


def open_l1(folder: Path, engine: Any) -> Engine:
    deployment = read_deployment(folder, RuntimeSettings(engine=engine), BatchingSettings())
    return open_engine(deployment, deployment.instances["L1", "fp32"])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("forgery", FORGED)
def test_open_engine_forged_graph_is_refused(copied_bundle: Path, engine: str, forgery: str) -> None:
    forge(copied_bundle, FORGED[forgery])
    with pytest.raises(BundleDamaged) as caught:
        open_l1(copied_bundle, engine)
    assert caught.value.fields == {"file": "L1.onnx"}


@pytest.mark.parametrize("engine", ENGINES)
def test_open_engine_graph_that_was_only_written_anew_is_opened(copied_bundle: Path, engine: str) -> None:
    forge(copied_bundle, lambda model: None)
    assert open_l1(copied_bundle, engine).name == engine


def test_read_bundle_weights_at_an_address_in_memory_are_refused(copied_bundle: Path) -> None:
    """OpenVINO would read them, and end the process with a segmentation fault at best."""
    forge(copied_bundle, path_to("*/_ORT_MEM_ADDR_/*"))
    assert damaged(copied_bundle) == {"file": "L1.onnx"}


def test_recommended_level_is_that_of_the_calibration_else_the_deepest() -> None:
    assert manifest().recommended_level == 4
    assert manifest(calibration=calibrated([], recommended=2)).recommended_level == 2


@pytest.mark.parametrize(
    ("engine", "iou"), [("a", 0.8), ("b", 0.7), ("c", 0.9), ("not measured", 0.7), (None, 0.7)]
)
def test_row_is_of_the_engine_else_the_worst(engine: str | None, iou: float) -> None:
    rows = [("L1", "int8", 0.8, "a"), ("L1", "int8", 0.7, "b"), ("L1", "int8", 0.9, "c"), ("L2", "int8", 0.1)]
    calibration = manifest(calibration=calibrated(rows)).calibration
    assert calibration is not None
    row = calibration.row("L1", "int8", engine)
    assert row is not None
    assert row.iou == iou
    assert calibration.row("L1", "fp16") is calibration.row("L3", "int8", "a") is None


def test_head_std_is_a_graph_beside_the_others() -> None:
    with_it = manifest(head_std=HEAD_STD)
    assert with_it.graph("head_std").files == {"fp32": "std.onnx"}
    assert (with_it.graphs, with_it.levels) == (manifest().graphs, (1, 2, 3, 4))
    assert with_it.graph_precisions == manifest().graph_precisions


def test_manifest_score_channels() -> None:
    classes = [{"value": value, "name": "x", "color": "#000000"} for value in (1, 2)]
    assert (manifest().score_channels, manifest(classes=classes, activation="softmax").score_channels) == (
        1,
        3,
    )


def test_manifest_survives_json() -> None:
    made = manifest(calibration=calibrated([("L1", "fp32", 0.5)]), head_std=HEAD_STD)
    assert Manifest.model_validate_json(made.model_dump_json(exclude_none=True)) == made


def test_find_bundles_by_name(bundle: Path) -> None:
    assert find_bundles(bundle) == [bundle]
    for name in ("b", "a"):
        shutil.copytree(bundle, bundle.parent / name)
    (bundle.parent / "no-bundle").mkdir()
    (bundle.parent / "file").write_text("")
    assert [path.name for path in find_bundles(bundle.parent)] == ["a", "b", "fake"]


@pytest.mark.parametrize("there", ["missing", "empty", "file"])
def test_find_bundles_none_is_refused(tmp_path: Path, there: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleDamaged) as caught:
        find_bundles(tmp_path / there)
    assert caught.value.fields == {"setting": "UNETPP_BUNDLES"}
