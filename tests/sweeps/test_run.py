"""The driver, on a fleet that follows a formula: totals, ends, resumption, and what the tracker is told."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.claims import Owner, claim
from infra.errors import BadInput, ClaimHeld, ClaimLost
from sweeps import control
from sweeps.ledger import Ledger, read_header, read_trials
from sweeps.run import CLAIM_FORMAT
from sweeps.space import apply
from sweeps.trial import Trial
from tests.sweeps.curves import LARGEST_R, Bench, loss_of, resolve, sweep
from workers import layout

DEFAULT = {
    "peft.r": 16,
    "alpha_over_r": 2,
    "peft.target_modules": "all-linear",
    "training.learning_rate": 2e-4,
    "peft.lora_dropout": 0.0,
}
FEASIBLE_R = {"peft.r": {"type": "categorical", "choices": [4, 8, 16]}}


def facts(trials: list[Trial]) -> list[tuple]:
    """What of a trial must not depend on when and how often its sweep was interrupted."""
    return [
        (
            trial.number,
            trial.params,
            trial.status,
            trial.reason,
            trial.values,
            trial.adapter_id,
            trial.reports,
            trial.duplicate_of,
        )
        for trial in trials
    ]


def trials_of(bench: Bench) -> list[Trial]:
    return read_trials(bench.store, "acme", "curves")


def test_sweep_ends_with_exactly_its_total_and_the_best_trial(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    result = bench.drive(sweep(num_trials=12, max_concurrent=3, enqueue=[DEFAULT]), num_places=3)
    trials = trials_of(bench)
    assert (result.status, result.num_trials, len(trials)) == ("complete", 12, 12)
    assert sum(result.counts.values()) == 12
    complete = [trial for trial in trials if trial.status == "complete"]
    assert result.best == min(complete, key=lambda trial: trial.values)
    assert result.default is not None
    assert result.default.params == DEFAULT
    assert result.best is not None
    assert result.best.values[0] == loss_of(resolve(apply(sweep().base_job, result.best.params)), 40)
    assert result.best.adapter_id == "a" + str(result.best.job_id)[1:]


def test_point_that_makes_no_job_is_infeasible_with_its_reason_and_counts(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    space = {"peft.r": {"type": "categorical", "choices": [8, 64]}}
    result = bench.drive(sweep(num_trials=2, sampler={"type": "grid"}, space=space))
    assert result.counts == {"complete": 1, "infeasible": 1}
    assert (
        trials_of(bench)[1].reason == f"bad_input: r = 64 is larger than the layer q_proj ({LARGEST_R}); use {LARGEST_R} or less."
    )


def test_out_of_memory_is_infeasible_and_other_failures_are_failed(tmp_path: Path) -> None:
    reasons = {4: "out_of_memory: 3 GB are not enough", 8: "error: the disk is on fire", 16: None}
    space = {"peft.r": {"type": "categorical", "choices": [4, 8, 16]}}
    bench = Bench(tmp_path)
    bench.drive(sweep(num_trials=3, sampler={"type": "grid"}, space=space), fails=lambda job: reasons[job.spec.peft.r])
    assert [(trial.status, trial.reason) for trial in trials_of(bench)] == [
        ("infeasible", reasons[4]),
        ("failed", reasons[8]),
        ("complete", ""),
    ]


def test_missing_objective_names_the_metrics_there_are(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.drive(sweep(num_trials=1, objective={"metric": "eval/los"}, space=FEASIBLE_R))
    (trial,) = trials_of(bench)
    assert trial.status == "failed"
    assert trial.reason == "no_metric: the job measured no eval/los; known metrics: eval/accuracy, eval/loss"


def test_pruner_that_never_sees_its_objective_is_noted_once(tmp_path: Path) -> None:
    spec = sweep(
        num_trials=2, objective={"metric": "eval/accuracy"}, space=FEASIBLE_R, pruner={"type": "asha", "min_resource": 10}
    )
    result = Bench(tmp_path).drive(spec)
    assert result.notes == ("The pruner has no effect: evaluations give eval/loss, not the objective eval/accuracy.",)


def test_too_many_failures_end_the_sweep_with_the_reason(tmp_path: Path) -> None:
    result = Bench(tmp_path).drive(
        sweep(num_trials=20, max_failures=2, space=FEASIBLE_R | LEARNING_RATE), fails=lambda job: "error: no"
    )
    assert (result.status, result.counts) == ("failed", {"failed": 3})
    assert result.reason == "3 trials failed, more than max_failures (2)"


LEARNING_RATE = {"training.learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True}}


def test_time_budget_counts_over_resumes(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    spec = sweep(num_trials=50, time_budget="90s", space=FEASIBLE_R | LEARNING_RATE)
    first = bench.drive(spec.model_copy(update={"num_trials": 2}), monotonic=Ticks(1.0), request_seconds=0.0)
    assert first.status == "complete"
    second = bench.drive(spec, monotonic=Ticks(1.0), request_seconds=0.0)
    assert second.status == "stopped"
    assert second.reason == "the time budget of 90s is used up"
    assert 2 < second.num_trials < 50
    assert first.seconds < 90 <= second.seconds
    assert bench.drive(spec, monotonic=Ticks(1.0)).num_trials == second.num_trials


class Ticks:
    """A clock that goes on by the same time at every look."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._now = seconds, 0.0

    def __call__(self) -> float:
        self._now += self._seconds
        return self._now


