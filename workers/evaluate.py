"""What is measured on rows: the losses, and exact match and format validity of generated answers."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from infra.errors import BadInput
from workers.adapter import Adapter
from workers.data.render import Example, Renderer
from workers.data.rows import Row
from workers.data.tokenizer import load_tokenizer
from workers.engine.batches import make_sequence, make_stream
from workers.engine.class_head import Classified
from workers.engine.generate import generate_answers
from workers.engine.lora import Factors
from workers.engine.portions import Worn
from workers.engine.resident import PROBE_TOKENS, Measured, ResidentBase, has_effect, measure
from workers.loading import load_model
from workers.scores import RowScores
from workers.spec import BaseModelSpec, EvaluationSpec, TaskType

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
    examples = renderer.render_all(rows)
    metrics = measure(base, examples, ROWS_PER_PASS).metrics(renderer.target_bytes(examples))
    if evaluation.generate:
        answers = answer_rows(base, renderer, rows[: evaluation.generate], evaluation.max_new_tokens)
        metrics |= answer_metrics(answers, evaluation.format_pattern)
    return metrics


def score_rows(
    base: ResidentBase, renderer: Renderer, rows: Sequence[Row], evaluation: EvaluationSpec, *, answers: bool = False
) -> RowScores:
    """Measure whatever adapter is switched in on each row, in one pass over the rows.

    With `answers` an answer is generated for every row, whatever `evaluation.generate` says.
    """
    examples = renderer.render_all(rows)
    measured = [one for start in range(0, len(rows), ROWS_PER_PASS) for one in _measured_apart(base, examples, start)]
    answered = answer_rows(base, renderer, rows, evaluation.max_new_tokens) if answers else None
    return scores_of(measured, [renderer.target_bytes([example]) for example in examples], answered, evaluation.format_pattern)


def scores_of(
    measured: Sequence[Measured], num_bytes: Sequence[int], answered: Sequence[Answer] | None, format_pattern: str | None
) -> RowScores:
    """Return what was found of rows, one by one, as scores; `num_bytes` are those of the rows' targets."""
    pattern = re.compile(format_pattern, re.DOTALL) if format_pattern is not None else None
    return RowScores(
        loss=tuple(one.loss_sum for one in measured),
        num_targets=tuple(len(one.expected) if isinstance(one, Classified) else one.num_targets for one in measured),
        num_correct=tuple(_num_correct(one) for one in measured),
        num_bytes=tuple(num_bytes),
        exact_match=None if answered is None else tuple(one.generated == one.reference for one in answered),
        format_validity=None
        if answered is None or pattern is None
        else tuple(pattern.fullmatch(one.generated) is not None for one in answered),
    )


def _measured_apart(base: ResidentBase, examples: Sequence[Example], start: int) -> list[Measured]:
    """Measure ROWS_PER_PASS rows in one stream, each as the part of an adapter of its own, so that their sums stay apart."""
    part = examples[start : start + ROWS_PER_PASS]
    batches = [[make_sequence(example, start + number, base.pooling)] for number, example in enumerate(part)]
    return base.measure_stream(make_stream(batches, base.device, base.first_position))


def _num_correct(measured: Measured) -> int:
    if isinstance(measured, Classified):
        return sum(predicted == expected for predicted, expected in zip(measured.predicted, measured.expected, strict=True))
    return measured.num_correct


