"""The bundle format, owned by its reader; the writer in `export/` imports these classes."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from server.errors import BundleDamaged
from server.runtime.calibration import Agreement, Calibration, Distilled, Measured, Part
from server.runtime.curve import DepthCurve

FORMAT: Literal["unetpp.bundle/1"] = "unetpp.bundle/1"
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
GOLDEN = "golden.npz"
# The network with all of its heads, which is not served: `unetpp verify` compares the served graphs with it.
NETWORK = "network.onnx"
ACCURATE = "accurate"
HEAD_STD = "head_std"

# The precision of a graph file; bf16 is the fp32 graph executed in bfloat16 by an engine that can.
GRAPH_PRECISIONS = {"fp32": "fp32", "bf16": "fp32", "fp16": "fp16", "int8": "int8"}

# In the place of a file's name it means that the weights lie at an address of this process's memory. ONNX
# Runtime refuses such a graph, and OpenVINO reads whatever lies there. Foreign operators and paths that leave
# the bundle are refused by both.
MEMORY_ADDRESS = b"_ORT_MEM_ADDR_"


class FileEntry(Part):
    """Size and hash of one file of the bundle."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Code(Part):
    """One coded term, within the lengths that DICOM allows."""

    value: str = Field(min_length=1, max_length=16)
    scheme: str = Field("SCT", min_length=1, max_length=16)
    meaning: str = Field(min_length=1, max_length=64)


class Codes(Part):
    """Terms by which DICOM names a class, by default of SNOMED CT.

    Attributes:
        category: category of the segmented property, e.g. Anatomical Structure.
        type: the segmented property, e.g. Hippocampus.
        modifier: modifier of the type, e.g. Anterior.
        region: anatomic region in which the property lies.
    """

    category: Code
    type: Code
    modifier: Code | None = None
    region: Code | None = None


class Class(Part):
    """One foreground class: its value in the mask, name, colour, and the terms by which DICOM names it."""

    value: int = Field(ge=1, le=255)
    name: str
    color: str = Field(pattern=r"^#[0-9a-f]{6}$")
    codes: Codes | None = None


class Window(Part):
    """Largest tile of one graph run, and the least share by which neighbouring windows overlap."""

    size: tuple[Annotated[int, Field(ge=2, le=65_536)], ...]
    overlap: float = Field(ge=0, le=0.75)


class ObjectChannel(Part):
    """A channel that tells touching objects apart, after that of the class in the scores of every graph.

    Attributes:
        kind: "distance": the farther a pixel lies inside its object, the higher; "centre": high around the middle of each
            object; "boundary": high at the edge of each object, also where two touch.
        saddle: two peaks of what it gives are one object if the saddle between them is at least this share of the lower one.
    """

    kind: Literal["distance", "centre", "boundary"]
    saddle: float = Field(0.8, gt=0, lt=1)


class Preprocessing(Part):
    """Operations of the graphs on an image after its statistics are removed, in this order.

    Attributes:
        clip: lowest and highest value.
        channel_order: index of the image's channel for each of the network's, e.g. (2, 1, 0) for a network trained
            on BGR.
        mean, std: constants per channel, in the network's order; values become (value - mean) / std.
    """

    clip: tuple[float, float] | None = None
    channel_order: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class Graph(Part):
    """One level, or the averaged network, with or without the spread of its heads.

    Attributes:
        name: "L1".."L5", "accurate" or "head_std".
        level: depth of the grid that it runs.
        divisor: number of pixels of which every tile axis is a multiple.
        parameters: trained parameters in it.
        macs_per_pixel: multiply-accumulates per input pixel or voxel.
        files: ONNX file per graph precision.
    """

    name: str = Field(pattern=r"^(L[1-5]|accurate|head_std)$")
    level: int = Field(ge=1, le=5)
    divisor: int = Field(ge=2, le=32)
    parameters: int = Field(ge=1)
    macs_per_pixel: float = Field(gt=0)
    files: dict[Literal["fp32", "fp16", "int8"], str]


