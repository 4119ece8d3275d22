"""One request, from bytes to bytes. Every door calls `SegmentationService.segment`: HTTP, jobs, zips, the command line.

The door of tensors (`/v2`), whose answers are not encoded, calls `input_batch.segment`, and `tile_batch.segment` for small images.
"""

import contextlib
import math
from collections.abc import Awaitable, Callable

from server.arrays import Image, InputHeader, Mask, Volume
from server.imaging import geometry
from server.imaging.decode import is_quick
from server.imaging.dicom_files import holds_dicom
from server.imaging.zip_reader import is_zip
from server.metrics import Metrics
from server.runtime.device import DeviceRunner, DeviceThread
from server.runtime.engines import Engine
from server.runtime.latency import LatencyModel
from server.runtime.loader import Loader
from server.runtime.scheduler import Scheduler
from server.segment import zip_batch
from server.segment.admission import Admission
from server.segment.certainty import Certainty
from server.segment.deadline import deadline
from server.segment.estimate import Estimate, cpu_work, mask_needs
from server.segment.flips import flips
from server.segment.preprocess import decode_options, decode_upload, note_resampling, read_headers
from server.segment.registry import Registry, Target, run_with_fallback
from server.segment.request import OnProgress, QoS, Response, SegmentParams, Upload, ignore_progress
from server.segment.response import Finished, encode_result, finish_mask, respond
from server.segment.sliding_window import NetworkInput, SlidingWindow, infer, make_sliding_window
from server.segment.ticket import Ticket
from server.segment.workers import Pool, Worker, Workers
from server.settings import BatchingSettings, LimitsSettings, RuntimeSettings

# Phases of the work beside the device.
CPU_PHASES = ("decode", "restore", "postprocess", "encode")

# A PNG of so few bytes and pixels is decoded, merged and encoded on the event loop: each takes some tenths of
# a millisecond, and handing them to a thread and back takes longer.
INLINE_BYTES = 32 * 1024
INLINE_PIXELS = 128 * 128
INLINE_FORMATS = ("mask.png",)

# Images with more pixels use the threads of volumes while their objects are split or outlined.
LONG_PIXELS = 1024 * 1024


