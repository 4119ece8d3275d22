"""When Ray Serve adds and removes replicas: by the predicted wait and by the levels that answers lack.

Counts of requests say little: a request may be one tile or a thousand, and where callers allow a shallower
level, a server that is too slow keeps its queue short by answering worse.
"""

import math
from typing import Any

from server.metrics import Metrics

# Names of the figures that a replica reports.
WAIT, DEFICIT = "predicted_wait_s", "level_deficit"

# A replica is removed below this part of the targets, because the others get its load.
LOW = 0.25

# Replicas are at most multiplied by this at once, because a wait grows faster than the load.
MAX_GROWTH = 2.0


class LevelDeficit:
    """Levels that answers lacked on average, of the answers since the last call.

    Args:
        metrics: counts of answers and of degraded ones.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._before = self._count()

    def since_last_call(self) -> float:
        """Returns the average; 0 where there was no answer."""
        before, self._before = self._before, self._count()
        answers, lacking = (now - old for now, old in zip(self._before, before, strict=True))
        return lacking / answers if answers else 0.0

    def _count(self) -> tuple[float, float]:
        """Answers, and levels that they lacked, since the start."""
        answers = lacking = 0.0
        for family in (*self._metrics.requests.collect(), *self._metrics.degraded.collect()):
            for sample in family.samples:
                labels = sample.labels
                if sample.name == "unetpp_requests_total" and labels["outcome"] == "ok":
                    answers += sample.value
                elif sample.name == "unetpp_degraded_total":
                    lacking += sample.value * (int(labels["requested_level"]) - int(labels["served_level"]))
        return answers, lacking


class ScaleOnWait:
    """A policy of Ray Serve, which adds the delays, the bounds and the smoothing of its own configuration.

    Args:
        target_wait_s: predicted wait in seconds above which replicas are added.
        target_deficit: levels lacking per answer above which replicas are added.
    """

    def __init__(self, target_wait_s: float, target_deficit: float) -> None:
        self._targets = {WAIT: target_wait_s, DEFICIT: target_deficit}

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Returns the number of replicas that should run, and no state."""
        figures = context.aggregated_metrics or {}
        means = {
            name: sum(figures[name].values()) / len(figures[name])
            for name in self._targets
            if figures.get(name)
        }
        target: int = context.target_num_replicas
        if not means:
            return target, {}
        load = max(means[name] / self._targets[name] for name in means)
        if load > 1:
            return max(target, math.ceil(context.current_num_replicas * min(load, MAX_GROWTH))), {}
        return (target - 1 if load < LOW and target > 1 else target), {}
