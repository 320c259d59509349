"""What the fleet decides about jobs whose hosts or attempts end before them."""

from pathlib import Path

import pytest

from infra.launch import Channel, Exit, Resources, Task
from infra.mailbox import Mailbox, MailboxChannel
from infra.services import Services
from infra.settings import load_settings
from tests.workers.test_attempt import a_job
from workers.fleet import MAX_LOSSES_IN_A_ROW, HostFleet, after_failure, after_loss
from workers.report import Admit, Decision, Evaluated


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


def test_job_that_loses_every_host_is_given_up() -> None:
    verdicts = [after_loss(losses) for losses in range(1, MAX_LOSSES_IN_A_ROW + 1)]
    assert verdicts == ["retry"] * (MAX_LOSSES_IN_A_ROW - 1) + ["give_up"]


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

    def __init__(self) -> None:
        self.hosts: list[OpenHandle] = []

    def launch(self, task: Task, name: str, resources: Resources) -> OpenHandle:
        self.hosts.append(OpenHandle(name))
        return self.hosts[-1]

    def capacity(self, resources: Resources) -> int:
        return 1

    def close(self) -> None:
        """Nothing runs."""


def test_an_answer_to_what_a_lost_host_asked_does_not_answer_the_next_question(tmp_path: Path) -> None:
    launcher, job = OpenLauncher(), a_job()
    fleet = HostFleet(Services(load_settings(tmp_path, {})), launcher)
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
