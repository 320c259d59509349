"""A sweep whose driver and hosts are killed again and again, and continued by the same command, ends as the undisturbed one."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contracts.storage_servers import S3Server
from tests.end_to_end.ground import SWEEP, TENANT, Ground, ground_in
from tests.end_to_end.mlflow_view import children, runs_in
from tests.faults.campaign import RANDOM, SEED, Campaign, assert_no_job_was_done_twice, crashpoints, names_in
from tests.faulty_proxy import FaultyProxy

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

SWEEP_RUN = ("sweep", "run", "sweep.yaml")
NUM_TRIALS, NUM_STEPS, INTERVAL, NUM_LIVE = 12, 30, 5, 2

LIVES = (
    "data-rows-written:1",  # once per store, so it comes first
    "claim-taken:1",
    RANDOM,
    "trial-recorded:1",
    RANDOM,
    "claim-updated:2",  # before a host has loaded its libraries: hosts pass this point, too
    RANDOM,
    "report-recorded:3",
    RANDOM,
    "tracking-shipped:2",
    "trial-told:1",
    RANDOM,
    "candidate-written:1",  # these two when all trials have ended
    "sweep-registered:1",
)
"""How the drivers die, one after the other: when they pass a point for the n-th time, or at a random moment after hosts died."""
FEWER_LIVES = ("data-rows-written:1", RANDOM, "report-recorded:2", RANDOM, "candidate-written:1")
HOST_POINTS = (
    "job-claimed:1",
    "step-done:7",
    "checkpoint-written:2",
    "job-resumed:1",
    "checkpoint-committed:3",
    "adapter-files-written:1",
    "manifest-written:1",
    "record-written:1",
    "job-committed:1",
)
ELSEWHERE = {
    "base-files-written",  # uploading and fetching a base: tests/workers/test_bases.py
    "base-fetched",
    "job-ended",  # a job that is preempted, cancelled or pruned: tests/end_to_end
    "journal-written",  # promotion: tests/pipelines/test_promote.py
    "head-written",
    "promotion-projected",
    "evidence-written",  # a promotion's: tests/faults/test_killed_promotions.py
    "orders-taken",  # nights: tests/faults/test_killed_night.py
}
ELSEWHERE_BEGINNINGS = ("night-", "gc-", "tenant-")
"""Of nights (test_killed_night.py), gc and forgetting tenants (tests/pipelines)."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, test_data: Path) -> Iterator[Ground]:
    """The same sweep, left alone."""
    with ground_in(tmp_path_factory.mktemp("undisturbed")) as ground:
        write(ground, test_data)
        done = ground.run(*SWEEP_RUN)
        assert done.code == 0, done.err
        yield ground


def write(ground: Ground, test_data: Path) -> None:
    ground.write_sweep(test_data, training={"max_steps": NUM_STEPS, "eval_steps": INTERVAL}, num_trials=NUM_TRIALS)


def assert_ended_as(ground: Ground, undisturbed: Ground, num_kills: int) -> None:
    """Compare what kills must not change, and bound what they may cost."""
    assert_totals_exact(ground)
    facts = [
        [(trial.number, trial.params, trial.values, trial.adapter_id) for trial in one.trials()] for one in (ground, undisturbed)
    ]
    assert facts[0] == facts[1]
    assert_no_job_was_done_twice(ground)
    assert_mlflow_equals(ground, undisturbed)
    steps, needed = (len(one.passed("step-done")) for one in (ground, undisturbed))
    print(f"{num_kills} kills, {steps} steps executed, {needed} undisturbed")
    assert needed == NUM_TRIALS * NUM_STEPS
    assert steps - needed <= num_kills * INTERVAL * NUM_LIVE
    assert any(int(passing.detail.split()[1]) > 0 for passing in ground.passed("job-resumed"))


def facts(ground: Ground) -> list[tuple[object, ...]]:
    """What of each trial must be the same."""
    return [(trial.number, trial.params, trial.values, trial.adapter_id, trial.reports) for trial in ground.trials()]


def assert_totals_exact(ground: Ground) -> None:
    trials = ground.trials()
    assert [trial.number for trial in trials] == list(range(NUM_TRIALS))
    assert Counter(trial.status for trial in trials) == {"complete": NUM_TRIALS}
    assert Counter(state["status"] for state in ground.job_states().values()) == {"succeeded": NUM_TRIALS}
    (sweep,) = ground.json("sweep", "status", f"{TENANT}/{SWEEP}")
    assert sweep["status"] == "complete"


def assert_mlflow_equals(ground: Ground, undisturbed: Ground) -> None:
    """One run per trial and one for the sweep, all ended, with the same points as ever, none twice."""
    runs, expected = (runs_in(f"sqlite:///{one.home}/mlflow.db") for one in (ground, undisturbed))
    assert [run.name for run in runs] == [run.name for run in expected]
    assert {run.status for run in runs} == {"FINISHED"}
    assert len(runs) == NUM_TRIALS + 1
    for number, run in children(runs).items():
        assert run.points == children(expected)[number].points
        assert run.tags["lorafleet.adapter_id"] == ground.trials()[number].adapter_id


def test_every_named_crash_point_of_a_sweep_is_one_it_is_killed_at() -> None:
    names = {name for name in crashpoints() if not name.startswith(ELSEWHERE_BEGINNINGS)}
    assert names_in((*LIVES, *HOST_POINTS)) | ELSEWHERE == names


def test_sweep_killed_at_every_point_and_at_random_ends_as_if_undisturbed(
    tmp_path: Path, test_data: Path, undisturbed: Ground
) -> None:
    with ground_in(tmp_path) as ground:
        write(ground, test_data)
        kills = Campaign(ground, SWEEP_RUN, list(LIVES), list(HOST_POINTS))
        kills.run()
        assert kills.num_driver_kills >= 10
        assert kills.num_host_kills >= 10
        assert_ended_as(ground, undisturbed, kills.num_driver_kills + kills.num_host_kills)


def test_sweep_killed_while_its_store_loses_answers_ends_as_if_undisturbed(
    tmp_path: Path, test_data: Path, undisturbed: Ground, moto: S3Server
) -> None:
    with FaultyProxy("127.0.0.1", moto.port, seed=SEED, drop_answer=0.05, cut_body=0.02) as proxy:
        settings = {"store": f"s3://{moto.new_bucket()}/lora", "endpoint_url": moto.url}
        with ground_in(tmp_path, environment={"LORAFLEET_S3_ENDPOINT_URL": proxy.url}, **settings) as ground:
            write(ground, test_data)
            kills = Campaign(ground, SWEEP_RUN, list(FEWER_LIVES), list(HOST_POINTS[2::2]))
            kills.run()
            assert kills.num_driver_kills >= 4
            assert kills.num_host_kills >= 4
            assert proxy.num_faults["drop"] > 10
            assert_ended_as(ground, undisturbed, kills.num_driver_kills + kills.num_host_kills)
