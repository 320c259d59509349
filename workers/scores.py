"""What was measured of each row, and the metrics that are made of it. No torch: evidence keeps these and gates judge by them.

Every metric here is a sum over rows divided by another sum over the same rows, so that it can be computed of any choice of rows,
which a bootstrap needs. Perplexity and F1 are not of this form; eval/loss and eval/accuracy stand for them.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from infra.errors import BadInput
from workers.metrics_log import decode_number, encode_number

Metric = Literal[
    "eval/loss", "eval/bits_per_byte", "eval/token_accuracy", "eval/accuracy", "eval/exact_match", "eval/format_validity"
]
LOWER_IS_BETTER: frozenset[str] = frozenset({"eval/loss", "eval/bits_per_byte"})
GENERATED: frozenset[str] = frozenset({"eval/exact_match", "eval/format_validity"})
"""Metrics of generated answers, which cost far more than a pass over the rows."""
PER_TOKEN: frozenset[str] = frozenset({"eval/loss", "eval/token_accuracy"})
"""Metrics whose unit is a token: two bases with different tokenizers do not share it."""

MIN_ROWS_COMPARED = 2
"""Rows that two adapters are compared on, at least: one says nothing of how rows vary."""


@dataclass(frozen=True)
class RowScores:
    """One number of each kind per row, in the order of the rows."""

    loss: tuple[float, ...]
    """Nats over the row's supervised tokens; of a classifier over its label."""
    num_targets: tuple[int, ...]
    """Supervised tokens; 1 for a label."""
    num_correct: tuple[int, ...]
    num_bytes: tuple[int, ...]
    """UTF-8 bytes of the targets' text; 0 for a label."""
    exact_match: tuple[bool, ...] | None = None
    """Whether the generated answer is the row's own; None if none were generated."""
    format_validity: tuple[bool, ...] | None = None
    """Whether the generated answer matches the format pattern; None without answers or pattern."""

    @property
    def num_rows(self) -> int:
        return len(self.loss)

    def to_json(self) -> dict[str, Any]:
        """Return the scores as JSON data; numbers that JSON has no word for are words."""
        return {**asdict(self), "loss": [encode_number(value) for value in self.loss]}

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> "RowScores":
        """Undo `to_json`."""
        columns: dict[str, Any] = {name: None if column is None else tuple(column) for name, column in body.items()}
        return RowScores(**{**columns, "loss": tuple(decode_number(value) for value in body["loss"])})


@dataclass(frozen=True)
class Parts:
    """A metric of each row as what is summed above and below the line."""

    above: tuple[float, ...]
    below: tuple[float, ...]

    @property
    def value(self) -> float:
        """The metric over all rows."""
        return math.fsum(self.above) / math.fsum(self.below)

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, self.above))


def parts_of(scores: RowScores, metric: str) -> Parts:
    """Return a metric's parts. Raises BadInput if it was not, or cannot be, measured on these rows."""
    ones = (1.0,) * scores.num_rows
    match metric:
        case "eval/loss":
            parts = Parts(scores.loss, tuple(map(float, scores.num_targets)))
        case "eval/bits_per_byte":
            parts = Parts(tuple(loss / math.log(2.0) for loss in scores.loss), tuple(map(float, scores.num_bytes)))
        case "eval/token_accuracy" | "eval/accuracy":
            parts = Parts(tuple(map(float, scores.num_correct)), tuple(map(float, scores.num_targets)))
        case "eval/exact_match":
            parts = Parts(tuple(map(float, scores.exact_match or ())), ones)
        case _:
            parts = Parts(tuple(map(float, scores.format_validity or ())), ones)
    if len(parts.above) != scores.num_rows or not sum(parts.below):
        raise BadInput(f"{metric} cannot be measured on these rows; choose another metric for the gate.")
    return parts
