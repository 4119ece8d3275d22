"""Images as the server sees them, with or without labels: for calibrating int8 and for measuring."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from model.reading import DataError, Sample, misplaced, read_index, read_label, report
from server.arrays import Image, Tiles, Volume
from server.errors import UnetppError
from server.imaging.decode import decode
from server.imaging.decode_options import DecodeOptions
from server.runtime.bundle import Graph, Manifest
from server.segment import quality
from server.segment.preprocess import place, with_channels
from server.segment.sliding_window import make_sliding_window, prepare_input
from server.segment.windows import Windows

# Pixels or voxels of a file; large, because the operator has chosen the files.
MAX_PIXELS = 1_000_000_000

# Callback with a line on a file that is left out.
Skip = Callable[[str], None]


@dataclass(frozen=True)
class Labelled:
    """An image or volume, through the server's own decoder, and its label map in the same pixels or voxels."""

    id: str
    image: Image | Volume
    label: UInt8[ndarray, "*size"]


def labelled(root: Path, split: str, manifest: Manifest) -> Iterator[Labelled]:
    """Yields the images or volumes of a split.

    Raises:
        DataError: names a file that is missing, unreadable or of another size; or the split has no rows.
    """
    for sample in samples(root, split, manifest.dims):
        image = _decoded(sample.image)
        label = (
            read_label(sample.label, manifest.score_channels)
            if manifest.dims == 2
            else _voxels(sample, manifest)
        )
        if label.shape != image.size:
            raise DataError(f"{sample.id}: image is {image.size}, label is {label.shape}")
        yield Labelled(sample.id, image, label)


def samples(root: Path, split: str, dims: int) -> list[Sample]:
    """Returns the rows of a split.

    Raises:
        DataError: there are none.
    """
    splits = read_index(root, dims)
    if not splits.get(split):
        raise DataError(f"{root}: index.csv has no rows with split {split!r}; it has {', '.join(splits)}")
    return splits[split]


def calibration_tiles(
    root: Path,
    manifest: Manifest,
    graphs: Sequence[Graph],
    count: int,
    seed: int = 0,
    skip: Skip = lambda line: None,
    labels: Path | None = None,
) -> dict[str, list[Tiles]]:
    """Cuts the middle windows of randomly chosen images or volumes, for each graph by its name.

    Args:
        root: data folder, whose training split is taken; or any folder of images.
        manifest: channels, window and normalisation.
        graphs: graphs, whose divisors may make the windows of a small image different.
        count: number of images.
        seed: seed of the choice.
        skip: callback with a line on each file of a folder of images that is left out.
        labels: folder of labels, whose files are not images where it lies in `root`.
    """
    if (root / "index.csv").is_file():
        files = [sample.image for sample in samples(root, "train", manifest.dims)]
    else:
        files = image_files(root, labels=labels)
    chosen = [files[index] for index in np.random.default_rng(seed).permutation(len(files))]
    sources = (
        (_decoded(file) for file in chosen)
        if (root / "index.csv").is_file()
        else (item.image for item in _fitting(root, chosen, manifest, skip))
    )
    tiles: dict[str, list[Tiles]] = {graph.name: [] for graph in graphs}
    for source in islice(sources, count):
        placement = place(source.input_header, manifest, "auto")
        prepared = prepare_input(source, placement, manifest)
        # Most graphs have the same windows; their tiles are then one in memory.
        known: dict[Windows, Tiles] = {}
        for graph in graphs:
            window = make_sliding_window(source, placement, manifest, graph, prepared=prepared)
            if window.windows not in known:
                # The middle one, because the corners of a large volume are air.
                middle = len(window.windows) // 2
                known[window.windows] = window.cut(range(middle, middle + 1))
            tiles[graph.name].append(known[window.windows])
    return tiles


def image_files(root: Path, split: str = "val", dims: int = 2, labels: Path | None = None) -> list[Path]:
    """Returns the files of a folder and of the folders in it, hidden ones left out; of a data folder the images of a split.

    Args:
        root: the folder.
        split: split of a data folder.
        dims: axes of its images.
        labels: folder in it that is left out.

    Raises:
        DataError: there are none.
    """
    if (root / "index.csv").is_file():
        return [sample.image for sample in samples(root, split, dims)]
    files = [file for file in sorted(root.rglob("*")) if file.is_file() and not _hidden(file, root)]
    if labels:
        files = [file for file in files if labels.resolve() not in file.resolve().parents]
    if not files:
        raise DataError(
            f"{root}: holds no files; it must be a folder of images, or of data with an index.csv"
        )
    return files


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


@dataclass(frozen=True)
class Picture:
    """An image or volume through the server's own decoder; `id` is its path in the folder."""

    id: str
    image: Image | Volume


