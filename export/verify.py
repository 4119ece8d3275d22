"""Proof that a bundle computes what its network computes: on the server's own engines, per level and precision."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from export.class_overlap import class_map
from export.cut import cut
from export.golden import OnnxReference, check_inputs
from export.importing import headed
from export.onnx_file import DOMAINS, messages, read_onnx
from export.producer import Producer, from_bundle
from export.weights import network_name, parameters
from server.arrays import Scores, Tiles
from server.runtime.bundle import GRAPH_PRECISIONS, HEAD_STD, NETWORK, WEIGHTS, Bundle
from server.runtime.engines import ENGINES
from server.runtime.golden import head_std_pairs, read_pairs

# fp32 must equal the network except for rounding; the others must give the same class for nearly every pixel.
FP32_MAX_ABS = 1e-4
MIN_AGREEMENT = {"bf16": 0.98, "fp16": 0.995, "int8": 0.97}


class VerifyError(ValueError):
    """A graph differs from its network, or must not be served; the text names each."""


@dataclass(frozen=True)
class Verdict:
    """Comparison of one graph on one engine at one precision with the network, over all inputs.

    Attributes:
        graph: name in the manifest.
        precision: fp32, bf16, fp16 or int8.
        engine: key of `ENGINES`.
        max_abs: largest absolute difference of a score.
        agreement: share of pixels with the same class.
    """

    graph: str
    precision: str
    engine: str
    max_abs: float
    agreement: float

    @property
    def passed(self) -> bool:
        """Whether the rule of its precision holds."""
        if self.precision == "fp32":
            return self.max_abs <= FP32_MAX_ABS
        return self.agreement >= MIN_AGREEMENT[self.precision]


def verify(
    bundle: Bundle,
    advance: Callable[[Verdict], None] = lambda verdict: None,
    source: Path | None = None,
) -> list[Verdict]:
    """Compares every graph at every precision on every installed CPU engine with the network.

    Of our own networks that is torch on the weights, of others the uncut graph on ONNX Runtime.

    Inputs are noise and synthetic cells of several sizes, and the golden pairs.

    Args:
        bundle: bundle to verify.
        advance: callback with each verdict.
        source: ONNX file that the bundle was imported from, to be compared, too; under its name as engine.

    Raises:
        ImportRefused: the source cannot be read.
        VerifyError: names every graph that differs, holds nodes of other levels or foreign parts, or has a
            wrong golden pair.
    """
    manifest = bundle.manifest
    wrong = [f"{NETWORK}: {problem}" for problem in _foreign_parts_of_network(bundle)]
    if wrong:
        raise VerifyError("the bundle must not be served:\n  " + "\n  ".join(wrong))
    producer = from_bundle(bundle)
    theirs = _source_reference(source, producer) if source else None
    fixed = check_inputs(len(manifest.channels), manifest.dims, manifest.normalization, manifest.percentiles)
    verdicts = []
    known = [*read_pairs(bundle.golden)]
    names = [graph.name for graph in manifest.all_graphs]
    # Input by input, because one run of a network gives the scores of all graphs.
    scores_of = [{name: producer.reference(name, tiles) for name in names} for tiles in fixed]
    for name in names:
        wrong += wrong_nodes(bundle, name, producer)
        golden = (
            head_std_pairs(known)
            if name == HEAD_STD
            else [(tiles, scores) for g, tiles, scores in known if g == name]
        )
        inputs = [*fixed, *(tiles for tiles, _ in golden)]
        expected = [scores[name] for scores in scores_of]
        expected += [producer.reference(name, tiles) for tiles, _ in golden]
        if (
            not golden
            or largest_difference([scores for _, scores in golden], expected[-len(golden) :]) > FP32_MAX_ABS
        ):
            wrong.append(f"{bundle.golden.name}: the scores of {name} are not those of the weights")
        for engine, precision, answers in _compared(bundle, producer, name, inputs, source, theirs):
            k = manifest.score_channels
            mine, network = ([scores[:, :k] for scores in some] for some in (answers, expected))
            verdict = Verdict(
                name,
                precision,
                engine,
                largest_difference(answers, expected),
                agreement(mine, network, manifest.threshold),
            )
            verdicts.append(verdict)
            advance(verdict)
    wrong += [
        f"{v.graph} at {v.precision} on {v.engine}: largest difference {v.max_abs:.2g}, mask agreement {v.agreement:.4f}"
        for v in verdicts
        if not v.passed
    ]
    if wrong:
        raise VerifyError("the bundle does not answer as its network does:\n  " + "\n  ".join(wrong))
    return verdicts


def _compared(
    bundle: Bundle,
    producer: Producer,
    name: str,
    inputs: list[Tiles],
    source: Path | None,
    theirs: OnnxReference | None,
) -> Iterator[tuple[str, str, list[Scores]]]:
    """Yields engine, precision and scores of all that is compared with the network at one graph."""
    for engine, precision in _runnable_at(bundle, name):
        yield engine, precision, _answers(bundle, name, engine, precision, inputs)
    if theirs and source and {*producer.heads(name)} <= {*theirs.heads}:
        yield source.name, "fp32", [theirs(name, tiles) for tiles in inputs]


def runnable(bundle: Bundle) -> list[tuple[str, str]]:
    """Returns the (engine, precision) pairs that run on this CPU, slow ones included: ONNX Runtime emulates fp16."""
    pairs = []
    for name, row in ENGINES.items():
        if not row.installed:
            continue
        precisions = [*row.precisions("cpu"), *(["fp16"] if name == "onnxruntime" else [])]
        pairs += [(name, p) for p in precisions if GRAPH_PRECISIONS[p] in bundle.manifest.graph_precisions]
    return pairs


def _runnable_at(bundle: Bundle, name: str) -> list[tuple[str, str]]:
    """Returns the pairs at which a graph is served."""
    return [
        (engine, precision)
        for engine, precision in runnable(bundle)
        if name != HEAD_STD or precision == "fp32"
    ]


def combinations(bundle: Bundle) -> int:
    """Counts the verdicts that `verify` gives."""
    return sum(len(_runnable_at(bundle, graph.name)) for graph in bundle.manifest.all_graphs)


def largest_difference(answers: list[Scores], expected: list[Scores]) -> float:
    """Returns the largest difference of a score; infinite where a shape differs or a score is not a number."""
    if [a.shape for a in answers] != [e.shape for e in expected]:
        return float("inf")
    difference = float(np.max([np.abs(a - e).max() for a, e in zip(answers, expected, strict=True)]))
    return float("inf") if np.isnan(difference) else difference


def agreement(answers: list[Scores], expected: list[Scores], threshold: float) -> float:
    """Returns the share of pixels whose class is the same."""
    same = total = 0
    for a, e in zip(answers, expected, strict=True):
        equal = class_map(a, threshold) == class_map(e, threshold)
        same += int(equal.sum())
        total += equal.size
    return same / total


def _source_reference(source: Path, producer: Producer) -> OnnxReference:
    """The scores of a person's own file, of those heads that it has: others were added to the bundle later.

    Raises:
        VerifyError: it has none of them.
    """
    model = read_onnx(source)
    made = {name for node in model.graph.node for name in node.output}
    levels = {level: head for level, head in producer.levels.items() if head in made}
    if not levels:
        heads = ", ".join(producer.levels.values())
        raise VerifyError(f"{source.name}: has no tensor of {heads[:100]}; was the bundle imported from it?")
    network = producer.network
    theirs = headed(model, network.dims, network.channels, [*levels.values()], source.name)
    return OnnxReference(theirs, levels, producer.before, producer.after)


def wrong_nodes(bundle: Bundle, name: str, producer: Producer) -> list[str]:
    """Lists files of a graph that cannot be read, have foreign parts, or do not hold exactly the weights of its heads."""
    expected = {*parameters(cut(producer.network.model, producer.heads(name)))}
    every = {*parameters(producer.network.model)}
    wrong = []
    for precision, file in bundle.manifest.graph(name).files.items():
        try:
            proto = onnx.load(bundle.folder / file, load_external_data=False)
        except DecodeError as error:
            wrong.append(f"{file}: not an ONNX file ({error})")
            continue
        wrong += [f"{file}: {problem}" for problem in foreign_parts(proto)]
        names = {network_name(t.name, every) for t in proto.graph.initializer} & every
        # int8 stores biases as integers, under other names; the weights are enough to tell.
        missing = {n for n in expected - names if precision != "int8" or n.endswith(".weight")}
        if missing or names - expected:
            wrong.append(
                f"{file}: missing {sorted(missing)[:3]}, of other levels {sorted(names - expected)[:3]}"
            )
    return wrong


def _foreign_parts_of_network(bundle: Bundle) -> list[str]:
    """Lists what `foreign_parts` finds in the network that the graphs are compared with, where the bundle has one."""
    if NETWORK not in bundle.manifest.files:
        return []
    try:
        return foreign_parts(onnx.load(bundle.folder / NETWORK, load_external_data=False))
    except DecodeError as error:
        return [f"not an ONNX file ({error})"]


def foreign_parts(proto: onnx.ModelProto) -> list[str]:
    """Lists what reaches beyond ONNX's own operators and the bundle's weights file: code of others, or other files.

    Engines refuse most of it when they open the graph; a bundle that passes here has none of it.
    """
    every = [*messages(proto)]
    domains = {m.domain for m in every if isinstance(m, onnx.NodeProto | onnx.OperatorSetIdProto)}
    tensors = [m for m in every if isinstance(m, onnx.TensorProto)]
    locations = {
        entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"
    }
    return [
        *(f"has a function of its own: {function.name!r:.70}" for function in proto.functions),
        *(["has training information"] if proto.training_info else []),
        *(f"has operators of the domain {domain!r:.70}" for domain in sorted(domains - DOMAINS)),
        *(f"has tensors in the file {location!r:.70}" for location in sorted(locations - {WEIGHTS})),
    ]


def _answers(bundle: Bundle, name: str, engine: str, precision: str, inputs: list[Tiles]) -> list[Scores]:
    try:
        opened = ENGINES[engine].open(bundle.path(name, precision), precision, "cpu", 0)
        return [opened.run(tiles) for tiles in inputs]
    except Exception as error:  # every engine raises its own
        raise VerifyError(f"{name} at {precision} on {engine}: cannot run ({error})") from error