class Comparison(Part):
    """Another network trained the same way and measured on the held-out data, e.g. a U-Net."""

    network: str
    parameters: int
    iou: float
    mean_iou: float
    dice: float


class Manifest(Part):
    """Properties of the network; operators' choices live in settings, the caller's in the request.

    Attributes:
        orientation: directions of the axes of a network for volumes, in nibabel's letters, e.g. "RAS".
        spacing: mm per voxel along them that volumes are resampled to; None takes any.
        normalization: statistics of the whole image, which the server gives to the graphs. "zscore": mean and standard
            deviation per channel; "percentile": the two `percentiles` become 0 and 1; "unit": the largest value of
            the data type becomes 1; "none": raw values.
        activation: function that makes scores of a head's output; "sigmoid-per-class" has several classes, and a background that is
            as likely as the best of them is not.
        activation_included: whether `network.onnx` ends in it.
        padding: filling of tiles where the input ends. "reflect": its mirror image; "constant": the value that enters the network
            as 0, because networks that see far take a mirror image for more of the same.
        objects: meaning of the channel that follows the class's; None where objects are separated by their shape.
        min_object_px: with `instances=true`, objects of fewer pixels (voxels) of the input are specks, and removed where the request
            names no size; chosen on validation data.
        min_object_score: with `instances=true`, objects of a lower mean score are removed where the request names no `min_score`; 0 keeps all.
        head_std: `accurate` with one channel more: the standard deviation over the heads of the foreground
            probability. None where there is one head, or the bundle was exported by a version that had no
            such graph.
        calibration: measured on labels.
        agreement: measured without labels, and used where there is no calibration.
        distilled: levels that `unetpp add-levels` added; None where all were trained with the network.
        depth_curve: chains of levels from which `mode=auto` chooses.
        mirror_axes: axes along which the network was trained on mirrored inputs, from 0, in its own orientation; None
            where that is not known.
        norm: layers of the network that normalise. "instance" looks at all of a tile, whose scores change
            with its padding.
    """

    format: Literal["unetpp.bundle/1"] = FORMAT
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    title: str
    description: str
    dims: Literal[2, 3]
    orientation: str | None = Field(None, pattern=r"^[RLAPSI]{3}$")
    spacing: tuple[float, float, float] | None = None
    channels: tuple[str, ...]
    normalization: Literal["zscore", "percentile", "unit", "none"]
    percentiles: tuple[float, float] | None = None
    preprocessing: Preprocessing | None = None
    activation: Literal["sigmoid", "softmax", "sigmoid-per-class"]
    activation_included: bool = False
    aggregation: Literal["mean-probability", "mean-logit", "last"] = "mean-probability"
    norm: Literal["none", "batch", "instance"] | None = None
    threshold: float = Field(0.5, gt=0, lt=1)
    classes: tuple[Class, ...] = Field(min_length=1)
    objects: ObjectChannel | None = None
    min_object_px: int = Field(0, ge=0, le=1_000_000)
    min_object_score: float = Field(0.0, ge=0, le=1)
    window: Window
    padding: Literal["reflect", "constant"] = "reflect"
    mirror_axes: tuple[int, ...] | None = None
    graphs: tuple[Graph, ...] = Field(min_length=1)
    head_std: Graph | None = None
    calibration: Calibration | None = None
    agreement: Agreement | None = None
    held_out: Measured | None = None
    depth_curve: DepthCurve | None = None
    comparison: tuple[Comparison, ...] = ()
    distilled: Distilled | None = None
    intended_use: str
    license: dict[str, str]
    provenance: dict[str, str]
    files: dict[str, FileEntry]

    @model_validator(mode="before")
    @classmethod
    def _read_earlier_name(cls, document: Any) -> Any:
        """Bundles written before 2026-11 call the graph `spread`."""
        if isinstance(document, dict) and "spread" in document:
            document = dict(document)
            graph = document.pop("spread")
            document[HEAD_STD] = {**graph, "name": HEAD_STD} if graph else None
        return document

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        listed = {WEIGHTS, GOLDEN} | {file for graph in self.all_graphs for file in graph.files.values()}
        if missing := listed - self.files.keys():
            raise ValueError(f"files without size and hash: {sorted(missing)}")
        if other := [file for file in listed - {WEIGHTS, GOLDEN} if not file.endswith(".onnx")]:
            # By their suffixes engines tell formats apart that may refer to further files.
            raise ValueError(f"graphs must be .onnx files: {other}")
        if odd := [name for name in self.files if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)]:
            raise ValueError(f"file names must stay inside the bundle: {odd}")
        if len(self.window.size) != self.dims:
            raise ValueError("window.size needs one number per axis")
        if any(side % graph.divisor for side in self.window.size for graph in self.all_graphs):
            raise ValueError("window.size must be a multiple of every graph's divisor")
        if "fp32" not in set.intersection(*(set(graph.files) for graph in self.graphs)):
            raise ValueError("every graph needs an fp32 file")
        if self.recommended_level not in self.levels:
            raise ValueError("the recommended level does not exist")
        return self

    @model_validator(mode="after")
    def _check_space(self) -> "Manifest":
        if (self.dims == 3) != (self.orientation is not None):
            raise ValueError("orientation belongs to networks for volumes, and only to them")
        if self.orientation and not all(set(self.orientation) & set(pair) for pair in ("RL", "AP", "SI")):
            raise ValueError(
                f"orientation names each of right/left, anterior/posterior, superior/inferior once: {self.orientation}"
            )
        if any(not 0 <= axis < self.dims for axis in self.mirror_axes or ()):
            raise ValueError(f"mirror_axes count from 0 to {self.dims - 1}: {self.mirror_axes}")
        if self.spacing and (self.dims == 2 or min(self.spacing) <= 0):
            raise ValueError("spacing belongs to networks for volumes and is positive")
        return self

    @model_validator(mode="after")
    def _check_names(self) -> "Manifest":
        names = [graph.name for graph in self.graphs]
        if len(set(names)) < len(names) or ACCURATE not in names:
            raise ValueError(f"graphs need different names and one must be {ACCURATE!r}: {names}")
        if odd := [graph.name for graph in self.graphs if graph.name not in (ACCURATE, f"L{graph.level}")]:
            raise ValueError(f"graphs whose name and level differ: {odd}")
        if self.distilled and not {*self.distilled.agreement} <= {*self.levels[:-1]}:
            raise ValueError("distilled names levels that do not exist, or the deepest one")
        if self.head_std and (self.head_std.name, self.head_std.level, [*self.head_std.files]) != (
            HEAD_STD,
            self.graph(ACCURATE).level,
            ["fp32"],
        ):
            raise ValueError(
                f"head_std must be named {HEAD_STD!r}, have the level of {ACCURATE!r}, and be in fp32 alone"
            )
        return self

    @model_validator(mode="after")
    def _check_classes(self) -> "Manifest":
        if self.depth_curve and not self.depth_curve.levels <= set(self.levels):
            raise ValueError("depth_curve has a level that does not exist")
        values = [c.value for c in self.classes]
        if values != list(range(1, len(values) + 1)):
            raise ValueError(f"values of classes must be 1, 2, ...: {values}")
        if self.objects and self.activation != "sigmoid":
            raise ValueError(f"objects needs one class with activation sigmoid, not {self.activation}")
        if self.activation == "sigmoid" and len(values) > 1:
            raise ValueError(f"activation sigmoid means exactly one class: {[c.name for c in self.classes]}")
        return self

    @property
    def all_graphs(self) -> tuple[Graph, ...]:
        """Those of the levels, `accurate`, and `head_std` where there is one."""
        return (*self.graphs, self.head_std) if self.head_std else self.graphs

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels that `mode=fast` can serve, shallowest first."""
        return tuple(sorted(graph.level for graph in self.graphs if graph.name != ACCURATE))

    @property
    def score_channels(self) -> int:
        """K of the scores: one sigmoid class, or background and the foreground classes."""
        return 1 if self.activation == "sigmoid" else len(self.classes) + 1

    @property
    def recommended_level(self) -> int:
        """The recommendation of the calibration, else of the agreement, else the deepest level."""
        measured = self.calibration or self.agreement
        return measured.recommended.level if measured else self.levels[-1]

    @property
    def graph_precisions(self) -> tuple[str, ...]:
        """Graph precisions that every graph has a file for."""
        return tuple(p for p in ("fp32", "fp16", "int8") if all(p in graph.files for graph in self.graphs))

    def graph(self, name: str) -> Graph:
        """The graph of that name, e.g. "L3"."""
        return next(graph for graph in self.all_graphs if graph.name == name)


class Bundle:
    """A bundle on disk whose every file has been checked against the manifest.

    Attributes:
        folder: folder that it was read from.
        manifest: manifest that was read.
        sha256: hash of the manifest's file, which stands for the bundle because that file has the hashes of
            all others.
    """

    def __init__(self, folder: Path, manifest: Manifest, sha256: str = "") -> None:
        self.folder = folder
        self.manifest = manifest
        self.sha256 = sha256

    def path(self, graph: str, precision: str) -> Path:
        """The ONNX file that runs `graph` at `precision` (bf16 runs the fp32 file)."""
        files: dict[str, str] = dict(self.manifest.graph(graph).files)  # type: ignore[arg-type]
        return self.folder / files[GRAPH_PRECISIONS[precision]]

    @property
    def golden(self) -> Path:
        """The golden pairs (npz)."""
        return self.folder / GOLDEN


def sha256(path: Path) -> str:
    """Hash of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bundle(folder: Path) -> Bundle:
    """Reads and checks a bundle.

    Raises:
        BundleDamaged: names the file that is missing, damaged or reaches beyond the bundle, or the field of
            the manifest that is wrong.
    """
    path = folder / MANIFEST
    try:
        written = path.read_bytes()
        manifest = Manifest.model_validate_json(written)
    except FileNotFoundError as error:
        text = f"{path}: not found; a bundle is a folder that `unetpp export` wrote"
        raise BundleDamaged(text, file=MANIFEST) from error
    except OSError as error:
        raise BundleDamaged(f"{path}: cannot be read: {error.strerror}", file=MANIFEST) from error
    except ValidationError as error:
        wrong = [(".".join(map(str, problem["loc"])), problem["msg"]) for problem in error.errors()]
        sentences = "; ".join(f"{field}: {message}".removeprefix(": ") for field, message in wrong)
        text = f"{path}: not a manifest that this version can read: {sentences}"
        raise BundleDamaged(text, file=MANIFEST, parameter=wrong[0][0] or None) from error
    check_files(folder, manifest)
    return Bundle(folder, manifest, hashlib.sha256(written).hexdigest())


def check_files(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Compares files of a bundle with the manifest: all of them, or those named.

    Raises:
        BundleDamaged: names the file.
    """
    for name in manifest.files if names is None else names:
        file, entry = folder / name, manifest.files[name]
        if not file.is_file():
            raise BundleDamaged(f"{file}: missing; copy the bundle again", file=name)
        if file.resolve().parent != folder.resolve():
            raise BundleDamaged(f"{file}: leads out of the bundle", file=name)
        if file.stat().st_size != entry.bytes or sha256(file) != entry.sha256:
            raise BundleDamaged(
                f"{file}: size or SHA-256 differs from the manifest; copy it again", file=name
            )
        if file.suffix == ".onnx" and MEMORY_ADDRESS in file.read_bytes():
            raise BundleDamaged(
                f"{file}: takes weights from an address in memory; export it again", file=name
            )
