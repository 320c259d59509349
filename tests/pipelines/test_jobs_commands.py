"""Jobs on the command line: listed, shown, their points, and cancelled whether a host has them or not."""

import dataclasses
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.claims import Owner, claim, read_document
from infra.local_storage import LocalStorage
from infra.records import decode_record, encode_record
from infra.storage import Storage
from tests.pipelines.command_line import CommandLine
from tests.pipelines.conftest import Trained
from workers import layout
from workers.host import EngineHost
from workers.job import JOB_FORMAT, Job, pin
from workers.job_state import FRESH, STATE_FORMAT, ask_to_cancel, is_asked_to_cancel
from workers.report import Evaluated, Finished, Progress

LEASE_SECONDS = 3.0
NUM_ENDLESS_STEPS = 100_000


def test_trained_job_is_listed_and_shown(used: CommandLine, trained: Trained) -> None:
    [row] = used("jobs", "list", "--json").json
    assert (row["job_id"], row["tenant"], row["task"], row["status"]) == (trained.job_id, "acme", "menus", "succeeded")
    assert (row["num_steps"], row["attempt"], row["owner"], row["adapter_id"]) == (4, 1, None, trained.adapter_id)
    assert trained.job_id in used("jobs", "list").out
    assert used("jobs", "list", "--status", "failed", "--json").json == []
    assert used("jobs", "list", "--tenant", "globex", "--json").json == []
    shown = used("jobs", "show", trained.job_id[:6], "--json").json
    assert shown.items() >= row.items()
    assert shown["job"]["spec"]["training"]["max_steps"] == 4
    assert "learning_rate=0.005" in used("jobs", "show", trained.job_id).out


def test_logs_have_each_step_once_and_end_with_the_status(used: CommandLine, trained: Trained) -> None:
    found = used("jobs", "logs", trained.job_id, "--json").json
    assert [row["step"] for row in found["steps"]] == [1, 2, 3, 4]
    assert all("train/loss" in row["metrics"] for row in found["steps"])
    assert ["eval/loss" in row["metrics"] for row in found["steps"]] == [False, True, False, True]
    lines = used("jobs", "logs", trained.job_id).out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [["step", str(step)] for step in (1, 2, 3, 4)]
    assert lines[-1] == "succeeded"


def test_job_that_has_ended_is_left_as_it_is(used: CommandLine, trained: Trained) -> None:
    before = used.listing()
    ended = used("jobs", "cancel", trained.job_id)
    assert ended.code == 0
    assert "has succeeded already" in ended.out
    assert used.listing() == before


@dataclasses.dataclass(frozen=True)
class Endless:
    """A job that goes on until somebody ends it."""

    store: Storage
    job: Job

    @property
    def key(self) -> str:
        return layout.job_state(self.job.tenant, self.job.base.base_id, self.job.job_id)

    @property
    def cancel_key(self) -> str:
        return layout.job_cancel(self.job.tenant, self.job.base.base_id, self.job.job_id)

    @property
    def status(self) -> str:
        document = read_document(self.store, self.key, STATE_FORMAT)
        assert document is not None
        return str(document.body["status"])


@pytest.fixture
def endless(trained: Trained, cli: CommandLine) -> Endless:
    """The trained job with very many steps, its rows and spec in the store of `cli`, not begun."""
    source = LocalStorage(trained.folder / ".lorafleet" / "store")
    spec_key = layout.job_spec("acme", trained.base_id, trained.job_id)
    job = Job.from_json(decode_record(source.get(spec_key)[0], JOB_FORMAT, spec_key))
    training = job.spec.training.model_copy(update={"max_steps": NUM_ENDLESS_STEPS, "eval_steps": None})
    spec = job.spec.model_copy(update={"training": training})
    job = pin(spec, job.base, job.train, job.validation, job.test, None)
    for info in source.list("tenants/acme/data/"):
        cli.store.put(info.key, source.get(info.key)[0])
    cli.store.put(layout.job_spec("acme", trained.base_id, job.job_id), encode_record(JOB_FORMAT, job.to_json()))
    return Endless(cli.store, job)


