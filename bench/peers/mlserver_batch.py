"""MLServer with requests that carry a batch of decoded images: one BYTES element of (N, H, W, 3) bytes in base64.

Set up as `mlserver.py`, without batching of its own: a request is a batch. Its JSON carries bytes as base64, which is shorter
and faster than lists of numbers.
"""

import numpy as np
from mlserver import MLModel
from mlserver.codecs import Base64Codec
from mlserver.types import InferenceRequest, InferenceResponse

from bench.peers.common import Model


class Segment(MLModel):
    """The graph is the model's URI; threads and the side of the images are extra parameters."""

    async def load(self) -> bool:
        """Once in each process."""
        parameters = self.settings.parameters
        self._model = Model(parameters.uri, parameters.extra["threads"])
        self._side = parameters.extra["side"]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """A batch in one run."""
        pixels = np.frombuffer(Base64Codec.decode_input(payload.inputs[0])[0], np.uint8)
        masks = self._model.run(list(pixels.reshape(-1, self._side, self._side, 3)))
        output = Base64Codec.encode_output("mask", [np.stack(masks).tobytes()], use_bytes=False)
        return InferenceResponse(model_name=self.name, outputs=[output])
