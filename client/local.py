"""`AsyncLocal` and `Local`: what `AsyncClient` and `Client` do, in this process and without a server."""

import contextlib
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from numpy.typing import ArrayLike

from client.blocking import Blocking
from client.request import Formats, Source, file_name, file_parts, segment_params
from client.result import Result, split_files
from server.segment.request import OnProgress, QoS, Response, Upload, ignore_progress
from server.settings import Settings

if TYPE_CHECKING:
    from server.segment.service import SegmentationService


class AsyncLocal:
    """Bundles that are opened in this process. Belongs to one event loop.

    Args:
        bundles: path of a bundle, or of a folder of bundles; UNETPP_BUNDLES if None.
        settings: settings instead of those of the environment.
        service: open service instead of a new one; it is closed with this object.

    Raises:
        UnetppError: a bundle cannot be opened; names it and the reason.
    """

    def __init__(
        self,
        bundles: str | os.PathLike[str] | None = None,
        settings: Settings | None = None,
        service: "SegmentationService | None" = None,
    ) -> None:
        self._service = service or _open(bundles, settings)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the bundles."""
        self._service.close()

    async def models(self) -> list[dict[str, Any]]:
        """Lists the open models."""
        from server.api.schemas import summary

        registry = self._service.registry
        return [
            summary(one, registry.default).model_dump(mode="json") for one in registry.deployments.values()
        ]

    async def model(self, name: str) -> dict[str, Any]:
        """Returns the card of a model."""
        from server.api.schemas import card

        registry = self._service.registry
        return card(registry.get(name), registry.default).model_dump(mode="json")

    async def segment(
        self,
        source: Source,
        *,
        formats: Formats = ("mask", "json"),
        reference: Source | None = None,
        affine: ArrayLike | None = None,
        progress: OnProgress = ignore_progress,
        **parameters: Any,
    ) -> Result:
        """Segments an image, a stack, a volume or a zip of images.

        Args:
            source: a path of a file or of a folder with a DICOM series, the bytes of a file, a file open for bytes, or a numpy array of numbers or booleans:
                (H, W) grey, (H, W, 3 or 4) colour (alpha is ignored), (S, H, W) a stack, or with `affine`
                (X, Y, Z) a volume.
            formats: names of `format=`; "mask" is the mask in the format of the input. Each becomes an entry of
                `Result.files`.
            reference: labels to score against, in any form of `source`, on the grid of the input.
            affine: (4, 4) matrix of a volume given as an array, from voxel indices to mm in RAS, and of its
                reference.
            progress: callback with the stage (decode, infer, encode), the number of finished windows and the
                number of all windows.
            parameters: further request parameters by name, e.g. `level=2`, `model="hippocampus"`,
                `min_size_px=30`, `deadline_ms=2000`.

        Returns:
            The answer, with the mask on the grid of the input.

        Raises:
            InvalidParameter: a parameter is wrong.
            TypeError, ValueError: the source is of another type or shape.
            UnetppError: the input cannot be segmented; its class, of `server.errors`, names the reason.
        """
        params = segment_params(formats, parameters)
        deadline = math.inf if params.deadline_ms is None else time.monotonic() + params.deadline_ms / 1000
        with contextlib.ExitStack() as opened:
            parts = file_parts(source, reference, affine)
            files = {field: opened.enter_context(part.open()) for field, part in parts.items()}
            upload = Upload(files["file"], files.get("reference"), file_name(source))
            response = await self._service.segment(upload, params, QoS(deadline=deadline), progress)
        with contextlib.closing(response):
            return _result(response)


class Local(Blocking[AsyncLocal]):
    """Bundles that are opened in this process, for blocking code. Use it in a `with` block, or call `close`.

    Args:
        bundles: path of a bundle, or of a folder of bundles; UNETPP_BUNDLES if None.
        options: further arguments of `AsyncLocal`: `settings`, `service`.

    Raises:
        UnetppError: a bundle cannot be opened; names it and the reason.
    """

    def __init__(self, bundles: str | os.PathLike[str] | None = None, **options: Any) -> None:
        super().__init__(AsyncLocal(bundles, **options))

    def segment(self, source: Source, *, progress: OnProgress = ignore_progress, **options: Any) -> Result:
        """Segments an image, a stack, a volume or a zip of images.

        Args:
            source: a path of a file or of a folder with a DICOM series, the bytes of a file, a file open for bytes, or a numpy array of numbers or booleans:
                (H, W) grey, (H, W, 3 or 4) colour (alpha is ignored), (S, H, W) a stack, or with `affine`
                (X, Y, Z) a volume.
            progress: callback with the stage (decode, infer, encode), the number of finished windows and the
                number of all windows, in the thread that waits.
            options: further arguments of `AsyncLocal.segment`: `formats`, `reference`, `affine`, and the request
                parameters by name, e.g. `level=2`.

        Returns:
            The answer, with the mask on the grid of the input.

        Raises:
            TypeError, ValueError: the source is of another type or shape.
            UnetppError: the input cannot be segmented; its class, of `server.errors`, names the reason.
        """
        return self.run_with_progress(
            lambda put: self._client.segment(source, progress=put, **options), progress
        )


def _open(bundles: str | os.PathLike[str] | None, settings: Settings | None) -> "SegmentationService":
    from server.service import open_service

    chosen = settings or Settings()
    return open_service(chosen if bundles is None else chosen.model_copy(update={"bundles": Path(bundles)}))


def _result(response: Response) -> Result:
    body = response.body if isinstance(response.body, bytes) else response.body.read()
    target = response.target
    return Result(
        split_files(response.media_type, response.filename, body),
        target.model,
        target.mode,
        target.level,
        target.precision,
        {phase: 1000 * seconds for phase, seconds in response.timings.items()},
        # To four decimals, as in the headers of a server.
        round(response.mean_iou, 4) if response.overlaps else None,
        round(response.mean_dice, 4) if response.overlaps else None,
        response.note,
        response.degraded,
    )
