"""Commands for whoever keeps an installation running: jobs, reconciling, schemas, and whether all is there."""

from dataclasses import asdict
from typing import Annotated

import typer

from pipelines.cli_common import (
    JsonOption,
    TenantOption,
    announced,
    app,
    jobs_app,
    load,
    print_json,
    print_notes,
    print_table,
    print_text,
    reading,
)

JobArgument = Annotated[str, typer.Argument(help="The job's id, or the beginning of it.")]


@jobs_app.command("list")
def jobs_list(
    tenant: TenantOption = None,
    status: Annotated[str | None, typer.Option(help="Only jobs in this status.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List jobs and how they stand."""
    pipeline = load("pipelines.jobs")
    listing = pipeline.list_jobs(reading(), tenant, status)
    empty = "no jobs in this store yet; make one with: lorafleet train job.yaml"
    if tenant or status:
        empty = "no such jobs; 'lorafleet jobs list' shows all."
    if as_json:
        print_json(listing.jobs)
    else:
        print_table(pipeline.COLUMNS, [pipeline.row_of(job) for job in listing.jobs], empty)
    print_notes(listing.notes)
    if listing.notes:
        raise typer.Exit(1)


@jobs_app.command("show")
def jobs_show(job: JobArgument, as_json: JsonOption = False) -> None:
    """Show what a job was asked for and how it stands."""
    pipeline = load("pipelines.jobs")
    shown = pipeline.show_job(reading(), job)
    print_json(shown) if as_json else print_text(pipeline.job_text(shown))


@jobs_app.command("logs")
def jobs_logs(job: JobArgument, as_json: JsonOption = False) -> None:
    """Show what a job has measured, as far as it is safe in the store."""
    pipeline = load("pipelines.jobs")
    found = pipeline.logs(reading(), job)
    print_json(found) if as_json else print_text(pipeline.logs_text(found))


@jobs_app.command("cancel")
def jobs_cancel(job: JobArgument, as_json: JsonOption = False) -> None:
    """End a job; its last checkpoint stays, and the command that made it goes on from there."""
    pipeline = load("pipelines.jobs")
    outcome = pipeline.cancel(announced(), job)
    print_json(pipeline.cancelled_json(outcome)) if as_json else print_text(outcome.sentence)


@app.command()
def reconcile(
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be mended; the store's journal wins.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare MLflow, and what killed processes left, with the store. Exit code 1 if something differs and was not fixed."""
    workspace = announced()
    services = workspace.services
    found = load("pipelines.reconcile").reconcile(workspace.store, services.registry(), services.tracker(), fix=fix)
    if as_json:
        print_json([asdict(finding) for finding in found])
    else:
        lines = [f"{'fixed  ' if one.fixed else 'differs'}  {one.subject}: {one.sentence}" for one in found]
        print_text("\n".join(lines) or "MLflow shows what the store says.")
    if not all(finding.fixed for finding in found):
        raise typer.Exit(1)


@app.command()
def gc(
    older_than: Annotated[str, typer.Option(help="How old it must be: 24h, 7d; by the store's clock.")] = "24h",
    delete: Annotated[bool, typer.Option("--delete", help="Remove it; without, only tell what would go.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Tell, and with --delete remove, what nothing in the store refers to any more."""
    pipeline = load("pipelines.gc")
    seconds = pipeline.parse_age(older_than)
    found = pipeline.collect((announced() if delete else reading()).store, older_than_seconds=seconds, delete=delete)
    if as_json:
        print_json(pipeline.collected_json(found, deleted=delete, older_than_seconds=seconds))
    else:
        print_text(pipeline.collected_text(found, deleted=delete))
    print_notes(found.notes)
    if found.notes:
        raise typer.Exit(1)


@app.command()
def schema(
    kind: Annotated[
        str | None, typer.Argument(metavar="[job|sweep|gates|fleet|settings]", help="Kind of file; default: all.")
    ] = None,
) -> None:
    """Print the JSON schema of the files people write."""
    print_json(load("pipelines.schema").schema(kind))


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Check that everything lorafleet needs is there. Exit code 1 if not, 4 if a service is not reachable."""
    pipeline = load("pipelines.doctor")
    checks = pipeline.examine(reading().services)
    print_json(pipeline.to_json(checks)) if as_json else print_table(pipeline.COLUMNS, pipeline.rows_of(checks), "")
    code = pipeline.exit_code(checks)
    if code:
        raise typer.Exit(code)
