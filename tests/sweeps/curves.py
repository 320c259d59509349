"""A fleet whose jobs follow a formula instead of training: everything else of the contract it keeps, over kills too.

A job's loss is a function of its spec and step. Before every evaluation it writes how far it is and its chunk of points, as
an attempt does, so that another process goes on from there. Every step that is executed leaves a line in `steps.log`.
"""

import json
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path

from infra.claims import Owner
from infra.errors import BadInput
from infra.local_storage import LocalStorage
from infra.storage import Storage
from infra.tracking import LocalTracker, Point
from infra.tracking_log import Shipper, TrackingLog
from sweeps.run import Surroundings, SweepResult, run_sweep
from sweeps.spec import SweepSpec
from workers import layout
from workers.job import BaseRef, DataRef, Job, pin
from workers.metrics_log import encode_points
from workers.report import Checkpointed, Evaluated, Finished, JobEvent, Progress
from workers.spec import JobSpec

LARGEST_R = 48
BASE = BaseRef("b" * 32, "v" * 32, "p" * 32, "/nowhere")
JOB = {
    "tenant": "acme",
    "task": "support",
    "base_model": {"name_or_path": "base"},
    "data": {"train": "train.jsonl", "validation": "valid.jsonl"},
    "training": {"max_steps": 40},
}
SPACE = {
    "peft.r": {"type": "categorical", "choices": [4, 8, 16, 64]},
    "alpha_over_r": {"type": "categorical", "choices": [1, 2]},
    "peft.target_modules": {"type": "categorical", "choices": ["attention", "all-linear", ["q_proj", "v_proj"]]},
    "training.learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
    "peft.lora_dropout": {"type": "float", "low": 0.0, "high": 0.1, "when": {"peft.target_modules": ["all-linear"]}},
}


def sweep(**changes: object) -> SweepSpec:
    """A sweep over the space above, with these changes."""
    return SweepSpec.model_validate({"name": "curves", "job": JOB, "num_trials": 6, "space": SPACE, **changes})


def resolve(spec: JobSpec, train: str = "d") -> Job:
    """Pin a job on a base that has layers of width LARGEST_R."""
    if spec.peft.r > LARGEST_R:
        raise BadInput(f"r = {spec.peft.r} is larger than the layer q_proj ({LARGEST_R}); use {LARGEST_R} or less.")
    return pin(spec, BASE, DataRef(train * 32, 100), DataRef("e" * 32, 10), None, None)


def loss_of(job: Job, step: int) -> float:
    """The closed form: best at a learning rate of 1e-3 and r = 16, falling with the steps."""
    peft, training = job.spec.peft, job.spec.training
    distance = abs(math.log10(training.learning_rate) + 3) + abs(math.log2(peft.r) - 4) / 4
    return 1.0 + 0.3 * distance + 0.05 * peft.lora_alpha / peft.r + peft.lora_dropout + 2.0 * math.exp(-step / 15)


