"""The fleet: places jobs on hosts and passes their events on (one fleet per cluster; embedded Ray: in the driver)."""

from typing import Protocol

from workers.job import Job
from workers.report import JobEvent


class Fleet(Protocol):
    """Takes jobs and yields their events. Used by one thread."""

    @property
    def num_places(self) -> int:
        """How many jobs train at the same time; more may be submitted and wait."""
        ...

    def submit(self, job: Job) -> None:
        """Queue a job (higher priority first). Its end is always told by one `Finished`, also if it had succeeded long before.

        A job that is submitted again after a kill continues from its last checkpoint. Its last `Evaluated` before that is told
        once more, with the same numbers, so callers must take an evaluation they know already as it was.
        """
        ...

    def events(self, timeout_seconds: float) -> list[JobEvent]:
        """Return what happened since the last call, or wait for the first event; an empty list after the time-out.

        Lost hosts are replaced and their jobs resubmitted inside; a job that loses its host too often ends as failed.
        """
        ...

    def decide(self, job_id: str, go: bool) -> None:
        """Answer an `Evaluated` event: go on, or stop (the job then ends with the status "stopped" and keeps no adapter)."""
        ...

    def cancel(self, job_id: str) -> None:
        """End a job at its next step with the status "cancelled"."""
        ...

    def close(self, *, preempt: bool = True) -> None:
        """Checkpoint live jobs (status "preempted") if `preempt`, stop the hosts, and return when nothing runs any more."""
        ...
