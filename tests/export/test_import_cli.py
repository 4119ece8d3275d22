"""`unetpp import` as a person types it: what it writes, and each refusal in words with nothing written."""

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from typer.testing import CliRunner

from export import onnx_file
from export.cli_import import import_network
from server.cli_utils import report_errors
from server.runtime.bundle import read_bundle
from tests.support.cards import write_card
from tests.support.networks import Builder, unetpp

app = typer.Typer(pretty_exceptions_enable=False)
app.command("import")(report_errors(import_network))
app.command("other")(lambda: None)


def unetpp_import(*arguments):
    return CliRunner().invoke(app, ["import", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def place(tmp_path):
    """A folder with a network, a card and images."""
    onnx.save(unetpp(), tmp_path / "m.onnx")
    write_card(tmp_path / "card.toml")
    folder = tmp_path / "images" / "plate 1" / "deep"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(3):
        pixels = random.integers(0, 255, (40 + number, 37, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    (tmp_path / "images" / ".hidden.png").write_bytes(b"hidden")
    return tmp_path


def do(place, *more, model="m.onnx"):
    return unetpp_import(place / model, "--card", place / "card.toml", "--out", place / "out" / "mine", *more)


def refused(place, *more, model="m.onnx"):
    """The error of an import after which the folder is as before."""
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    result = do(place, *more, model=model)
    assert result.exit_code == 1, result.output
    assert "error: " in result.stderr
    assert "Traceback" not in result.output
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
    return result.stderr


def test_it_says_what_it_wrote_and_what_is_next(place):
    result = do(place, "--images", place / "images")
    assert result.exit_code == 0, result.output
    manifest = read_bundle(place / "out" / "mine").manifest
    assert manifest.levels == (1, 2, 3)
    assert manifest.graph_precisions == ("fp32", "fp16", "int8")
    assert "levels 1, 2, 3; weights in float" in result.output
    assert f"unetpp verify {place / 'out' / 'mine'} --source {place / 'm.onnx'}" in result.output
    # Once, although every graph reads the folder.
    assert result.stderr.count("left out: ") == 1
    assert "left out: notes.txt: not a format" in result.stderr


def test_labels_inside_of_the_images_do_not_set_int8(place):
    """A label is an image, too, with which int8 would be calibrated; a file that is none is told of where it is tried."""
    labels = place / "images" / "labels" / "plate 1" / "deep"
    labels.mkdir(parents=True)
    for number in range(3):
        Image.fromarray(np.eye(40 + number, 37, dtype=np.uint8)).save(labels / f"{number}.png")
    (labels / "notes.txt").write_text("not an image")
    result = do(place, "--images", place / "images", "--labels", place / "images" / "labels")
    assert result.exit_code == 0, result.output
    assert "left out: notes.txt" in result.stderr
    assert "left out: labels" not in result.stderr


def test_without_images_there_is_no_int8(place):
    assert do(place).exit_code == 0
    assert read_bundle(place / "out" / "mine").manifest.graph_precisions == ("fp32", "fp16")


def test_heads_by_name(place):
    assert do(place, "--heads", "head3, head1").exit_code == 0
    assert read_bundle(place / "out" / "mine").manifest.levels == (1, 3)


def test_one_output_names_the_remedies(place):
    onnx.save(unetpp(heads=(3,)), place / "m.onnx")
    result = do(place)
    assert result.exit_code == 0
    assert "m.onnx has one output, which is level 3" in result.output
    assert "--heads" in result.output
    assert "unetpp add-levels" in result.output
    assert read_bundle(place / "out" / "mine").manifest.levels == (3,)


def test_inspect_needs_no_card_and_writes_nothing(place):
    before = {*place.rglob("*")}
    result = unetpp_import(place / "m.onnx", "--inspect")
    assert result.exit_code == 0, result.output
    for word in ("x0_1", "x0_2", "x0_3", "head1", "head3", "X^{0,2}", "100.0%", "2D, 3 channels, opset 18"):
        assert word in result.output or word == "100.0%"
    assert {*place.rglob("*")} == before
    onnx.save(unetpp(heads=(3,), sizes=["n", "c", "h", "w"]), place / "one.onnx")
    result = unetpp_import(place / "one.onnx", "--inspect")
    # Of a dynamic axis the first convolution tells the channels.
    assert "2D, 3 channels" in result.output
    assert "one output" in result.output
    assert "unetpp add-levels" in result.output


def test_inspect_shows_outputs_that_are_no_maps(place):
    model = unetpp()
    model.graph.node.append(helper.make_node("GlobalAveragePool", ["x3_0"], ["pooled"]))
    model.graph.node.append(helper.make_node("Flatten", ["pooled"], ["kind"]))
    model.graph.output.add(name="kind")
    onnx.save(model, place / "m.onnx")
    result = unetpp_import(place / "m.onnx", "--inspect")
    assert "output 'kind' of shape (1, 7) is no map of scores per pixel" in result.output
    assert "output 'kind'" in refused(place)
    assert do(place, "--heads", "head1,head2").exit_code == 0


def test_options_that_are_missing_are_named(place):
    result = unetpp_import(place / "m.onnx", "--card", place / "card.toml")
    assert result.exit_code == 1
    assert "--card and --out are needed" in result.stderr
    assert "--labels needs --images" in refused(place, "--labels", place / "images")


def external(place, **changes):
    onnx.save(unetpp(), place / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    model = onnx.load(place / "m.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = str(changes.get(entry.key, entry.value))
    (place / "m.onnx").write_bytes(model.SerializeToString())


def test_truncated(place):
    whole = (place / "m.onnx").read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        (place / "m.onnx").write_bytes(whole[:length])
        assert "m.onnx" in refused(place)
    (place / "m.onnx").write_bytes(b"\x89PNG\r\n\x1a\n" * 100)
    assert "not an ONNX file, or truncated" in refused(place)


def test_weights_in_files_that_are_missing_short_or_elsewhere(place, tmp_path_factory):
    external(place)
    whole = (place / "w.bin").read_bytes()
    (place / "w.bin").write_bytes(whole[: len(whole) // 2])
    assert "damaged or truncated" in refused(place)
    (place / "w.bin").unlink()
    assert "its weights lie in 'w.bin', which is missing" in refused(place)
    outside = tmp_path_factory.mktemp("outside") / "w.bin"
    outside.write_bytes(whole)
    for location in (outside, f"../../{outside.parent.name}/w.bin"):
        external(place, location=location)
        assert "outside of its folder" in refused(place)
    (place / "w.bin").unlink()
    (place / "w.bin").symlink_to(outside)
    external_model = onnx.load(place / "m.onnx", load_external_data=False)
    for tensor in external_model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "w.bin" if entry.key == "location" else entry.value
    (place / "m.onnx").write_bytes(external_model.SerializeToString())
    assert "outside of its folder" in refused(place)


def test_more_than_protobuf_holds(place, monkeypatch):
    external(place)
    with (place / "w.bin").open("r+b") as file:
        # Sparse: no byte of it is written.
        file.truncate(3_000_000_000)
    assert "3.0 GB with its weights; up to 2.1 GB can be imported" in refused(place)
    onnx.save(unetpp(), place / "m.onnx")
    monkeypatch.setattr(onnx_file, "MAX_BYTES", 1000)
    assert "with its weights; up to" in refused(place)


def replaced(model, name, values):
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    return model


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(place, value):
    onnx.save(replaced(unetpp(), "head1.bias", np.array([value], np.float32)), place / "m.onnx")
    assert "'head1.bias' hold NaN or infinity" in refused(place)


def sequence(*nodes, outputs, opset=18, sizes=("n", 3, "h", "w"), inputs=("input",), kind=TensorProto.FLOAT):
    graph = helper.make_graph(
        [helper.make_node(*node[:3], **(node[3] if len(node) > 3 else {})) for node in nodes],
        "graph",
        [helper.make_tensor_value_info(name, kind, [*sizes]) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("vendor", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


RELU = ("Relu", ["input"], ["out"])


def classifier():
    build = Builder(2, 18)
    value = build.add("GlobalAveragePool", build.block("input", 3, 8, "a"), name="pool")
    return build.model(3, [build.add("Flatten", value, name="kinds")])


def exits(count):
    build = Builder(2, 18)
    value, names = "input", []
    for number in range(count):
        value = build.block(value, 4 if number else 3, 4, f"block{number}")
        names.append(build.conv(value, 4, 1, f"exit{number}", kernel=1))
    return build.model(3, names)


def with_double():
    model = unetpp()
    tensor = next(t for t in model.graph.initializer if t.name == "head1.weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    return model


@pytest.mark.parametrize(("model", "words"), [
    (unetpp(opset=12), "opset 12; 13 to 21 can be imported. Export with opset_version=18"),
    (unetpp(opset=22), "opset 22; 13 to 21"),
    (unetpp(sizes=[1, 3, 64, 96]), 'fixed sizes 1 × 64 × 96; make them dynamic: torch.onnx.export(…, input_names=["image"], dynamic_axes={"image": {0: "n", 2: "h", 3: "w"}}, dynamo=False)'),
    (unetpp(sizes=[1, 3, "h", "w"]), "fixed sizes 1 × ? × ?"),
    (sequence(("Magic", ["input"], ["out"], {"domain": "vendor"}), outputs=["out"]), "not ONNX's own: vendor.Magic"),
    (sequence(("Add", ["input", "second"], ["out"]), outputs=["out"], inputs=("input", "second")), "has 2 inputs"),
    (sequence(("Cast", ["input"], ["out"], {"to": 1}), outputs=["out"], kind=TensorProto.UINT8), "takes uint8 values; export it with a float32 input"),
    (classifier(), "output 'kinds' of shape (1, 8) is no map of scores per pixel; this is no segmentation network"),
    (sequence(outputs=[]), "holds no graph"),
    (with_double(), "'head1.weight' are double; export the network in float32 or float16"),
    (unetpp(channels=4), "takes 4 channels, the card names 3"),
    (unetpp(dims=3), "its input has 5 axes; the card says dims = 2"),
    (exits(6), "has 6 heads; 1 to 5 become levels"),
    (unetpp(classes=2), "the heads have 2 channels, and the card has 1 class with activation = 'sigmoid'"),
    (unetpp(end="Sigmoid"), "ends in Sigmoid, so that it would be applied twice; write activation_included = true"),
    (unetpp(classes=2, end="Softmax"), "the heads have 2 channels"),
    (unetpp(end="LogSoftmax"), "gives logarithms (LogSoftmax)"),
], ids=lambda value: value[:30] if isinstance(value, str) else "")  # fmt: skip
def test_a_network_that_cannot_be_imported(place, model, words):
    onnx.save(model, place / "m.onnx")
    assert words in refused(place)


def test_features_are_no_heads(place):
    assert "different numbers of channels: [1, 4]; features are no heads" in refused(
        place, "--heads", "x0_1,head2"
    )
    assert "the heads have 4 channels" in refused(place, "--heads", "x0_1,x0_2")
    assert "no tensor 'nowhere'; unetpp import m.onnx --inspect lists them" in refused(
        place, "--heads", "nowhere"
    )
    assert "names a tensor twice" in refused(place, "--heads", "head1,head1")


@pytest.mark.parametrize(("network", "card", "words"), [
    ({}, {"activation_included": True}, "ends in Conv, which gives logits; remove activation_included = true"),
    ({"classes": 2, "end": "Softmax"}, {"activation": "sigmoid-per-class", "activation_included": True, "classes": [
        {"value": 1, "name": "a", "color": "#ff0000"}, {"value": 2, "name": "b", "color": "#00ff00"}]},
     "ends in Softmax, and the card says activation = 'sigmoid-per-class'; write activation = 'softmax'"),
    ({}, {"activation": "softmax"}, "the heads have 1 channel, and the card has 1 class with activation = 'softmax', which is the background and then a channel per class; sigmoid is for that"),
    ({}, {"dims": None}, "needs dims: 2 for images, 3 for volumes"),
    ({}, {"dims": 4}, "card.toml: not a valid card: dims: Input should be 2 or 3"),
    ({}, {"input": None}, "needs input"),
    ({}, {"activation": None}, "needs activation"),
    ({}, {"activation": "relu"}, "activation: Input should be"),
    ({}, {"channels": ["grey"]}, "takes 3 channels, the card names 1"),
    ({}, {"input": {"normalization": "percentile"}}, 'percentiles belongs to normalization = "percentile", and is needed there'),
    ({}, {"input": {"normalization": "percentile", "percentiles": [99, 1]}}, "the lower one first"),
    ({}, {"input": {"normalization": "unit", "mean": [0.5]}}, "input.mean has 1 values, and there are 3 channels"),
    ({}, {"input": {"normalization": "unit", "std": [1, 0, 1]}}, "std must be positive"),
    ({}, {"input": {"normalization": "unit", "channel_order": [0, 1, 1]}}, "each of the channels 0 to 2 once"),
    ({}, {"input": {"normalization": "unit", "clip": [1, 0]}}, "clip is the lowest and then the highest value"),
    ({}, {"input": {"normalization": "imagenet"}}, "input.normalization: Input should be"),
    ({}, {"window": {"size": [33, 32], "overlap": 0.25}}, "window.size must be a multiple of every graph's divisor"),
    ({}, {"window": {"size": [32, 32, 32], "overlap": 0.25}}, "window.size needs one number per axis"),
    ({}, {"name": "My Network"}, "name: String should match pattern"),
    ({}, {"aggregation": "mean-logit", "activation_included": True}, "aggregation mean-logit needs logits"),
    ({}, {"normalisation": "zscore"}, "normalisation: Extra inputs are not permitted"),
    ({"dims": 3, "channels": 1, "widths": (2, 3, 4), "heads": (1, 2)}, {"dims": 3, "channels": ["ct"], "orientation": None, "window": {"size": [16] * 3, "overlap": 0.25}},
     "orientation belongs to networks for volumes"),
], ids=lambda value: value[:30] if isinstance(value, str) else "")  # fmt: skip
def test_a_card_that_is_wrong(place, network, card, words):
    onnx.save(unetpp(**network), place / "m.onnx")
    write_card(place / "card.toml", **card)
    text = refused(place)
    assert words in text
    assert "pydantic" not in text


def test_folders_of_images(place):
    empty = place / "empty"
    empty.mkdir()
    assert "holds no files" in refused(place, "--images", empty)
    (empty / "a.txt").write_text("no image")
    text = refused(place, "--images", empty)
    assert "no file that 'mine' can take" in text
    assert "a.txt: not a format" in text


def test_an_out_that_is_something_else(place):
    (place / "out" / "mine").mkdir(parents=True)
    (place / "out" / "mine" / "precious").write_text("precious")
    assert "exists and is not a bundle" in refused(place)


def test_normalisation_inside_is_a_warning(place):
    onnx.save(unetpp(before=[("Sub", 127.5), ("Div", 128.0)]), place / "m.onnx")
    result = do(place)
    assert result.exit_code == 0
    assert "warning: the graph itself begins with Sub 127.5, Div 128" in result.stderr
    write_card(place / "card.toml", input={"normalization": "none"})
    assert "warning" not in do(place).stderr


def test_an_interrupted_import_leaves_nothing(place, monkeypatch):
    from export import pack

    def stopped(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(pack, "write_manifest", stopped)
    result = do(place)
    assert result.exit_code == 1
    assert "no space left" in result.stderr
    assert [*(place / "out").iterdir()] == []
