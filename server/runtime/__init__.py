"""Bundles, engines and the batcher: tiles in, scores out."""
