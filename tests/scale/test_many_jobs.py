"""Very many jobs join and leave one host: the base stays, memory does not grow, each adapter is as if it were the only one."""

import gc
from pathlib import Path

import psutil
import pytest

from tests.workers.jobs import Ground, drive
from workers.host import EngineHost
from workers.job import Job
from workers.report import Finished

NUM_JOBS = 1000
NUM_TOGETHER = 8
WARM_UP = 100
MAX_GROWTH_BYTES = 48 << 20
PROBED = (151, 502, 998)
"""Jobs that are trained alone as well, on a host that has seen no other."""


def small_job(ground: Ground, number: int) -> Job:
    """A job of two steps; ranks, targets and lengths of stay change from one to the next."""
    training = {"seed": number, "max_steps": 1 + number % 3, "eval_steps": None, "per_device_train_batch_size": 1}
    targets = ["attention", "mlp", "all-linear", ["q_proj"]][number % 4]
    return ground.job(training=training, peft={"r": 1 + number % 16, "target_modules": targets})


def ended(host: EngineHost) -> list[Finished]:
    return [event for event in host.report() if isinstance(event, Finished)]


@pytest.mark.scale
@pytest.mark.timeout(3600)
def test_a_thousand_joins_and_leaves_neither_reload_the_base_nor_grow_memory(tmp_path: Path, test_data: Path) -> None:
    ground = Ground(tmp_path, test_data)
    host = ground.host(slots=NUM_TOGETHER)
    found: dict[str, Finished] = {}
    bases, after_warm_up, number = set(), 0, 0
    while len(found) < NUM_JOBS:
        while host.num_free and number < NUM_JOBS:
            host.admit(small_job(ground, number))
            number += 1
        host.step()
        found |= {end.job_id: end for end in ended(host)}
        assert host._loaded is not None
        bases.add(id(host._loaded.base))
        if not after_warm_up and len(found) >= WARM_UP:
            gc.collect()
            after_warm_up = psutil.Process().memory_info().rss
    gc.collect()
    assert {end.status for end in found.values()} == {"succeeded"}
    assert len({end.adapter_id for end in found.values()}) == NUM_JOBS
    assert len(bases) == 1
    assert host._loaded is not None
    assert host._loaded.pack.bytes_in_use() == 0
    assert psutil.Process().memory_info().rss - after_warm_up < MAX_GROWTH_BYTES
    host.close()
    for probed in PROBED:
        alone = Ground(tmp_path / f"alone-{probed}", test_data)
        job, solo = small_job(alone, probed), alone.host()
        solo.admit(job)
        (finished,) = [event for event in drive(solo, job) if isinstance(event, Finished)]
        assert finished.adapter_id == found[job.job_id].adapter_id
        alone.close()