class Bench:
    """A base on which stored adapters are tried one after the other, in this process."""

    def __init__(
        self,
        path: Path,
        spec: BaseModelSpec,
        max_length: int,
        num_threads: int = 1,
        *,
        labels: Sequence[str] = (),
        device: str = "cpu",
        base: ResidentBase | None = None,
    ) -> None:
        """Load the base of a folder; rows are cut at `max_length` tokens. A job's numbers come back with its threads.

        With the `labels` of a classifier rows are classified; the plain base then has a head that tells nothing apart. A `base`
        that was loaded from the folder before, for the same kind of task, is used again.
        """
        torch.set_num_threads(num_threads)
        task_type: TaskType = "SEQ_CLS" if labels else "CAUSAL_LM"
        self.base = base or ResidentBase(load_model(path, spec, task_type=task_type, device=device))
        self.labels = tuple(labels)
        length = self.base.context_length
        self.renderer = Renderer(load_tokenizer(path), max_length, context_length=length, labels=self.labels)

    @contextmanager
    def wearing(self, adapter: Adapter | None) -> Iterator[None]:
        """Switch an adapter in (None: the plain base). Raises BadInput if it does not fit the model, tensor by tensor."""
        worn = self.worn(adapter)
        self.base.switch(worn.factors, worn.head)
        try:
            yield
        finally:
            self.base.switch({})

    def worn(self, adapter: Adapter | None) -> Worn:
        """Return what an adapter (None: the plain base) puts on the base. Raises BadInput as `wearing` does."""
        if adapter is not None and adapter.labels != self.labels:
            raise BadInput(
                f"the adapter tells apart {', '.join(adapter.labels)[:80] or 'no labels'}, and these rows are measured for "
                f"{', '.join(self.labels)[:80] or 'no labels'}; evaluate it in a command of its own."
            )
        return Worn({} if adapter is None else self._factors(adapter), self._head(adapter))

    def evaluate(self, adapter: Adapter | None, rows: Sequence[Row], evaluation: EvaluationSpec) -> dict[str, float]:
        """Measure the base with an adapter on rows."""
        with self.wearing(adapter):
            return evaluate_rows(self.base, self.renderer, rows, evaluation)

    def scores(
        self, adapter: Adapter | None, rows: Sequence[Row], evaluation: EvaluationSpec, *, answers: bool = False
    ) -> RowScores:
        """Measure the base with an adapter on each row; see `score_rows`."""
        with self.wearing(adapter):
            return score_rows(self.base, self.renderer, rows, evaluation, answers=answers)

    def moves_logits(self, adapter: Adapter) -> bool:
        """Tell whether the adapter fits the base and moves its logits, to finite values, on a fixed row of tokens."""
        worn = self.worn(adapter)
        return has_effect(self.base, worn.factors, self.probe, worn.head)

    @property
    def probe(self) -> Example:
        """The fixed row of tokens on which the effect of adapters is looked for."""
        vocabulary = max(2, int(self.base.model.config.get_text_config().vocab_size))
        ids = [number % vocabulary for number in range(1, PROBE_TOKENS + 1)]
        label = 0 if self.labels else None
        return Example(ids, [label is None and place > 0 for place in range(PROBE_TOKENS)], "a row of tokens", label=label)

    def answers(self, adapter: Adapter | None, rows: Sequence[Row], max_new_tokens: int) -> list[Answer]:
        """Generate an answer for the last turn of each row."""
        with self.wearing(adapter):
            return answer_rows(self.base, self.renderer, rows, max_new_tokens)

    def _head(self, adapter: Adapter | None) -> dict[str, torch.Tensor]:
        """Return an adapter's head; for the plain base of classifiers one of zeros, to which all labels are alike."""
        if adapter is not None:
            return adapter.head
        if not self.labels:
            return {}
        return {name: torch.zeros(shape) for name, shape in self.base.head_shape.tensor_shapes(len(self.labels)).items()}

    def _factors(self, adapter: Adapter) -> dict[str, Factors]:
        for module in adapter.modules:
            layer = self.base.layers.get(module)
            a, b = adapter.factors(module)
            if layer is None or a.shape[1] != layer.in_features or b.shape[0] != layer.out_features:
                raise BadInput(f"the adapter's layer {module} does not fit this base; use the base it was trained on.")
        device = self.base.device
        pairs = {module: adapter.factors(module) for module in adapter.modules}
        return {module: Factors(a.to(device), b.to(device), adapter.scale(module)) for module, (a, b) in pairs.items()}
