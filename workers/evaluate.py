"""What is measured on rows beside the loss: exact match and format validity of generated answers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from workers.data.render import Renderer
from workers.data.rows import Row
from workers.engine.generate import generate_answers
from workers.engine.resident import ResidentBase, measure
from workers.spec import EvaluationSpec

ROWS_PER_PASS = 16


@dataclass(frozen=True)
class Answer:
    """One row's prompt, what was generated, and what should have been."""

    where: str
    generated: str
    reference: str


def answer_rows(base: ResidentBase, renderer: Renderer, rows: Sequence[Row], max_new_tokens: int) -> list[Answer]:
    """Generate an answer for each row's last turn with whatever adapter is switched in."""
    prompts = [renderer.prompt_ids(row) for row in rows]
    generated = generate_answers(base, prompts, max_new_tokens, renderer.stop_ids)
    return [
        Answer(row.where, renderer.answer_text(ids), renderer.reference(row).strip())
        for row, ids in zip(rows, generated, strict=True)
    ]


def answer_metrics(answers: Sequence[Answer], format_pattern: str | None) -> dict[str, float]:
    """Return eval/exact_match and, with a pattern, eval/format_validity: shares of the answers, 0 to 1."""
    if not answers:
        return {}
    metrics = {"eval/exact_match": sum(answer.generated == answer.reference for answer in answers) / len(answers)}
    if format_pattern is not None:
        pattern = re.compile(format_pattern, re.DOTALL)
        metrics["eval/format_validity"] = sum(pattern.fullmatch(answer.generated) is not None for answer in answers) / len(
            answers
        )
    return metrics


def evaluate_rows(
    base: ResidentBase,
    renderer: Renderer,
    rows: Sequence[Row],
    evaluation: EvaluationSpec,
) -> dict[str, float]:
    """Measure whatever adapter is switched in on all `rows`, generating for the first `evaluation.generate` of them."""
    examples = [renderer.render(row) for row in rows]
    metrics = measure(base, examples, ROWS_PER_PASS).metrics(renderer.target_bytes(examples))
    if evaluation.generate:
        answers = answer_rows(base, renderer, rows[: evaluation.generate], evaluation.max_new_tokens)
        metrics |= answer_metrics(answers, evaluation.format_pattern)
    return metrics
