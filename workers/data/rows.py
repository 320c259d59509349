"""Rows in canonical form, and their identity.

Every format that people write becomes one of five kinds; the kind of a row is read from its keys. The canonical bytes of a
set are its rows, in order, one canonical JSON text per line, so its digest knows nothing of files, key order or formats.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from infra.errors import BadInput
from infra.fingerprint import canonical_json, id_of_bytes

Kind = Literal["messages", "prompt_completion", "text", "preference", "classification"]

DATA_FORMAT = "data/1"
KINDS: dict[frozenset[str], Kind] = {
    frozenset({"messages"}): "messages",
    frozenset({"prompt", "completion"}): "prompt_completion",
    frozenset({"text"}): "text",
    frozenset({"prompt", "chosen", "rejected"}): "preference",
    frozenset({"text", "label"}): "classification",
}
_WAYS_OUT = {
    "preference": "preference training (DPO) is not there; write each chosen answer as the 'completion' of its 'prompt'",
    "classification": "CAUSAL_LM learns to write; set task_type: SEQ_CLS to train a classifier, write the text as 'prompt' and "
    "the label as 'completion', or set data.format: text to train on the text alone",
}


@dataclass(frozen=True)
class Row:
    """One row in canonical form."""

    body: Mapping[str, Any]
    """{"messages": [{"role", "content"}, ...]}, {"prompt", "completion"}, {"text"}, {"prompt", "chosen", "rejected"} or
    {"text", "label"}; strings only. An assistant message may have "weight": 0, which keeps it out of the loss."""
    where: str
    """File and line, for people."""

    @property
    def kind(self) -> Kind:
        """What the keys of the body say it is. Raises BadInput for a body in no canonical form."""
        kind = KINDS.get(frozenset(self.body))
        if kind is None:
            raise BadInput(f"{self.where} has the keys {sorted(self.body)}, which is no canonical form of a row.")
        return kind


def kind_of(rows: Sequence[Row]) -> Kind:
    """Return the one kind of `rows`. Raises BadInput if there are none or they differ."""
    if not rows:
        raise BadInput("a data set needs at least one row.")
    kind = rows[0].kind
    for row in rows:
        if row.kind != kind:
            raise BadInput(f"{row.where} is {row.kind} while {rows[0].where} is {kind}; use one format for a data set.")
    return kind


def refuse_untrainable(rows: Sequence[Row]) -> None:
    """Raise BadInput, with the way out, if a CAUSAL_LM cannot be trained on rows of this kind."""
    kind = kind_of(rows)
    if kind in _WAYS_OUT:
        raise BadInput(f"{rows[0].where} is a {kind} row: {_WAYS_OUT[kind]}.")


def row_bytes(row: Row) -> bytes:
    """Return the canonical JSON text of a row, without a line end."""
    return canonical_json(row.body)


def canonical_rows(rows: Iterable[Row]) -> bytes:
    """Return the canonical bytes of a set: one line per row, in order."""
    return b"".join(row_bytes(row) + b"\n" for row in rows)


def digest_of(canonical: bytes) -> str:
    """Return the id of a set's canonical bytes."""
    return id_of_bytes(f"{DATA_FORMAT}\n".encode() + canonical)


def position_of(row: Row) -> float:
    """Return the row's fixed place in [0, 1), from its content alone; a split compares it with a share."""
    return int.from_bytes(hashlib.sha256(b"split/1\n" + row_bytes(row)).digest()[:6]) / (1 << 48)


def num_duplicates(rows: Sequence[Row], others: Sequence[Row] = ()) -> int:
    """Count the rows that stand in `others` as well or, without others, earlier in `rows`."""
    if others:
        known = {row_bytes(row) for row in others}
        return sum(row_bytes(row) in known for row in rows)
    return sum(count - 1 for count in Counter(map(row_bytes, rows)).values())
