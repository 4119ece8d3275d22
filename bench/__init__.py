"""Measurements: each script prints a table with both sides of a claim in one run, and writes it to results/."""

# Before ONNX Runtime, which some scripts load first, because importing `server` switches its telemetry off.
import server  # noqa: F401
