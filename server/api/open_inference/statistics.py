"""Statistics per model, in the form of Triton's statistics extension, which perf_analyzer reads."""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from server.api.open_inference.models import VERSION

# Triton's names of what our phases are.
PHASES = {
    "queue": ("queue", "open"),
    "compute_input": ("decode",),
    "compute_infer": ("infer",),
    "compute_output": ("restore", "postprocess", "encode"),
}
# Never counted, because nothing is cached; clients want the members.
CACHE = ("cache_hit", "cache_miss")


@dataclass
class _Counts:
    images: int = 0
    requests: int = 0
    last_ms: int = 0
    ns: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    failed: int = 0


class Statistics:
    """Counts requests and durations by model name, since the start of the server."""

    def __init__(self) -> None:
        self._counts: dict[str, _Counts] = defaultdict(_Counts)

    def succeeded(self, name: str, images: int, seconds: float, timings: Mapping[str, float]) -> None:
        """Counts a request that was answered.

        Args:
            name: name of the model.
            images: images of the request.
            seconds: duration of the request.
            timings: seconds per phase.
        """
        counts = self._counts[name]
        counts.images += images
        counts.requests += 1
        counts.last_ms = int(time.time() * 1e3)
        counts.ns["success"] += int(seconds * 1e9)
        for member, phases in PHASES.items():
            counts.ns[member] += int(sum(timings.get(phase, 0.0) for phase in phases) * 1e9)

    def failed(self, name: str, seconds: float) -> None:
        """Counts a request to an existing model that was answered with an error."""
        self._counts[name].failed += 1
        self._counts[name].ns["fail"] += int(seconds * 1e9)

    def document(self, names: Iterable[str]) -> dict[str, Any]:
        """The document of GET /v2/models/NAME/stats, or of all models."""
        return {"model_stats": [self._row(name) for name in names]}

    def _row(self, name: str) -> dict[str, Any]:
        counts = self._counts.get(name, _Counts())
        durations = {
            member: {"count": counts.requests, "ns": counts.ns.get(member, 0)}
            for member in ("success", *PHASES)
        }
        none = {"count": 0, "ns": 0}
        return {
            "name": name,
            "version": VERSION,
            "last_inference": counts.last_ms,
            "inference_count": counts.images,
            "execution_count": counts.requests,
            "inference_stats": {
                **durations,
                "fail": {"count": counts.failed, "ns": counts.ns.get("fail", 0)},
                **dict.fromkeys(CACHE, none),
            },
            "batch_stats": [],
        }
