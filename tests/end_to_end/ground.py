"""A folder with a sweep of real input, a home of its own, and the command line as people start it: one process per driver."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml

from infra.stores import open_store
from sweeps.ledger import read_trials
from sweeps.trial import Trial
from workers import layout

PATIENCE_SECONDS = 600.0
"""Longest wait for anything here. Only a bound: machines that run tests are busy."""
TENANT, TASK, SWEEP = "acme", "weather", "weather"
SPACE = {
    "peft.r": {"type": "categorical", "choices": [2, 4, 8]},
    "training.learning_rate": {"type": "float", "low": 1.0e-3, "high": 1.0e-2, "log": True},
}
TRAINING = {"per_device_train_batch_size": 4, "max_length": 128, "eval_steps": 5, "max_steps": 15}


class Passing(NamedTuple):
    """A line of the trace: a process passed a named point (`infra.crashpoints`)."""

    pid: int
    name: str
    detail: str


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class Ground:
    """Where a sweep is driven. `environment` is what its processes find beside a clean copy of this process's own."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    store: str | None = None
    """None: the home's own."""
    endpoint_url: str | None = None
    """Where tests read an S3 store, past any proxy that stands before it."""
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _logs: dict[int, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def trace_file(self) -> Path:
        return self.folder / "trace"

    def write_sweep(self, test_data: Path, *, training: Mapping[str, Any] | None = None, **changes: Any) -> None:
        """Write rows and `sweep.yaml`: SNIPS get-weather on the TinyStories base, with `changes` of the sweep's keys."""
        customer = test_data / "sets" / "snips" / "customers" / "get-weather"
        for name, num_rows in (("train", 64), ("valid", 16)):
            rows = (customer / f"{name}.jsonl").read_text().splitlines()[:num_rows]
            (self.folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
        job = {
            "tenant": TENANT,
            "task": TASK,
            "base_model": {"name_or_path": str(test_data / "bases" / "stories260k")},
            "data": {"train": "train.jsonl", "validation": "valid.jsonl"},
            "training": TRAINING | dict(training or {}),
        }
        sweep = {
            "name": SWEEP,
            "job": job,
            "space": SPACE,
            "sampler": {"type": "random", "seed": 3},
            "num_trials": 4,
            "max_concurrent": 2,
            "register": {"alias": "challenger"},
        }
        (self.folder / "sweep.yaml").write_text(yaml.safe_dump(sweep | changes, sort_keys=False))

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command in a process group of its own, as a terminal does."""
        return self.start_python("-m", "pipelines.cli", *arguments, **environment)

    def start_python(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start Python in a process group of its own."""
        log = self.folder / f"command-{len(self._started)}"
        with log.with_suffix(".out").open("wb") as out, log.with_suffix(".err").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.folder,
                env=self._environment() | environment,
                stdout=out,  # files, since Ray's processes may outlive a killed driver and keep a pipe open
                stderr=err,
                start_new_session=True,
            )
        self._started.append(process)
        self._logs[process.pid] = log
        return process

    def end_of(self, process: subprocess.Popen[bytes]) -> Ended:
        """Wait until a command ends; return how, and what it said."""
        code = process.wait(PATIENCE_SECONDS)
        log = self._logs[process.pid]
        return Ended(code, log.with_suffix(".out").read_text(), log.with_suffix(".err").read_text())

    def run(self, *arguments: str, **environment: str) -> Ended:
        """Run a command to its end."""
        return self.end_of(self.start(*arguments, **environment))

    def json(self, *arguments: str) -> Any:
        """Run a command with --json and return what it printed; it must succeed."""
        done = self.run(*arguments, "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)

    def trials(self) -> list[Trial]:
        """Return what the ledger holds."""
        return read_trials(self.storage, TENANT, SWEEP)

    @property
    def storage(self) -> Any:
        return open_store(self.store or str(self.home / "store"), endpoint_url=self.endpoint_url)

    def job_states(self) -> dict[str, dict[str, Any]]:
        """Return the body of every job's state by job_id."""
        found = {}
        for info in self.storage.list(layout.tenant(TENANT)):
            parts = layout.parts_of_job_state(info.key)
            if parts is not None:
                found[parts[2]] = json.loads(self.storage.get(info.key)[0])["body"]
        return found

    def trace(self) -> list[Passing]:
        """Return the points that processes have passed so far, in order."""
        if not self.trace_file.exists():
            return []
        lines = self.trace_file.read_text().splitlines()
        return [Passing(int(pid), name, " ".join(rest)) for _, pid, name, *rest in (line.split(" ") for line in lines)]

    def passed(self, name: str) -> list[Passing]:
        """Return the passings of one point."""
        return [passing for passing in self.trace() if passing.name == name]

    def close(self) -> None:
        """End what a failed test left running: the process groups of its commands."""
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LORAFLEET_")}
        ours = {"LORAFLEET_HOME": str(self.home), "LORAFLEET_CRASHPOINT_TRACE": str(self.trace_file), "OMP_NUM_THREADS": "1"}
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        store = {"LORAFLEET_STORE": self.store} if self.store else {}
        return kept | ours | {"PYTHONPATH": path} | store | self.environment


@contextmanager
def ground_in(folder: Path, **settings: Any) -> Iterator[Ground]:
    """Give a ground in `folder`, and end what it started."""
    ground = Ground(folder, **settings)
    try:
        yield ground
    finally:
        ground.close()


def hosts_of(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the processes in which Ray runs a driver's hosts."""
    try:
        children = psutil.Process(driver.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if _command(child).startswith("ray::Runner")]


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Return the first true value of `condition`."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise TimeoutError(f"waited {PATIENCE_SECONDS:.0f} s in vain until {what}")


def wait_until_gone(processes: Sequence[psutil.Process]) -> None:
    """Return when none of the processes runs any more."""
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE_SECONDS)
    assert not alive, alive


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
