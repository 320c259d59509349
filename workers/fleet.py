"""The fleet: places jobs on hosts and passes their events on (one fleet per cluster; embedded Ray: in the driver).

Policies are pure functions (`after_loss`, `after_failure`, and `placing`); `HostFleet` carries them out.
"""

import itertools
import logging
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from infra.launch import Exit, Handle, Launcher, Resources
from infra.services import Services
from workers.host_task import HostTask
from workers.job import Job
from workers.placing import Load, Waiting, next_placement, why_waiting
from workers.report import Admit, Checkpointed, Decision, Evaluated, Evict, Finished, HostEvent, PackState, Shutdown
from workers.residency import Residency, residency_of

log = logging.getLogger(__name__)
MAX_LOSSES_IN_A_ROW = 4
"""Hosts a job may lose without a checkpoint in between before it is given up."""
LOSSES_TOGETHER = 2
"""Hosts a job may lose in a row in the company of others; after that it gets a host of its own."""
MIN_PASS_TOKENS = 256
"""A host that replaces one lost for memory has half its budget, but no less than this."""
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

    def events(self, timeout_seconds: float) -> list[HostEvent]:
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


def after_loss(losses_in_a_row: int) -> Literal["retry", "retry_alone", "give_up"]:
    """Decide about a job whose host was lost for the n-th time since its last checkpoint.

    It may be the job that ends its hosts: then its neighbours should not be there.
    """
    if losses_in_a_row >= MAX_LOSSES_IN_A_ROW:
        return "give_up"
    return "retry_alone" if losses_in_a_row >= LOSSES_TOGETHER else "retry"


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


@dataclass
class _Queued:
    """A job that has no host. Fields as in `placing.Waiting`."""

    job: Job
    alone: bool = False
    overtaken: int = 0
    residency: Residency = field(init=False)

    def __post_init__(self) -> None:
        self.residency = residency_of(self.job)

    @property
    def waiting(self) -> Waiting:
        return Waiting(self.residency, self.job.spec.resources.priority, self.alone, self.overtaken)


@dataclass
class _Host:
    """A launched host, what it holds, and the jobs it trains."""

    handle: Handle
    residency: Residency | None = None
    jobs: dict[str, Job] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    """Jobs with an evaluation that has no answer yet."""
    is_private: bool = False
    pack: PackState | None = None
    """What it told of its pack last."""

    @property
    def load(self) -> Load:
        return Load(self.residency, len(self.jobs), self.is_private and bool(self.jobs))

    def give(self, queued: _Queued) -> None:
        self.jobs[queued.job.job_id] = queued.job
        self.residency, self.is_private = queued.residency, queued.alone
        self.asked.discard(queued.job.job_id)
        self.handle.channel.send(Admit(queued.job))


@dataclass
class _Losses:
    """What each job lost since its last checkpoint."""

    counts: dict[str, int] = field(default_factory=dict)
    hosts: dict[str, int] = field(default_factory=dict)
    """Hosts alone; `counts` has the failures of the store as well."""

    def add(self, job_id: str, *, host: bool) -> int:
        """Count one more; return how many there are."""
        self.hosts[job_id] = self.hosts.get(job_id, 0) + host
        self.counts[job_id] = self.counts.get(job_id, 0) + 1
        return self.counts[job_id]

    def must_be_alone(self, job_id: str) -> bool:
        """Tell whether the job has lost so many hosts that it shall have the next one for itself."""
        return after_loss(self.hosts.get(job_id, 0)) != "retry"

    def forget(self, job_id: str) -> None:
        self.counts.pop(job_id, None)
        self.hosts.pop(job_id, None)


