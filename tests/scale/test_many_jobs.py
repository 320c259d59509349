"""Many jobs one after the other on one host: the base stays, memory does not grow, each adapter is as if it were the only one."""

import gc
from pathlib import Path

import psutil
import pytest

from tests.workers.jobs import Ground, drive
from workers.report import Finished

NUM_JOBS = 200
WARM_UP = 40
MAX_GROWTH_BYTES = 48 << 20


@pytest.mark.scale
@pytest.mark.timeout(1800)
def test_two_hundred_jobs_on_one_host_neither_reload_the_base_nor_grow_memory(tmp_path: Path, test_data: Path) -> None:
    ground = Ground(tmp_path, test_data)
    host = ground.host()
    adapters, resident, after_warm_up = set(), set(), 0
    for number in range(NUM_JOBS):
        job = ground.job(training={"seed": number, "max_steps": 2, "eval_steps": None}, peft={"r": 1 + number % 16})
        host.admit(job)
        (finished,) = [event for event in drive(host, job) if isinstance(event, Finished)]
        assert finished.status == "succeeded"
        adapters.add(finished.adapter_id)
        resident.add(id(host._base))
        if number == WARM_UP:
            gc.collect()
            after_warm_up = psutil.Process().memory_info().rss
    gc.collect()
    assert len(adapters) == NUM_JOBS
    assert len(resident) == 1
    assert psutil.Process().memory_info().rss - after_warm_up < MAX_GROWTH_BYTES
    alone = Ground(tmp_path / "alone", test_data)
    job = alone.job(training={"seed": 150, "max_steps": 2, "eval_steps": None}, peft={"r": 1 + 150 % 16})
    solo = alone.host()
    solo.admit(job)
    (finished,) = [event for event in drive(solo, job) if isinstance(event, Finished)]
    assert finished.adapter_id in adapters
