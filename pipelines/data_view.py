"""`lorafleet data inspect job.yaml`: rows as tokens are trained on, the supervised ones standing out, or with their labels."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from pipelines.files import load_job
from pipelines.workspace import Workspace
from workers.data.inspect import DataSummary, InspectedRow, inspect_rows, inspect_text, summarize, summary_lines, what_is_learned


@dataclass(frozen=True)
class Inspection:
    """A few rows in full and the numbers of all."""

    rows: list[InspectedRow]
    summary: DataSummary
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON data."""
        return {"summary": asdict(self.summary), "rows": [asdict(row) for row in self.rows], "notes": self.notes}


def inspect(workspace: Workspace, path: Path, limit: int, overrides: Sequence[str]) -> Inspection:
    """Read and render the training rows of a job file. Nothing is stored."""
    spec, folder = load_job(path, overrides)
    resolver = workspace.resolver(folder)
    splits, renderer = resolver.read(spec)
    rows = inspect_rows(splits.train, renderer, limit)
    return Inspection(rows, summarize(splits.train, renderer), splits.notes)


def show(inspection: Inspection, console: Console) -> None:
    """Print an inspection: in colours on a terminal, with [[brackets]] around what is trained on elsewhere."""
    if not console.is_terminal:
        console.print(inspect_text(inspection.rows, inspection.summary), highlight=False, markup=False, soft_wrap=True)
    else:
        for row in inspection.rows:
            console.print(_coloured(row))
        for line in summary_lines(inspection.summary):
            console.print(line, highlight=False, markup=False)
    for note in inspection.notes:
        console.print(f"note: {note}", style="yellow", highlight=False, markup=False)


def _coloured(row: InspectedRow) -> Text:
    text = Text(f"{row.where}  {row.num_tokens} tokens, {what_is_learned(row)}\n", style="bold")
    for segment in row.segments:
        text.append(segment.text, style="black on green" if segment.supervised else "dim")
    return text.append("\n")
