"""One file of rows, read defensively: JSONL, CSV or Parquet to plain dicts, each with its place.

Files come from others. A line has a bounded length, text must be UTF-8, and JSON may neither repeat a key nor hold NaN.
What is wrong with one row is a value (`RawRow.problem`), so that a caller can name the first and count the rest; what is
wrong with a whole file raises BadInput. Read leniently, a line that is too long or no UTF-8 is wrong with a row only.
"""

import csv
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from infra.errors import BadInput

MAX_LINE_BYTES = 16 * 1024 * 1024
"""A row of 16 MiB is some four million tokens, far beyond any context; longer lines are never read whole."""
MAX_LENIENT_LINE_BYTES = 1024 * 1024
"""Of a row that is read leniently: what many customers send unseen gets less room than what one person hands in."""
EXTENSIONS = (".jsonl", ".csv", ".parquet")
_PARQUET_BATCH_ROWS = 1024
_LENIENT_PARQUET_BATCH_ROWS = 64
"""Few, since a small file may hold a long text once and repeat it in every row."""
_MAX_ROW_GROUP_BYTES = 1 << 30
_BUFFER_BYTES = 1 << 18
_OTHER_FILES = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"PAR1": "Parquet", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2"}
"""How files begin that are often named .jsonl or .csv by mistake."""


@dataclass(frozen=True)
class RawRow:
    """One row as it stands in a file."""

    where: str
    """File and line (1 is the first); of a Parquet file, file and row."""
    value: dict[str, Any]
    """Empty if the row could not be read."""
    problem: str | None = None
    """What is wrong with it, as the end of a sentence that begins with `where`."""
    num_bytes: int = 0
    """About the room it takes in its file, where it is read leniently."""


_Reader = Callable[[Path, str], Iterator[RawRow]]


def read_raw(path: Path, name: str) -> Iterator[RawRow]:
    """Yield the rows of the file at `path`, called `name` in messages. Raises BadInput for a file that cannot be read."""
    readers: dict[str, _Reader] = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    yield from _read(readers, path, name)


def read_leniently(path: Path, name: str, max_line_bytes: int = MAX_LENIENT_LINE_BYTES) -> Iterator[RawRow]:
    """Yield the rows of a file as `read_raw` does; a row that cannot be read is one with a problem, and the next one follows.

    A line longer than `max_line_bytes` takes no more memory than that. Raises BadInput where the rest of the file cannot be
    read (no such extension, UTF-16, damaged Parquet, CSV with an open quote); what came before has been yielded.
    """
    lenient = {".jsonl": _sift_jsonl, ".csv": _sift_csv}
    readers: dict[str, _Reader] = {
        suffix: functools.partial(reader, max_line_bytes=max_line_bytes) for suffix, reader in lenient.items()
    }
    yield from _read(readers | {".parquet": _sift_parquet}, path, name)


def _read(readers: Mapping[str, _Reader], path: Path, name: str) -> Iterator[RawRow]:
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


