"""MLServer, a custom runtime, adaptive batching on.

Followed: https://docs.seldon.ai/mlserver/user-guide/adaptive-batching (`max_batch_size` and `max_batch_time`
in model-settings.json; "these values are usually found through experimentation") and
https://docs.seldon.ai/mlserver/user-guide/custom (`load` and `predict`, `decode_args`). Batches are formed
only for requests in the Open Inference Protocol, whose JSON carries files as base64, both ways. `debug` is
off, as for production.
"""

from mlserver import MLModel
from mlserver.codecs import Base64Codec
from mlserver.types import InferenceRequest, InferenceResponse

from bench.peers.common import Model


class Segment(MLModel):
    """The graph is the model's URI; the threads are an extra parameter."""

    async def load(self) -> bool:
        """Once in each process."""
        parameters = self.settings.parameters
        self._model = Model(parameters.uri, parameters.extra["threads"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Files of several requests, one run."""
        masks = self._model.answer(Base64Codec.decode_input(payload.inputs[0]))
        return InferenceResponse(
            model_name=self.name, outputs=[Base64Codec.encode_output("mask", masks, use_bytes=False)]
        )
