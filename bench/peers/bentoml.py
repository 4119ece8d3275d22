"""BentoML, one service, adaptive batching on.

Followed: https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html: `batchable=True`, one parameter that is
a list, `max_batch_size` by what the machine bears, and "When a Service ... can't process requests quickly enough to
meet the maximum latency settings, it results in an HTTP 503 ... To solve this, you can either increase the
`max_latency_ms`": it stays at its default, one minute, the most generous value in the documentation. A batchable endpoint answers with a
list, and files in lists are not supported in answers, so the mask travels as base64 in JSON. Arguments:
https://docs.bentoml.com/en/latest/build-with-bentoml/template-arguments.html.
"""

import base64
from pathlib import Path

import bentoml
import numpy as np
from PIL import Image
from pydantic import BaseModel

from bench.peers.common import Model, encode


class Arguments(BaseModel):
    """Arguments of `bentoml serve --arg`."""

    graph: str
    threads: int
    max_batch: int


given = bentoml.use_arguments(Arguments)


@bentoml.service(name="segment", traffic={"timeout": 600}, workers=1)
class Segment:
    """One worker process."""

    def __init__(self) -> None:
        self._model = Model(Path(given.graph), given.threads)

    @bentoml.api(batchable=True, max_batch_size=given.max_batch, max_latency_ms=60_000)
    def segment(self, images: list[Image.Image]) -> list[str]:
        """Images of several requests, one run."""
        masks = self._model.run([np.asarray(image) for image in images])
        return [base64.b64encode(encode(mask)).decode() for mask in masks]