def _bounded_lines(file: BinaryIO, name: str, max_line_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield (line number, line without its end, None in place of one that is too long)."""
    number = 0
    while line := file.readline(max_line_bytes + 1):
        number += 1
        if number == 1:
            _refuse_utf16(line, name)
            _refuse_other_files(line, name)
            line = line.removeprefix(b"\xef\xbb\xbf")
        is_too_long = len(line) > max_line_bytes
        while is_too_long and line and not line.endswith(b"\n"):
            line = file.readline(max_line_bytes + 1)
        yield number, None if is_too_long else line.rstrip(b"\r\n")


def _refuse_other_files(line: bytes, name: str) -> None:
    found = next((kind for start, kind in _OTHER_FILES.items() if line.startswith(start)), None)
    if found is not None:
        raise BadInput(f"{name} is a {found} file by its first bytes; unpack it, or give it the extension of what it is.")


def _too_long(max_line_bytes: int) -> str:
    return f"is longer than {max_line_bytes >> 10} KiB; split it, or take it out"


def _sift_jsonl(path: Path, name: str, max_line_bytes: int) -> Iterator[RawRow]:
    with path.open("rb", buffering=_BUFFER_BYTES) as file:
        for number, line in _bounded_lines(file, name, max_line_bytes):
            if line is None:
                yield RawRow(f"{name}:{number}", {}, _too_long(max_line_bytes))
            elif line.strip():
                yield replace(_parse_line(f"{name}:{number}", line), num_bytes=len(line))


class _BadLine(ValueError):
    """What is wrong with one line of a CSV file, as the end of a sentence."""


class _CsvLines:
    """The lines of a CSV file for `csv.reader`: what is wrong with one is raised, and the next call goes on behind it.

    A generator could not do that: it ends with what it raises.
    """

    def __init__(self, file: BinaryIO, name: str, max_line_bytes: int) -> None:
        self._lines = _bounded_lines(file, name, max_line_bytes)
        self._max_bytes = max_line_bytes
        self.row_bytes = 0
        self.number = 0

    def begin_row(self) -> int:
        """Return the number of the line at which the next row begins; its length is counted from there."""
        self.row_bytes = 0
        return self.number + 1

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        self.row_bytes += 0 if line is None else len(line)
        if line is None or self.row_bytes > self._max_bytes:
            raise _BadLine(_too_long(self._max_bytes))
        try:
            return line.decode() + "\n"
        except UnicodeDecodeError as error:
            raise _BadLine(f"is not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8") from None


def _sift_csv(path: Path, name: str, max_line_bytes: int) -> Iterator[RawRow]:
    with path.open("rb", buffering=_BUFFER_BYTES) as file:
        lines = _CsvLines(file, name, max_line_bytes)
        reader = csv.reader(lines, strict=True)
        header: list[str] | None = None
        while True:
            start = lines.begin_row()
            try:
                cells = next(reader, None)
            except (csv.Error, _BadLine) as error:
                problem = str(error) if isinstance(error, _BadLine) else f"is not valid CSV ({error})"
                if header is None or lines.number > start:
                    raise _lost_in_csv(f"{name}:{start}", problem) from None
                yield RawRow(f"{name}:{start}", {}, problem)
                continue
            if cells is None:
                return
            if header is None:
                header = _checked_header(cells, name)
            elif cells:
                yield replace(_csv_row(f"{name}:{start}", header, cells), num_bytes=lines.row_bytes)


def _lost_in_csv(where: str, problem: str) -> BadInput:
    """Without its header, or inside a quote that is open over lines, nobody knows what the rest of a CSV file means."""
    return BadInput(f"{where} {problem}, so where the next row begins is not known; close its quotes, or write JSONL.")


def _sift_parquet(path: Path, name: str) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _refuse_big_groups(file.metadata, name)
            for batch in file.iter_batches(_LENIENT_PARQUET_BATCH_ROWS):
                for value in _values_of(batch):
                    number += 1
                    where, room = f"{name}:{number}", batch.nbytes // batch.num_rows
                    yield RawRow(where, {}, value) if isinstance(value, str) else RawRow(where, value, num_bytes=room)
    except BadInput:
        raise
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError) as error:  # names of columns may be no UTF-8 as well
        reason = (str(error).splitlines() or [""])[0][:200]
        raise BadInput(f"{name} is not a readable Parquet file after row {number} ({reason}); write it again.") from None


def _refuse_big_groups(metadata: Any, name: str) -> None:
    sizes = [metadata.row_group(place).total_byte_size for place in range(metadata.num_row_groups)]
    if max(sizes, default=0) > _MAX_ROW_GROUP_BYTES:
        raise BadInput(
            f"{name} has a row group of {max(sizes) >> 20} MiB, expected at most {_MAX_ROW_GROUP_BYTES >> 20}; "
            "write it in smaller row groups."
        )


def _values_of(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a batch, or what is wrong with one."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):  # text that is no UTF-8, times beyond the calendar: some row of the batch
        pass
    for place in range(batch.num_rows):
        try:
            yield from batch.slice(place, 1).to_pylist()
        except (ValueError, OverflowError) as error:
            yield f"holds a value that cannot be read ({str(error)[:100]})"