def pictures(
    root: Path, manifest: Manifest, split: str = "val", skip: Skip = lambda line: None
) -> Iterator[Picture]:
    """Yields the images or volumes of a folder that the network can take.

    Args:
        root: folder of images in any nesting, or a data folder.
        manifest: dims and channels.
        split: split of a data folder.
        skip: callback with a line on each file that is left out.

    Raises:
        DataError: there is none; says why.
    """
    yield from _fitting(root, image_files(root, split, manifest.dims), manifest, skip)


def with_labels(
    root: Path, labels: Path, manifest: Manifest, split: str = "val", skip: Skip = lambda line: None
) -> Iterator[Labelled]:
    """Yields the images or volumes of a folder with their label maps, which are the files of the same names in another.

    A label may have another suffix than its image, and lack the suffix _0000 of nnU-Net's images.

    Args:
        root: folder of images in any nesting, or a data folder.
        labels: folder with the same nesting.
        manifest: dims, channels and classes.
        split: split of a data folder.
        skip: callback with a line on each image that is left out.

    Raises:
        DataError: there is none; says why.
    """
    known = {_key(file, labels): file for file in image_files(labels)}
    files = image_files(root, split, manifest.dims, labels)
    base = root / "images" if (root / "index.csv").is_file() else root
    left_out: list[str] = []

    def leave_out(line: str) -> None:
        left_out.append(line)
        skip(line)

    count = 0
    for item in _fitting(root, files, manifest, leave_out):
        key = _key(root / item.id, base)
        label = known.get(key) or known.get(key.removesuffix("_0000"))
        try:
            if label is None:
                raise DataError(f"{item.id}: has no label of that name in {labels}")
            yield Labelled(item.id, item.image, _label_map(label, item.image, len(manifest.classes)))
            count += 1
        except (DataError, UnetppError) as error:
            leave_out(str(error))
    if not count:
        raise DataError(report(f"{root}: no image with a label", left_out))


def _key(file: Path, root: Path) -> str:
    """The path of a file in its folder without suffix; of two suffixes where the last is .gz."""
    path = file.relative_to(root)
    return str(path.with_name(path.name.removesuffix(".gz")).with_suffix(""))


def _fitting(root: Path, files: list[Path], manifest: Manifest, skip: Skip) -> Iterator[Picture]:
    """Yields the files that can be read and that the network can take, and tells of the others.

    Raises:
        DataError: there is none.
    """
    left_out = []
    for file in files:
        name = str(file.relative_to(root))
        try:
            source = _decoded(file)
            place(source.input_header, manifest, "auto")
            one = source.values[(slice(1),) * (source.values.ndim - 1)]
            with_channels(one, len(manifest.channels))
        except (DataError, UnetppError) as error:
            reason = str(error).removeprefix(f"{file.parent.name}/{file.name}: ")
            left_out.append(f"{name}: {reason}")
            skip(left_out[-1])
            continue
        yield Picture(name, source)
    if len(left_out) == len(files):
        raise DataError(report(f"{root}: no file that {manifest.name!r} can take", left_out))


def _label_map(path: Path, image: Image | Volume, classes: int) -> UInt8[ndarray, "*size"]:
    """Reads a label map on the grid of its image.

    Raises:
        DataError: it is a colour picture, or has values other than the classes.
        UnetppError: it lies on another grid.
    """
    label = _decoded(path, labels=True)
    quality.check_grid(image.input_header, label.input_header)
    if label.values.shape[-1] != 1 and np.ptp(label.values, axis=-1).any():
        raise DataError(f"{path.name}: is a colour picture; labels are one value per pixel")
    return _classes(path, label.values[..., 0], classes)


def _classes(path: Path, values: np.ndarray, classes: int) -> UInt8[ndarray, "*size"]:
    """The class per pixel of a label's values; of one class every value above 0 is foreground."""
    if classes == 1:
        return (values > 0).astype(np.uint8)
    label = values.astype(np.uint8)
    if (label != values).any() or label.max(initial=0) > classes:
        raise DataError(f"{path}: values other than the classes 0 to {classes}")
    return label


def _decoded(path: Path, *, labels: bool = False) -> Image | Volume:
    try:
        with path.open("rb") as file:
            return decode(file, DecodeOptions(MAX_PIXELS, MAX_PIXELS, labels=labels))
    except UnetppError as error:
        raise DataError(f"{path.parent.name}/{path.name}: {error}") from error


def _voxels(sample: Sample, manifest: Manifest) -> UInt8[ndarray, "*size"]:
    """Reads a label volume in the voxels of its file, like a response."""
    if apart := misplaced(sample):
        raise DataError(apart)
    return _classes(sample.label, _decoded(sample.label, labels=True).values[..., 0], len(manifest.classes))
