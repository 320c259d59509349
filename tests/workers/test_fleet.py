"""What the fleet decides about jobs whose hosts or attempts end before them."""

from pathlib import Path
from typing import Any

import pytest

from infra.launch import Channel, Exit, Resources, Task
from infra.mailbox import Mailbox, MailboxChannel
from infra.services import Services
from infra.settings import load_settings
from tests.workers.test_attempt import SPEC, a_job
from workers.fleet import MAX_LOSSES_IN_A_ROW, HostFleet, after_failure, after_loss
from workers.host_task import HostTask
from workers.job import BaseRef, DataRef, Job, pin
from workers.report import Admit, Checkpointed, Decision, Evaluated, Finished, PackState


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("held: tenants/a/state.json is held by process 7 on node-1", "wait"),
        ("claim_lost: it was taken over", "wait"),
        ("store: s3://bucket does not answer", "count"),
        ("non_finite: loss was not finite", "tell"),
        ("bad_input: the store is not meant here", "tell"),
        ("", "tell"),
    ],
)
def test_failure_of_the_surroundings_is_not_the_end_of_the_job(reason: str, expected: str) -> None:
    assert after_failure(reason) == expected


def test_job_that_loses_every_host_is_given_up_after_it_was_tried_alone() -> None:
    verdicts = [after_loss(losses) for losses in range(MAX_LOSSES_IN_A_ROW + 1)]
    assert verdicts == ["retry", "retry", "retry_alone", "retry_alone", "give_up"]


class OpenHandle:
    """A host without a task: the test holds the task's end of the channel, and says when it is gone."""

    place = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.exit: Exit | None = None
        inbox, outbox = Mailbox(), Mailbox()
        self.channel: Channel = MailboxChannel(inbox, outbox)
        self.host_end: Channel = MailboxChannel(outbox, inbox)

    def poll(self) -> Exit | None:
        return self.exit

    def kill(self) -> None:
        self.exit = Exit("lost", "killed")


class OpenLauncher:
    """Launches hosts that the test plays."""

    def __init__(self, num_hosts: int = 1, num_gpus: int = 0) -> None:
        self.num_gpus = num_gpus
        self.hosts: list[OpenHandle] = []
        self.tasks: list[HostTask] = []
        self.resources: list[Resources] = []
        self._num_hosts = num_hosts

    def launch(self, task: Task, name: str, resources: Resources) -> OpenHandle:
        assert isinstance(task, HostTask)
        self.tasks.append(task)
        self.resources.append(resources)
        self.hosts.append(OpenHandle(name))
        return self.hosts[-1]

    def capacity(self, resources: Resources) -> int:
        return self._num_hosts

    def close(self) -> None:
        """Nothing runs."""


def fleet_of(tmp_path: Path, launcher: OpenLauncher, **options: Any) -> HostFleet:
    return HostFleet(Services(load_settings(tmp_path, {})), launcher, **options)


def job_number(number: int, *, base: str = "b", priority: int = 50) -> Job:
    """A job that differs from others in its seed, with a base named by a letter."""
    spec = SPEC.model_copy(
        update={
            "training": SPEC.training.model_copy(update={"seed": number}),
            "resources": SPEC.resources.model_copy(update={"priority": priority}),
        }
    )
    return pin(spec, BaseRef(base * 32, "v" * 32, "p" * 32, "base"), DataRef("d" * 32, 8), None, None, None)


def admitted(host: OpenHandle) -> list[str]:
    """Return the jobs that a host was given since this was asked last."""
    return [order.job.job_id for order in host.host_end.receive(0.0) if isinstance(order, Admit)]


def test_an_answer_to_what_a_lost_host_asked_does_not_answer_the_next_question(tmp_path: Path) -> None:
    launcher, job = OpenLauncher(), a_job()
    fleet = fleet_of(tmp_path, launcher)
    fleet.submit(job)
    first = launcher.hosts[0]
    first.host_end.send(Evaluated(job.job_id, 20, {"eval/loss": 1.0}))
    first.kill()
    assert fleet.events(0.0) == [Evaluated(job.job_id, 20, {"eval/loss": 1.0})]
    second = launcher.hosts[1]
    fleet.decide(job.job_id, True)
    assert second.host_end.receive(0.0) == [Admit(job)]
    second.host_end.send(Evaluated(job.job_id, 20, {"eval/loss": 1.0}))
    fleet.events(0.0)
    fleet.decide(job.job_id, True)
    fleet.decide(job.job_id, True)
    assert second.host_end.receive(0.0) == [Decision(job.job_id, True)]


