"""A trained network becomes a bundle, and proves it (torch, onnx, onnxruntime)."""
