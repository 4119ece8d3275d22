"""Many small images of one size in one piece: what is done once per image costs more than a small network.

The masks are those of `SegmentationService.segment_array` for each image, bit by bit: statistics are those of each image
alone, and tiles go through the same scheduler.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray

from server.arrays import Image, InputHeader, Mask, Tiles
from server.imaging import encode as encoding
from server.segment.deadline import deadline
from server.segment.merge import decide
from server.segment.normalization import (
    MAX_EXACT_PIXELS,
    MAX_EXACT_ROW,
    image_statistics_of_tiles,
    normalization,
)
from server.segment.preprocess import with_channels
from server.segment.registry import Target, run_with_fallback
from server.segment.request import QoS, SegmentParams
from server.segment.response import Finished
from server.segment.ticket import Ticket
from server.segment.windows import tile_grid

if TYPE_CHECKING:
    from server.segment.service import SegmentationService

# Larger images spend too little of their time beside the network for this to pay.
MAX_PIXELS = 256 * 256

# More pixels go one image after the other, because all of one piece lie in memory several times.
MAX_BATCH_PIXELS = 16 * 1024 * 1024

# Parameters that change neither the scores nor what is made of them, beside `threshold`.
PLAIN = frozenset(
    ("mode", "level", "model", "precision", "format", "threshold", "deadline_ms", "min_level", "nonfinite")
)


def fits(pixels: Shaped[ndarray, "N H W C"], target: Target, params: SegmentParams) -> bool:
    """Whether each image is one window of a network of images, and its mask needs nothing but its scores."""
    manifest, header = target.manifest, _header(pixels)
    if math.prod(pixels.shape[:-1]) > MAX_BATCH_PIXELS:
        return False
    if manifest.dims != 2 or math.prod(header.size) > MAX_PIXELS or not params.model_fields_set <= PLAIN:
        return False
    needs = encoding.needs(encoding.choose(params.format, None))
    padded = manifest.padding == "constant"
    return target.mode != "auto" and needs <= {"scores"} and not padded and _is_one_window(header, target)


def _header(pixels: Shaped[ndarray, "N H W C"]) -> InputHeader:
    count, height, width, channels = pixels.shape
    return InputHeader((height, width), channels, pixels.itemsize, count=count)


def _is_one_window(header: InputHeader, target: Target) -> bool:
    """Whether it is so at the target's level and at those that may be served instead."""
    grids = [
        tile_grid(header.size, one.manifest, one.instance.graph) for one in (target, *target.alternatives)
    ]
    return all(math.prod(grid.counts) == 1 for grid in grids)


async def segment(
    service: "SegmentationService",
    pixels: Shaped[ndarray, "N H W C"],
    params: SegmentParams,
    qos: QoS,
    target: Target,
) -> Finished:
    """Segments images for which `fits` is true; their masks are stacked, N before H.

    Raises:
        CallerError, TryAgain, ServerFault: `server.errors` draws the tree.
    """
    async with deadline(qos):
        return await run_with_fallback(
            target, params, lambda one: _segment_once(service, pixels, params, qos, one)
        )


async def _segment_once(
    service: "SegmentationService",
    pixels: Shaped[ndarray, "N H W C"],
    params: SegmentParams,
    qos: QoS,
    target: Target,
) -> Finished:
    header = _header(pixels)
    worker = service.workers.task()
    async with service.admission.admit((header, None), target, params, qos) as ticket:
        worker.admitted(ticket.memory_wait_s, "image")
        engine = await worker.wait("open", service.open_graph(ticket.target))
        tiles = await worker.run("decode", cut, pixels, ticket.target)
        result = await service.scheduler.run(ticket.flow, engine, tiles)
        worker.add("queue", max(0.0, result.started - result.submitted))
        worker.add("infer", result.ended - result.started)
        mask = await worker.run("restore", join, result.scores, header, ticket, params)
    finished = Finished(mask, ticket, worker.timings)
    service.complete(header, ticket, params, finished, len(pixels))
    for image, classes in zip(pixels, mask.classes, strict=True):
        service.on_completed(ticket, Image(image), Mask(classes), params)
    return finished


def cut(pixels: Shaped[ndarray, "N H W C"], target: Target) -> Tiles:
    """The tiles of images, each with the statistics of its image."""
    manifest = target.manifest
    height, width = tile_grid(pixels.shape[1:3], manifest, target.instance.graph).tile
    channels = len(manifest.channels)
    exact = (
        manifest.normalization == "zscore"
        and pixels.dtype == np.uint8
        and pixels.shape[-1] in (1, channels)
        and pixels.shape[2] <= MAX_EXACT_ROW
        and math.prod(pixels.shape[1:3]) <= MAX_EXACT_PIXELS
    )
    if exact:
        values = np.empty((len(pixels), pixels.shape[-1], *pixels.shape[1:3]), np.float32)
        values[...] = np.moveaxis(pixels, -1, 1)
        mean, inverse_std = image_statistics_of_tiles(values)
        values = np.broadcast_to(values, (len(values), channels, *values.shape[2:]))
    else:
        prepared = [with_channels(image, channels) for image in pixels]
        rows = [
            normalization(image, manifest.normalization, manifest.percentiles, pixels.dtype)
            for image in prepared
        ]
        mean, inverse_std = (np.stack(column) for column in zip(*rows, strict=True))
        values = np.moveaxis(np.stack(prepared), -1, 1)
    missing = height - values.shape[2], width - values.shape[3]
    if any(missing):
        values = np.pad(values, ((0, 0), (0, 0), *((0, side) for side in missing)), mode="reflect")
    shape = (len(values), channels)
    statistics = (
        np.broadcast_to(one, shape)[..., None, None].astype(np.float32) for one in (mean, inverse_std)
    )
    return Tiles(values, *statistics)


def join(
    scores: list[Shaped[ndarray, "K h w"]], header: InputHeader, ticket: Ticket, params: SegmentParams
) -> Mask:
    """The masks of images, as `WindowMerger` decides them for one window; its arrays are (N, H, W), and (K, N, H, W) of scores."""
    manifest = ticket.target.manifest
    height, width = header.size
    stacked = np.stack([one[: manifest.score_channels, :height, :width] for one in scores], axis=1)
    threshold = params.threshold
    if threshold is None and manifest.score_channels == 1:
        threshold = manifest.threshold
    classes, _ = decide(stacked, np.ones(stacked.shape[1:], np.float32), threshold)
    with_scores = "scores" in encoding.needs(ticket.formats)
    return Mask(classes, stacked.astype(np.float16) if with_scores else None)
