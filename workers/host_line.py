"""The line before a host's seats: jobs that were admitted and are not in training yet.

A claim may have to be waited for (its owner lives, the store is slow), so claims are taken in threads, and the pack goes on.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from workers.attempt import Attempt
from workers.job import Job
from workers.report import Finished


@dataclass(eq=False)
class Arrival:
    """A job in the line."""

    job: Job
    claim: "Future[Attempt | Finished]"
    evicted: str | None = None
    """How it was asked to end meanwhile."""


class Line:
    """Jobs on their way to a seat. Used by one thread."""

    def __init__(self, claim: Callable[[Job], Attempt | Finished], num_threads: int) -> None:
        """`claim` takes a job's claim, or says how the job ended if there is nothing to do; it runs in threads."""
        self._claim = claim
        self._threads = ThreadPoolExecutor(num_threads, "claim")
        self._arrivals: list[Arrival] = []

    def __len__(self) -> int:
        return len(self._arrivals)

    def add(self, job: Job) -> None:
        """Put a job at the end."""
        self._arrivals.append(Arrival(job, self._threads.submit(self._claim, job)))

    def evict(self, job_id: str, status: str) -> None:
        """Note that a job shall end this way as soon as its claim is there."""
        for arrival in self._arrivals:
            if arrival.job.job_id == job_id:
                arrival.evicted = status

    def claimed(self) -> list[Arrival]:
        """Return those whose claim is decided, in order."""
        return [arrival for arrival in self._arrivals if arrival.claim.done()]

    def under_way(self) -> "list[Future[Attempt | Finished]]":
        """Return the claims that are not decided."""
        return [arrival.claim for arrival in self._arrivals if not arrival.claim.done()]

    def remove(self, arrival: Arrival) -> None:
        self._arrivals.remove(arrival)

    def close(self) -> None:
        """Let go of all: no claim is renewed any more, nor one that comes later."""
        for arrival in self._arrivals:
            arrival.claim.add_done_callback(_let_go)
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._arrivals = []


def _let_go(claim: "Future[Attempt | Finished]") -> None:
    if not claim.cancelled() and claim.exception() is None and isinstance(begun := claim.result(), Attempt):
        begun.close()