def test_same_command_after_the_end_runs_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    first = bench.drive(sweep(num_trials=4))
    executed = bench.executed_steps()
    second = bench.drive(sweep(num_trials=4))
    assert bench.executed_steps() == executed
    assert (second.counts, second.best) == (first.counts, first.best)


def test_larger_total_in_the_file_goes_on_and_equals_one_long_sweep(tmp_path: Path) -> None:
    short, long = Bench(tmp_path / "short"), Bench(tmp_path / "long")
    for total in (3, 4, 12):
        short.drive(sweep(num_trials=total))
    long.drive(sweep(num_trials=12))
    assert facts(trials_of(short)) == facts(trials_of(long))


def test_extended_total_holds_also_when_the_unchanged_file_is_run_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.drive(sweep(num_trials=2))
    control.extend(bench.store, "acme", "curves", 5)
    assert bench.drive(sweep(num_trials=2)).num_trials == 5
    with pytest.raises(BadInput, match="has 5 trials already"):
        control.extend(bench.store, "acme", "curves", 4)


def test_live_driver_takes_up_a_new_total(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    def extend_once(view) -> None:
        if view.num_trials == 2 and view.counts.get("complete") == 1:
            control.extend(bench.store, "acme", "curves", 4)

    result = bench.drive(sweep(num_trials=2, space=FEASIBLE_R | LEARNING_RATE), on_change=extend_once, request_seconds=0.0)
    assert result.num_trials == 4


def test_stop_checkpoints_and_the_same_command_ends_as_if_undisturbed(tmp_path: Path) -> None:
    bench, undisturbed = Bench(tmp_path / "a"), Bench(tmp_path / "b")
    spec = sweep(num_trials=5)

    def stop_in_the_third(view) -> None:
        if len(view.trials) == 3 and view.trials[2].step == 20:
            control.stop(bench.store, "acme", "curves")

    result = bench.drive(spec, on_change=stop_in_the_third, request_seconds=0.0)
    assert (result.status, result.reason) == ("preempted", "asked to stop")
    assert result.counts["running"] == 1
    assert control.status(bench.store, "acme", "curves").status == "preempted"
    assert bench.drive(spec).status == "complete"
    undisturbed.drive(spec)
    assert facts(trials_of(bench)) == facts(trials_of(undisturbed))
    assert sorted(bench.executed_steps()) == sorted(undisturbed.executed_steps())


def test_sweep_that_must_end_does_so_before_its_next_trial_and_one_that_is_through_stays_complete(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    def when_one_is_through() -> str | None:
        return "the deadline came" if any(trial.status == "complete" for trial in trials_of(bench)) else None

    result = bench.drive(sweep(num_trials=5), must_end=when_one_is_through)
    assert (result.status, result.reason, result.counts) == ("preempted", "the deadline came", {"complete": 1})
    assert bench.drive(sweep(num_trials=5)).status == "complete"
    assert bench.drive(sweep(num_trials=5), must_end=when_one_is_through).status == "complete"


def test_interrupt_leaves_live_trials_to_the_next_driver(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    def interrupt(view) -> None:
        if len(view.trials) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.drive(sweep(num_trials=3), on_change=interrupt)
    assert bench.fleet.is_closed
    assert bench.tracker.read("acme/curves")["status"] == "preempted"
    assert bench.drive(sweep(num_trials=3)).counts.get("running") is None


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({"space": FEASIBLE_R}, r"space \(alpha_over_r: .*"),
        ({"sampler": {"type": "random", "seed": 0}}, r"sampler \(type: 'tpe' -> 'random'\)"),
        ({"pruner": {"type": "asha", "min_resource": 10}}, r"job \(training.eval_steps: None -> 10\), pruner \(.*\)"),
        ({"enqueue": [{"peft.r": 8}]}, "enqueue"),
        ({"objective": {"metric": "eval/accuracy", "direction": "maximize"}}, "objective"),
    ],
)
def test_changed_sweep_is_refused_and_names_what_moved(tmp_path: Path, changes: dict, moved: str) -> None:
    bench = Bench(tmp_path)
    bench.drive(sweep(num_trials=1))
    with pytest.raises(BadInput, match=f"Sweep 'curves' was started with other {moved}; start one under a new name"):
        bench.drive(sweep(num_trials=1, **changes))


def test_changed_data_is_refused_by_name(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.drive(sweep(num_trials=1))
    with pytest.raises(BadInput, match=r"was started with other data \(train\); "):
        bench.drive(sweep(num_trials=2), resolve=lambda spec: resolve(spec, train="x"))
    assert len(trials_of(bench)) == 1


def test_equal_points_are_executed_once_and_copied(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    space = {"peft.r": {"type": "categorical", "choices": [8, 16]}}
    result = bench.drive(sweep(num_trials=8, space=space, sampler={"type": "random"}))
    trials = trials_of(bench)
    assert result.counts == {"complete": 8}
    assert len({trial.job_id for trial in trials}) == 2
    assert sum(trial.duplicate_of is None for trial in trials) == 2
    executed = bench.executed_steps()
    assert len(executed) == len(set(executed)) == 2 * 40
    for trial in trials:
        if trial.duplicate_of is not None:
            original = trials[trial.duplicate_of]
            assert (trial.values, trial.adapter_id) == (original.values, original.adapter_id)


def test_equal_point_asked_while_the_first_lives_follows_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    space = {"peft.r": {"type": "categorical", "choices": [8, 16]}}
    points = [{"peft.r": 8}, {"peft.r": 8}, {"peft.r": 16}]
    result = bench.drive(sweep(num_trials=3, space=space, enqueue=points, max_concurrent=3), num_places=3)
    assert [trial.duplicate_of for trial in trials_of(bench)] == [None, 0, None]
    assert result.counts == {"complete": 3}
    assert len(bench.executed_steps()) == 2 * 40


def test_asha_prunes_and_its_verdicts_are_stops(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    spec = sweep(num_trials=12, max_concurrent=4, pruner={"type": "asha", "min_resource": 10, "reduction_factor": 2})
    views = []
    result = bench.drive(spec, num_places=4, on_change=views.append)
    pruned = [trial for trial in trials_of(bench) if trial.status == "pruned"]
    assert pruned
    assert result.counts["complete"] >= 1
    assert all(trial.num_steps < 40 or max(trial.reports) == 40 for trial in pruned)
    rungs = views[-1].rungs
    assert [rung.step for rung in rungs] == [10, 20, 40]
    assert sum(rung.num_pruned for rung in rungs) == len(pruned)


def test_trial_at_its_last_step_is_judged_no_more(tmp_path: Path) -> None:
    """Its host may die between the commit and the telling; then the last evaluation is never heard of."""
    spec = sweep(num_trials=6, pruner={"type": "asha", "min_resource": 40, "reduction_factor": 2})
    heard, unheard = Bench(tmp_path / "heard"), Bench(tmp_path / "unheard")
    heard.drive(spec, last_is_told=True)
    unheard.drive(spec, last_is_told=False)
    assert {trial.status for trial in trials_of(heard)} == {"complete", "infeasible"}
    outcomes = [[(trial.params, trial.status, trial.values) for trial in trials_of(bench)] for bench in (heard, unheard)]
    assert outcomes[0] == outcomes[1]
    assert all(40 in trial.reports for trial in trials_of(heard) if trial.status == "complete")


def test_several_objectives_give_a_front(tmp_path: Path) -> None:
    objectives = [{"metric": "eval/loss"}, {"metric": "eval/accuracy", "direction": "maximize"}]
    result = Bench(tmp_path).drive(sweep(num_trials=5, objective=objectives))
    assert result.best is not None
    assert result.front == (result.best,)
    assert len(result.best.values) == 2


def test_second_driver_is_told_that_the_sweep_is_driven(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    lease = claim(
        bench.store, layout.sweep_claim("acme", "curves"), CLAIM_FORMAT, {"seconds": 0.0}, owner=Owner.here(), lease_seconds=0.3
    )
    with lease.keep_alive(), pytest.raises(ClaimHeld, match="Sweep 'curves' is driven by another process"):
        bench.drive(sweep())


def test_driver_that_slept_through_its_lease_changes_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    spec = sweep(num_trials=3)

    def interrupt(view) -> None:
        if len(view.trials) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.drive(spec, on_change=interrupt)
    sleeper = Ledger(bench.store, read_header(bench.store, "acme", "curves"), epoch=1)
    (live,) = sleeper.live()
    bench.drive(spec)
    before = facts(trials_of(bench))
    with pytest.raises(ClaimLost):
        sleeper.report(live.number, 10, 0.0)
    with pytest.raises(ClaimLost):
        sleeper.start({"peft.r": 4}, "j" * 32)
    assert facts(trials_of(bench)) == before


def test_trial_that_a_sleeper_wrote_last_is_taken_over(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.drive(sweep(num_trials=2))
    header = read_header(bench.store, "acme", "curves")
    sleeper, successor = Ledger(bench.store, header, epoch=7), Ledger(bench.store, header, epoch=8)
    sleeper.start({"peft.r": 4}, "a" * 32)
    successor.start({"peft.r": 8}, "b" * 32)
    assert trials_of(bench)[2].params == {"peft.r": 8}
    with pytest.raises(ClaimLost):
        sleeper.report(2, 10, 1.0)


def test_tracker_shows_every_trial_with_its_points_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.drive(sweep(num_trials=4))
    assert bench.tracker.open_runs("curves") == []
    parent = bench.tracker.read("acme/curves")
    assert (parent["status"], parent["tags"]["lorafleet.sweep"]) == ("complete", "curves")
    for trial in trials_of(bench):
        run = bench.tracker.read(f"acme/curves/{trial.number}")
        assert run["parent"] == "acme/curves"
        assert run["status"] == trial.status
        assert run["tags"]["lorafleet.trial"] == str(trial.number)
        assert run["params"] == {path: str(value) for path, value in trial.params.items()}
        if trial.status == "complete":
            assert run["tags"]["lorafleet.job_id"] == trial.job_id
            assert run["tags"]["lorafleet.adapter_id"] == trial.adapter_id
            assert sorted(row[2] for row in run["points"] if row[0] == "train/loss") == list(range(1, 41))


DRIVER = """
import sys
from pathlib import Path
from tests.sweeps.curves import Bench
from tests.sweeps.test_run import KILLED
print(Bench(Path(sys.argv[1])).drive(KILLED).status)
"""
KILLED = sweep(num_trials=8, pruner={"type": "asha", "min_resource": 10, "reduction_factor": 2})


@pytest.mark.parametrize(
    "points",
    [
        "claim-taken:1,trial-recorded:1,trial-recorded:3",
        "report-recorded:2,report-recorded:5,trial-told:1",
        "trial-told:3,tracking-shipped:2,report-recorded:4",
    ],
)
def test_killed_sweep_ends_as_the_undisturbed_one(tmp_path: Path, points: str, undisturbed: Callable[[], Bench]) -> None:
    environment = os.environ | {
        "LORAFLEET_CRASHPOINT": points,
        "LORAFLEET_CRASHPOINT_SPENT": str(tmp_path / "spent"),
        "PYTHONHASHSEED": "random",
    }
    (tmp_path / "spent").mkdir()
    num_kills = 0
    while True:
        process = subprocess.run(
            [sys.executable, "-c", DRIVER, str(tmp_path / "bench")], env=environment, capture_output=True, text=True
        )
        if process.returncode != -signal.SIGKILL:
            break
        num_kills += 1
    assert process.stdout == "complete\n", process.stderr
    assert num_kills == len(points.split(","))
    bench, reference = Bench(tmp_path / "bench"), undisturbed()
    assert facts(trials_of(bench)) == facts(trials_of(reference))
    assert bench.tracker.open_runs("curves") == []
    for trial in trials_of(bench):
        key = f"acme/curves/{trial.number}"
        mine, other = bench.tracker.read(key), reference.tracker.read(key)
        assert sorted(row[:3] for row in mine["points"]) == sorted(row[:3] for row in other["points"])
        assert (mine["status"], mine["params"]) == (other["status"], other["params"])
    executed = bench.executed_steps()
    assert set(executed) == set(reference.executed_steps())
    # At a kill one live job can lose at most the interval since its last checkpoint.
    assert len(executed) - len(set(executed)) <= 10 * num_kills


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Bench]:
    bench = Bench(tmp_path_factory.mktemp("undisturbed"))
    bench.drive(KILLED)
    return lambda: bench
