"""The fleet: places jobs on hosts and passes their events on (one fleet per cluster; embedded Ray: in the driver).

Policies are pure functions (`after_loss`, `next_job`); `HostFleet` carries them out.
"""

import itertools
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from infra.launch import Handle, Launcher, Resources
from infra.services import Services
from workers.host_task import HostTask
from workers.job import Job
from workers.report import Admit, Checkpointed, Decision, Evaluated, Evict, Finished, JobEvent, Shutdown

log = logging.getLogger(__name__)
MAX_LOSSES_IN_A_ROW = 4
"""Hosts a job may lose without a checkpoint in between before it is given up."""
POLL_SECONDS = 0.005
CLOSE_SECONDS = 60.0


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


Residency = tuple[str, str]


def residency_of(job: Job) -> Residency:
    """What a host must hold to train `job`: base and training view."""
    return (job.base.base_id, job.base.training_view)


def after_loss(losses_in_a_row: int) -> Literal["retry", "give_up"]:
    """Decide about a job whose host was lost for the n-th time since its last checkpoint."""
    return "give_up" if losses_in_a_row >= MAX_LOSSES_IN_A_ROW else "retry"


def after_failure(reason: str) -> Literal["tell", "wait", "count"]:
    """Decide about a job whose attempt ended without a word in its state, or failed for good.

    Another owner lives ("held", "claim_lost"), such as a host whose driver was killed a moment ago: the job waits for it to let
    go. A store that did not answer counts as a lost host. Everything else is how the job ended.
    """
    match reason.partition(":")[0]:
        case "held" | "claim_lost":
            return "wait"
        case "store":
            return "count"
        case _:
            return "tell"


def next_job(queue: Sequence[Job], resident: Residency | None) -> int:
    """Return the index of the job that a free host should take: highest priority, then the host's own base, then the oldest."""

    def key(index: int) -> tuple[int, bool, int]:
        return (-queue[index].spec.resources.priority, residency_of(queue[index]) != resident, index)

    return min(range(len(queue)), key=key)


@dataclass
class _HostSeat:
    """A launched host, what it holds, and the job it trains."""

    handle: Handle
    resident: Residency | None = None
    job: Job | None = None
    asks: bool = False
    """Whether this host told an evaluation that has no answer yet."""


