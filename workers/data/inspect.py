"""What is trained on, for people: rows as runs of text that are targets or not, or with their label, and the numbers of a set.

Rows that training would refuse are shown rather than refused here. Drawing on a terminal is left to whoever has one.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from workers.data.render import Example, Renderer
from workers.data.rows import Row, num_duplicates

_QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Segment:
    """A run of text, special tokens spelled out."""

    text: str
    supervised: bool
    """Whether the run is part of the loss."""


@dataclass(frozen=True)
class InspectedRow:
    """One row as the model will see it."""

    where: str
    segments: tuple[Segment, ...]
    num_tokens: int
    num_supervised_tokens: int
    was_cut: bool
    label: str | None
    """What a classifier should answer; None for rows that a model learns to write."""


@dataclass(frozen=True)
class DataSummary:
    """The numbers of a set of rows, after rendering and cutting."""

    num_rows: int
    num_tokens: int
    num_supervised_tokens: int
    length_quantiles: dict[str, int]
    """Tokens of a row at p50, p90, p99 and max, after the cut."""
    num_cut_rows: int
    num_unsupervised_rows: int
    """Rows without any target; training refuses them."""
    num_duplicate_rows: int
    """Rows that repeat an earlier one."""
    num_control_token_rows: int
    """Rows whose own text spells a special token of the tokenizer."""
    num_rows_by_label: dict[str, int]
    """Rows of each label a classifier tells apart; empty for other jobs."""

    @property
    def supervised_share(self) -> float:
        """Targets among all tokens, 0 to 1."""
        return self.num_supervised_tokens / max(1, self.num_tokens)


def inspect_rows(rows: Sequence[Row], renderer: Renderer, limit: int) -> list[InspectedRow]:
    """Return the first `limit` rows as they will be trained on. Raises BadInput as rendering does."""
    shown = rows[: max(0, limit)]
    return [_inspected(example, renderer) for example in renderer.render_unchecked(shown)] if shown else []


def _inspected(example: Example, renderer: Renderer) -> InspectedRow:
    segments = tuple(Segment(text, supervised) for text, supervised in renderer.segments(example))
    label = None if example.label is None else renderer.labels[example.label]
    return InspectedRow(example.where, segments, len(example.input_ids), example.num_supervised, example.was_cut, label)


def summarize(rows: Sequence[Row], renderer: Renderer) -> DataSummary:
    """Render all rows and return their numbers. Raises BadInput as rendering does."""
    examples = renderer.render_unchecked(rows)
    counts = Counter(example.label for example in examples)
    return DataSummary(
        num_rows=len(examples),
        num_tokens=sum(len(example.input_ids) for example in examples),
        num_supervised_tokens=sum(example.num_supervised for example in examples),
        length_quantiles=_quantiles(sorted(len(example.input_ids) for example in examples)),
        num_cut_rows=sum(example.was_cut for example in examples),
        num_unsupervised_rows=sum(example.label is None and not example.num_supervised for example in examples),
        num_duplicate_rows=num_duplicates(rows),
        num_control_token_rows=sum(renderer.holds_control_tokens(row) for row in rows),
        num_rows_by_label={label: counts[number] for number, label in enumerate(renderer.labels)},
    )


def _quantiles(ordered: Sequence[int]) -> dict[str, int]:
    last = len(ordered) - 1
    return {f"p{share * 100:.0f}": ordered[round(share * last)] for share in _QUANTILES} | {"max": ordered[last]}


def summary_lines(summary: DataSummary) -> list[str]:
    """Return the numbers as plain lines; what is zero and harmless is left out."""
    lengths = ", ".join(f"{name} {tokens}" for name, tokens in summary.length_quantiles.items())
    lines = [_content_line(summary), f"tokens per row: {lengths}"]
    warnings = (
        (summary.num_cut_rows, "cut at the maximal length"),
        (summary.num_unsupervised_rows, "with nothing left to train on (training refuses them)"),
        (summary.num_duplicate_rows, "repeating an earlier row"),
        (summary.num_control_token_rows, "spelling a special token of the base in their text"),
    )
    return lines + [f"rows {what}: {count}" for count, what in warnings if count]


def _content_line(summary: DataSummary) -> str:
    line, counts = f"{summary.num_rows} rows, {summary.num_tokens} tokens", summary.num_rows_by_label
    if not counts:
        return f"{line}, {summary.num_supervised_tokens} of them trained on ({summary.supervised_share:.1%})"
    rarest, commonest = min(counts, key=lambda label: counts[label]), max(counts, key=lambda label: counts[label])
    return f"{line}, {len(counts)} labels (fewest rows: {rarest} {counts[rarest]}, most: {commonest} {counts[commonest]})"


def inspect_text(rows: Sequence[InspectedRow], summary: DataSummary | None = None) -> str:
    """Return rows as plain text, what is trained on in [[double brackets]], then the numbers."""
    blocks = [_row_text(row) for row in rows]
    if summary is not None:
        blocks.append("\n".join(summary_lines(summary)))
    return "\n\n".join(blocks)


def _row_text(row: InspectedRow) -> str:
    body = "".join(f"[[{segment.text}]]" if segment.supervised else segment.text for segment in row.segments)
    cut = ", cut" if row.was_cut else ""
    return f"{row.where} ({row.num_tokens} tokens, {what_is_learned(row)}{cut})\n{body}"


def what_is_learned(row: InspectedRow) -> str:
    """Return what training makes of a row: how many of its tokens are targets, or its label."""
    return f"{row.num_supervised_tokens} trained on" if row.label is None else f"label {row.label}"
