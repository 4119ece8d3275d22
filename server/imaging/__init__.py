"""Bytes to pixels and masks to bytes; knows nothing of networks."""