class SegmentationService:
    """Segments uploads: it owns each part that a request passes through, from its upload to its response.

    Args:
        registry: deployments.
        runtime: settings of open graphs and their memory.
        batching: settings of batches and their wait.
        limits: limits of a request.
        metrics: counters.
        device: runner of the graphs; by default a thread of its own.
        latency: model that predicts seconds of work; by default an empty one.

    Attributes:
        registry: deployments.
        limits: limits of a request.
        metrics: counters.
        loader: loader that opens graphs.
        scheduler: queue in front of the device.
        admission: decision whether, and at which level, a request is served.
        on_completed: callback for each finished request: (ticket, source, mask, params), before its response
            is sent.
    """

    def __init__(
        self,
        registry: Registry,
        runtime: RuntimeSettings,
        batching: BatchingSettings,
        limits: LimitsSettings,
        metrics: Metrics,
        device: DeviceRunner | None = None,
        latency: LatencyModel | None = None,
    ) -> None:
        self.registry = registry
        self.limits = limits
        self.metrics = metrics
        self._device = device or DeviceThread()
        latency = latency or LatencyModel()
        self.loader = Loader(self._device, runtime.graph_memory_mb * 1_000_000)
        metrics.set_function(metrics.instances_open, self.loader.count_open)
        self.scheduler = Scheduler(self._device, latency, metrics, batching.max_wait_ms / 1000)
        self.admission = Admission(self.scheduler, latency, limits, metrics)
        self.workers = Workers()
        self.on_completed: Callable[[Ticket, Image | Volume, Mask, SegmentParams], None] = lambda *_: None

    def open(self) -> None:
        """Opens the recommended graph of the default model, after which requests can be served.

        Raises:
            BundleDamaged, EngineUnavailable: names the file and the reason.
        """
        self.loader.open_recommended(self.registry.get(self.registry.default))

    def open_in_background(self) -> None:
        """Opens the other graphs that `precision=auto` serves, those of the default model first."""
        default = self.registry.get(self.registry.default)
        self.loader.open_in_background(dict.fromkeys((default, *self.registry.deployments.values())))

    def close(self) -> None:
        """Fails what is queued, waits for what runs, and ends the threads."""
        self.scheduler.close()
        self.loader.close()
        self._device.close()
        self.workers.close()

    async def segment(
        self,
        upload: Upload,
        params: SegmentParams,
        qos: QoS = QoS(),  # noqa: B008 - frozen
        on_progress: OnProgress = ignore_progress,
        target: Target | None = None,
    ) -> Response:
        """Segments an image, a volume, a stack, or each image of a zip.

        Args:
            upload: encoded input.
            params: request parameters.
            qos: time limits and priority.
            on_progress: callback with (stage, windows done, windows in all); stages are decode, infer,
                encode.
            target: result of `registry.resolve` when the request began; by default it is resolved now.

        Raises:
            CallerError, TryAgain, ServerFault: `server.errors` draws the tree.
        """
        requested = target or self.registry.resolve(params)
        params = params.with_object_limits(requested.deployment.manifest)
        async with deadline(qos):
            if await self.is_batch(upload):
                return await zip_batch.segment(self, upload, params, qos, on_progress, requested)
            finished = await self._segment_again(upload, params, qos, on_progress, requested, encoded=True)
        return respond(finished, params)

    async def segment_array(
        self, source: Upload | Image | Volume, params: SegmentParams, qos: QoS, target: Target
    ) -> Finished:
        """Segments one input, encoded or decoded already, for a caller who takes the arrays of the mask.

        Raises:
            CallerError, TryAgain, ServerFault: `server.errors` draws the tree.
        """
        return await self._segment_again(source, params, qos, ignore_progress, target, encoded=False)

    async def _segment_again(
        self,
        source: Upload | Image | Volume,
        params: SegmentParams,
        qos: QoS,
        on_progress: OnProgress,
        requested: Target,
        *,
        encoded: bool,
    ) -> Finished:
        """Segments one input, by another candidate where this machine proves unable to run the first."""

        async def segment_one(target: Target) -> Finished:
            for file in (source.file, source.reference) if isinstance(source, Upload) else ():
                if file is not None:
                    file.seek(0)
            return await self._segment_one(source, params, qos, on_progress, target, encoded=encoded)

        return await run_with_fallback(requested, params, segment_one)

    async def _segment_one(
        self,
        source: Upload | Image | Volume,
        params: SegmentParams,
        qos: QoS,
        on_progress: OnProgress,
        requested: Target,
        *,
        encoded: bool,
    ) -> Finished:
        upload = source if isinstance(source, Upload) else None
        options = decode_options(params, self.limits)
        worker = self.workers.task(_pool(upload))
        headers = await worker.run("decode", read_headers, source, options)
        accept = upload.accept if upload else None
        async with self.admission.admit(headers, requested, params, qos, accept) as admitted:
            worker.admitted(admitted.memory_wait_s, _threads(worker, headers[0], admitted, params))
            # Before anything is decoded, because it may fail.
            await worker.wait("open", self.open_graph(admitted.target.runs[0]))
            on_progress("decode", 0, admitted.estimate.windows)
            decoded, reference = await worker.run(
                "decode", decode_upload, source, params, options, headers[0]
            )
            decoded = note_resampling(decoded, admitted.placement, admitted.target.manifest)
            ticket, window, mask = await self._infer(decoded, admitted, params, worker, on_progress)
            on_progress("encode", ticket.estimate.windows, ticket.estimate.windows)
            result = await worker.run(
                "postprocess", finish_mask, window, mask, reference, ticket, params, worker
            )
            body = None
            if upload and encoded:
                name = _name(upload, headers[0])
                body = await worker.run("encode", encode_result, result, ticket, params, name)
        finished = Finished(result.mask, ticket, worker.timings, decoded.note, dict(result.overlaps), body)
        self.complete(headers[0], ticket, params, finished)
        self.on_completed(ticket, decoded, mask, params)
        return finished

    async def infer_decoded(
        self, source: Image | Volume, target: Target, params: SegmentParams, qos: QoS
    ) -> Mask:
        """Segments an input that is decoded already; the mask is as the scores decide it.

        Raises:
            CallerError, TryAgain, ServerFault: `server.errors` draws the tree.
        """
        header = source.input_header
        worker = self.workers.task("image" if header.kind == "image" else "volume")
        async with self.admission.admit((header, None), target, params, qos) as ticket:
            return (await self._infer(source, ticket, params, worker))[2]

    async def _infer(
        self,
        source: Image | Volume,
        ticket: Ticket,
        params: SegmentParams,
        worker: Worker,
        on_progress: OnProgress = ignore_progress,
    ) -> tuple[Ticket, SlidingWindow, Mask]:
        """Runs what the ticket says: one graph, or those of a chain one after another until an answer is certain enough."""
        done = 0
        prepared: NetworkInput | None = None

        def show(stage: str, windows: int, _: int) -> None:
            on_progress(stage, done + windows, ticket.estimate.windows)

        with contextlib.ExitStack() as places:
            for step, target in enumerate(ticket.target.runs):
                flow = (
                    places.enter_context(self.admission.continue_chain(ticket, step)) if step else ticket.flow
                )
                engine = await worker.wait("open", self.open_graph(target))
                certainty = Certainty() if target.mode == "auto" else None
                window = await worker.run(
                    "decode", _window, source, ticket, target, params, certainty, prepared
                )
                mask = await infer(window, flow, engine, self.scheduler, worker, show)
                share = certainty.share if certainty else None
                if share is None or not ticket.target.continues_after(step, share):
                    break
                done, prepared = done + window.tile_count, window.input
                # Before the next answer takes its memory.
                del window, mask
        ticket.flow.later_s = 0.0
        return ticket.served(step, share), window, mask

    async def is_batch(self, upload: Upload) -> bool:
        """Returns whether an upload is a zip of images, each with an answer; DICOM in a zip is one input."""
        if not is_zip(upload.file):
            return False
        worker = self.workers.task()
        return not await worker.run("decode", holds_dicom, upload.file, self.limits.max_zip_images)

    def open_graph(self, target: Target) -> Awaitable[Engine]:
        """Opens the graph of a target, if it is not open."""
        return self.loader.ensure_open(target.deployment, target.instance)

    async def estimate(self, upload: Upload, params: SegmentParams) -> Estimate:
        """Estimates what a request would take; leaves the file at its start.

        Raises:
            CallerError: it could not be segmented at all, or is over a limit.
        """
        target = self.registry.resolve(params)
        params = params.with_object_limits(target.deployment.manifest)
        if await self.is_batch(upload):
            return await zip_batch.estimate(self, upload, params)
        options = decode_options(params, self.limits)
        headers = await self.workers.task().run("decode", read_headers, upload, options)
        return self.admission.estimate(headers, target, params, upload.accept)

    def complete(
        self,
        header: InputHeader,
        ticket: Ticket,
        params: SegmentParams,
        finished: Finished,
        inputs: int = 1,
    ) -> None:
        """Teaches the latency model and counts what the response tells of quality, of so many inputs."""
        beside_s = sum(seconds for phase, seconds in finished.timings.items() if phase in CPU_PHASES)
        self.admission.observe_cpu(header, ticket, params, beside_s)
        target, requested = ticket.target, ticket.requested
        if ticket.degraded:
            levels = (f"{requested.level}", f"{target.level}")
            self.metrics.degraded.labels(target.model, *levels, ticket.degraded).inc(inputs)
            self.metrics.level_deficit.labels(target.model).inc(inputs * (requested.level - target.level))
        # What a caller does with a mask tells nothing of how good the level is.
        if finished.overlaps and not params.changes_mask:
            named = {c.name: finished.overlaps[c.value] for c in target.manifest.classes}
            self.metrics.reference.observe((target.model, target.mode, f"{target.level}"), named)


