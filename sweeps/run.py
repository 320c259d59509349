"""The driver of a sweep: asks for trials, has their jobs trained, passes on verdicts, records what came of them.

One driver per sweep; the same call goes on where a driver before was killed. Each step is recorded in the ledger before it has an
effect outside: a trial before its job is submitted, a report before it may prune, an end before anybody hears of it.
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from infra.claims import Lease, Owner, claim
from infra.crashpoints import crashpoint
from infra.errors import BadInput, ClaimHeld, ClaimLost, LorafleetError
from infra.storage import Storage
from infra.tracking import Tracker
from infra.tracking_log import TrackingLog
from sweeps.ledger import CLAIM_FORMAT, Header, Ledger, Settings, pin_sweep
from sweeps.outcome import outcome_of_job
from sweeps.packs import PackView, forget_packs, packs_of, write_packs
from sweeps.projection import Projection
from sweeps.space import apply, grid_size
from sweeps.spec import SweepSpec
from sweeps.study import Study, no_mirror
from sweeps.trial import Trial, best_of, count_by_status, pareto_front
from sweeps.view import SweepView, view_of
from workers import layout
from workers.fleet import Fleet
from workers.forgotten import TenantForgotten, refuse_forgotten
from workers.job import Job
from workers.metrics_log import decode_points
from workers.report import Checkpointed, Evaluated, Finished, HostEvent, PackState, Progress
from workers.spec import JobSpec


@dataclass(frozen=True)
class Surroundings:
    """What a driver works with. The caller opens and closes them."""

    store: Storage
    fleet: Fleet
    resolve: Callable[[JobSpec], Job]
    """Pins base and data of a job; raises BadInput if the spec makes no job."""
    tracking_log: TrackingLog
    tracker: Tracker
    """Asked once, on a resume, which runs it still shows as open."""
    owner: Owner
    lease_seconds: float = 30.0
    on_change: Callable[[SweepView], None] = lambda view: None
    """Called with the state of things after every round."""
    must_end: Callable[[], str | None] = lambda: None
    """Asked before every round: why the sweep is to end now, resumable, as if it was asked to stop; None while it may go on."""
    mirror: Callable[[Trial, Study], None] = no_mirror
    """Called with every ended trial (`StudyMirror`)."""
    clock: Callable[[], float] = time.time
    """Seconds since the epoch."""
    monotonic: Callable[[], float] = time.monotonic
    """Seconds that never jump; the time budget counts them."""
    wait_seconds: float = 0.5
    """Longest wait for an event in one round."""
    request_seconds: float = 2.0
    """Time between two looks for what other processes wish (stop, extend)."""


@dataclass(frozen=True)
class SweepResult:
    """How far a sweep came."""

    tenant: str
    name: str
    status: str
    """complete; failed: too many failures; stopped: no time left; preempted: asked to stop, the same command goes on."""
    reason: str
    counts: dict[str, int]
    """Trials by status; nothing but preempted leaves any running."""
    best: Trial | None
    """Best complete trial; of several objectives the front's best in the first."""
    front: tuple[Trial, ...]
    """The trials no other beats in every objective; with one objective the best alone."""
    default: Trial | None
    """The first enqueued trial, None if nothing was enqueued."""
    num_trials: int
    """Trials that exist."""
    seconds: float
    """Running time, summed over resumes."""
    notes: tuple[str, ...]


def run_sweep(spec: SweepSpec, around: Surroundings) -> SweepResult:
    """Drive a sweep until its totals are reached, and return what it found.

    Raises BadInput if another sweep was started under this name, ClaimHeld while another process drives it, ClaimLost
    if another took over. Whatever is raised, KeyboardInterrupt too, the live jobs are checkpointed and the same call goes on.
    """
    job = around.resolve(spec.base_job)
    header = pin_sweep(around.store, spec, job, around.clock())
    lease = _claim(around, job.tenant, spec.name)
    _refuse_forgotten(around.store, job.tenant, spec.name, lease)
    with lease.keep_alive():
        driver = _Driver(spec, around, header, job, lease)
        try:
            driver.adopt()
            while True:
                driver.heed_requests()
                driver.fill()
                driver.show()
                if driver.is_done():
                    break
                for event in around.fleet.events(around.wait_seconds):
                    driver.take(event)
        except BaseException as error:
            driver.abandon(error)
            raise
        return driver.conclude()


