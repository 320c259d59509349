"""`lorafleet sweep ...`: run a sweep from its file or go on with it, register what it found, write its report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infra.crashpoints import crashpoint
from infra.errors import BadInput, ClaimHeld, ServiceUnavailable
from infra.storage import Storage
from pipelines.files import load_sweep
from pipelines.promote import register_best
from pipelines.references import find_reference
from pipelines.sweep_names import find_sweep
from pipelines.sweep_reports import report_of
from pipelines.workspace import Tracking, Workspace
from sweeps.ledger import read_spec, read_trials
from sweeps.projection import sweep_key, trial_key
from sweeps.run import Surroundings, SweepResult, run_sweep
from sweeps.spec import SweepSpec
from sweeps.study import StudyMirror, no_mirror
from sweeps.view import SweepView
from workers import layout
from workers.fleet import Fleet
from workers.job import Job
from workers.lazy_fleet import LazyFleet
from workers.spec import metrics_of

if TYPE_CHECKING:
    from workers.resolve import Resolver


@dataclass(frozen=True)
class SweepOutcome:
    """What a sweep found and where it lies."""

    result: SweepResult
    registered: str | None
    """Reference of the registered best: "acme.support@challenger", or its id where that alias is a later one's by now.

    None if nothing was registered.
    """
    report: Path | None
    notes: tuple[str, ...]
    num_unshipped: int


def run(
    workspace: Workspace, path: Path, overrides: Sequence[str] = (), on_change: Callable[[SweepView], None] = lambda view: None
) -> SweepOutcome:
    """Start the sweep of a file, or go on with it: the same command does both."""
    spec, _, folder = load_sweep(path, overrides)
    return run_spec(workspace, anchored(spec, folder), on_change)


def anchored(spec: SweepSpec, folder: Path) -> SweepSpec:
    """Return a sweep whose local paths are absolute, so that it can be resumed by its name from any folder."""

    def absolute(path: str) -> str:
        return path if "://" in path else str((folder / Path(path).expanduser()).absolute())

    job = spec.base_job
    base = job.base_model.name_or_path
    here = (folder / Path(base).expanduser()).exists()  # otherwise the name of a hub model
    data = {name: absolute(value) for name in ("train", "validation", "test") if (value := getattr(job.data, name)) is not None}
    job = job.model_copy(
        update={
            "base_model": job.base_model.model_copy(update={"name_or_path": absolute(base) if here else base}),
            "data": job.data.model_copy(update=data),
        }
    )
    return spec.model_copy(update={"job": job})


def run_spec(workspace: Workspace, spec: SweepSpec, on_change: Callable[[SweepView], None] = lambda view: None) -> SweepOutcome:
    """Run a sweep. Everything wrong is found before the first trial is recorded."""
    job = spec.base_job
    is_over = _is_over(workspace.store, spec)
    max_hosts = min(spec.max_concurrent, spec.num_trials)
    with workspace.fleet(job.resources.num_threads, max_hosts, at_once=not is_over) as start:
        workspace.services.check_at_start()
        resolver = workspace.resolver(Path.cwd())
        resolved = resolver.resolve(job)
        base_id = resolved.base.base_id
        check_measured(spec, resolved)
        _check_register(spec)
        with _tracking(workspace, job.tenant, spec.name) as tracking:
            fleet: Fleet = LazyFleet(start) if is_over else start()
            result = run_sweep(spec, _surroundings(workspace, spec, fleet, resolver, tracking, on_change))
            registered, note = _register(workspace, spec, result, base_id, tracking)
            report = _report(workspace, result, tracking)
    notes = (*resolver.notes, *result.notes, *([note] if note else []))
    return SweepOutcome(result, registered, report, notes, tracking.num_left)


def _is_over(store: Storage, spec: SweepSpec) -> bool:
    """Tell whether the sweep seems to have reached its total, so that no host will be needed."""
    tenant = spec.base_job.tenant
    if store.head(layout.sweep_spec(tenant, spec.name)) is None:
        return False
    trials = read_trials(store, tenant, spec.name)
    return len(trials) >= spec.num_trials and all(trial.status != "running" for trial in trials)


def _tracking(workspace: Workspace, tenant: str, name: str) -> Tracking:
    """Open the sweep's tracking log, which a driver holds from its start on: earlier than its claim, and in its home only."""
    try:
        return workspace.tracking(f"sweep-{tenant}-{name}")
    except ClaimHeld as error:
        raise ClaimHeld(
            f"Sweep '{name}' is driven by another process; wait for it, or end it with 'lorafleet sweep stop {name}'."
        ) from error


