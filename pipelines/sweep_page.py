"""What a person reads about sweeps: the end of a run, status, best, and the answers to extend and stop."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table

from pipelines.live import counts_text, draw, duration
from pipelines.sweep_names import find_sweep, list_sweeps
from pipelines.workspace import Workspace
from sweeps import control
from sweeps.trial import Trial
from sweeps.view import SweepView

if TYPE_CHECKING:
    from pipelines.sweep import SweepOutcome


def summary(outcome: "SweepOutcome") -> dict[str, Any]:
    """Return the end of a run as JSON data."""
    result = outcome.result
    return {
        "tenant": result.tenant,
        "sweep": result.name,
        "status": result.status,
        "reason": result.reason,
        "num_trials": result.num_trials,
        "counts": result.counts,
        "best": result.best and trial_json(result.best),
        "default": result.default and trial_json(result.default),
        "registered": outcome.registered,
        "report": outcome.report and str(outcome.report),
        "seconds": result.seconds,
        "notes": list(outcome.notes),
    }


def text(outcome: "SweepOutcome") -> str:
    """Return the end of a run as lines: totals, best and default, where things lie, what to do next."""
    result = outcome.result
    counts = ", ".join(f"{count} {status}" for status, count in result.counts.items() if count)
    totals = f"{result.num_trials} trials ({counts}) in {duration(result.seconds)}"
    lines = [f"sweep {result.tenant}/{result.name} {result.status}: {totals}"]
    if result.reason:
        lines.append(f"  {result.reason}")
    if result.default is not None and result.default.values:
        lines.append(f"default  trial {result.default.number}  {_values(result.default)}  {_params(result.default)}")
    if result.best is not None:
        lines.append(f"best     trial {result.best.number}  {_values(result.best)}  {_params(result.best)}")
        lines.append(f"adapter  {result.best.adapter_id}")
    if outcome.registered is not None:
        lines.append(f"registered as {outcome.registered}; promote it with: lorafleet promote {outcome.registered}")
    if outcome.report is not None:
        lines.append(f"report   {outcome.report}")
    if result.status == "preempted":
        lines.append(f"continue with: lorafleet sweep resume {result.tenant}/{result.name}")
    if outcome.num_unshipped:
        lines.append(f"MLflow has not taken {outcome.num_unshipped} events yet; the next command on this sweep ships them.")
    return "\n".join(lines)


def trial_json(trial: Trial) -> dict[str, Any]:
    """Return a trial as JSON data, in the words that all lists use."""
    return {
        "trial": trial.number,
        "status": trial.status,
        "reason": trial.reason,
        "params": dict(trial.params),
        "values": list(trial.values),
        "metrics": dict(trial.metrics),
        "job_id": trial.job_id,
        "adapter_id": trial.adapter_id,
        "num_steps": trial.num_steps,
        "seconds": trial.seconds,
        "duplicate_of": trial.duplicate_of,
    }


def status(workspace: Workspace, reference: str | None) -> list[SweepView]:
    """Return the sweep that is named, or all."""
    pairs = list_sweeps(workspace) if reference is None else [find_sweep(workspace, reference)]
    return [control.status(workspace.store, tenant, name) for tenant, name in pairs]


def status_json(views: list[SweepView]) -> list[dict[str, Any]]:
    """Return views as JSON data."""
    return [asdict(view) for view in views]


def status_view(views: list[SweepView]) -> Group | Table | str:
    """Return one sweep in full, several as a table."""
    if not views:
        return "no sweeps in this store yet; start one with: lorafleet sweep run sweep.yaml"
    if len(views) == 1:
        return draw(views[0], height=60)
    table = Table(box=None, pad_edge=False)
    for name in ("sweep", "status", "trials", "best", "spent"):
        table.add_column(name)
    for view in views:
        best = f"{view.best.value:.4f}" if view.best is not None and view.best.value is not None else "-"
        table.add_row(f"{view.tenant}/{view.name}", view.status, counts_text(view), best, duration(view.seconds))
    return table


def best(workspace: Workspace, reference: str) -> dict[str, Any]:
    """Return the best trial as JSON data, and where the report was written."""
    from pipelines.sweep_reports import report_of  # here, since plots load Optuna and plotly

    tenant, name = find_sweep(workspace, reference)
    trial = control.best(workspace.store, tenant, name)
    return {"tenant": tenant, "sweep": name, **trial_json(trial), "report": str(report_of(workspace, tenant, name))}


def best_text(found: Mapping[str, Any]) -> str:
    """Return the best trial as lines."""
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in found["metrics"].items())
    params = ", ".join(f"{path}={value}" for path, value in found["params"].items())
    lines = [f"trial {found['trial']} of {found['tenant']}/{found['sweep']}", params, metrics]
    return "\n".join([*lines, f"adapter {found['adapter_id']}", f"report {found['report']}"])


def extend(workspace: Workspace, reference: str, num_trials: int) -> str:
    """Set a new total; return the sentence that says so."""
    tenant, name = find_sweep(workspace, reference)
    control.extend(workspace.store, tenant, name, num_trials)
    return f"sweep {tenant}/{name} now ends after {num_trials} trials; if no driver runs: lorafleet sweep resume {tenant}/{name}"


def stop(workspace: Workspace, reference: str) -> str:
    """Ask the driver to end; return the sentence that says so, or that there is nothing to end."""
    tenant, name = find_sweep(workspace, reference)
    found = control.status(workspace.store, tenant, name).status
    if found != "running":
        return f"sweep {tenant}/{name} is not running ({found}); there is nothing to stop."
    control.stop(workspace.store, tenant, name)
    return f"sweep {tenant}/{name} was asked to stop; continue it with: lorafleet sweep resume {tenant}/{name}"


def _values(trial: Trial) -> str:
    return " ".join(f"{value:.4f}" for value in trial.values)


def _params(trial: Trial) -> str:
    return ", ".join(
        f"{path.rsplit('.', 1)[-1]}={value:.3g}" if isinstance(value, float) else f"{path.rsplit('.', 1)[-1]}={value}"
        for path, value in trial.params.items()
    )