@dataclass
class _Losses:
    """How often each job lost its host since its last checkpoint."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, job_id: str) -> int:
        self.counts[job_id] = self.counts.get(job_id, 0) + 1
        return self.counts[job_id]

    def forget(self, job_id: str) -> None:
        self.counts.pop(job_id, None)


class HostFleet:
    """Hosts with one job each: as many as the launcher's machines hold, `max_hosts` at most. A lost one is replaced."""

    def __init__(self, services: Services, launcher: Launcher, *, num_threads: int = 1, max_hosts: int | None = None) -> None:
        self._services, self._launcher = services, launcher
        self._resources = Resources(num_cpus=float(num_threads), num_threads=num_threads)
        capacity = launcher.capacity(self._resources)
        self._num_places = min(capacity, max_hosts) if max_hosts is not None else capacity
        self._hosts: list[_HostSeat] = []
        self._queue: list[Job] = []
        self._told: deque[JobEvent] = deque()
        self._losses = _Losses()
        self._numbers = itertools.count(1)
        for _ in range(self._num_places):  # they load their libraries while the driver still looks at base and data
            self._launch_host()

    @property
    def num_places(self) -> int:
        return self._num_places

    def submit(self, job: Job) -> None:
        self._queue.append(job)
        self._place()

    def events(self, timeout_seconds: float) -> list[JobEvent]:
        deadline = time.monotonic() + timeout_seconds
        while True:
            self._gather()
            self._place()
            if self._told or time.monotonic() >= deadline:
                told = list(self._told)
                self._told.clear()
                return told
            time.sleep(POLL_SECONDS)

    def decide(self, job_id: str, go: bool) -> None:
        seat = self._seat_of(job_id)
        # An answer to what a lost host asked is dropped: its successor asks again, and would take it for the next answer.
        if seat is not None and seat.asks:
            seat.asks = False
            seat.handle.channel.send(Decision(job_id, go))

    def cancel(self, job_id: str) -> None:
        seat = self._seat_of(job_id)
        if seat is not None:
            seat.handle.channel.send(Evict(job_id, "cancelled"))
            return
        waiting = [job for job in self._queue if job.job_id == job_id]
        self._queue = [job for job in self._queue if job.job_id != job_id]
        self._told += [Finished(job.job_id, "cancelled") for job in waiting]

    def close(self, *, preempt: bool = True) -> None:
        self._queue.clear()
        if preempt:
            self._preempt()
        for seat in self._hosts:
            seat.handle.channel.send(Shutdown())
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline and any(seat.handle.poll() is None for seat in self._hosts):
            time.sleep(POLL_SECONDS)
        self._hosts.clear()
        self._launcher.close()

    def host_processes(self) -> list[int]:
        """Process ids of the live hosts that have started (fault tests kill them)."""
        return [place.pid for seat in self._hosts if (place := seat.handle.place) is not None]

    def _preempt(self) -> None:
        for seat in self._hosts:
            if seat.job is not None:
                seat.handle.channel.send(Evict(seat.job.job_id, "preempted"))
        deadline = time.monotonic() + CLOSE_SECONDS
        while time.monotonic() < deadline and any(seat.job is not None for seat in self._hosts):
            self._gather()
            self._queue.clear()
            time.sleep(POLL_SECONDS)

    def _seat_of(self, job_id: str) -> _HostSeat | None:
        return next((seat for seat in self._hosts if seat.job is not None and seat.job.job_id == job_id), None)

    def _gather(self) -> None:
        """Take in what the hosts sent; replace hosts that are gone."""
        for seat in list(self._hosts):
            gone = seat.handle.poll()
            for event in seat.handle.channel.receive(0.0):
                self._take(seat, event)
            if gone is not None:
                self._hosts.remove(seat)
                self._lose(seat, gone.reason)

    def _take(self, seat: _HostSeat, event: JobEvent) -> None:
        if isinstance(event, Checkpointed):
            self._losses.forget(event.job_id)
        if isinstance(event, Evaluated):
            seat.asks = not event.final
        if isinstance(event, Finished) and seat.job is not None and seat.job.job_id == event.job_id:
            job, seat.job = seat.job, None
            if event.status == "failed" and self._is_tried_again(seat, job, event.reason):
                return
        self._told.append(event)

    def _is_tried_again(self, seat: _HostSeat, job: Job, reason: str) -> bool:
        match after_failure(reason):
            case "wait":
                log.info("job %s waits for its turn (%s)", job.job_id, reason)
                self._queue.append(job)
            case "count":
                self._count_loss(seat, job, reason)
            case "tell":
                return False
        return True

    def _lose(self, seat: _HostSeat, reason: str) -> None:
        if seat.job is not None:
            self._count_loss(seat, seat.job, reason)

    def _count_loss(self, seat: _HostSeat, job: Job, reason: str) -> None:
        losses = self._losses.add(job.job_id)
        log.warning("host %s lost job %s (%s), the %d. loss in a row", seat.handle.name, job.job_id, reason, losses)
        if after_loss(losses) == "retry":
            self._queue.append(job)
        else:
            sentence = f"host_lost: {losses} hosts in a row were lost with this job; the last: {reason}"
            self._told.append(Finished(job.job_id, "failed", sentence))

    def _place(self) -> None:
        """Give queued jobs to free hosts; launch hosts while there is room."""
        while self._queue:
            seat = self._free_seat()
            if seat is None:
                return
            job = self._queue.pop(next_job(self._queue, seat.resident))
            seat.job, seat.resident, seat.asks = job, residency_of(job), False
            seat.handle.channel.send(Admit(job))

    def _free_seat(self) -> _HostSeat | None:
        wanted = {residency_of(job) for job in self._queue}
        free = [seat for seat in self._hosts if seat.job is None and seat.handle.poll() is None]
        free.sort(key=lambda seat: seat.resident not in wanted)
        if free:
            return free[0]
        if len(self._hosts) >= self._num_places:
            return None
        return self._launch_host()

    def _launch_host(self) -> _HostSeat:
        handle = self._launcher.launch(HostTask(self._services), f"host-{next(self._numbers)}", self._resources)
        self._hosts.append(_HostSeat(handle))
        return self._hosts[-1]