def _claim(around: Surroundings, tenant: str, name: str) -> Lease:
    key = layout.sweep_claim(tenant, name)
    try:
        return claim(
            around.store,
            key,
            CLAIM_FORMAT,
            {"seconds": 0.0, "status": "running"},
            owner=around.owner,
            lease_seconds=around.lease_seconds,
        )
    except ClaimHeld as error:
        raise ClaimHeld(
            f"Sweep '{name}' is driven by another process; wait for it, end it with 'sweep stop {name}', or, if it was killed, "
            f"try again in {around.lease_seconds:.0f} seconds."
        ) from error


def _refuse_forgotten(store: Storage, tenant: str, name: str, lease: Lease) -> None:
    """Raise BadInput, and leave nothing of the sweep, if its tenant was forgotten since it was resolved."""
    try:
        refuse_forgotten(store, tenant)
    except TenantForgotten:
        lease.release()
        store.delete(layout.sweep_spec(tenant, name))
        store.delete(layout.sweep_claim(tenant, name))
        raise


@dataclass
class _Driver:
    """What a driver knows while it drives; the truth of it is in the ledger."""

    spec: SweepSpec
    around: Surroundings
    header: Header
    job: Job
    lease: Lease
    notes: list[str] = field(default_factory=list)
    _progress: dict[int, Progress] = field(default_factory=dict)
    _packs: dict[str, PackState] = field(default_factory=dict)
    """What hosts told of their packs last, by host."""
    _shown: tuple[PackView, ...] = ()
    """The packs that stand in the store."""
    _numbers: dict[str, int] = field(default_factory=dict)
    """Trials whose job was submitted here and has not ended, by job."""
    _preempted: str | None = None
    """Why this driver ends before its time."""
    _limit: tuple[str, str] | None = None
    """Status and reason, while a limit forbids to ask for more trials."""
    _asked_last: float = -math.inf

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.around.store, self.header, self.lease.epoch, self.around.clock)
        self.settings = self.ledger.agree_on_settings(Settings.of(self.spec))
        self.study = Study(self.header.spec, self.ledger.trials.values())
        self.projection = Projection(
            self.around.tracking_log, self.header, self.job, lambda key: decode_points(self.around.store.get(key)[0])
        )
        self._spent_before = float(self.lease.body["seconds"])
        self._began = self.around.monotonic()
        self._grid_points = self._count_grid()

    def adopt(self) -> None:
        """Take up what a driver before left: tell the tracker what it may have missed, and have live jobs go on."""
        self.ledger.forget_stop()
        self.projection.begin()
        self._repeat_what_the_tracker_missed()
        for trial in self.ledger.ended():
            self.around.mirror(trial, self.study)
        for trial in self.ledger.live():
            self._resume(trial)

    def heed_requests(self) -> None:
        """Look whether the caller wants an end; note the time spent, and whether another process wants that, or another total."""
        if not self.is_done() and (reason := self.around.must_end()) is not None:
            self.preempt(reason)
            return
        now = self.around.monotonic()
        if now - self._asked_last < self.around.request_seconds:
            return
        self._asked_last = now
        self.lease.update({"seconds": self.seconds, "status": "running"})
        self._show_packs()
        self.settings = self.ledger.settings()
        if self.ledger.is_asked_to_stop():
            self.preempt("asked to stop")

    def fill(self) -> None:
        """Ask for trials while some are wanted and there is a place for them."""
        while self._wants_more() and self._has_room():
            self._start_next()

    def show(self) -> None:
        """Hand the state of things to whoever watches."""
        spec = self.settings.applied_to(self.header.spec)
        trials = list(self.ledger.trials.values())
        status = "running" if self._preempted is None else "preempted"
        packs = packs_of(self._packs.values(), self._numbers)
        view = view_of(self.header.tenant, spec, status, trials, self.seconds, self._progress, self.notes, packs)
        self.around.on_change(view)

    def is_done(self) -> bool:
        """Tell whether nothing lives (here) and nothing more is wanted."""
        return self._preempted is not None or (not self.ledger.live() and not self._wants_more())

    def take(self, event: HostEvent) -> None:
        """Act on what the fleet tells of a job of ours."""
        if isinstance(event, PackState):
            self._packs[event.host] = event
            return
        number = self._numbers.get(event.job_id)
        if number is None:
            return
        match event:
            case Progress():
                self._progress[number] = event
            case Evaluated(final=True):
                self._note_last(number, event)
            case Evaluated():
                self.around.fleet.decide(event.job_id, not self._is_to_be_pruned(number, event))
            case Checkpointed():
                self.projection.chunk(number, event.chunk, event.epoch)
            case Finished():
                self._finish(number, event)

    def preempt(self, reason: str) -> None:
        """Checkpoint what lives and ask for nothing more; the ledger keeps it as running, for the next driver."""
        self._preempted = reason
        self.around.fleet.close(preempt=True)
        self.ledger.forget_stop()

    def abandon(self, error: BaseException) -> None:
        """Leave everything so that the same call goes on, as far as that is possible still."""
        if isinstance(error, ClaimLost):
            self.around.fleet.close(preempt=True)
            return
        # A store that does not answer must not hide the error that is on its way up.
        with contextlib.suppress(LorafleetError):
            self.preempt("interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__)
            self.conclude()

    def conclude(self) -> SweepResult:
        """Say how far the sweep came, to the tracker too, and let go of it."""
        status, reason = self._limit or ("complete", "")
        if self._preempted is not None:
            status, reason = "preempted", self._preempted
            for trial in self.ledger.live():
                self.projection.pause_trial(trial.number)
        self.projection.end(f"{status}({reason})" if reason else status)
        forget_packs(self.around.store, self.header.tenant, self.header.spec.name)
        self.lease.release({"seconds": self.seconds, "status": status})
        trials = list(self.ledger.trials.values())
        return SweepResult(
            tenant=self.header.tenant,
            name=self.header.spec.name,
            status=status,
            reason=reason,
            counts=count_by_status(trials),
            best=best_of(trials, self.header.spec.objectives),
            front=tuple(pareto_front(trials, self.header.spec.objectives)),
            default=self.ledger.trials.get(0) if self.header.spec.enqueue else None,
            num_trials=len(trials),
            seconds=self.seconds,
            notes=tuple(self.notes),
        )

    @property
    def seconds(self) -> float:
        """Running time, summed over resumes."""
        return self._spent_before + self.around.monotonic() - self._began

    def _show_packs(self) -> None:
        """Let people at other terminals see what the hosts train, where that has changed."""
        packs = packs_of(self._packs.values(), self._numbers)
        if packs != self._shown:
            write_packs(self.around.store, self.header.tenant, self.header.spec.name, packs)
            self._shown = packs

    def _count_grid(self) -> int | None:
        if self.spec.sampler.type != "grid":
            return None
        size = len(self.spec.enqueue) + grid_size(self.spec.space)
        if size < self.settings.num_trials:
            self.notes.append(
                f"The grid has {size} points (enqueued ones included), fewer than num_trials; the sweep ends after them."
            )
        return size

    def _wants_more(self) -> bool:
        total = min(self.settings.num_trials, self._grid_points or self.settings.num_trials)
        if self._preempted is not None or len(self.ledger.trials) >= total:
            return False
        self._limit = self._limit_reached()
        return self._limit is None

    def _limit_reached(self) -> tuple[str, str] | None:
        num_failed = sum(trial.status == "failed" for trial in self.ledger.trials.values())
        if num_failed > self.settings.max_failures:
            return "failed", f"{num_failed} trials failed, more than max_failures ({self.settings.max_failures})"
        budget = self.settings.applied_to(self.header.spec).time_budget_seconds
        if budget is not None and self.seconds >= budget:
            return "stopped", f"the time budget of {self.settings.time_budget} is used up"
        return None

    def _has_room(self) -> bool:
        live = self.ledger.live()
        return len(live) < self.settings.max_concurrent and len(self._numbers) < self.around.fleet.num_places

    def _start_next(self) -> None:
        """Ask for a trial, record it, and have its job trained unless that is or was done by an earlier trial."""
        params = self.study.ask(len(self.ledger.trials))
        try:
            job = self.around.resolve(apply(self.spec.base_job, params))
        except BadInput as error:
            self._after_end(self.ledger.start_infeasible(params, f"bad_input: {error}"), is_new=True)
            return
        same = self.ledger.by_job(job.job_id)
        trial = self.ledger.start(params, job.job_id, same.number if same else None)
        crashpoint("trial-recorded", str(trial.number))
        self._go_on(trial, job)

    def _resume(self, trial: Trial) -> None:
        job = self.around.resolve(apply(self.spec.base_job, trial.params))
        if job.job_id != trial.job_id:
            raise BadInput(
                f"Trial {trial.number} of the sweep '{self.header.spec.name}' was job {trial.job_id}, and would now be "
                f"{job.job_id}; restore the adapter or data it was started with, or start a new sweep."
            )
        self._go_on(trial, job, again=True)

    def _go_on(self, trial: Trial, job: Job, *, again: bool = False) -> None:
        self.projection.start_trial(trial, again=again)
        if trial.duplicate_of is None:
            self._numbers[job.job_id] = trial.number
            self.around.fleet.submit(job)
        elif not self.ledger.trials[trial.duplicate_of].is_live:
            self._end_as_copy(trial.number)

    def _is_to_be_pruned(self, number: int, event: Evaluated) -> bool:
        """Record an intermediate value, then judge. A step that is recorded already (after a kill) is judged as it was."""
        value = event.metrics.get(self.spec.objectives[0].metric)
        if value is None:
            self._note_missing(event)
            return self.study.is_condemned(number)
        if event.step not in self.ledger.trials[number].reports:
            self.ledger.report(number, event.step, value)
            crashpoint("report-recorded", f"{number} {event.step}")
        return self.study.report(number, event.step, value) or self.study.is_condemned(number)

    def _note_last(self, number: int, event: Evaluated) -> None:
        """Record the value at a job's last step, which judges nobody: nothing is left to save, and a kill may lose it."""
        value = event.metrics.get(self.spec.objectives[0].metric)
        if value is not None and event.step not in self.ledger.trials[number].reports:
            self.ledger.report(number, event.step, value, kind="copy")
            self.study.copy(number, event.step, value)

    def _note_missing(self, event: Evaluated) -> None:
        if self.spec.pruner.type != "none":
            note = (
                f"The pruner has no effect: evaluations give {', '.join(sorted(event.metrics)) or 'no metrics'}, "
                f"not the objective {self.spec.objectives[0].metric}."
            )
            if note not in self.notes:
                self.notes.append(note)

    def _finish(self, number: int, event: Finished) -> None:
        del self._numbers[event.job_id]
        self._progress.pop(number, None)
        if event.status == "preempted":
            self.preempt("its jobs were preempted")
            return
        outcome = outcome_of_job(event, self.spec.objectives, condemned=self.study.is_condemned(number))
        self._after_end(self.ledger.end(number, outcome))

    def _after_end(self, trial: Trial, *, is_new: bool = False) -> None:
        """A trial's end is recorded: pass it on, and end the trials that repeat it."""
        crashpoint("trial-told", str(trial.number))
        if is_new:
            self.projection.start_trial(trial)
        self.study.tell(trial)
        self.projection.end_trial(trial)
        self.around.mirror(trial, self.study)
        for follower in self.ledger.live():
            if follower.duplicate_of == trial.number:
                self._end_as_copy(follower.number)

    def _end_as_copy(self, number: int) -> None:
        trial = self.ledger.end_as_copy(number)
        for step, value in trial.reports.items():
            self.study.copy(number, step, value)
        self._after_end(trial)

    def _repeat_what_the_tracker_missed(self) -> None:
        """The driver before may have died between recording an end and logging it: only its last trial can be concerned.

        Runs that are open although their trial has ended are those of a log that was lost with its machine.
        """
        last = self.ledger.last_told()
        if last is None:
            return
        is_open = self.projection.open_numbers(self.around.tracker.open_runs(self.header.spec.name))
        self.projection.repeat(trial for trial in self.ledger.ended() if trial.number in is_open | {last.number})
