"""A bundle becomes an HTTP service (numpy, onnxruntime, fastapi; never torch)."""

__version__ = "0.1.0"
