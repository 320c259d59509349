"""Labelled rows: which labels a job tells apart, and texts as token ids.

The labels are those of the training rows, sorted as text, so they are a function of the data alone; integers stand in canonical
rows as their decimal text. A text is tokenised as the tokenizer itself frames a single one ([CLS] text [SEP], <s> text </s>,
BOS text), and a long one is cut on the right inside that frame: the position that is classified is always there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from infra.errors import BadInput
from workers.data.rows import Row, kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NUM_LISTED = 8
_FRAMED = "a"


def labels_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the distinct labels of training rows, sorted. Raises BadInput if rows have none, or all have the same."""
    refuse_unlabelled(rows)
    labels = tuple(sorted({str(row.body["label"]) for row in rows}))
    if len(labels) < 2:
        raise BadInput(
            f"all {len(rows)} training rows have the label {labels[0][:60]!r} (first: {rows[0].where}); "
            "a classifier needs at least two labels to tell apart."
        )
    return labels


def refuse_unlabelled(rows: Sequence[Row]) -> None:
    """Raise BadInput, with the way out, unless the rows are text with a label."""
    kind = kind_of(rows)
    if kind != "classification":
        raise BadInput(
            f"{rows[0].where} is a {kind} row, and task_type SEQ_CLS trains on rows of 'text' and 'label'; "
            "write such rows (data.format: auto or classification), or set task_type: CAUSAL_LM."
        )


def label_numbers(rows: Sequence[Row], labels: Sequence[str]) -> list[int]:
    """Return the place of each row's label among `labels`. Raises BadInput, naming the first row whose label is not there."""
    refuse_unlabelled(rows)
    places = {label: place for place, label in enumerate(labels)}
    strange = [row for row in rows if row.body["label"] not in places]
    if strange:
        listed = ", ".join(label[:60] for label in labels[:_NUM_LISTED]) + (", ..." if len(labels) > _NUM_LISTED else "")
        raise BadInput(
            f"{strange[0].where} has the label {strange[0].body['label'][:60]!r}, which is none of the {len(labels)} labels "
            f"that are trained on ({listed}); add training rows with it, or drop such rows ({len(strange)} in all)."
        )
    return [places[row.body["label"]] for row in rows]


def frame_of(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special ids that the tokenizer puts before and behind a single text."""
    framed: list[int] = tokenizer(_FRAMED)["input_ids"]
    plain: list[int] = tokenizer(_FRAMED, add_special_tokens=False)["input_ids"]
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return framed[:start], framed[start + len(plain) :]
    return [], []


def fit_in_frame(ids: Sequence[int], frame: tuple[list[int], list[int]], max_length: int) -> tuple[list[int], bool]:
    """Return the ids of a text in its frame, at most `max_length` of them, and whether some of the text were left out.

    Raises BadInput if the frame leaves no place for text.
    """
    front, behind = frame
    room = max_length - len(front) - len(behind)
    if room < 1:
        raise BadInput(
            f"texts are cut at {max_length} tokens, and the tokenizer puts {len(front) + len(behind)} special ones around each; "
            "raise training.max_length."
        )
    return [*front, *ids[:room], *behind], len(ids) > room
