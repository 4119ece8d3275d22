"""A bundle becomes an HTTP service (numpy, onnxruntime, fastapi; never torch)."""

import os

__version__ = "0.1.0"

# ONNX Runtime (from 1.29) reports its use to its maker and keeps an id on disk, unless this variable is set
# before it is loaded: a server of medical images reports to no third party.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # noqa: TID251
