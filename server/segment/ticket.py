"""The admitted form of a request."""

import asyncio
import time
from dataclasses import dataclass, replace

from server.errors import CallerError, DeadlinePassed
from server.imaging.geometry import Placement
from server.runtime.flow import Flow
from server.segment.estimate import Estimate
from server.segment.registry import Target


@dataclass(frozen=True)
class Ticket:
    """An admitted request.

    Attributes:
        requested: target that the request resolved to.
        target: target that is served.
        degraded: "deadline" or "load" where they differ, else "".
        formats: canonical names of the output formats.
        placement: position of the network's grid in the input.
        estimate: predicted work.
        flow: place in the queue; of a chain that of its first target.
        memory_wait_s: seconds that the request waited for a share of the memory budget.
        uncertain_share: share of uncertain pixels in the answer of a chain; None for other modes.
    """

    requested: Target
    target: Target
    degraded: str
    formats: tuple[str, ...]
    placement: Placement
    estimate: Estimate
    flow: Flow
    memory_wait_s: float = 0.0
    uncertain_share: float | None = None

    def served(self, step: int, uncertain_share: float | None) -> "Ticket":
        """The ticket once the target that answers is known.

        Args:
            step: index of it in the chain.
            uncertain_share: share of uncertain pixels in its answer.
        """
        if uncertain_share is None:
            return self
        # A shorter chain that ends where the requested one would have ended gives the same answer.
        same = self.target.chain and not self.requested.continues_after(step, uncertain_share)
        return replace(
            self,
            target=self.target.runs[step],
            degraded="" if same else self.degraded,
            uncertain_share=uncertain_share,
        )


def drop_reason(error: BaseException, flow: Flow) -> str:
    """The reason that windows of an admitted request are not run."""
    # Timers of event loops go by milliseconds, and may be early by one.
    if isinstance(error, DeadlinePassed) or time.monotonic() + 0.002 >= flow.deadline:
        return "late"
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return "unreadable" if isinstance(error, CallerError) else "error"
