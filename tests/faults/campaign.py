"""Killing drivers and hosts of some work at named points and at random, and starting the same command again, until it is done."""

import ast
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.end_to_end.ground import Ground, hosts_of, wait_until

SEED = int(os.environ.get("FAULTS_SEED", "20261122"))
RANDOM = "random"
REPOSITORY = Path(__file__).parents[2]


@dataclass
class Campaign:
    """Drives work to its end through kills. Hosts die, at points and at random, in the lives of drivers that die at random."""

    ground: Ground
    command: tuple[str, ...]
    """What starts the work, and continues it."""
    lives: list[str]
    """How the drivers die, one after the other: when they pass a point for the n-th time, or at RANDOM after hosts died.

    Hosts die at the next two of `host_points` in a life that ends at RANDOM, or where it says so: "random+manifest-written:1".
    """
    host_points: list[str]
    chance: random.Random = field(default_factory=lambda: random.Random(SEED))
    kills: list[str] = field(default_factory=list)
    """What was killed and when, in order."""
    _number: int = 0
    """Of the life: each may die at a point that an earlier one died at."""

    def run(self) -> None:
        """Kill as planned, then let the last driver end."""
        for planned in self.lives:
            self._number += 1
            self._spent.mkdir(parents=True)
            self._live(planned)
        assert not self.host_points, f"no host was killed at {self.host_points}"
        done = self.ground.run(*self.command)
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
        end, *named = planned.split("+")
        hosts = named or (self.host_points[:2] if end == RANDOM else [])
        armed = hosts if end == RANDOM else [end, *hosts]
        environment = {"LORAFLEET_CRASHPOINT": ",".join(armed), "LORAFLEET_CRASHPOINT_SPENT": str(self._spent)}
        driver = self.ground.start(*self.command, **environment)
        if end == RANDOM:
            self._see_hosts_die(driver, hosts)
            self._kill_at_random(driver)
        ended = self.ground.end_of(driver)
        assert ended.code == -signal.SIGKILL, f"the driver ended before it died at {planned}: {ended}"
        dead = [point for point in hosts if self._is_spent(point)]
        assert set(named) <= set(dead), f"no host was killed at {named}"
        self.host_points = [point for point in self.host_points if point not in dead]
        self.kills += [*(f"host at {point}" for point in dead), f"driver at {end}"]

    def _see_hosts_die(self, driver: subprocess.Popen[bytes], points: list[str]) -> None:
        for point in points:
            wait_until(lambda: driver.poll() is not None or self._is_spent(point), f"a host dies at {point}")  # noqa: B023

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
        return self.ground.folder / "spent" / str(self._number)


def assert_no_job_was_done_twice(ground: Ground) -> None:
    """No job is committed twice, and none trains on after its commit."""
    committed: set[str] = set()
    for passing in ground.trace():
        if passing.name == "job-committed":
            assert passing.detail not in committed
            committed.add(passing.detail)
        if passing.name in {"step-done", "job-resumed"}:
            assert passing.detail.split()[0] not in committed


def crashpoints() -> set[str]:
    """Return the names of all points in the code."""
    names = set()
    for package in ("infra", "workers", "sweeps", "pipelines"):
        for path in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "crashpoint":
                    assert isinstance(node.args[0], ast.Constant)
                    names.add(str(node.args[0].value))
    return names


def names_in(points: Iterable[str]) -> set[str]:
    """Return the names of points that are written with how often they are passed."""
    return {point.partition(":")[0] for planned in points for point in planned.split("+")} - {RANDOM}