def test_jobs_fill_the_hosts_evenly_up_to_their_places(tmp_path: Path) -> None:
    launcher = OpenLauncher(num_hosts=2)
    fleet = fleet_of(tmp_path, launcher, slots_per_host=3)
    assert fleet.num_places == 6
    jobs = [job_number(number) for number in range(7)]
    for job in jobs[:2]:
        fleet.submit(job)
    assert [len(admitted(host)) for host in launcher.hosts] == [1, 1]
    for job in jobs[2:]:
        fleet.submit(job)
    assert [len(admitted(host)) for host in launcher.hosts] == [2, 2]
    assert fleet.why(jobs[6].job_id) == "it waits because all 3 places of every host with its base are taken."
    launcher.hosts[1].host_end.send(Finished(jobs[1].job_id, "stopped"))
    fleet.events(0.0)
    assert admitted(launcher.hosts[1]) == [jobs[6].job_id]
    assert fleet.why(jobs[6].job_id) == "it is on host-2, with 2 others."
    assert "does not know" in fleet.why(jobs[1].job_id)


def test_no_more_hosts_are_launched_than_are_of_use(tmp_path: Path) -> None:
    launcher = OpenLauncher(num_hosts=8)
    fleet_of(tmp_path, launcher, max_hosts=1)
    assert len(launcher.hosts) == 1


def test_evaluations_of_several_jobs_on_one_host_are_answered_each_on_its_own(tmp_path: Path) -> None:
    launcher = OpenLauncher()
    fleet = fleet_of(tmp_path, launcher)
    first, second = job_number(1), job_number(2)
    for job in (first, second):
        fleet.submit(job)
        launcher.hosts[0].host_end.send(Evaluated(job.job_id, 5, {}))
    fleet.events(0.0)
    admitted(launcher.hosts[0])
    fleet.decide(second.job_id, False)
    assert launcher.hosts[0].host_end.receive(0.0) == [Decision(second.job_id, False)]
    assert "verdict" in fleet.why(first.job_id)
    fleet.decide(first.job_id, True)
    assert launcher.hosts[0].host_end.receive(0.0) == [Decision(first.job_id, True)]


def test_a_lost_host_loses_all_its_jobs_and_each_is_placed_again(tmp_path: Path) -> None:
    launcher = OpenLauncher(num_hosts=2)
    fleet = fleet_of(tmp_path, launcher)
    jobs = [job_number(number) for number in range(4)]
    for job in jobs:
        fleet.submit(job)
    lost = admitted(launcher.hosts[0])
    launcher.hosts[0].kill()
    fleet.events(0.0)
    assert sorted(admitted(launcher.hosts[2])) == sorted(lost)


def test_a_job_that_was_on_two_lost_hosts_gets_one_of_its_own_and_a_checkpoint_forgives(tmp_path: Path) -> None:
    launcher = OpenLauncher()
    fleet = fleet_of(tmp_path, launcher)
    killer, neighbour = job_number(1), job_number(2)
    for job in (killer, neighbour):
        fleet.submit(job)
    for _ in range(2):
        launcher.hosts[-1].host_end.send(Checkpointed(neighbour.job_id, 5, 1, ""))
        launcher.hosts[-1].kill()
        fleet.events(0.0)
    third = launcher.hosts[-1]
    assert admitted(third) in ([killer.job_id], [neighbour.job_id])
    waiting = next(job for job in (killer, neighbour) if "waits" in fleet.why(job.job_id))
    (running,) = {killer.job_id, neighbour.job_id} - {waiting.job_id}
    third.host_end.send(Finished(running, "failed", "error: no"))
    fleet.events(0.0)
    assert admitted(third) == [waiting.job_id]


def test_jobs_of_two_bases_never_share_a_host(tmp_path: Path) -> None:
    launcher = OpenLauncher()
    fleet = fleet_of(tmp_path, launcher)
    here, other = job_number(1), job_number(2, base="c")
    fleet.submit(here)
    fleet.submit(other)
    assert admitted(launcher.hosts[0]) == [here.job_id]
    assert "another base" in fleet.why(other.job_id)
    launcher.hosts[0].host_end.send(Finished(here.job_id, "succeeded"))
    fleet.events(0.0)
    assert admitted(launcher.hosts[0]) == [other.job_id]


def test_what_follows_a_host_that_was_killed_for_memory_takes_half_as_many_tokens(tmp_path: Path) -> None:
    launcher, job = OpenLauncher(), a_job()
    fleet = fleet_of(tmp_path, launcher)
    fleet.submit(job)
    assert launcher.tasks[0].max_tokens is None
    launcher.hosts[0].host_end.send(PackState("host-1", (job.job_id,), 8192, 8000, 1.0, 3, 0.0))
    launcher.hosts[0].exit = Exit("lost", "The process of task host-1 was killed because its node ran out of memory.")
    fleet.events(0.0)
    assert launcher.tasks[1].max_tokens == 4096


@pytest.mark.parametrize(("num_gpus", "device"), [(0, "cpu"), (2, "cuda")])
def test_a_host_has_a_gpu_where_there_are_some(tmp_path: Path, num_gpus: int, device: str) -> None:
    launcher = OpenLauncher(num_gpus=num_gpus)
    fleet_of(tmp_path, launcher)
    assert [task.device for task in launcher.tasks] == [device]
    assert [one.num_gpus for one in launcher.resources] == [float(num_gpus > 0)]
