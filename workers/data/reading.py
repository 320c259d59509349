"""One file of rows, read defensively: JSONL, CSV or Parquet to plain dicts, each with its place.

Files come from others. A line has a bounded length, text must be UTF-8, and JSON may neither repeat a key nor hold NaN.
What is wrong with one row is a value (`RawRow.problem`), so that a caller can name the first and count the rest; what is
wrong with a whole file raises BadInput.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from infra.errors import BadInput

MAX_LINE_BYTES = 16 * 1024 * 1024
"""A row of 16 MiB is some four million tokens, far beyond any context; longer lines are never read whole."""
EXTENSIONS = (".jsonl", ".csv", ".parquet")
_PARQUET_BATCH_ROWS = 1024


@dataclass(frozen=True)
class RawRow:
    """One row as it stands in a file."""

    where: str
    """File and line (1 is the first); of a Parquet file, file and row."""
    value: dict[str, Any]
    """Empty if the row could not be read."""
    problem: str | None = None
    """What is wrong with it, as the end of a sentence that begins with `where`."""


def read_raw(path: Path, name: str) -> Iterator[RawRow]:
    """Yield the rows of the file at `path`, called `name` in messages. Raises BadInput for a file that cannot be read."""
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        hint = (
            " Write one JSON object per line and name it .jsonl." if path.suffix.lower() in (".json", ".ndjson", ".txt") else ""
        )
        raise BadInput(f"{name} has the extension '{path.suffix}', expected one of {', '.join(EXTENSIONS)}.{hint}")
    try:
        yield from reader(path, name)
    except OSError as error:
        raise BadInput(f"{name} cannot be read ({error.strerror or error}); check the path and its permissions.") from None


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line without its end), never holding more than the bound."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise BadInput(f"{name}:{number} is longer than {MAX_LINE_BYTES >> 20} MiB; a row per line is expected, split it.")
        if number == 1:
            _refuse_utf16(line, name)
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield number, line.rstrip(b"\r\n")


def _refuse_utf16(line: bytes, name: str) -> None:
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadInput(f"{name} is encoded in UTF-16, expected UTF-8; save it again as UTF-8.")


def _read_jsonl(path: Path, name: str) -> Iterator[RawRow]:
    with path.open("rb") as file:
        for number, line in _lines(file, name):
            if line.strip():
                yield _parse_line(f"{name}:{number}", line)


def _parse_line(where: str, line: bytes) -> RawRow:
    try:
        value = json.loads(line.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        return RawRow(where, {}, f"is not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8")
    except RecursionError:
        return RawRow(where, {}, "is nested too deeply; rows hold strings and at most a list of messages")
    except json.JSONDecodeError as error:
        return RawRow(where, {}, f"is not valid JSON ({error.msg} at column {error.colno})")
    except ValueError as error:
        return RawRow(where, {}, f"is not valid JSON ({error})")
    if not isinstance(value, dict):
        return RawRow(where, {}, f"should be a JSON object, got {type(value).__name__}")
    return RawRow(where, value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:60]!r} stands there twice")
    return value


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON value")


def _read_csv(path: Path, name: str) -> Iterator[RawRow]:
    with path.open("rb") as file:
        reader = csv.reader(_decoded(file, name), strict=True)
        header: list[str] | None = None
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise BadInput(
                    f"{name}:{start} is not valid CSV ({error}); quote cells that hold commas, quotes or line ends, "
                    "and write cells above 131,072 characters as JSONL."
                ) from None
            if cells is None:
                return
            if header is None:
                header = _checked_header(cells, name)
            elif cells:
                yield _csv_row(f"{name}:{start}", header, cells)


def _decoded(file: BinaryIO, name: str) -> Iterator[str]:
    for number, line in _lines(file, name):
        try:
            yield line.decode() + "\n"
        except UnicodeDecodeError as error:
            raise BadInput(
                f"{name}:{number} is not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8."
            ) from None


def _checked_header(cells: list[str], name: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = next((cell for cell in header if header.count(cell) > 1), None)
    if twice is not None:
        raise BadInput(f"{name}:1 names the column {twice!r} twice; the first line should name each column once.")
    return header


def _csv_row(where: str, header: list[str], cells: list[str]) -> RawRow:
    if len(cells) != len(header):
        return RawRow(where, {}, f"has {len(cells)} cells where the first line names {len(header)} columns")
    return RawRow(where, dict(zip(header, cells, strict=True)))


def _read_parquet(path: Path, name: str) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_BATCH_ROWS):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{name}:{number}", value)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise BadInput(f"{name} is not a readable Parquet file after row {number} ({reason}); write it again.") from None
