"""What the routes that segment have in common: their query, their body, and what the answer's headers say."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field
from starlette.datastructures import QueryParams
from starlette.requests import Request

from server import errors
from server.imaging import encode
from server.segment.request import Answer, SegmentRequest
from server.settings import Precision

BINARY = {"type": "string", "format": "binary"}
REQUEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "required": ["file"], "properties": {"file": BINARY, "reference": BINARY}}
            },
            "image/*": {"schema": BINARY},
            "application/gzip": {"schema": BINARY},
            "application/zip": {"schema": BINARY},
            "application/octet-stream": {"schema": BINARY},
        },
    }
}


class Parameters(BaseModel):
    """The query of whatever segments."""

    mode: str | None = Field(None, description="accurate (default): mean of all heads; fast: one level")
    level: int | None = Field(None, description="1 (fastest) to 4 (deepest); implies mode=fast")
    model: str | None = Field(None, description="bundle name; see GET /models")
    precision: Precision = Field("auto", description="auto: the fastest within 0.5 points of IoU of fp32")
    format: str | None = Field(
        None,
        description=" | ".join((encode.MASK, *encode.ENCODERS))
        + "; several by comma: a zip of them; else by Accept, else as the input",
    )
    include_mask: bool = Field(
        False,
        description="with format=json: the mask in base64, as mask_png, mask_tiff, mask_nifti or mask_nrrd, or with instances as mask_labels_png and so on",
    )
    threshold: float | None = Field(
        None, description="0 to 1: foreground is what scores above it; of several classes the best; else as the model card says"
    )
    fill_holes: bool = Field(False, description="holes that an object encloses become part of it")
    instances: bool = Field(False, description="touching objects of one class are split; the mask is then their numbers")
    min_size_px: int | None = Field(None, description="objects of fewer pixels (voxels) are removed")
    min_size_mm2: float | None = Field(
        None,
        description="of images, and of pages that are times: objects of a smaller area are removed; the pixel size must be known",
    )
    min_size_mm3: float | None = Field(None, description="of volumes and stacks: objects of a smaller volume are removed")
    keep_largest: bool = Field(False, description="of each class only the largest object is kept")
    pixel_size_um: str | None = Field(
        None,
        description="of images and stacks, as 0.5 or 0.5x0.25 (height x width; of stacks also x page); wins over what the file says",
    )
    axis: str = Field("auto", description="slices of a volume for a model of images: auto (coarsest spacing), 0, 1, 2")
    nonfinite: str = Field("refuse", description="values that are NaN or infinite: refuse, or zero")
    axes: str = Field("", description="of a TIFF, slowest first, as ZYX, TCYX, YXS; wins over its OME or ImageJ metadata")
    channel: int | None = Field(
        None, description="0, 1, …: of an input with several channels this one alone; else colours, or the first"
    )

    def wanted(self, request: Request) -> SegmentRequest:
        """The request in the domain's words.

        Raises:
            InvalidParameter: a parameter is misspelt or given twice.
            UnknownFormat: the format asked for, or what Accept allows, is none of ours.
        """
        self._check_names(request.query_params)
        accept = request.headers.get("accept")
        # Before the body comes; what it holds may leave less to choose from.
        encode.choose(self.format, accept, instances=self.instances)
        return SegmentRequest(
            accept=accept, **self.model_dump(include={field.name for field in dataclasses.fields(SegmentRequest)})
        )

    def _check_names(self, query: QueryParams) -> None:
        """Refuses what would be ignored: misspelt parameters, and all but the last of several."""
        known = type(self).model_fields
        for name, times in Counter(name for name, _ in query.multi_items()).items():
            if name not in known:
                raise errors.InvalidParameter(f"unknown parameter {name!r:.60}; there are: {', '.join(known)}")
            if times > 1:
                raise errors.InvalidParameter(f"{name} is given {times} times; give it once")


def headers(answer: Answer) -> dict[str, str]:
    """The headers of an answer."""
    route = answer.choice.route
    found = {
        "Content-Type": answer.media_type,
        "X-Segment-Model": answer.choice.model,
        "X-Segment-Mode": route.mode,
        "X-Segment-Level": str(route.level),
        "X-Segment-Mode-Requested": answer.requested.mode,
        "X-Segment-Level-Requested": str(answer.requested.level),
        "X-Segment-Precision": answer.choice.precision,
        "Content-Disposition": f'inline; filename="{answer.file}"',
        "Server-Timing": ", ".join(f"{phase};dur={seconds * 1e3:.2f}" for phase, seconds in answer.seconds.items()),
    }
    if answer.quality:
        found["X-Segment-IoU"] = f"{answer.mean_iou:.4f}"
        found["X-Segment-Dice"] = f"{answer.mean_dice:.4f}"
    if answer.postprocessing:
        found["X-Segment-Postprocessing"] = shown(answer.postprocessing)
    if answer.degraded:
        found["X-Segment-Degraded"] = answer.degraded
    if answer.note:
        found["X-Segment-Note"] = answer.note
    return found


def shown(postprocessing: Mapping[str, Any]) -> str:
    """What was done, in its order, as a line: "threshold=0.4; fill_holes"."""
    return "; ".join(name if value is True else f"{name}={value:g}" for name, value in postprocessing.items())
