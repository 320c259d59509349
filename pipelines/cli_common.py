"""What all commands share: the applications they hang on, options, printing, and how a command finds its workspace.

Nothing heavy is imported here; commands import what they need when they run, by `load`.
"""

import importlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pipelines.workspace import Workspace

INTERRUPTED = 130
"""Exit code of a command that was ended before its work was: by Ctrl-C, as shells and typer have it, or by `sweep stop`."""

WIDE = 100_000
"""Columns that are assumed where there is no terminal."""

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
nightly_app = typer.Typer(help="Every customer's adapter up to date, night by night.", no_args_is_help=True)
tenant_app = typer.Typer(help="What is kept of a customer.", no_args_is_help=True)
GROUPS = {
    "sweep": sweep_app,
    "nightly": nightly_app,
    "data": data_app,
    "jobs": jobs_app,
    "adapters": adapters_app,
    "base": base_app,
    "tenant": tenant_app,
}
for name, group in GROUPS.items():
    app.add_typer(group, name=name)

SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a key of the file: --set training.max_steps=50.")]
SweepSetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key of the sweep or its job: --set job.training.max_steps=50.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
TenantOption = Annotated[str | None, typer.Option(help="Only this tenant.")]


def load(module: str) -> Any:
    """Import what a command needs when it runs, so that --help stays light."""
    return importlib.import_module(module)


def announced() -> "Workspace":
    """Open the workspace of a command that makes something, and say on stderr where things are kept."""
    workspace: Workspace = load("pipelines.workspace").Workspace.here()
    Console(stderr=True).print(f"home {workspace.settings.home}", style="dim", highlight=False, soft_wrap=True)
    return workspace


def reading() -> "Workspace":
    """Open the workspace of a command that only looks: it makes no home, and writes to the log file of one that is there."""
    module = load("pipelines.workspace")
    workspace: Workspace = module.Workspace(module.load_settings())
    if os.access(workspace.settings.home, os.W_OK):
        module.set_up_logs(workspace.settings.home)
    return workspace


def print_text(text: str = "") -> None:
    """Print lines as they are, whatever they hold."""
    Console().print(text, highlight=False, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print JSON that every parser takes: numbers that JSON has no word for become "NaN", "Infinity" and "-Infinity"."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def print_notes(notes: Sequence[str]) -> None:
    """Print on stderr what a person should know beside the result."""
    for note in notes:
        Console(stderr=True).print(f"note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> None:
    """Print rows as a table, or the sentence `empty` if there are none. Where there is no terminal no cell is cut or wrapped."""
    if not rows:
        print_text(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, no_wrap=place == 0, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    print_picture(table)


def print_picture(picture: RenderableType) -> None:
    """Print what fits itself to the width of a terminal; where there is none, nothing is cut."""
    console = Console()
    (console if console.is_terminal else Console(width=WIDE)).print(picture, highlight=False, crop=False)
