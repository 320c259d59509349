"""A sweep whose driver and hosts are killed again and again, and continued by the same command, ends as the undisturbed one."""

import ast
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.contracts.storage_servers import S3Server
from tests.end_to_end.ground import SWEEP, TENANT, Ground, ground_in, hosts_of, wait_until
from tests.end_to_end.mlflow_view import children, runs_in
from tests.faulty_proxy import FaultyProxy

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

REPOSITORY = Path(__file__).parents[2]
SEED = int(os.environ.get("FAULTS_SEED", "20261122"))
NUM_TRIALS, NUM_STEPS, INTERVAL, NUM_LIVE = 12, 30, 5, 2

RANDOM = "random"
LIVES = (
    "data-rows-written:1",  # once per store, so it comes first
    "claim-taken:1",
    RANDOM,
    "trial-recorded:1",
    RANDOM,
    "claim-updated:3",
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
}


@dataclass
class Campaign:
    """Drives a sweep to its end through kills. Hosts die, at points and at random, in the lives of drivers that die at random."""

    ground: Ground
    lives: list[str]
    host_points: list[str]
    chance: random.Random = field(default_factory=lambda: random.Random(SEED))
    kills: list[str] = field(default_factory=list)
    """What was killed and when, in order."""

    def run(self) -> None:
        """Kill as planned, then let the last driver end."""
        self._spent.mkdir()
        for planned in self.lives:
            self._live(planned)
        assert not self.host_points, f"no host was killed at {self.host_points}"
        done = self.ground.run("sweep", "run", "sweep.yaml")
        assert done.code == 0, done.err
        print(f"seed {SEED}: " + ", ".join(self.kills))

    @property
    def num_driver_kills(self) -> int:
        return sum(kill.startswith("driver") for kill in self.kills)

    @property
    def num_host_kills(self) -> int:
        return sum(kill.startswith("host") for kill in self.kills)

    def _live(self, planned: str) -> None:
        """Start a driver and see it die as planned."""
        hosts = self.host_points[:2] if planned == RANDOM else []
        armed = hosts if planned == RANDOM else [planned]
        environment = {"LORAFLEET_CRASHPOINT": ",".join(armed), "LORAFLEET_CRASHPOINT_SPENT": str(self._spent)}
        driver = self.ground.start("sweep", "run", "sweep.yaml", **environment)
        if planned == RANDOM:
            self._see_hosts_die(driver, hosts)
            self._kill_at_random(driver)
        ended = self.ground.end_of(driver)
        assert ended.code == -signal.SIGKILL, f"the driver ended before it died at {planned}: {ended}"
        self.kills.append(f"driver at {planned}")

    def _see_hosts_die(self, driver: subprocess.Popen[bytes], points: list[str]) -> None:
        for point in points:
            wait_until(lambda: driver.poll() is not None or self._is_spent(point), f"a host dies at {point}")  # noqa: B023
            if self._is_spent(point):
                self.host_points.remove(point)
                self.kills.append(f"host at {point}")

    def _kill_at_random(self, driver: subprocess.Popen[bytes]) -> None:
        """Kill a host after some steps, and the driver after some more."""
        self._wait_for_steps(driver, self.chance.randint(1, 12))
        hosts = hosts_of(driver)
        if hosts:
            self.chance.choice(hosts).kill()
            self.kills.append("host at random")
        self._wait_for_steps(driver, self.chance.randint(1, 12))
        time.sleep(self.chance.uniform(0.0, 0.2))
        driver.kill()

    def _wait_for_steps(self, driver: subprocess.Popen[bytes], number: int) -> None:
        before = len(self.ground.passed("step-done"))
        wait_until(
            lambda: driver.poll() is not None or len(self.ground.passed("step-done")) >= before + number,
            f"{number} steps are done",
        )

    def _is_spent(self, point: str) -> bool:
        return (self._spent / point.replace(":", "-")).exists()

    @property
    def _spent(self) -> Path:
        return self.ground.folder / "spent"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, test_data: Path) -> Iterator[Ground]:
    """The same sweep, left alone."""
    with ground_in(tmp_path_factory.mktemp("undisturbed")) as ground:
        write(ground, test_data)
        done = ground.run("sweep", "run", "sweep.yaml")
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


def assert_no_job_was_done_twice(ground: Ground) -> None:
    """No job is committed twice, and none trains on after its commit."""
    committed: set[str] = set()
    for passing in ground.trace():
        if passing.name == "job-committed":
            assert passing.detail not in committed
            committed.add(passing.detail)
        if passing.name in {"step-done", "job-resumed"}:
            assert passing.detail.split()[0] not in committed


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
    names = set()
    for package in ("infra", "workers", "sweeps", "pipelines"):
        for path in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "crashpoint":
                    assert isinstance(node.args[0], ast.Constant)
                    names.add(node.args[0].value)
    planned = {point.partition(":")[0] for point in (*LIVES, *HOST_POINTS)} - {RANDOM}
    assert planned | ELSEWHERE == names


def test_sweep_killed_at_every_point_and_at_random_ends_as_if_undisturbed(
    tmp_path: Path, test_data: Path, undisturbed: Ground
) -> None:
    with ground_in(tmp_path) as ground:
        write(ground, test_data)
        kills = Campaign(ground, list(LIVES), list(HOST_POINTS))
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
            kills = Campaign(ground, list(FEWER_LIVES), list(HOST_POINTS[2::2]))
            kills.run()
            assert kills.num_driver_kills >= 4
            assert kills.num_host_kills >= 4
            assert proxy.num_faults["drop"] > 10
            assert_ended_as(ground, undisturbed, kills.num_driver_kills + kills.num_host_kills)
