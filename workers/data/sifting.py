"""The rows of a job read leniently: good ones by their use, and a list of what is wrong with the others.

Data that comes every night from many customers may hold anything. `splits.load_splits` refuses a set for one bad row, because a
person stands there who can correct it; here a bad row is put aside with its place and its problem, a file that cannot be
read is one more entry of the list, and nothing raises but a store that does not answer.
"""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from infra.errors import BadInput, ObjectNotFound, ServiceUnavailable, WorkFailed
from infra.stores import open_store
from workers.data.formats import SiftedRow, sift_row
from workers.data.reading import MAX_LENIENT_LINE_BYTES, RawRow, read_leniently
from workers.data.rows import Row
from workers.data.sources import OpenUri, Role, SourceFile, files_of_role
from workers.spec import DataSpec

MAX_LISTED = 10_000
"""Bad rows that are listed of one source; all are counted."""
GIVE_UP_AFTER = 10_000
"""Bad rows of one file after which the rest is left unread, if the good ones are fewer: it holds no rows at all."""
MAX_ROWS_BYTES = 256 << 20
"""Of a source's good rows, all files together. They are held in memory at once, beside those of other customers."""
_MAX_CHARACTERS = 300


@dataclass
class Quarantine:
    """What was put aside of one source."""

    entries: list[tuple[str, str]] = field(default_factory=list)
    """(file:line, what is wrong), the first MAX_LISTED; printable text that ends in no full stop."""
    num_rows: int = 0
    """Bad rows, those that are not listed included."""
    unread: list[str] = field(default_factory=list)
    """A sentence for each file (or source) that could not be read to its end."""

    def add(self, where: str, problem: str) -> None:
        """Put a row aside."""
        self.num_rows += 1
        if len(self.entries) < MAX_LISTED:
            self.entries.append((printable(where), printable(problem).removesuffix(".")))

    def give_up(self, where: str, sentence: str) -> None:
        """Note a file whose rest cannot be read. Once for one sentence: a folder is looked at for each use."""
        if printable(sentence) in self.unread:
            return
        self.unread.append(printable(sentence))
        self.entries.append((printable(where), printable(sentence).removesuffix(".")))


@dataclass(frozen=True)
class SiftedRows:
    """Good rows by the use that the source's files give them."""

    train: list[Row]
    validation: list[Row] | None
    """None if the source has no such file."""
    test: list[Row] | None
    notes: tuple[str, ...]
    """Sentences about keys that were not used."""


def sift_source(
    spec: DataSpec,
    folder: Path,
    quarantine: Quarantine,
    open_uri: OpenUri | None = None,
    max_line_bytes: int = MAX_LENIENT_LINE_BYTES,
    max_rows_bytes: int = MAX_ROWS_BYTES,
) -> SiftedRows:
    """Read what `spec` names as `load_splits` does, without splitting; what is bad goes into `quarantine`.

    A file with which the good rows exceed `max_rows_bytes` is left where they do. All rows that come back are of one kind: that
    of most training rows. Raises ServiceUnavailable, and nothing else.
    """
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="lorafleet-data-") as workspace:
        sift = _Sifting(spec, folder, Path(workspace), open_uri or open_store, max_line_bytes, max_rows_bytes, quarantine, notes)
        train = sift.role("train") or []
        validation, test = sift.role("validation"), sift.role("test")
    kind = train[0].kind if train else None
    return SiftedRows(train, _of_kind(validation, kind, quarantine), _of_kind(test, kind, quarantine), tuple(notes))


def printable(text: str) -> str:
    """Return text for lists and pages: bounded, and with escapes for what does not print (line ends, lone surrogates)."""
    short = text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…"
    if short.isprintable():
        return short
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in short)


@dataclass
class _Sifting:
    spec: DataSpec
    folder: Path
    workspace: Path
    open_uri: OpenUri
    max_line_bytes: int
    left_bytes: int
    quarantine: Quarantine
    notes: list[str]

    def role(self, role: Role) -> list[Row] | None:
        """Return the good rows of a role, None if the source has no file for it."""
        try:
            files = files_of_role(self.spec, role, self.folder, self.workspace, self.open_uri)
        except ServiceUnavailable:  # an OSError as well, and no fault of the source
            raise
        except (BadInput, ObjectNotFound, WorkFailed, OSError) as error:
            self.quarantine.give_up(self.spec.train, _sentence(error))
            return []
        sifted = [row for file in files for row in self._file(file)]
        return self._of_one_format(sifted) if files else None

    def _file(self, file: SourceFile) -> list[SiftedRow]:
        good: list[SiftedRow] = []
        num_bad = 0
        try:
            for raw in read_leniently(file.path, file.name, self.max_line_bytes):
                found = sift_row(raw, self.spec.format)
                if isinstance(found, SiftedRow):
                    self._make_room(raw, file)
                    good.append(found)
                else:
                    self.quarantine.add(raw.where, found)
                    num_bad += 1
                    _refuse_garbage(raw, file, num_bad, len(good))
        except BadInput as error:
            self.quarantine.give_up(file.name, _sentence(error))
        return good

    def _make_room(self, raw: RawRow, file: SourceFile) -> None:
        self.left_bytes -= raw.num_bytes
        if self.left_bytes < 0:
            raise BadInput(f"{file.name} was left at {raw.where}: its rows take more room than a customer of a night may have.")

    def _of_one_format(self, sifted: Sequence[SiftedRow]) -> list[Row]:
        """Return the rows in the format that most of them have; the others are put aside."""
        if not sifted:
            return []
        counts: dict[str, int] = {}
        for one in sifted:
            counts[one.format] = counts.get(one.format, 0) + 1
        most = max(counts, key=lambda name: counts[name])
        ignored = {key for one in sifted if one.format == most for key in one.ignored_keys}
        if ignored:
            self.notes.append(f"Not used as {most}: {', '.join(printable(key[:60]) for key in sorted(ignored)[:8])}.")
        for one in sifted:
            if one.format != most:
                self.quarantine.add(one.row.where, f"is {one.format} while most rows are {most}; keep one format per source")
        return [one.row for one in sifted if one.format == most]


def _refuse_garbage(raw: RawRow, file: SourceFile, num_bad: int, num_good: int) -> None:
    if num_bad >= GIVE_UP_AFTER and num_bad > num_good:
        raise BadInput(f"{file.name} was left at {raw.where}: {num_bad} of its first {num_bad + num_good} rows are bad.")


def _of_kind(rows: list[Row] | None, kind: str | None, quarantine: Quarantine) -> list[Row] | None:
    if rows is None or kind is None:
        return rows
    for row in _others(rows, kind):
        quarantine.add(row.where, f"is {row.kind} while the training rows are {kind}; use one format for a data set")
    return [row for row in rows if row.kind == kind]


def _others(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row.kind != kind]


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"the source cannot be read ({error.strerror or error}); check the path and its permissions."
    return str(error)
