"""Which waiting job goes to which host: the fleet's policy, pure functions over plain values.

A host takes jobs that share its base, a host without jobs takes any. Jobs spread over the hosts evenly, since a host computes
with the threads it has, however many jobs share them. Higher priority goes first, then the older. A job that finds no host (all
hold another base, or it must have one of its own) is overtaken by others of its priority `MAX_OVERTAKEN` times at most; from then
on, and at once by jobs of lower priority, the host with the fewest jobs is kept free of newcomers for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from workers.residency import Residency

MAX_OVERTAKEN = 16
ANY_PRIORITY = 1 << 30


@dataclass(frozen=True)
class Waiting:
    """A job that has no host."""

    residency: Residency
    priority: int = 0
    alone: bool = False
    """Whether it must have a host of its own."""
    overtaken: int = 0
    """Jobs that came later and were placed since it waits."""


@dataclass(frozen=True)
class Load:
    """What a host does at the moment."""

    residency: Residency | None = None
    """None until it was given a job."""
    num_jobs: int = 0
    is_private: bool = False
    """Whether its job must have it for itself."""


@dataclass(frozen=True)
class Placement:
    """The next job to place, and its host; both as places in the lists that were given."""

    job: int
    host: int


def next_placement(queue: Sequence[Waiting], hosts: Sequence[Load], slots: int) -> Placement | None:
    """Return which job of the queue (oldest first) goes where next, None if none can be placed now."""
    reserved: dict[int, int] = {}
    for index in sorted(range(len(queue)), key=lambda place: (-queue[place].priority, place)):
        waiting = queue[index]
        free = [host for host in range(len(hosts)) if waiting.priority >= reserved.get(host, 0)]
        takers = [host for host in free if takes(hosts[host], waiting, slots)]
        if takers:
            return Placement(index, min(takers, key=lambda host: _rank(hosts[host], waiting)))
        if free and not _waits_for_a_seat_only(waiting, hosts):
            emptiest = min(free, key=lambda host: hosts[host].num_jobs)
            reserved[emptiest] = ANY_PRIORITY if waiting.overtaken >= MAX_OVERTAKEN else waiting.priority
    return None


def takes(host: Load, waiting: Waiting, slots: int) -> bool:
    """Tell whether a host may be given a job now."""
    if host.num_jobs == 0:
        return True
    return not (waiting.alone or host.is_private) and host.residency == waiting.residency and host.num_jobs < slots


def _rank(host: Load, waiting: Waiting) -> tuple[int, bool, bool]:
    """The fewest jobs first; of those, one that holds the base already, then one that holds none."""
    return (host.num_jobs, host.residency != waiting.residency, host.residency is not None)


def _waits_for_a_seat_only(waiting: Waiting, hosts: Sequence[Load]) -> bool:
    return not waiting.alone and any(host.residency == waiting.residency and not host.is_private for host in hosts)


def why_waiting(waiting: Waiting, hosts: Sequence[Load], slots: int) -> str:
    """Return why a job has no host, as a sentence's second half: "it waits because ..."."""
    if any(takes(host, waiting, slots) for host in hosts):
        return "jobs of a higher priority, or that waited longer, go first"
    if waiting.alone:
        return "it was on two hosts that were lost, and no host is free of other jobs yet"
    if not any(host.residency == waiting.residency for host in hosts):
        return "every host trains on another base, or with another number of threads, and none has come to an end yet"
    return f"all {slots} places of every host with its base are taken"
