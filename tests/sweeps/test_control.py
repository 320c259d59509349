"""What other processes see of a sweep and may ask of it."""

from pathlib import Path

import pytest

from infra.errors import BadInput
from sweeps import control
from sweeps.ledger import Settings, read_spec
from tests.sweeps.curves import Bench, sweep


def test_status_and_best_are_read_from_the_ledger_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    result = bench.drive(sweep(num_trials=5))
    view = control.status(bench.store, "acme", "curves")
    assert (view.status, view.num_trials, view.counts) == ("complete", 5, result.counts)
    assert 0 < view.seconds <= result.seconds
    best = control.best(bench.store, "acme", "curves")
    assert best == result.best
    assert view.best is not None
    assert (view.best.number, view.best.value) == (best.number, best.values[0])
    assert control.names(bench.store, "acme") == ["curves"]


def test_view_during_the_drive_tells_steps_and_estimates(tmp_path: Path) -> None:
    views = []
    Bench(tmp_path).drive(sweep(num_trials=4), on_change=views.append)
    live = [trial for view in views for trial in view.trials if trial.status == "running" and trial.step > 0]
    assert {trial.num_steps for trial in live} == {40}
    assert {trial.step for trial in live} == {10, 20, 30, 40}
    assert views[0].seconds_left is None
    assert views[-1].seconds_left == 0.0
    assert views[-1].tokens_per_second == 0.0


def test_sweep_that_is_not_there_is_named(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for ask in (control.status, control.best, control.stop):
        with pytest.raises(BadInput, match="There is no sweep 'curves' of the tenant 'acme'"):
            ask(bench.store, "acme", "curves")


def test_best_of_nothing_complete_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.drive(sweep(num_trials=2), fails=lambda job: "error: no")
    with pytest.raises(BadInput, match="None of the 2 trials of the sweep 'curves' is complete"):
        control.best(bench.store, "acme", "curves")


def test_going_on_by_name_keeps_an_extended_total_apart_from_the_file(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.drive(sweep(num_trials=2))
    control.extend(bench.store, "acme", "curves", 3)
    spec = read_spec(bench.store, "acme", "curves")
    assert Settings.of(spec).num_trials == 3
    assert bench.drive(spec).num_trials == 3
    control.extend(bench.store, "acme", "curves", 4)
    assert bench.drive(sweep(num_trials=2)).num_trials == 4
    assert bench.drive(sweep(num_trials=5)).num_trials == 5


def test_wish_to_stop_that_nobody_heard_does_not_stop_the_next_driver(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.drive(sweep(num_trials=1))
    control.stop(bench.store, "acme", "curves")
    assert bench.drive(sweep(num_trials=3)).counts.get("running") is None
