"""What the routes that segment have in common: their query, their body, and what the answer's headers say."""

import dataclasses
from collections import Counter
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
    include_mask: bool = Field(False, description="with format=json: the mask in base64, as mask_png, mask_tiff or mask_nifti")
    axis: str = Field("auto", description="slices of a volume for a model of images: auto (coarsest spacing), 0, 1, 2")
    nonfinite: str = Field("refuse", description="values that are NaN or infinite: refuse, or zero")

    def wanted(self, request: Request) -> SegmentRequest:
        """The request in the domain's words.

        Raises:
            InvalidParameter: a parameter is misspelt or given twice.
            UnknownFormat: the format asked for, or what Accept allows, is none of ours.
        """
        self._check_names(request.query_params)
        accept = request.headers.get("accept")
        # Before the body comes; what it holds may leave less to choose from.
        encode.choose(self.format, accept)
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
    if answer.degraded:
        found["X-Segment-Degraded"] = answer.degraded
    if answer.note:
        found["X-Segment-Note"] = answer.note
    return found
