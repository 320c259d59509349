"""What a sweep looks like at one moment: plain values for a live view, a status page, or JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sweeps.packs import PackView
from sweeps.space import Params
from sweeps.spec import SweepSpec
from sweeps.trial import Trial, TrialStatus, best_of, count_by_status
from workers.report import Progress


@dataclass(frozen=True)
class TrialView:
    """One trial; fields as in `Trial`, and how far it is."""

    number: int
    status: TrialStatus
    reason: str
    params: Params
    step: int
    """Steps done, as far as known."""
    num_steps: int
    """Steps it will have done; 0 while that is not known."""
    loss: float | None
    """Training loss of the last step, nats per token; only while it is driven from here."""
    value: float | None
    """Of the first objective: at its end, or the last reported one."""
    tokens_per_second: float
    adapter_id: str | None
    duplicate_of: int | None


@dataclass(frozen=True)
class Rung:
    """Where the pruner compares trials."""

    step: int
    num_reached: int
    num_pruned: int
    """Trials whose last report lies between this rung and the next, and that were pruned there."""


@dataclass(frozen=True)
class SweepView:
    """A sweep at one moment."""

    tenant: str
    name: str
    status: str
    num_trials: int
    counts: Mapping[str, int]
    """Trials by status, those that occur."""
    trials: tuple[TrialView, ...]
    best: TrialView | None
    rungs: tuple[Rung, ...]
    tokens_per_second: float
    seconds: float
    """Running time spent, summed over resumes."""
    seconds_left: float | None
    """Estimate until all trials have ended; None before the first has."""
    notes: tuple[str, ...] = ()
    """What a person should know once: a setting without effect, why no further trial is asked for."""
    packs: tuple[PackView, ...] = ()
    """What its hosts train, as they told last."""


def view_of(
    tenant: str,
    spec: SweepSpec,
    status: str,
    trials: Sequence[Trial],
    seconds: float,
    progress: Mapping[int, Progress] | None = None,
    notes: Sequence[str] = (),
    packs: Sequence[PackView] = (),
) -> SweepView:
    """Return the view of these trials; `spec` bears the settings in force, `progress` is by the trial's number."""
    live = progress or {}
    views = tuple(_trial_view(trial, live.get(trial.number)) for trial in trials)
    best = best_of(trials, spec.objectives)
    return SweepView(
        tenant=tenant,
        name=spec.name,
        status=status,
        num_trials=spec.num_trials,
        counts=count_by_status(trials),
        trials=views,
        best=next((view for view in views if best is not None and view.number == best.number), None),
        rungs=rungs_of(spec, trials),
        tokens_per_second=sum(view.tokens_per_second for view in views if view.status == "running"),
        seconds=seconds,
        seconds_left=seconds_left(spec, views, seconds),
        notes=tuple(notes),
        packs=tuple(packs),
    )


def rungs_of(spec: SweepSpec, trials: Sequence[Trial]) -> tuple[Rung, ...]:
    """Return the rungs that some trial has reached; none without a pruner."""
    last_steps = [(trial.status, max(trial.reports, default=0)) for trial in trials if trial.duplicate_of is None]
    rungs: list[Rung] = []
    step = spec.pruner.min_resource
    while spec.pruner.type == "asha" and any(last >= step for _, last in last_steps):
        following = step * spec.pruner.reduction_factor
        num_pruned = sum(status == "pruned" and step <= last < following for status, last in last_steps)
        rungs.append(Rung(step, sum(last >= step for _, last in last_steps), num_pruned))
        step = following
    return tuple(rungs)


def seconds_left(spec: SweepSpec, views: Sequence[TrialView], seconds: float) -> float | None:
    """Return the time left if trials go on ending at the rate so far; a live trial counts by its share of steps.

    Trials that never trained (infeasible ones, copies) say nothing of the rate.
    """
    trained = [view for view in views if view.status == "running" or (view.step > 0 and view.duplicate_of is None)]
    done = sum(_share_done(view) for view in trained)
    if all(view.status == "running" for view in trained) or done <= 0.0:
        return None
    to_come = spec.num_trials - len(views) + sum(1.0 - _share_done(view) for view in trained)
    return max(0.0, to_come) * seconds / done


def _share_done(view: TrialView) -> float:
    if view.status != "running":
        return 1.0
    return min(1.0, view.step / view.num_steps) if view.num_steps else 0.0


def _trial_view(trial: Trial, progress: Progress | None) -> TrialView:
    reports = trial.reports
    last_report = max(reports, default=0)
    return TrialView(
        number=trial.number,
        status=trial.status,
        reason=trial.reason,
        params=trial.params,
        step=max(progress.step if progress else 0, last_report) if trial.is_live else trial.num_steps or last_report,
        num_steps=progress.num_steps if progress else trial.num_steps,
        loss=progress.loss if progress and trial.is_live else None,
        value=trial.values[0] if trial.values else reports.get(last_report),
        tokens_per_second=progress.tokens_per_second if progress and trial.is_live else 0.0,
        adapter_id=trial.adapter_id,
        duplicate_of=trial.duplicate_of,
    )
