"""The command line: words to functions, errors to sentences and exit codes. Nothing heavy is imported before a command needs it.

Exit codes: 0 ok, 1 work failed, 2 bad input, 3 gate rejected, 4 a service is not reachable; 130 after Ctrl-C.
"""

import importlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from rich.console import Console

from infra.errors import LorafleetError

if TYPE_CHECKING:
    from pipelines.workspace import Workspace

log = logging.getLogger("lorafleet")
app = typer.Typer(
    help="Train, search, track and promote LoRA adapters, each locked to its base model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
sweep_app = typer.Typer(help="Search rank, alpha, target modules and more.", no_args_is_help=True)
data_app = typer.Typer(help="Look at what would be trained on.", no_args_is_help=True)
jobs_app = typer.Typer(help="Single trainings.", no_args_is_help=True)
adapters_app = typer.Typer(help="Stored adapters.", no_args_is_help=True)
base_app = typer.Typer(help="Base models, by content.", no_args_is_help=True)
for name, group in (("sweep", sweep_app), ("data", data_app), ("jobs", jobs_app), ("adapters", adapters_app), ("base", base_app)):
    app.add_typer(group, name=name)

SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key of the file: --set job.training.max_steps=50.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
TenantOption = Annotated[str | None, typer.Option(help="Only this tenant.")]


def _load(module: str) -> Any:
    """Import what a command needs when it runs, so that --help stays light."""
    return importlib.import_module(module)


def _workspace() -> "Workspace":
    workspace: Workspace = _load("pipelines.workspace").Workspace.here()
    return workspace


def _announced() -> "Workspace":
    """Open the workspace and say on stderr where things are kept."""
    workspace = _workspace()
    Console(stderr=True).print(f"home {workspace.settings.home}", style="dim", highlight=False, soft_wrap=True)
    return workspace


def _print(text: str = "") -> None:
    Console().print(text, highlight=False, markup=False, soft_wrap=True)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def _note(notes: Sequence[str]) -> None:
    for note in notes:
        Console(stderr=True).print(f"note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)


@app.command()
def demo(
    trials: Annotated[int, typer.Option(min=3, help="Trials of the demo's sweep.")] = 12,
    folder: Annotated[Path | None, typer.Option(help="Where to keep it; default: <home>/demo.")] = None,
) -> None:
    """Build a small base, sweep adapters for one customer, promote the best, and show what it bought."""
    _load("pipelines.demo").run_demo(_announced(), trials, folder, Console())


@app.command()
def train(
    file: Annotated[Path, typer.Argument(help="The job file.")], set_: SetOption = None, as_json: JsonOption = False
) -> None:
    """Train one adapter. The same command again continues it, or returns its result."""
    pipeline = _load("pipelines.train")
    outcome = pipeline.train_with_view(_announced(), file, set_ or [], Console(stderr=as_json))
    _note(outcome.notes)
    _print_json(pipeline.summary(outcome)) if as_json else _print(pipeline.text(outcome))
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
    view = _load("pipelines.data_view")
    inspected = view.inspect(_workspace(), file, rows, set_ or [])
    _print_json(inspected.to_json()) if as_json else view.show(inspected, Console())


@sweep_app.command("run")
def sweep_run(
    file: Annotated[Path, typer.Argument(help="The sweep file.")], set_: SetOption = None, as_json: JsonOption = False
) -> None:
    """Run a sweep; the same command continues it after whatever happened."""
    _drive_sweep(lambda sweeps, workspace, show: sweeps.run(workspace, file, set_ or [], show), as_json)


@sweep_app.command("resume")
def sweep_resume(sweep: Annotated[str, typer.Argument(help="tenant/name, name or file.")], as_json: JsonOption = False) -> None:
    """Continue a sweep by its name, with the spec the store keeps."""
    _drive_sweep(lambda sweeps, workspace, show: sweeps.resume(workspace, sweep, show), as_json)


def _drive_sweep(start: Any, as_json: bool) -> None:
    workspace = _announced()
    live = _load("pipelines.live")
    with live.watching(Console(stderr=as_json)) as view:
        outcome = start(_load("pipelines.sweep"), workspace, view.show)
    _note(outcome.notes)
    present = _load("pipelines.sweep_page")
    _print_json(present.summary(outcome)) if as_json else _print(present.text(outcome))
    if outcome.result.status == "failed" or outcome.result.best is None:
        raise typer.Exit(1)


@sweep_app.command("extend")
def sweep_extend(
    sweep: Annotated[str, typer.Argument(help="tenant/name, name or file.")],
    num_trials: Annotated[int, typer.Option(min=1, help="New total of trials.")],
) -> None:
    """Set a new total of trials; a running driver takes it up, otherwise resume the sweep."""
    _print(_load("pipelines.sweep_page").extend(_workspace(), sweep, num_trials))


@sweep_app.command("stop")
def sweep_stop(sweep: Annotated[str, typer.Argument(help="tenant/name, name or file.")]) -> None:
    """Ask the driver of a sweep to checkpoint and end; resume continues it."""
    _print(_load("pipelines.sweep_page").stop(_workspace(), sweep))


@sweep_app.command("status")
def sweep_status(
    sweep: Annotated[str | None, typer.Argument(help="tenant/name, name or file; none lists all.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show how far a sweep is, from its ledger alone."""
    page = _load("pipelines.sweep_page")
    shown = page.status(_workspace(), sweep)
    _print_json(page.status_json(shown)) if as_json else Console().print(page.status_view(shown))


@sweep_app.command("best")
def sweep_best(sweep: Annotated[str, typer.Argument(help="tenant/name, name or file.")], as_json: JsonOption = False) -> None:
    """Show the best trial and its adapter."""
    page = _load("pipelines.sweep_page")
    best = page.best(_workspace(), sweep)
    _print_json(best) if as_json else _print(page.best_text(best))


def main() -> None:
    """Run the command line; whatever goes wrong is one sentence on stderr and the documented exit code."""
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: Sequence[str]) -> int:
    command = typer.main.get_command(app)
    try:
        result = command.main(args=list(arguments), prog_name="lorafleet", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show(sys.stdout)
        return 0
    except click.ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, click.exceptions.Abort):
        _say("interrupted: what was running is checkpointed; the same command continues.")
        return 130
    except LorafleetError as error:
        log.debug("failed", exc_info=True)
        _say(str(error))
        return error.exit_code
    except BrokenPipeError:
        return 0
    except Exception as error:  # the last line of defence: a person gets a sentence, the log file the traceback
        log.critical("unexpected error", exc_info=True)
        _say(f"unexpected {type(error).__name__}: {error}. This is a defect of lorafleet; the log file in its home tells more.")
        return 1


def _say(sentence: str) -> None:
    Console(stderr=True).print(f"error: {sentence}", style="red", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
