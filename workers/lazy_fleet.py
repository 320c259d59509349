"""A fleet that is not started before somebody needs a host: for work that may turn out to be done already."""

from collections.abc import Callable

from workers.fleet import Fleet
from workers.job import Job
from workers.report import HostEvent


class LazyFleet:
    """See the module; used by one thread, as every `Fleet`."""

    def __init__(self, start: Callable[[], Fleet]) -> None:
        self._start = start
        self._fleet: Fleet | None = None

    @property
    def num_places(self) -> int:
        """As in `Fleet`; only the fleet itself knows, so this starts it."""
        return self._started().num_places

    def submit(self, job: Job) -> None:
        """As in `Fleet`."""
        self._started().submit(job)

    def events(self, timeout_seconds: float) -> list[HostEvent]:
        """As in `Fleet`; nothing happens on a fleet that was not started."""
        return [] if self._fleet is None else self._fleet.events(timeout_seconds)

    def decide(self, job_id: str, go: bool) -> None:
        """As in `Fleet`."""
        if self._fleet is not None:
            self._fleet.decide(job_id, go)

    def cancel(self, job_id: str) -> None:
        """As in `Fleet`."""
        if self._fleet is not None:
            self._fleet.cancel(job_id)

    def close(self, *, preempt: bool = True) -> None:
        """As in `Fleet`."""
        if self._fleet is not None:
            self._fleet.close(preempt=preempt)

    def _started(self) -> Fleet:
        if self._fleet is None:
            self._fleet = self._start()
        return self._fleet
