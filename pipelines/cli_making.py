"""Commands that train: the demo, one job, a sweep; and looking at what would be trained on."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pipelines.cli_common import (
    INTERRUPTED,
    JsonOption,
    SetOption,
    SweepSetOption,
    announced,
    app,
    data_app,
    load,
    print_json,
    print_notes,
    print_picture,
    print_text,
    reading,
    sweep_app,
)


@app.command()
def demo(
    trials: Annotated[int, typer.Option(min=3, help="Trials of the demo's sweep.")] = 12,
    folder: Annotated[Path | None, typer.Option(help="Where to keep it; default: <home>/demo.")] = None,
) -> None:
    """Build a small base, sweep adapters for one customer, promote the best, and show what it bought."""
    load("pipelines.demo").run_demo(announced(), trials, folder, Console())


@app.command()
def train(
    file: Annotated[Path, typer.Argument(help="The job file.")], set_: SetOption = None, as_json: JsonOption = False
) -> None:
    """Train one adapter. The same command again continues it, or returns its result."""
    pipeline = load("pipelines.train")
    outcome = pipeline.train_with_view(announced(), file, set_ or [], Console(stderr=as_json))
    print_notes(outcome.notes)
    print_json(pipeline.summary(outcome)) if as_json else print_text(pipeline.text(outcome))
    if outcome.finished.status != "succeeded":
        raise typer.Exit(1)


@data_app.command("inspect")
def data_inspect(
    file: Annotated[Path, typer.Argument(help="A job file.")],
    rows: Annotated[int, typer.Option(min=0, help="Rows to show.")] = 5,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the rows as tokens are trained on: what is supervised stands out."""
    view = load("pipelines.data_view")
    inspected = view.inspect(reading(), file, rows, set_ or [])
    print_json(inspected.to_json()) if as_json else view.show(inspected, Console())


@sweep_app.command("run")
def sweep_run(
    file: Annotated[Path, typer.Argument(help="The sweep file.")], set_: SweepSetOption = None, as_json: JsonOption = False
) -> None:
    """Run a sweep; the same command continues it after whatever happened."""
    _drive_sweep(lambda sweeps, workspace, show: sweeps.run(workspace, file, set_ or [], show), as_json)


@sweep_app.command("resume")
def sweep_resume(sweep: Annotated[str, typer.Argument(help="tenant/name, name or file.")], as_json: JsonOption = False) -> None:
    """Continue a sweep by its name, with the spec the store keeps."""
    _drive_sweep(lambda sweeps, workspace, show: sweeps.resume(workspace, sweep, show), as_json)


def _drive_sweep(start: Any, as_json: bool) -> None:
    workspace = announced()
    live = load("pipelines.live")
    with live.watching(Console(stderr=as_json)) as view:
        outcome = start(load("pipelines.sweep"), workspace, view.show)
    print_notes(outcome.notes)
    present = load("pipelines.sweep_page")
    print_json(present.summary(outcome)) if as_json else print_text(present.text(outcome))
    if outcome.result.status == "preempted":
        raise typer.Exit(INTERRUPTED)
    if outcome.result.status == "failed" or outcome.result.best is None:
        raise typer.Exit(1)


@sweep_app.command("extend")
def sweep_extend(
    sweep: Annotated[str, typer.Argument(help="tenant/name, name or file.")],
    num_trials: Annotated[int, typer.Option(min=1, help="New total of trials.")],
) -> None:
    """Set a new total of trials; a running driver takes it up, otherwise resume the sweep."""
    print_text(load("pipelines.sweep_page").extend(reading(), sweep, num_trials))


@sweep_app.command("stop")
def sweep_stop(sweep: Annotated[str, typer.Argument(help="tenant/name, name or file.")]) -> None:
    """Ask the driver of a sweep to checkpoint and end; resume continues it."""
    print_text(load("pipelines.sweep_page").stop(reading(), sweep))


@sweep_app.command("status")
def sweep_status(
    sweep: Annotated[str | None, typer.Argument(help="tenant/name, name or file; none lists all.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show how far a sweep is, from its ledger alone."""
    page = load("pipelines.sweep_page")
    shown = page.status(reading(), sweep)
    print_json(page.status_json(shown)) if as_json else print_picture(page.status_view(shown))


@sweep_app.command("best")
def sweep_best(sweep: Annotated[str, typer.Argument(help="tenant/name, name or file.")], as_json: JsonOption = False) -> None:
    """Show the best trial and its adapter."""
    page = load("pipelines.sweep_page")
    best = page.best(reading(), sweep)
    print_json(best) if as_json else print_text(page.best_text(best))
