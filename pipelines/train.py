"""`lorafleet train job.yaml`: one job from file to stored adapter. The same command again continues it, or returns its result."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from infra.tracking import RunStart
from infra.tracking_log import TrackingLog
from pipelines.files import load_job
from pipelines.workspace import Workspace
from workers import report
from workers.fleet import HostFleet
from workers.job import Job
from workers.metrics_log import decode_points
from workers.report import Checkpointed, Evaluated, Finished, HostEvent

WAIT_SECONDS = 0.5


@dataclass(frozen=True)
class TrainOutcome:
    """How the job ended, and what a person should know."""

    job: Job
    finished: Finished
    notes: tuple[str, ...]
    num_unshipped: int
    """Tracking events that MLflow has not taken yet; the next command ships them."""


def train(
    workspace: Workspace, path: Path, overrides: Sequence[str], on_event: Callable[[HostEvent], None] = lambda event: None
) -> TrainOutcome:
    """Train one job. Raises BadInput and its kin before anything is launched; a failed training is an outcome."""
    spec, folder = load_job(path, overrides)
    with workspace.fleet(spec.resources.num_threads, max_hosts=1) as fleet:
        workspace.services.check_at_start()
        resolver = workspace.resolver(folder)
        job = resolver.resolve(spec)
        with workspace.tracking(f"job-{job.tenant}-{job.job_id}") as tracking:
            finished = _train_tracked(workspace, job, fleet(), tracking.log, on_event)
    return TrainOutcome(job, finished, tuple(resolver.notes), tracking.num_left)


def _train_tracked(
    workspace: Workspace, job: Job, fleet: HostFleet, log: TrackingLog, on_event: Callable[[HostEvent], None]
) -> Finished:
    """Have the job trained, and its run told in the tracking log: each chunk of points once, when it is safe in the store."""
    key = f"{job.tenant}/jobs/{job.job_id}"
    log.run(RunStart(key, job.tenant, f"{job.spec.task}-{job.job_id[:8]}", tags=tags_of(job), params=params_of(job)))
    log.end(key, "running")
    shipped: set[str] = set()

    def ship(chunk: str) -> None:
        if chunk and chunk not in shipped:
            shipped.add(chunk)
            log.points(key, decode_points(workspace.store.get(chunk)[0]))

    try:
        finished = _drive(fleet, job, on_event, ship)
    except BaseException:  # Ctrl-C too: the job is checkpointed when the fleet closes, and goes on with the same command
        log.end(key, "preempted")
        raise
    for chunk in finished.chunks:
        ship(chunk)
    ids = {"lorafleet.adapter_id": finished.adapter_id} if finished.adapter_id is not None else {}
    log.tags(key, ids | {"lorafleet.attempt": str(finished.attempt)})
    log.end(key, f"{finished.status}({finished.reason})" if finished.reason else finished.status)
    return finished


def _drive(fleet: HostFleet, job: Job, on_event: Callable[[HostEvent], None], ship: Callable[[str], None]) -> Finished:
    """Have the job trained to its end."""
    fleet.submit(job)
    while True:
        for event in fleet.events(WAIT_SECONDS):
            on_event(event)
            match event:
                case Evaluated(final=False):
                    fleet.decide(job.job_id, True)
                case Checkpointed(chunk=chunk):
                    ship(chunk)
                case Finished():
                    return event


def tags_of(job: Job) -> dict[str, str]:
    """Return the tags a job's run bears in MLflow."""
    return {
        "lorafleet.job_id": job.job_id,
        "lorafleet.tenant": job.tenant,
        "lorafleet.base_id": job.base.base_id,
        "lorafleet.data_digest": job.train.digest,
    }


def params_of(job: Job) -> dict[str, str]:
    """Return the adapter's and the training's settings as MLflow params."""
    sections = {"peft": job.spec.peft, "training": job.spec.training}
    return {f"{name}.{key}": str(value) for name, section in sections.items() for key, value in section.model_dump().items()}


def train_with_view(workspace: Workspace, path: Path, overrides: Sequence[str], console: Console) -> TrainOutcome:
    """Train one job with a progress bar on a terminal; evaluations are printed as lines either way."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        def show(event: HostEvent) -> None:
            match event:
                case report.Progress():
                    rate = f"loss {event.loss:.4f}  {event.tokens_per_second:,.0f} tokens/s"
                    bar.update(task, description=rate, completed=event.step, total=event.num_steps)
                case Evaluated():
                    bar.console.print(f"step {event.step}  {metrics_text(event.metrics)}", highlight=False, soft_wrap=True)

        return train(workspace, path, overrides, show)


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Return metrics in one line, the common prefix left out."""
    return "  ".join(f"{name.removeprefix('eval/')} {value:.4f}" for name, value in metrics.items())


def summary(outcome: TrainOutcome) -> dict[str, Any]:
    """Return the end of a training as JSON data."""
    finished = outcome.finished
    return {
        "tenant": outcome.job.tenant,
        "task": outcome.job.spec.task,
        "job_id": outcome.job.job_id,
        "base_id": outcome.job.base.base_id,
        "status": finished.status,
        "reason": finished.reason,
        "adapter_id": finished.adapter_id,
        "metrics": dict(finished.metrics),
        "num_steps": finished.num_steps,
        "best_step": finished.best_step,
        "num_tokens": finished.num_tokens,
        "seconds": finished.seconds,
        "reused": finished.reused,
    }


def text(outcome: TrainOutcome) -> str:
    """Return the end of a training as lines."""
    finished = outcome.finished
    if finished.status != "succeeded":
        return f"job {outcome.job.job_id} {finished.status}: {finished.reason or 'continue it with the same command'}"
    how = "had succeeded before" if finished.reused else f"succeeded after {finished.num_steps} steps in {finished.seconds:.0f}s"
    lines = [f"job {outcome.job.job_id} {how}", metrics_text(finished.metrics), f"adapter {finished.adapter_id}"]
    if outcome.num_unshipped:
        lines.append(f"MLflow has not taken {outcome.num_unshipped} events yet; the same command ships them.")
    return "\n".join(line for line in lines if line)
