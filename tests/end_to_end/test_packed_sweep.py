"""Sweeps train in packs, and what comes out is what would have come out one by one."""

from pathlib import Path

import pytest

from tests.end_to_end.ground import SWEEP, TENANT, ground_in

pytestmark = pytest.mark.timeout(900)
NUM_TRIALS = 8


def adapter_ids(folder: Path, test_data: Path, max_concurrent: int) -> dict[int, str | None]:
    """Run the same random sweep with so many trials at a time; return what each trial trained."""
    folder.mkdir()
    with ground_in(folder) as ground:
        ground.write_sweep(
            test_data,
            training={"max_steps": 6, "eval_steps": 3},
            num_trials=NUM_TRIALS,
            max_concurrent=max_concurrent,
            sampler={"type": "random", "seed": 5},
            pruner={"type": "none"},
        )
        done = ground.run("sweep", "run", "sweep.yaml")
        assert done.code == 0, done.err
        status = ground.run("sweep", "status", f"{TENANT}/{SWEEP}")
        assert status.code == 0, status.err
        return {trial.number: trial.adapter_id for trial in ground.trials()}


@pytest.mark.scale
def test_one_trial_at_a_time_and_sixteen_give_the_same_adapters(tmp_path: Path, test_data: Path) -> None:
    alone = adapter_ids(tmp_path / "alone", test_data, 1)
    together = adapter_ids(tmp_path / "together", test_data, 16)
    assert alone == together
    assert len({adapter for adapter in alone.values() if adapter is not None}) == NUM_TRIALS
