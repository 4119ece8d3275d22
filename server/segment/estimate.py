"""Estimate of the work of a request, from its header alone."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from server.arrays import InputHeader
from server.errors import TooLarge
from server.imaging import encode as encoding
from server.imaging.decode_options import DecodeOptions
from server.imaging.geometry import Placement
from server.runtime.bundle import Graph, Manifest
from server.runtime.latency import UNKNOWN, Prediction
from server.segment import postprocess
from server.segment.flips import flips
from server.segment.request import SegmentParams
from server.segment.statistics import LISTED_BYTES, MAX_LISTED
from server.segment.windows import CHUNK_PIXELS, tile_grid
from server.settings import LimitsSettings

# Bytes of the place of one window; a stack of tiny slices has more windows than pixels in one.
WINDOW_BYTES = 100


@dataclass(frozen=True)
class Estimate:
    """Predicted work of a request.

    Attributes:
        pixels: pixels or voxels of the input, or of the network's grid where that has more.
        windows: windows to be run, each copy of one counted.
        tile_pixels: pixels of each window.
        padding: pixels of all windows that are not the input's.
        memory_bytes: peak in bytes of the decoded input, the open scores, the mask and its encoding.
        device_s: predicted seconds on the device; 0 where nothing is known.
        cpu_s: predicted seconds beside the device: decoding, merging, post-processing and encoding; 0 where
            nothing is known.
        fastest_s: device and CPU time in seconds at the best rates ever observed; 0 unless enough was
            observed to refuse a request because of it.
        observed: keys and sizes of the latency model that the times rest on.
        tile: predicted seconds of one window.
        steps: estimates of the targets of a chain; the other attributes are those of all of them together.
        later_s: predicted seconds on the device after the first target of a chain, weighed by how often it goes on.
    """

    pixels: int
    windows: int
    tile_pixels: int
    padding: int
    memory_bytes: int
    device_s: float = 0.0
    cpu_s: float = 0.0
    fastest_s: float = 0.0
    observed: tuple[tuple[Hashable, int], ...] = ()
    tile: Prediction = UNKNOWN
    steps: tuple["Estimate", ...] = ()
    later_s: float = 0.0

    @property
    def first(self) -> "Estimate":
        """The estimate of what is run first."""
        return self.steps[0] if self.steps else self

    @property
    def seconds(self) -> float:
        """Predicted time of the request alone."""
        return self.device_s + self.cpu_s

    def __str__(self) -> str:
        seconds = f"about {self.seconds:,.0f} s and " if self.fastest_s else ""
        return f"{seconds}{self.memory_bytes / 1e6:,.0f} MB of memory"


def estimate_work(
    header: InputHeader,
    reference: InputHeader | None,
    placement: Placement,
    manifest: Manifest,
    graph: Graph,
    formats: tuple[str, ...],
    params: SegmentParams,
) -> Estimate:
    """Adds up windows and memory; times are filled in by admission.

    Args:
        header: header of the input.
        reference: header of the reference, if there is one.
        placement: position of the network's grid in the input.
        manifest: manifest of the network.
        graph: graph to be run.
        formats: formats of the answer.
        params: request parameters, because post-processing takes memory.
    """
    grid = tile_grid(placement.size, manifest, graph, flat=placement.flat)
    windows, tile_pixels = math.prod(grid.counts), math.prod(grid.tile)
    copies = len(flips(params.tta, manifest.mirror_axes))
    pixels, network, k = math.prod(header.size), math.prod(placement.size), manifest.score_channels
    needs = mask_needs(formats, params, manifest)
    # The network's own copy: resampled, or colours averaged to grey.
    copied = network * 4 * header.channels if placement.resampled else 0
    copied += network * 4 if header.channels > len(manifest.channels) else 0
    # Along the axis that orders the windows one window is open, along the others all of it.
    sides = (
        t if a == grid.axis else max(s, t)
        for a, (s, t) in enumerate(zip(placement.size, grid.tile, strict=True))
    )
    open_channels = k + ("head_std" in needs) + (manifest.objects is not None)
    open_rows = math.prod(sides) * 4 * (2 * open_channels + 3)
    chunks = (
        max(CHUNK_PIXELS, tile_pixels * header.count)
        * copies
        * 4
        * (len(manifest.channels) + open_channels)
        * 2
        + WINDOW_BYTES * windows * header.count
    )
    compared = (
        math.prod(reference.size) * (reference.channels * reference.sample_bytes + 3) if reference else 0
    )
    # The mask, its encoded form, and what finding the best class takes in passing.
    memory = pixels * (header.channels * header.sample_bytes + 2) + copied + open_rows + compared
    memory += _output_bytes(header, pixels, manifest, needs, formats, params)
    covered = math.prod(min(s, t) for s, t in zip(placement.size, grid.tile, strict=True))
    tiles, count = windows * copies * header.count, header.count
    return Estimate(
        max(pixels, network) * count,
        tiles,
        tile_pixels,
        tiles * (tile_pixels - covered),
        memory * count + chunks,
    )


def mask_needs(formats: tuple[str, ...], params: SegmentParams, manifest: Manifest) -> frozenset[str]:
    """Parts of the mask that the formats and the post-processing need.

    Beside those of the formats these are "confidence", where objects have a mean score, and "interior", where the network itself tells
    objects apart.
    """
    needs = encoding.needs(formats)
    scored = {"confidence"} if "objects" in needs or params.min_score else frozenset()
    by_network = {"interior"} if params.instances and manifest.objects is not None else frozenset()
    return needs | scored | by_network


def check_limits(estimate: Estimate, header: InputHeader, limits: LimitsSettings) -> None:
    """Compares a request with the limits of one.

    Raises:
        TooLarge: names the limit and the size.
    """
    if header.kind != "image":
        DecodeOptions(0, limits.max_voxels).check_volume(header.size, f"Here it would take {estimate}. ")
    limit_mb = limits.max_memory_mb
    if estimate.memory_bytes > limit_mb * 1e6:
        raise TooLarge(
            f"this would take {estimate}; the limit is {limit_mb:,} MB. Crop the input, ask for fewer formats, of which "
            "the mask takes least, or raise UNETPP_LIMITS__MAX_MEMORY_MB on the server",
            limit=limit_mb,
            actual=round(estimate.memory_bytes / 1e6),
            unit="MB",
            setting="UNETPP_LIMITS__MAX_MEMORY_MB",
        )


def _output_bytes(
    header: InputHeader,
    pixels: int,
    manifest: Manifest,
    needs: frozenset[str],
    formats: tuple[str, ...],
    params: SegmentParams,
) -> int:
    """Memory of what becomes of the mask."""
    # Scores as float16 and once more encoded; the standard deviation, encoded as float32.
    memory = (6 * manifest.score_channels if "scores" in needs else 0) * pixels
    memory += (10 if "head_std" in needs else 0) * pixels
    # The score of each pixel's class; what is labelled and listed. Post-processing is over when the mask is
    # encoded.
    objects = "objects" in needs
    memory += (2 * ("confidence" in needs) + 2 * ("interior" in needs)) * pixels
    encoded = (postprocess.label_bytes(pixels) if objects else 0) + encoding.memory(
        formats, header, len(manifest.classes)
    )
    memory += max(postprocess.memory_bytes(params, pixels, objects=objects), encoded)
    return memory + (LISTED_BYTES * min(MAX_LISTED, pixels) if "report" in needs else 0)


def cpu_work(header: InputHeader, formats: tuple[str, ...], params: SegmentParams) -> tuple[str, str, str]:
    """The kind of work beside the device, as a key of the latency model."""
    # By what is done with the mask: the objects of one caller say nothing of the plain mask of another.
    if params.instances:
        work = "instances"
    elif any(encoding.ENCODERS[name].outlines for name in formats):
        work = "outlines"
    elif encoding.needs(formats) or params.needs_objects or params.fill_holes:
        work = "objects"
    else:
        work = "mask"
    return "cpu", header.kind, work


def chain_estimate(steps: Sequence[Estimate], going_on: Sequence[float]) -> Estimate:
    """The estimate of an input that goes all the way through a chain.

    Args:
        steps: estimates of its targets.
        going_on: by target but the first: share of the inputs for which it is run.
    """
    last = steps[-1]
    known = all(step.fastest_s for step in steps)
    # The work beside the device is done once, but for cutting and merging.
    before_s = sum(step.windows * step.tile.fastest_s for step in steps[:-1])
    return replace(
        last,
        windows=sum(step.windows for step in steps),
        padding=sum(step.padding for step in steps),
        memory_bytes=max(step.memory_bytes for step in steps),
        device_s=sum(step.device_s for step in steps),
        fastest_s=before_s + last.fastest_s if known else 0.0,
        observed=tuple(dict.fromkeys(pair for step in steps for pair in step.observed)),
        steps=tuple(steps),
        later_s=math.fsum(step.device_s * share for step, share in zip(steps[1:], going_on, strict=True)),
    )


def total(counted: Sequence[tuple[Estimate, int]]) -> Estimate:
    """The estimate of the inputs of one request, a few of which are worked on at once; counts how many are alike."""
    ones = [times(one, count) for one, count in counted]
    return replace(
        ones[0],
        pixels=sum(one.pixels * count for one, count in counted),
        windows=sum(one.windows for one in ones),
        memory_bytes=max(one.memory_bytes for one in ones),
        device_s=sum(one.device_s for one in ones),
        cpu_s=sum(one.cpu_s for one in ones),
        fastest_s=sum(one.fastest_s for one in ones) if all(one.fastest_s for one in ones) else 0.0,
        observed=tuple(dict.fromkeys(pair for one in ones for pair in one.observed)),
    )


def times(estimate: Estimate, count: int) -> Estimate:
    """The estimate of `count` inputs that are like one."""
    return replace(
        estimate,
        windows=estimate.windows * count,
        device_s=estimate.device_s * count,
        cpu_s=estimate.cpu_s * count,
        fastest_s=estimate.fastest_s * count,
    )