def resume(workspace: Workspace, reference: str, on_change: Callable[[SweepView], None] = lambda view: None) -> SweepOutcome:
    """Go on with a sweep by its name, from what the store keeps of it."""
    tenant, name = find_sweep(workspace, reference)
    return run_spec(workspace, read_spec(workspace.store, tenant, name), on_change)


def _surroundings(
    workspace: Workspace,
    spec: SweepSpec,
    fleet: Fleet,
    resolver: "Resolver",
    tracking: Tracking,
    on_change: Callable[[SweepView], None],
) -> Surroundings:
    return Surroundings(
        store=workspace.store,
        fleet=fleet,
        resolve=resolver.resolve,
        tracking_log=tracking.log,
        tracker=workspace.services.tracker(),
        owner=workspace.owner,
        lease_seconds=workspace.settings.lease_seconds,
        on_change=on_change,
        mirror=_mirror(workspace, spec),
    )


def _report(workspace: Workspace, result: SweepResult, tracking: Tracking) -> Path:
    path = report_of(workspace, result.tenant, result.name)
    tracking.log.file(sweep_key(result.tenant, result.name), path, "report")
    return path


def check_measured(spec: SweepSpec, job: Job) -> None:
    """Raise BadInput if no trial could measure the objective: every one would train to its end first."""
    measured = metrics_of(spec.base_job)
    for objective in spec.objectives:
        if objective.metric not in measured:
            raise BadInput(f"the objective {objective.metric} is not measured by such a job; use one of {', '.join(measured)}.")
    if job.validation is None:
        raise BadInput(
            f"the objective {spec.objectives[0].metric} needs validation rows; give data.validation, or data.validation_split."
        )


def _run_id(workspace: Workspace, key: str) -> str | None:
    """Return MLflow's id of a run, None while MLflow is away: the adapter is registered all the same."""
    try:
        return workspace.services.tracker().run_id(key)
    except ServiceUnavailable:
        return None


def _check_register(spec: SweepSpec) -> None:
    """Names are checked before anything runs, so that a finished sweep can be registered."""
    offer = spec.register_best
    if offer is not None:
        layout.model(spec.base_job.tenant, offer.task or spec.base_job.task)


def _mirror(workspace: Workspace, spec: SweepSpec) -> Callable[..., None]:
    storage = workspace.settings.study_storage
    return StudyMirror(storage, f"{spec.base_job.tenant}/{spec.name}", spec) if storage is not None else no_mirror


def _register(
    workspace: Workspace, spec: SweepSpec, result: SweepResult, base_id: str, tracking: Tracking
) -> tuple[str | None, str | None]:
    """Offer the best adapter to the task, with its evidence; return its reference and what a person should know."""
    best, offer = result.best, spec.register_best
    if offer is None or best is None or best.adapter_id is None or result.status == "preempted":
        return None, None
    tracking.drain()
    task = offer.task or spec.base_job.task
    outcome = register_best(
        workspace.store,
        workspace.services.registry(),
        tenant=result.tenant,
        task=task,
        adapter_id=best.adapter_id,
        base_id=base_id,
        job_id=best.job_id,
        sweep=result.name,
        metrics=best.metrics,
        alias=offer.alias,
        run_id=_run_id(workspace, trial_key(result.tenant, result.name, best.number)),
    )
    crashpoint("sweep-registered", best.adapter_id)
    return reference_to(workspace.store, f"{result.tenant}.{task}@{offer.alias}", best.adapter_id), outcome.note


def reference_to(store: Storage, alias: str, adapter_id: str) -> str:
    """Return the `alias` that an adapter was offered under, or its id if a later candidate has taken the alias over."""
    return alias if find_reference(store, alias).adapter_id == adapter_id else adapter_id
