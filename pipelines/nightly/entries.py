"""The entries of a fleet, one per customer: what a list, a pattern or a table says of each, before it is made into a customer.

Nothing is checked here that concerns one customer alone, except what cannot be read at all.
"""

import csv
import difflib
import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from infra.errors import BadInput
from pipelines.files import parse_yaml
from pipelines.nightly.records import Signature
from pipelines.nightly.signatures import OpenUri, discover
from pipelines.nightly.spec import CsvSpec, DiscoverSpec, Fleet, ListedSpec
from workers.data.reading import RawRow, read_raw

DISCOVERED, TABLED, LISTED = range(3)
"""Layers: what a higher one says has precedence."""
_SET = "set."
_COLUMNS = ("tenant", "data", "priority", "task", "pin")


@dataclass(frozen=True)
class Entry:
    """What one place says of one customer."""

    tenant: str
    """As found: of a pattern or a table it may be anything."""
    task: str
    layer: int
    source: str | None
    folder: Path
    """Where relative paths start."""
    given: Mapping[str, Any]
    """Settings by name, those alone that are said."""
    overrides: Mapping[str, Any]
    """Values for the job by path."""
    where: str
    """The place, for people."""
    signature: Signature | None = None
    problem: str | None = None
    """Why nothing can be made of it, as a sentence."""


def entries_of(fleet: Fleet, open_store: OpenUri) -> Iterator[Entry]:
    """Yield what all entries of fleet.yaml say, customer by customer.

    Raises BadInput for a pattern's folder or a table that is not there or cannot be read, ServiceUnavailable for a store that
    does not answer.
    """
    for number, spec in enumerate(fleet.spec.customers):
        where = f"{fleet.path.name}: customers.{number}"
        if isinstance(spec, ListedSpec):
            yield Entry(spec.tenant, fleet.task_of(spec), LISTED, spec.data, fleet.folder, spec.given, spec.set, where)
        elif isinstance(spec, DiscoverSpec):
            yield from _discovered(fleet, spec, where, open_store)
        else:
            yield from _tabled(fleet, spec, where)


def _discovered(fleet: Fleet, spec: DiscoverSpec, where: str, open_store: OpenUri) -> Iterator[Entry]:
    task, given, place = fleet.task_of(spec), spec.given, f"{where} ({spec.discover})"
    for found in discover(spec.discover, fleet.folder, open_store):
        if not any(fnmatch.fnmatchcase(found.name, pattern) for pattern in spec.exclude):
            source = found.source if found.signature.files else None
            yield Entry(found.name, task, DISCOVERED, source, fleet.folder, given, spec.set, place, found.signature)


def _tabled(fleet: Fleet, spec: CsvSpec, where: str) -> Iterator[Entry]:
    path = fleet.folder / Path(spec.csv).expanduser()
    if path.suffix.lower() != ".csv" or not path.is_file():
        what = "is no CSV file" if path.exists() else "does not exist"
        raise BadInput(f"{where}: {spec.csv} {what} in {fleet.folder.absolute()}; name a table that ends in .csv.")
    _check_columns(path, f"{where}: {spec.csv}")
    for raw in read_raw(path, spec.csv):
        yield _of_line(fleet, spec, path.parent, raw)


def _check_columns(path: Path, where: str) -> None:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        columns = [cell.strip() for cell in next(csv.reader(file), [])]
    for needed in ("tenant", "data"):
        if needed not in columns:
            raise BadInput(
                f"{where} has no column '{needed}'; its first line should name the columns, 'tenant' and 'data' among them."
            )
    for column in columns:
        if column not in _COLUMNS and not column.startswith(_SET):
            close = difflib.get_close_matches(column, _COLUMNS, n=1)
            hint = f"Did you mean '{close[0]}'?" if close else f"Known are {', '.join(_COLUMNS)} and {_SET}<path in the job>."
            raise BadInput(f"{where} has the unknown column '{column[:80]}'. {hint}")


def _of_line(fleet: Fleet, spec: CsvSpec, folder: Path, raw: RawRow) -> Entry:
    cells = {name: cell.strip() for name, cell in raw.value.items() if cell.strip()}
    tenant, task = cells.get("tenant", raw.where), cells.get("task") or fleet.task_of(spec)
    said = Entry(tenant, task, TABLED, cells.get("data"), folder, spec.given, spec.set, raw.where)
    try:
        if raw.problem is not None or "tenant" not in cells:
            raise BadInput(f"{raw.problem or 'names no tenant; fill the cell'}.")
        given = {**spec.given, **_settings_in(cells)}
        return replace(said, given=given, overrides={**spec.set, **_overrides_in(cells)})
    except BadInput as error:
        return replace(said, problem=str(error))


def _settings_in(cells: Mapping[str, str]) -> dict[str, Any]:
    given: dict[str, Any] = {name: cells[name] for name in ("pin",) if name in cells}
    if "priority" in cells:
        text = cells["priority"]
        if re.fullmatch("[0-9]{1,2}|100", text) is None:
            raise BadInput(f"the priority {text[:20]!r} should be a whole number from 0 to 100.")
        given["priority"] = int(text)
    return given


def _overrides_in(cells: Mapping[str, str]) -> dict[str, Any]:
    return {name.removeprefix(_SET): _value(text) for name, text in cells.items() if name.startswith(_SET)}


@lru_cache(maxsize=4096)
def _value(text: str) -> Any:
    return parse_yaml(text, "a cell")
