"""Commands that look into adapters: audit one, compare two."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli_common import JsonOption, adapters_app, announced, load, print_json, print_notes, print_text, reading

AdapterArgument = Annotated[str, typer.Argument(help="Id, unique prefix, or <tenant>.<task>@<alias>.")]


@adapters_app.command("audit")
def adapters_audit(
    adapter: AdapterArgument,
    base: Annotated[Path | None, typer.Option(help="Folder of the base; refused if it is not the adapter's.")] = None,
    rows: Annotated[
        int, typer.Option(min=0, help="Training rows, and held-out rows, to measure for memorisation at most; 0: none.")
    ] = 256,
    canaries: Annotated[
        Path | None, typer.Option(help="File of planted secrets: JSONL with prompt and completion, the secret in the latter.")
    ] = None,
    alternatives: Annotated[int, typer.Option(min=9, help="Random secrets that each canary is compared with.")] = 255,
    as_json: JsonOption = False,
) -> None:
    """Measure an adapter's layers, look through its rows, and find out what it learned by heart; kept as evidence."""
    pipeline = load("pipelines.audit")
    found = pipeline.audit(announced(), adapter, base=base, num_rows=rows, canaries=canaries, num_alternatives=alternatives)
    print_json(found) if as_json else print_text(pipeline.audit_text(found))
    if found["not_in_mlflow"]:
        print_notes([f"MLflow does not show this audit: {found['not_in_mlflow']}"])


@adapters_app.command("diff")
def adapters_diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Id, unique prefix, or <tenant>.<task>@<alias>.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another adapter of the same base.")],
    as_json: JsonOption = False,
) -> None:
    """Compare two adapters of one base: their updates layer by layer, their settings and their rows."""
    pipeline = load("pipelines.adapter_diff")
    found = pipeline.diff(reading(), a, b)
    print_json(found) if as_json else print_text(pipeline.diff_text(found))
