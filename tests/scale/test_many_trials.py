"""A thousand trials in one sweep: exact totals, and a ledger that is rebuilt halfway without a difference."""

from pathlib import Path

import pytest

from sweeps.ledger import read_trials
from tests.sweeps.curves import Bench, sweep

NUM_TRIALS = 1000


@pytest.mark.scale
@pytest.mark.timeout(1800)
def test_a_thousand_trials_have_exact_totals_over_a_restart_and_equal_an_uninterrupted_sweep(tmp_path: Path) -> None:
    changes = {"sampler": {"type": "random", "seed": 1}, "max_concurrent": 8}
    whole, halves = Bench(tmp_path / "whole"), Bench(tmp_path / "halves")
    whole.drive(sweep(num_trials=NUM_TRIALS, **changes), num_places=8)
    halves.drive(sweep(num_trials=NUM_TRIALS // 2, **changes), num_places=8)
    result = halves.drive(sweep(num_trials=NUM_TRIALS, **changes), num_places=8)
    assert result.num_trials == NUM_TRIALS
    assert sum(result.counts.values()) == NUM_TRIALS
    first, second = (read_trials(bench.store, "acme", "curves") for bench in (whole, halves))
    assert [trial.params for trial in first] == [trial.params for trial in second]
    assert [trial.values for trial in first] == [trial.values for trial in second]
