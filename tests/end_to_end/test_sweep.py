"""The main job on real input, as a person does it: sweep, look, promote, roll back, evaluate, extend; all embedded."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.ground import SWEEP, TASK, TENANT, Ground, ground_in
from tests.end_to_end.mlflow_view import SeenRun, children, runs_in

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]
NUM_TRIALS = 8
FINAL_METRICS = {"eval/loss", "eval/perplexity", "eval/token_accuracy"}
ENDED = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED", "infeasible": "FAILED"}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, test_data: Path) -> Iterator[Ground]:
    """Eight trials by TPE and ASHA, the default first."""
    with ground_in(tmp_path_factory.mktemp("swept")) as ground:
        ground.write_sweep(
            test_data,
            num_trials=NUM_TRIALS,
            sampler={"type": "tpe", "seed": 1},
            pruner={"type": "asha", "min_resource": 5, "reduction_factor": 3},
            enqueue=[{"peft.r": 4, "training.learning_rate": 2.0e-3}],
        )
        done = ground.run("sweep", "run", "sweep.yaml")
        assert done.code == 0, done.err
        assert f"sweep {TENANT}/{SWEEP} complete: {NUM_TRIALS} trials" in done.out
        yield ground


def runs_of(ground: Ground) -> list[SeenRun]:
    return runs_in(f"sqlite:///{ground.home}/mlflow.db")


def test_sweep_ends_with_its_total_and_learns_something(swept: Ground) -> None:
    trials = swept.trials()
    assert [trial.number for trial in trials] == list(range(NUM_TRIALS))
    assert {trial.status for trial in trials} <= {"complete", "pruned"}
    best = swept.json("sweep", "best", f"{TENANT}/{SWEEP}")
    complete = [trial for trial in trials if trial.status == "complete"]
    assert best["adapter_id"] == min(complete, key=lambda trial: trial.values).adapter_id
    assert best["metrics"]["eval/loss"] < 4.0  # the plain base has 7.6
    assert best["metrics"].keys() >= FINAL_METRICS


def test_report_stands_alone(swept: Ground) -> None:
    page = (swept.home / "reports" / f"{TENANT}-{SWEEP}.html").read_text()
    assert f"{SWEEP}" in page
    assert 'src="http' not in page


def test_finished_sweep_has_nothing_to_stop(swept: Ground) -> None:
    before = swept.run("sweep", "status", f"{TENANT}/{SWEEP}", "--json").out
    asked = swept.run("sweep", "stop", f"{TENANT}/{SWEEP}")
    assert (asked.code, asked.out) == (0, f"sweep {TENANT}/{SWEEP} is not running (complete); there is nothing to stop.\n")
    assert swept.run("sweep", "status", f"{TENANT}/{SWEEP}", "--json").out == before


def test_mlflow_has_a_run_for_the_sweep_and_one_per_trial_none_of_them_open(swept: Ground) -> None:
    runs, trials = runs_of(swept), swept.trials()
    (parent,) = [run for run in runs if run.name == SWEEP]
    assert (parent.status, parent.tags["lorafleet.status"]) == ("FINISHED", "complete")
    by_number = children(runs)
    assert len(runs) == 1 + NUM_TRIALS
    for trial in trials:
        run = by_number[trial.number]
        assert run.status == ENDED[trial.status]
        assert run.tags["mlflow.parentRunId"] == parent.run_id
        tags = {
            name: run.tags.get(f"lorafleet.{name}") for name in ("status", "sweep", "trial", "job_id", "tenant", "adapter_id")
        }
        expected = (trial.status, SWEEP, str(trial.number), trial.job_id, TENANT, trial.adapter_id)
        assert tuple(tags.values()) == expected
        assert run.tags["lorafleet.base_id"] == parent.tags["lorafleet.base_id"]
        assert run.tags["lorafleet.data_digest"] == parent.tags["lorafleet.data_digest"]
        assert run.tags["lorafleet.attempt"] == "1"
        steps = [step for metric, step, _ in run.points if metric == "train/loss"]
        assert steps == list(range(1, len(steps) + 1))


def test_best_is_registered_promoted_rolled_back_and_evaluated_on_its_own_base_only(swept: Ground, test_data: Path) -> None:
    best = swept.json("sweep", "best", f"{TENANT}/{SWEEP}")["adapter_id"]
    second = next(str(t.adapter_id) for t in swept.trials() if t.status == "complete" and t.adapter_id != best)
    model = f"{TENANT}.{TASK}"
    assert [swept.run("promote", ref).code for ref in (f"{model}@challenger", second)] == [0, 0]
    assert swept.run("rollback", model).code == 0
    champions = [entry["adapter_id"] for entry in swept.json("history", model)]
    assert sorted(champions) == sorted([best, second, best])
    measured = swept.json("evaluate", f"{model}@champion", "--data", "valid.jsonl")
    plain, champion = measured["measured"]
    assert champion["adapter_id"] == best
    assert champion["metrics"]["eval/loss"] < plain["metrics"]["eval/loss"] - 1.0
    audit = swept.json("adapters", "audit", best, "--rows", "0")
    assert audit["not_in_mlflow"] is None
    tagged = [run.tags["lorafleet.adapter_id"] for run in runs_of(swept) if run.tags.get("lorafleet.audit") == audit["sentence"]]
    assert best in tagged
    assert audit["sentence"] in (swept.home / "reports" / f"{TENANT}-{SWEEP}.html").read_text()
    foreign = str(test_data / "bases" / "talk-5m")
    refused = swept.run("evaluate", f"{model}@champion", "--base", foreign, "--data", "valid.jsonl")
    assert refused.code == 2
    assert "base" in refused.err


def test_same_command_does_nothing_new_and_extend_adds_exactly_so_many(swept: Ground) -> None:
    before, steps = swept.trials(), len(swept.passed("step-done"))
    again = swept.run("sweep", "run", "sweep.yaml")  # starts no host, hence no Ray
    assert again.code == 0
    assert swept.trials() == before
    assert len(swept.passed("step-done")) == steps
    assert len(runs_of(swept)) == 1 + NUM_TRIALS
    assert swept.run("sweep", "extend", f"{TENANT}/{SWEEP}", "--num-trials", str(NUM_TRIALS + 2)).code == 0
    assert swept.run("sweep", "resume", SWEEP, LORAFLEET_LAUNCHER="in-process").code == 0
    assert swept.trials()[:NUM_TRIALS] == before
    assert Counter(run.status in {"RUNNING", "SCHEDULED"} for run in runs_of(swept)) == {False: 1 + NUM_TRIALS + 2}
    assert len(swept.trials()) == NUM_TRIALS + 2
