"""Interface of the stores that several servers share: leases, progress and places in one queue."""

from abc import abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from server.jobs.job import SharedJob
from server.jobs.store import Store


@dataclass(frozen=True)
class Progress:
    """Progress of a job that runs on this server."""

    id: str
    stage: str | None
    done: int
    total: int
    eta_s: float


@dataclass(frozen=True)
class Totals:
    """Sums over all servers: jobs that wait, of these the ones that could be taken now, and bytes of files."""

    waiting: int
    claimable: int
    used_bytes: int


class SharedStore(Store):
    """Jobs that several servers share. A server works on a job while it renews its lease.

    Attributes:
        lease_s: seconds without renewal after which another server takes a job.
    """

    is_shared = True
    lease_s: float

    @abstractmethod
    def claim(self) -> SharedJob | None:
        """Takes the first job that no server works on; None where there is none.

        Raises:
            StoreBroken, StoreUnavailable: the store fails.
        """

    @abstractmethod
    def renew(self, running: Collection[Progress]) -> set[str]:
        """Renews the leases of jobs that run here, and reports their progress.

        Returns:
            The ids of those that this server must give up: they were cancelled or removed, or others have them.

        Raises:
            StoreBroken, StoreUnavailable: the store fails; none is known to be lost.
        """

    @abstractmethod
    def drop(self, id_: str) -> None:
        """Stops work on a job, which its lease then leaves to others."""

    @abstractmethod
    def totals(self) -> Totals:
        """Sums over all servers.

        Raises:
            StoreBroken, StoreUnavailable: the store fails.
        """

    @abstractmethod
    def reports(self, ids: Iterable[str]) -> dict[str, SharedJob]:
        """Jobs with their place in the queue of all servers, and what is left before them.

        Raises:
            StoreBroken, StoreUnavailable: the store fails.
        """

    @abstractmethod
    def report(self, id_: str) -> SharedJob:
        """A job with its place in the queue.

        Raises:
            UnknownJob: it was never accepted, was deleted or has expired.
            StoreBroken, StoreUnavailable: the store fails.
        """
