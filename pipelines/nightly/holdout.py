"""Which rows are never trained on: a frozen share, chosen by what was asked rather than by the whole row.

A row's question is its prompt, or its text. Of a conversation it is what the users said first, as much as is needed to tell
it from others that begin with a greeting: a conversation that goes on tomorrow, gets another answer or another system
prompt keeps its question. Case, white space and forms of characters do not count (NFKC). So a row's place depends on
itself alone; no row moves from the holdout into training as data grows, and near-repeats of a question share a side.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from workers.data.formats import is_trained
from workers.data.rows import Row, row_bytes
from workers.data_audit import normalised

RULE = "holdout/1"
"""Part of every row's place; raised if the rule changes, which moves all customers' holdouts."""
ENOUGH_CHARACTERS = 32
"""Of what the users said, to know a conversation by."""
_VALIDATION_RULE = "validation/1"


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """A row with its two names; as a key, itself and no other."""

    row: Row
    digest: bytes
    """SHA-256 of the row's canonical form."""
    question: bytes
    """SHA-256 of its question."""


@dataclass(frozen=True)
class Parted:
    """Rows by their use, each sorted by digest: a function of the set of rows alone."""

    train: list[Known]
    validation: list[Known]
    holdout: list[Known]
    num_duplicates: int = 0
    """Rows that repeated another one of the same file's use, and were left out."""
    num_overlap: int = 0
    """Rows left out of training (or of validation) because their question stands in the holdout (or in validation)."""


@dataclass(frozen=True)
class Files:
    """Good rows as the source's files have them; None where it has no such file."""

    train: list[Row]
    validation: list[Row] | None = None
    test: list[Row] | None = None


def part(files: Files, holdout: float, validation: float) -> Parted:
    """Give each row one use. `holdout` and `validation` are shares of the training file (the second: of what the first left).

    Files of the source's own take the place of a share; their questions are then taken out of the training rows.
    """
    rows, rest = _known(files.train), _known(files.validation or [])
    if files.test is None:
        held, rows = _drawn(rows, RULE, holdout)
    else:
        held = _known(files.test)
    if files.validation is None:
        rest, rows = _drawn(rows, _VALIDATION_RULE, validation)
    num_rows = len(rows) + len(rest) + len(held)
    num_given = len(files.train) + len(files.validation or []) + len(files.test or [])
    rest = _without(rest, held)
    rows = _without(rows, held + rest)
    num_left = len(rows) + len(rest) + len(held)
    return Parted(rows, rest, held, num_duplicates=num_given - num_rows, num_overlap=num_rows - num_left)


def known(row: Row) -> Known:
    """Return a row with its names."""
    question = normalised(question_of(row)).encode()
    return Known(row, hashlib.sha256(row_bytes(row)).digest(), hashlib.sha256(question).digest())


def question_of(row: Row) -> list[str]:
    """Return the texts that make up a row's question (see the top of the module)."""
    if row.kind != "messages":
        return [str(row.body["prompt" if "prompt" in row.body else "text"])]
    messages = row.body["messages"]
    last = max((place for place, message in enumerate(messages) if is_trained(message)), default=len(messages))
    said: list[str] = []
    for message in messages[:last]:
        if message["role"] == "user" and sum(map(len, said)) < ENOUGH_CHARACTERS:
            said.append(str(message["content"]))
    return said or [str(message["content"]) for message in messages[:last]]


def _known(rows: Iterable[Row]) -> list[Known]:
    """Return the distinct rows; of equal ones the first."""
    by_digest: dict[bytes, Known] = {}
    for one in map(known, rows):
        by_digest.setdefault(one.digest, one)
    return [by_digest[digest] for digest in sorted(by_digest)]


def _drawn(rows: list[Known], rule: str, share: float) -> tuple[list[Known], list[Known]]:
    """Return (those whose question falls into the share, the others)."""
    inside: list[Known] = []
    outside: list[Known] = []
    for one in rows:
        place = int.from_bytes(hashlib.sha256(rule.encode() + one.question).digest()[:6]) / (1 << 48)
        (inside if place < share else outside).append(one)
    return inside, outside


def _without(rows: list[Known], others: list[Known]) -> list[Known]:
    questions = {one.question for one in others}
    return [one for one in rows if one.question not in questions]