class HostFleet:
    """Hosts that train packs: as many as the launcher's machines hold, `max_hosts` at most. A lost one is replaced.

    On machines with GPUs each host has one, elsewhere `num_threads` processors; each takes up to `slots_per_host` jobs.
    """

    def __init__(
        self,
        services: Services,
        launcher: Launcher,
        *,
        num_threads: int = 1,
        max_hosts: int | None = None,
        slots_per_host: int | None = None,
    ) -> None:
        """`slots_per_host` None takes what the settings say."""
        settings = services.settings
        self._slots = slots_per_host or settings.slots_per_host
        self._services = Services(settings.model_copy(update={"slots_per_host": self._slots}))
        self._launcher = launcher
        num_gpus = 1.0 if launcher.num_gpus > 0 else 0.0
        self._resources = Resources(num_cpus=float(num_threads), num_gpus=num_gpus, num_threads=num_threads)
        capacity = launcher.capacity(self._resources)
        self._num_hosts = min(capacity, max_hosts) if max_hosts is not None else capacity
        self._max_tokens: int | None = None
        self._hosts: list[_Host] = []
        self._queue: list[_Queued] = []
        self._all_wait = False
        """Whether nobody in the queue found a host, and nothing has changed since: most looks at the hosts bring nothing new."""
        self._told: deque[HostEvent] = deque()
        self._losses = _Losses()
        self._numbers = itertools.count(1)
        self._launch_missing()  # they load their libraries while the driver still looks at base and data

    @property
    def num_places(self) -> int:
        return self._num_hosts * self._slots

    @property
    def num_hosts(self) -> int:
        """How many hosts are held, whether they train or wait."""
        return self._num_hosts

    @property
    def launcher(self) -> Launcher:
        """What launches the hosts; closed with the fleet."""
        return self._launcher

    def submit(self, job: Job) -> None:
        self._enqueue(job)
        self._place()

    def events(self, timeout_seconds: float) -> list[HostEvent]:
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
        host = self._host_of(job_id)
        # An answer to what a lost host asked is dropped: its successor asks again, and would take it for the next answer.
        if host is not None and job_id in host.asked:
            host.asked.remove(job_id)
            host.handle.channel.send(Decision(job_id, go))

    def cancel(self, job_id: str) -> None:
        host = self._host_of(job_id)
        if host is not None:
            host.handle.channel.send(Evict(job_id, "cancelled"))
            return
        waiting = [queued for queued in self._queue if queued.job.job_id == job_id]
        self._all_wait = False  # it may have been the one that a host was kept free for
        self._queue = [queued for queued in self._queue if queued.job.job_id != job_id]
        self._told += [Finished(queued.job.job_id, "cancelled") for queued in waiting]

    def why(self, job_id: str) -> str:
        """Return what a job does, or why it waits, as a sentence."""
        host = self._host_of(job_id)
        if host is not None:
            others = len(host.jobs) - 1
            company = f"with {others} other{'s' if others != 1 else ''}" if others else "alone"
            return f"it is on {host.handle.name}, {company}{'; it awaits a verdict' if job_id in host.asked else ''}."
        queued = next((queued for queued in self._queue if queued.job.job_id == job_id), None)
        if queued is None:
            return "this fleet does not know it, or it has ended."
        because = why_waiting(queued.waiting, [one.load for one in self._hosts], self._slots)
        return f"it waits because {because}."

    def close(self, *, preempt: bool = True) -> None:
        self._queue.clear()
        if preempt:
            self._preempt()
        for host in self._hosts:
            host.handle.channel.send(Shutdown())
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline and any(host.handle.poll() is None for host in self._hosts):
            time.sleep(POLL_SECONDS)
        self._hosts.clear()
        self._launcher.close()

    def host_processes(self) -> list[int]:
        """Process ids of the live hosts that have started (fault tests kill them)."""
        return [place.pid for host in self._hosts if (place := host.handle.place) is not None]

    def _preempt(self) -> None:
        for host, job_id in self._jobs():
            host.handle.channel.send(Evict(job_id, "preempted"))
        deadline = time.monotonic() + CLOSE_SECONDS
        while time.monotonic() < deadline and any(host.jobs for host in self._hosts):
            self._gather()
            self._queue.clear()
            time.sleep(POLL_SECONDS)

    def _jobs(self) -> Iterator[tuple[_Host, str]]:
        for host in self._hosts:
            for job_id in host.jobs:
                yield host, job_id

    def _host_of(self, job_id: str) -> _Host | None:
        return next((host for host in self._hosts if job_id in host.jobs), None)

    def _gather(self) -> None:
        """Take in what the hosts sent; part with hosts that are gone."""
        for host in list(self._hosts):
            gone = host.handle.poll()
            for event in host.handle.channel.receive(0.0):
                self._take(host, event)
            if gone is not None:
                self._hosts.remove(host)
                self._all_wait = False
                self._lose(host, gone)

    def _take(self, host: _Host, event: HostEvent) -> None:
        match event:
            case PackState():
                host.pack = event
            case Checkpointed():
                self._losses.forget(event.job_id)
            case Evaluated(final=False):
                host.asked.add(event.job_id)
            case Finished() if event.job_id in host.jobs:
                job = host.jobs.pop(event.job_id)
                self._all_wait = False
                host.asked.discard(event.job_id)
                if event.status == "failed" and self._is_tried_again(host, job, event.reason):
                    return
                self._losses.forget(event.job_id)
        self._told.append(event)

    def _is_tried_again(self, host: _Host, job: Job, reason: str) -> bool:
        match after_failure(reason):
            case "wait":
                log.info("job %s waits for its turn (%s)", job.job_id, reason)
                self._enqueue(job)
            case "count":
                self._count_loss(host, job, reason, is_host=False)
            case "tell":
                return False
        return True

    def _lose(self, host: _Host, gone: Exit) -> None:
        if "memory" in gone.reason and host.pack is not None:
            self._max_tokens = max(MIN_PASS_TOKENS, host.pack.budget_tokens // 2)
            log.warning("host %s ran out of memory; hosts now take %d tokens at a time", host.handle.name, self._max_tokens)
        for job in host.jobs.values():
            self._count_loss(host, job, gone.reason, is_host=True)

    def _count_loss(self, host: _Host, job: Job, reason: str, *, is_host: bool) -> None:
        losses = self._losses.add(job.job_id, host=is_host)
        log.warning("host %s lost job %s (%s), the %d. loss in a row", host.handle.name, job.job_id, reason, losses)
        if after_loss(losses) != "give_up":
            self._enqueue(job)
            return
        self._losses.forget(job.job_id)
        sentence = f"host_lost: {losses} hosts in a row were lost with this job; the last: {reason}"
        self._told.append(Finished(job.job_id, "failed", sentence))

    def _enqueue(self, job: Job) -> None:
        self._queue.append(_Queued(job, self._losses.must_be_alone(job.job_id)))
        self._all_wait = False

    def _place(self) -> None:
        """Give queued jobs to hosts, and launch hosts in place of lost ones where there are jobs for them."""
        if not self._queue or self._all_wait:
            return
        self._launch_missing()
        while self._queue:
            live = [host for host in self._hosts if host.handle.poll() is None]
            placement = next_placement([queued.waiting for queued in self._queue], [host.load for host in live], self._slots)
            if placement is None:
                self._all_wait = True
                return
            placed = self._queue.pop(placement.job)
            for earlier in self._queue[: placement.job]:
                earlier.overtaken += earlier.job.spec.resources.priority == placed.job.spec.resources.priority
            live[placement.host].give(placed)

    def _launch_missing(self) -> None:
        while len(self._hosts) < self._num_hosts:
            name = f"host-{next(self._numbers)}"
            task = HostTask(self._services, name, "cuda" if self._resources.num_gpus else "cpu", self._max_tokens)
            self._hosts.append(_Host(self._launcher.launch(task, name, self._resources)))
