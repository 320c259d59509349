"""An attempt owns its job for one epoch, and nobody does what another owner has done."""

import threading
import time
from dataclasses import replace
from pathlib import Path

from infra.claims import Owner
from infra.local_storage import LocalStorage
from workers.attempt import Attempt
from workers.job import BaseRef, DataRef, Job, pin
from workers.report import Finished
from workers.spec import JobSpec

LEASE_SECONDS = 30.0
SPEC = JobSpec.model_validate(
    {"tenant": "acme", "task": "support", "base_model": {"name_or_path": "base"}, "data": {"train": "train.jsonl"}}
)


def a_job() -> Job:
    return pin(SPEC, BaseRef("b" * 32, "v" * 32, "p" * 32, "base"), DataRef("d" * 32, 8), None, None, None)


def test_whoever_waited_for_another_owner_takes_its_result_and_trains_nothing(tmp_path: Path) -> None:
    store, job = LocalStorage(tmp_path), a_job()
    first = Attempt.begin(store, job, Owner.here(), LEASE_SECONDS)
    assert isinstance(first, Attempt)
    answers: list[Attempt | Finished] = []
    waiting = threading.Thread(target=lambda: answers.append(Attempt.begin(store, job, Owner.here(), LEASE_SECONDS)))
    waiting.start()
    time.sleep(0.5)  # long enough to find the claim held; it watches for a third of the lease
    told = first.succeed("a" * 32, {"eval/loss": 1.5}, 6, 4, 100)
    waiting.join()
    assert answers == [replace(told, reused=True)]
    assert Attempt.begin(store, job, Owner.here(), LEASE_SECONDS) == replace(told, reused=True)