def _name(upload: Upload, header: InputHeader) -> str:
    """Returns the name that answers repeat; none of DICOM, which is often named after the patient."""
    return "" if header.dicom else upload.name


def _pool(upload: Upload | None) -> Pool:
    """Returns the pool in which the header is read."""
    quick = upload is not None and upload.reference is None and is_quick(upload.file, INLINE_BYTES)
    return "inline" if quick else "image"


def _threads(worker: Worker, header: InputHeader, ticket: Ticket, params: SegmentParams) -> Pool:
    """Returns the pool for the rest of the work, whose size is now known."""
    kind = cpu_work(header, ticket.formats, params)[2]
    if header.kind != "image" or (kind in ("instances", "outlines") and ticket.estimate.pixels > LONG_PIXELS):
        return "volume"
    quick = worker.pool == "inline" and ticket.formats == INLINE_FORMATS and not params.postprocessing
    return "inline" if quick and math.prod(header.size) <= INLINE_PIXELS else "image"


def _window(
    source: Image | Volume,
    ticket: Ticket,
    target: Target,
    params: SegmentParams,
    certainty: Certainty | None,
    prepared: NetworkInput | None,
) -> SlidingWindow:
    placement = ticket.placement
    if isinstance(source, Image):
        # It may have been turned upright (EXIF) since its header was read.
        placement = geometry.place_image(source.size)
    graph, needs = target.instance.graph, mask_needs(ticket.formats, params, target.manifest)
    copies = flips(params.tta, target.manifest.mirror_axes)
    return make_sliding_window(
        source, placement, target.manifest, graph, needs, params.threshold, certainty, copies, prepared
    )
