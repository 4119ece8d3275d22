"""Bundles, engines and the scheduler: tiles in, scores out."""
