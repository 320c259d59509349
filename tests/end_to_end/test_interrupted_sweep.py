"""A sweep that is killed, interrupted and driven twice at once: the same command ends it as if nothing had happened."""

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.ground import SWEEP, Ground, ground_in, hosts_of, wait_until, wait_until_gone
from tests.end_to_end.mlflow_view import runs_in

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]


def statuses(ground: Ground) -> set[str]:
    return {run.status for run in runs_in(f"sqlite:///{ground.home}/mlflow.db")}


def wait_for_steps(ground: Ground, number: int) -> None:
    """Return when the hosts have done so many more steps."""
    before = len(ground.passed("step-done"))
    wait_until(lambda: len(ground.passed("step-done")) >= before + number, "hosts train")


@pytest.mark.faults
def test_sweep_ends_as_the_undisturbed_one_after_a_killed_driver_a_killed_host_and_an_interrupt(
    tmp_path: Path, test_data: Path
) -> None:
    with (
        ground_in(tmp_path / "twin", environment={"LORAFLEET_LAUNCHER": "in-process"}) as twin,
        ground_in(tmp_path / "a") as ground,
    ):
        for one in (twin, ground):
            one.write_sweep(test_data, training={"max_steps": 60})
        undisturbed = twin.start("sweep", "run", "sweep.yaml")

        # In the first life the driver dies as soon as it has recorded an evaluation, which comes after a checkpoint.
        spent = {"LORAFLEET_CRASHPOINT": "report-recorded:1", "LORAFLEET_CRASHPOINT_SPENT": str(tmp_path)}
        assert ground.run("sweep", "run", "sweep.yaml", **spent).code == -signal.SIGKILL

        # In the second a host is killed, then Ctrl-C is pressed: it reaches all processes of the terminal.
        driver = ground.start("sweep", "run", "sweep.yaml")
        wait_for_steps(ground, 3)
        psutil.Process(ground.passed("step-done")[-1].pid).kill()
        wait_for_steps(ground, 3)
        hosts = hosts_of(driver)
        os.killpg(driver.pid, signal.SIGINT)
        interrupted = ground.end_of(driver)
        assert interrupted.code == 130, interrupted.err
        assert "Traceback" not in interrupted.err
        wait_until_gone(hosts)
        assert "RUNNING" not in {state["status"].upper() for state in ground.job_states().values()}
        assert "RUNNING" not in statuses(ground)

        # In the third it ends.
        done = ground.run("sweep", "run", "sweep.yaml")
        assert done.code == 0, done.err
        assert twin.end_of(undisturbed).code == 0
        assert [(t.number, t.adapter_id, t.reports) for t in ground.trials()] == [
            (t.number, t.adapter_id, t.reports) for t in twin.trials()
        ]
        assert statuses(ground) == {"FINISHED"}
        assert any(int(passing.detail.split()[1]) > 0 for passing in ground.passed("job-resumed"))


@pytest.mark.faults
def test_second_driver_of_a_sweep_is_turned_away_and_harms_nothing(tmp_path: Path, test_data: Path) -> None:
    with ground_in(tmp_path, environment={"LORAFLEET_LAUNCHER": "in-process"}) as ground:
        ground.write_sweep(test_data, num_trials=2, training={"max_steps": 20_000, "eval_steps": 10_000})
        first = ground.start("sweep", "run", "sweep.yaml")
        wait_until(lambda: ground.passed("step-done"), "the first driver trains")
        elsewhere = {"LORAFLEET_HOME": str(tmp_path / "other"), "LORAFLEET_STORE": str(ground.home / "store")}
        for environment in ({}, elsewhere):
            second = ground.run("sweep", "run", "sweep.yaml", **environment)
            assert second.code == 1
            assert f"Sweep '{SWEEP}' is driven by another process" in second.err
            assert "Traceback" not in second.err
        first.send_signal(signal.SIGINT)
        assert ground.end_of(first).code == 130
        assert [trial.status for trial in ground.trials()] == ["running", "running"]
        assert {trial.epoch for trial in ground.trials()} == {1}
