"""Commands for a fleet's nights, and for what is kept of a tenant."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from infra.errors import ServiceUnavailable
from pipelines.cli_common import (
    JsonOption,
    announced,
    app,
    load,
    nightly_app,
    print_json,
    print_notes,
    print_text,
    reading,
    tenant_app,
)

if TYPE_CHECKING:
    from pipelines.nightly.driver import Progress
    from pipelines.nightly.run import NightOutcome

FleetFile = Annotated[Path, typer.Argument(help="The fleet's file.", metavar="FLEET.YAML")]
FleetReference = Annotated[str, typer.Argument(help="The fleet's file, or its name.", metavar="FLEET")]
LINE_SECONDS = 10.0
"""Between two lines on how far a night is."""


@nightly_app.command("run")
def nightly_run(fleet: FleetFile, as_json: JsonOption = False) -> None:
    """Run a fleet's night, or finish one that was cut off. Exit code 1 if a customer failed or the night was not finished."""
    _run(fleet, None, as_json)


@nightly_app.command("retry")
def nightly_retry(
    fleet: FleetFile,
    tenants: Annotated[
        list[str] | None, typer.Argument(help="Who is trained again; left out: all that failed or are held.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train customers again although nothing changed: those named, or all that failed or are held."""
    _run(fleet, tenants or [], as_json)


@nightly_app.command("status")
def nightly_status(fleet: FleetReference, as_json: JsonOption = False) -> None:
    """Show how the last night of a fleet stands."""
    found = load("pipelines.nightly.looking").standing(reading(), fleet)
    print_json(found.to_json()) if as_json else print_text(found.text())


@nightly_app.command("report")
def nightly_report(
    fleet: FleetReference,
    night: Annotated[str | None, typer.Option(help="Which night, by its date; left out: the last one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the report of a finished night, and where its page is."""
    looking, workspace = load("pipelines.nightly.looking"), reading()
    report = looking.report_of(workspace, fleet, night)
    if as_json:
        print_json(report)
        return
    print_text(looking.report_text(report))
    print_text(f"page {looking.page_of(workspace, fleet, report['night'])}")


@nightly_app.command("why")
def nightly_why(
    fleet: FleetFile, tenant: Annotated[str, typer.Argument(help="The customer.")], as_json: JsonOption = False
) -> None:
    """Say how a customer's last night ended, what tonight would do with it, and why."""
    told = load("pipelines.nightly.looking").why_of(reading(), fleet, tenant, time.time())
    print_json(told) if as_json else print_text("\n".join(told))


@app.command("plan")
def plan(fleet: FleetFile, as_json: JsonOption = False) -> None:
    """Predict what a fleet's next night will do and cost, from its files and earlier nights; nothing is read or trained."""
    looking = load("pipelines.nightly.looking")
    outlook, refused = looking.plan_of(reading(), fleet, time.time())
    if as_json:
        rows = [{"tenant": row.tenant, "task": row.task, "reason": row.reason, "sentence": row.sentence} for row in refused]
        print_json(outlook.to_json() | {"refused": rows})
    else:
        print_text(looking.plan_text(outlook, refused))


@tenant_app.command("forget")
def tenant_forget(
    tenant: Annotated[str, typer.Argument(help="The customer.")],
    fix: Annotated[bool, typer.Option("--yes", help="Remove it; without this, what would be removed is listed.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Let it be taken in again; what was removed does not come back.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove all that is kept of a tenant, here and in MLflow; a tombstone keeps everybody from taking it in again."""
    forgetting = load("pipelines.forget")
    if undo:
        print_text(forgetting.undo(announced(), tenant))
        return
    outcome = forgetting.forget(announced() if fix else reading(), tenant, really=fix)
    print_json(outcome.to_json()) if as_json else print_text(outcome.text())
    print_notes(outcome.notes)
    if fix and not outcome.is_complete:
        raise typer.Exit(ServiceUnavailable.exit_code)


def _run(fleet: Path, retry: list[str] | None, as_json: bool) -> None:
    outcome: NightOutcome = load("pipelines.nightly.run").run(announced(), fleet, retry=retry, on_progress=_Lines().show)
    if as_json:
        print_json(_json_of(outcome))
    elif outcome.report is not None:
        print_text(load("pipelines.nightly.page").summary_text(outcome.report))
    if outcome.page is not None and not as_json:
        print_text(f"page {outcome.page}")
    print_notes(outcome.notes)
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


def _json_of(outcome: "NightOutcome") -> Any:
    if outcome.report is None:
        return {"notes": list(outcome.notes)}
    return load("pipelines.nightly.page").report_json(outcome.report)


class _Lines:
    """Tells how far a night is, a line now and then."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def show(self, progress: "Progress") -> None:
        if time.monotonic() - self._told < LINE_SECONDS:
            return
        self._told = time.monotonic()
        counts = ", ".join(f"{count} {status}" for status, count in sorted(progress.counts.items()))
        line = f"{progress.num_ended} of {progress.num_planned} customers ended{f' ({counts})' if counts else ''}, "
        line += f"{progress.num_training} in training, {progress.num_judging} being measured"
        Console(stderr=True).print(line, highlight=False, soft_wrap=True)
