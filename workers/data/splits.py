"""The rows of a job: its data spec read, checked and split.

A split by share goes by the content of each row alone, so it stays the same when rows are added, removed or reordered.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from infra.errors import BadInput
from infra.stores import open_store
from workers.data.formats import to_rows
from workers.data.reading import read_raw
from workers.data.rows import Row, kind_of, num_duplicates, position_of
from workers.data.sources import OpenUri, Role, SourceFile, files_of_role
from workers.spec import DataSpec


@dataclass(frozen=True)
class Splits:
    """The rows of a job by their use."""

    train: list[Row]
    validation: list[Row] | None
    test: list[Row] | None
    notes: list[str] = field(default_factory=list)
    """Sentences a person may want to read: duplicates, keys that were not used, settings without effect."""


def load_splits(spec: DataSpec, folder: Path, open_uri: OpenUri | None = None) -> Splits:
    """Read the rows `spec` names; relative paths start at `folder`, `open_uri` opens an s3:// prefix as a store.

    Raises BadInput for anything wrong with the files, ServiceUnavailable for a store that does not answer.
    """
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="lorafleet-data-") as workspace:
        read = {
            role: _read_role(spec, role, folder, Path(workspace), open_uri or open_store, notes)
            for role in ("train", "validation", "test")
        }
    train, validation, test = read["train"] or [], read["validation"], read["test"]
    if spec.validation_split > 0:
        if validation is None:
            train, validation = split_rows(train, spec.validation_split)
        else:
            notes.append("data.validation_split has no effect, because there are validation rows.")
    _check_kinds(train, validation, test)
    return Splits(train, validation, test, notes + _notes_on_duplicates(train, validation, test))


def split_rows(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Return (the rest, about `share` of the rows), chosen by the content of each row. Raises BadInput if one is empty."""
    chosen = [row for row in rows if position_of(row) < share]
    rest = [row for row in rows if position_of(row) >= share]
    if not chosen or not rest:
        side = "validation" if not chosen else "training"
        raise BadInput(
            f"data.validation_split {share} of {len(rows)} rows leaves none for {side}; change it, or name data.validation."
        )
    return rest, chosen


def _read_role(
    spec: DataSpec, role: Role, folder: Path, workspace: Path, open_uri: OpenUri, notes: list[str]
) -> list[Row] | None:
    files = files_of_role(spec, role, folder, workspace, open_uri)
    return _read_files(files, spec.format, notes) if files else None


def _read_files(files: Sequence[SourceFile], format: str, notes: list[str]) -> list[Row]:
    rows: list[Row] = []
    for file in files:
        read = to_rows(read_raw(file.path, file.name), format, file.name)
        if read.ignored_keys:
            notes.append(f"{file.name}: not used as {read.format}: {', '.join(key[:60] for key in read.ignored_keys[:8])}.")
        rows += read.rows
    return rows


def _check_kinds(train: list[Row], *others: list[Row] | None) -> None:
    kind_of(train + [row for rows in others for row in rows or []])


def _notes_on_duplicates(train: list[Row], validation: list[Row] | None, test: list[Row] | None) -> list[str]:
    notes = []
    if count := num_duplicates(train):
        notes.append(f"{count} of {len(train)} training rows repeat an earlier one.")
    for name, rows in (("validation", validation), ("test", test)):
        if rows and (count := num_duplicates(rows, train)):
            notes.append(f"{count} of {len(rows)} {name} rows stand in the training rows as well; their scores flatter.")
    return notes
