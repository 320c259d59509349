"""Jobs spread evenly over hosts that share their base, and none waits for ever."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from workers.placing import MAX_OVERTAKEN, Load, Placement, Waiting, next_placement
from workers.residency import Residency


def base(name: str) -> Residency:
    return Residency(name, "view", "contract", "CAUSAL_LM", 1)


BASES = st.sampled_from([base("a"), base("b"), base("c")])
JOBS = st.builds(Waiting, residency=BASES, priority=st.sampled_from([0, 50]), alone=st.sampled_from([False, False, True]))


class World:
    """Hosts, a queue, and what runs where."""

    def __init__(self, num_hosts: int, slots: int) -> None:
        self.slots = slots
        self.running: list[list[Waiting]] = [[] for _ in range(num_hosts)]
        self.resident: list[Residency | None] = [None] * num_hosts
        self.queue: list[Waiting] = []

    @property
    def loads(self) -> list[Load]:
        pairs = zip(self.running, self.resident, strict=True)
        return [Load(held, len(jobs), any(job.alone for job in jobs)) for jobs, held in pairs]

    def place_all(self) -> list[Waiting]:
        placed = []
        while (placement := next_placement(self.queue, self.loads, self.slots)) is not None:
            job = self.queue.pop(placement.job)
            self.queue = [
                replace(one, overtaken=one.overtaken + (index < placement.job and one.priority == job.priority))
                for index, one in enumerate(self.queue)
            ]
            self.running[placement.host].append(job)
            self.resident[placement.host] = job.residency
            placed.append(job)
        return placed

    def check(self) -> None:
        for jobs in self.running:
            assert len(jobs) <= self.slots
            assert len({job.residency for job in jobs}) <= 1
            assert len(jobs) <= 1 or not any(job.alone for job in jobs)


@given(jobs=st.lists(JOBS, max_size=30), num_hosts=st.integers(1, 4), slots=st.integers(1, 5), data=st.data())
def test_every_job_is_placed_in_the_end_and_no_host_is_overfull_or_mixed(
    jobs: list[Waiting], num_hosts: int, slots: int, data: st.DataObject
) -> None:
    world, num_placed = World(num_hosts, slots), 0
    for job in jobs:
        world.queue.append(job)
        if data.draw(st.booleans()):
            num_placed += len(world.place_all())
            world.check()
    while num_placed < len(jobs):
        num_placed += len(world.place_all())
        world.check()
        busy = [host for host, running in enumerate(world.running) if running]
        assert busy, "jobs wait although no host has any"
        world.running[data.draw(st.sampled_from(busy))].pop(0)


@given(num_jobs=st.integers(1, 20), num_hosts=st.integers(1, 5))
def test_jobs_of_one_base_are_spread_to_within_one(num_jobs: int, num_hosts: int) -> None:
    world = World(num_hosts, 8)
    world.queue = [Waiting(base("a"))] * num_jobs
    world.place_all()
    counts = [len(jobs) for jobs in world.running]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == min(num_jobs, 8 * num_hosts)


def test_a_host_that_holds_the_base_is_preferred_among_the_empty_ones() -> None:
    hosts = [Load(base("b")), Load(None), Load(base("a"))]
    assert next_placement([Waiting(base("a"))], hosts, 4) == Placement(0, 2)
    assert next_placement([Waiting(base("c"))], hosts, 4) == Placement(0, 1)


def test_higher_priority_is_placed_first_and_what_it_waits_for_is_not_given_to_lower_ones() -> None:
    queue = [Waiting(base("a"), priority=10), Waiting(base("b"), priority=90)]
    assert next_placement(queue, [Load(None)], 4) == Placement(1, 0)
    assert next_placement(queue, [Load(base("a"), 1)], 4) is None


def test_a_job_of_another_base_is_overtaken_a_bounded_number_of_times() -> None:
    world = World(1, 4)
    world.queue = [Waiting(base("a"))] * 4
    world.place_all()
    world.queue = [Waiting(base("b"))] + [Waiting(base("a"))] * (3 * MAX_OVERTAKEN)
    overtakers = 0
    while not any(job.residency == base("b") for job in world.running[0]):
        world.running[0].pop(0)
        overtakers += len([job for job in world.place_all() if job.residency == base("a")])
    assert overtakers == MAX_OVERTAKEN