@contextmanager
def training(endless: Endless, cache_dir: Path) -> Iterator[list[Finished]]:
    """Train in a thread, as a host of another process would; gives how the job ended, once the block is left."""
    began, stop = threading.Event(), threading.Event()
    finished: list[Finished] = []
    host = EngineHost(endless.store, cache_dir, lease_seconds=LEASE_SECONDS)

    def run() -> None:
        host.admit(endless.job)
        while not finished and not stop.is_set():
            host.step()
            for event in host.report():
                if isinstance(event, Progress | Evaluated):
                    began.set()
                if isinstance(event, Finished):
                    finished.append(event)
                    began.set()
        host.evict(endless.job.job_id, "preempted")

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert began.wait(60)
        yield finished
    finally:
        stop.set()
        thread.join()


def test_job_that_a_host_trains_is_ended_by_its_host(cli: CommandLine, endless: Endless) -> None:
    with training(endless, cli.home / "cache") as finished:
        assert cli("jobs", "list", "--json").json[0]["status"] == "running"
        ended = cli("jobs", "cancel", endless.job.job_id[:8], "--json")
    assert ended.code == 0
    assert ended.json == {"job_id": endless.job.job_id, "status": "cancelled"}
    assert [event.status for event in finished] == ["cancelled"]
    assert finished[0].num_steps < NUM_ENDLESS_STEPS
    assert endless.store.head(endless.cancel_key) is None


def test_request_that_came_too_late_does_not_end_the_next_try(cli: CommandLine, endless: Endless) -> None:
    job = endless.job
    parts = (job.tenant, job.base.base_id, job.job_id)
    assert not is_asked_to_cancel(endless.store, *parts, epoch=1)
    ask_to_cancel(endless.store, *parts, epoch=1, actor="ann")
    assert is_asked_to_cancel(endless.store, *parts, epoch=1)
    assert not is_asked_to_cancel(endless.store, *parts, epoch=2)


@pytest.mark.parametrize("owned", ["by nobody", "by a process that was killed"])
def test_job_without_a_living_host_is_cancelled_at_once(cli: CommandLine, endless: Endless, owned: str) -> None:
    me = Owner.here()
    lease = claim(endless.store, endless.key, STATE_FORMAT, FRESH, owner=dataclasses.replace(me, started=me.started - 1))
    lease.update({"status": "running"})
    if owned == "by nobody":
        lease.release({"status": "preempted"})
    [row] = cli("jobs", "list", "--json").json
    assert row["is_lost"] is (owned != "by nobody")
    ended = cli("jobs", "cancel", endless.job.job_id)
    assert ended.code == 0
    assert f"job {endless.job.job_id} is cancelled" in ended.out
    assert endless.status == "cancelled"
    assert endless.store.head(endless.cancel_key) is None
    again = cli("jobs", "cancel", endless.job.job_id, "--json").json
    assert again["status"] == "cancelled"
    document = read_document(endless.store, endless.key, STATE_FORMAT)
    assert document is not None
    assert (document.epoch, document.owner) == (2, None)


def test_cancelled_job_can_be_trained_again(cli: CommandLine, endless: Endless) -> None:
    claim(endless.store, endless.key, STATE_FORMAT, FRESH, owner=Owner.here()).release({"status": "cancelled"})
    with training(endless, cli.home / "cache") as finished:
        assert endless.status == "running"
    assert [event.status for event in finished] == []
    assert endless.status == "preempted"


def test_damaged_state_hides_no_other_job_but_is_told(cli: CommandLine, endless: Endless) -> None:
    claim(endless.store, endless.key, STATE_FORMAT, FRESH, owner=Owner.here()).release()
    other = endless.key.replace(endless.job.job_id, "b" * 32)
    endless.store.put(other, b"{}")
    ended = cli("jobs", "list", "--json")
    assert ended.code == 1
    assert [row["job_id"] for row in json.loads(ended.out)] == [endless.job.job_id]
    assert "note: " in ended.err
    assert other in ended.err
