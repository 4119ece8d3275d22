"""The Open Inference Protocol (`/v2`): tensors, messages and documents, of which HTTP and gRPC are made."""