class CurveFleet:
    """Places `num_places` jobs at a time, one step interval each per look, in the order of submission."""

    def __init__(
        self,
        folder: Path,
        store: Storage,
        num_places: int = 1,
        fails: Callable[[Job], str | None] = lambda job: None,
        last_is_told: bool = True,
    ) -> None:
        """`last_is_told`: False loses the evaluation at each job's last step, as the end of a host does."""
        self._last_is_told = last_is_told
        self._folder, self._store, self._num_places, self._fails = folder, store, num_places, fails
        self._jobs: deque[Job] = deque()
        self._waiting: set[str] = set()
        self._stopped: set[str] = set()
        self._told: list[JobEvent] = []
        self.is_closed = False
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def num_places(self) -> int:
        return self._num_places

    def submit(self, job: Job) -> None:
        assert not self.is_closed
        assert job.job_id not in {one.job_id for one in self._jobs}
        state = self._state(job)
        self._jobs.append(job)
        if state["evaluated"] and not state["ended"]:
            self._evaluate(job, state["step"])

    def events(self, timeout_seconds: float) -> list[JobEvent]:
        for job in list(self._jobs)[: self._num_places]:
            if job.job_id not in self._waiting:
                self._advance(job)
        told, self._told = self._told, []
        return told

    def decide(self, job_id: str, go: bool) -> None:
        self._waiting.remove(job_id)
        if not go:
            self._stopped.add(job_id)

    def cancel(self, job_id: str) -> None:
        raise AssertionError("a sweep cancels no job")

    def close(self, *, preempt: bool = True) -> None:
        self.is_closed = True
        self._jobs.clear()

    def _advance(self, job: Job) -> None:
        state = self._state(job)
        failure = self._fails(job)
        if state["step"] >= self._num_steps(job) or failure or job.job_id in self._stopped:
            self._end(job, state, failure)
            return
        every = job.spec.training.eval_steps or 10
        steps = range(state["step"] + 1, state["step"] + every + 1)
        with (self._folder / "steps.log").open("a") as log:
            log.writelines(f"{job.job_id} {step}\n" for step in steps)
        self._told.append(Progress(job.job_id, steps[-1], self._num_steps(job), loss_of(job, steps[-1]), 100.0, 10))
        self._checkpoint(job, state, steps)
        self._evaluate(job, steps[-1])

    def _checkpoint(self, job: Job, state: dict, steps: range) -> None:
        points = [Point("train/loss", loss_of(job, step), step, 1000 + step) for step in steps]
        chunk = f"{layout.attempt('acme', BASE.base_id, job.job_id, 1)}metrics-{steps[-1]:06d}.jsonl"
        self._store.put(chunk, encode_points(points))
        state |= {"step": steps[-1], "evaluated": True, "chunks": [*state["chunks"], chunk]}
        self._save(job, state)
        self._told.append(Checkpointed(job.job_id, steps[-1], 1, chunk))

    def _evaluate(self, job: Job, step: int) -> None:
        final = step >= self._num_steps(job)
        if not final:
            self._waiting.add(job.job_id)
        if not final or self._last_is_told:
            self._told.append(Evaluated(job.job_id, step, {"eval/loss": loss_of(job, step)}, final))

    def _end(self, job: Job, state: dict, failure: str | None) -> None:
        self._jobs.remove(job)
        self._save(job, state | {"ended": True})
        chunks = tuple(state["chunks"])
        if failure:
            self._told.append(Finished(job.job_id, "failed", failure, num_steps=state["step"], chunks=chunks))
        elif job.job_id in self._stopped:
            self._told.append(Finished(job.job_id, "stopped", num_steps=state["step"], chunks=chunks))
        else:
            step = state["step"]
            metrics = {"eval/loss": loss_of(job, step), "eval/accuracy": 1.0 / loss_of(job, step)}
            adapter_id = "a" + job.job_id[1:]
            event = Finished(job.job_id, "succeeded", "", adapter_id, metrics, step, step, 2.0, 10 * step, chunks=chunks)
            self._told.append(event)

    def _num_steps(self, job: Job) -> int:
        assert job.spec.training.max_steps is not None
        return job.spec.training.max_steps

    def _state(self, job: Job) -> dict:
        path = self._folder / f"{job.job_id}.json"
        return json.loads(path.read_text()) if path.exists() else {"step": 0, "evaluated": False, "ended": False, "chunks": []}

    def _save(self, job: Job, state: dict) -> None:
        path = self._folder / f"{job.job_id}.json"
        path.with_suffix(".new").write_text(json.dumps(state))
        path.with_suffix(".new").replace(path)


class Bench:
    """A folder in which sweeps are driven again and again: store, fleet and tracker in it last, the rest is opened anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = LocalStorage(folder / "store")
        self.tracker = LocalTracker(folder / "tracker")

    def drive(
        self, spec: SweepSpec, num_places: int = 1, fails=lambda job: None, resolve=resolve, last_is_told=True, **around: object
    ) -> SweepResult:
        """Drive the sweep as one process would, ship what it tells, and return its result."""
        self.fleet = CurveFleet(self.folder / "fleet", self.store, num_places, fails, last_is_told)
        log = TrackingLog(self.folder / "tracking.jsonl")
        shipper = Shipper(log, self.tracker, interval_seconds=0.01)
        try:
            surroundings = Surroundings(
                self.store, self.fleet, resolve, log, self.tracker, Owner.here(), lease_seconds=0.3, wait_seconds=0.0, **around
            )
            return run_sweep(spec, surroundings)
        finally:
            assert shipper.drain(30.0) == 0
            shipper.close(5.0)
            log.close()

    def executed_steps(self) -> list[str]:
        """Every step of every job that was executed, as "<job_id> <step>"."""
        path = self.folder / "fleet" / "steps.log"
        return path.read_text().splitlines() if path.exists() else []
