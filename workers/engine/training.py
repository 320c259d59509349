"""One adapter's training in a pack: which rows come next, what the evaluations said, and the state from which it goes on.

    step s:  g = sum over micro-batches of d(loss sum)/dw / (supervised tokens of the whole step)
             clip, AdamW, next

Nothing random is carried along: row order, dropout and initial weights are functions of (seed, step), so that weights,
moments and a few numbers are the whole state. The state knows no pack, no row and no rank bucket: it may be restored elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from infra.errors import BadInput
from workers.data.render import Example
from workers.engine.bank import FIRST_MOMENT, SECOND_MOMENT, WEIGHTS, Bank, HeadBank, LoraBank, Row, rank_bucket
from workers.engine.batches import Tokens, make_sequence, rows_of_step
from workers.engine.dropout import generator_of
from workers.engine.head_shapes import fresh_head
from workers.engine.lora import Factors, initial_a, scale_of
from workers.engine.plan import Member
from workers.engine.resident import Measured, ResidentBase
from workers.engine.schedule import learning_rate_at, num_steps
from workers.spec import PeftSpec, TrainingSpec
from workers.targets import alphas_of, check_ranks, ranks_of, select_targets

MAX_SKIPPED_STEPS = 5
"""Steps in a row that may be skipped for a non-finite loss or gradient before the job is given up."""
EVALUATION_TOKENS = 2048
"""Validation rows of one job are measured so many tokens at a time: a constant, so that bits do not depend on the pack."""
KINDS = {"weights": WEIGHTS, "first_moment": FIRST_MOMENT, "second_moment": SECOND_MOMENT}


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Nats per supervised token of the step's rows, before the update."""
    gradient_norm: float
    """Before the clip."""
    learning_rate: float
    num_tokens: int
    seconds: float
    """The adapter's share, by tokens, of the time its passes took."""
    skipped: bool
    """True if loss or gradient was not finite and the weights were left alone."""


@dataclass(frozen=True)
class Standing:
    """Where a training is, beside its vectors. Written into checkpoints."""

    step: int = 0
    best_step: int = 0
    best_metrics: Mapping[str, float] | None = None
    last_metrics: Mapping[str, float] | None = None
    """Of the evaluation at `last_evaluated`."""
    last_evaluated: int = 0
    evaluations_without_gain: int = 0
    skipped_in_a_row: int = 0
    num_tokens: int = 0
    stopped_early: bool = False
    split_rows: int = 0
    """Rows of a micro-batch after memory ran out; 0 while it is what was asked for. Other than 0 changes the last bits."""


@dataclass
class _Step:
    """The step that is under way: its micro-batches, how many are done, and what they gave."""

    batches: list[list[int]]
    denominator: int
    done: int = 0
    loss_sum: float = 0.0
    num_tokens: int = 0
    seconds: float = 0.0


class Banks(Protocol):
    """Where a training finds its rows."""

    def lora(self, rank: int) -> LoraBank:
        """Return the bank of a rank bucket."""
        ...

    def head(self, num_labels: int) -> HeadBank:
        """Return the bank of heads with so many labels."""
        ...


class Training:
    """Trains one adapter in a pack, which does the arithmetic. Made by `Pack.join`."""

    def __init__(
        self,
        base: ResidentBase,
        banks: Banks,
        peft: PeftSpec,
        training: TrainingSpec,
        train: Sequence[Example],
        validation: Sequence[Example],
        *,
        init: Mapping[str, Tensor] | None = None,
        validation_bytes: int = 0,
        num_labels: int = 0,
    ) -> None:
        """Prepare fresh weights, or those of `init` (PEFT names). Raises BadInput if targets or rank do not fit the base."""
        self.base, self.peft, self.training = base, peft, training
        self.train, self.validation, self.validation_bytes = train, validation, validation_bytes
        self.ranks, scales = shape_of_adapter(base, peft)
        self._names = _names_of(base, self.ranks, num_labels)
        if init is not None:
            _check_names(init, self._names, self.ranks)
        tensors = _initial(base, self.ranks, num_labels, training.seed) if init is None else init
        self.num_steps = num_steps(training, len(train))
        self.standing = Standing()
        self._sequences: dict[int, Tokens] = {}
        self._current: _Step | None = None
        self._rows = _take_rows(banks, self.ranks, num_labels)
        self.member = Member(self._rows, scales, peft.lora_dropout)
        try:
            self._write(WEIGHTS, tensors)
            self._best = self._read(WEIGHTS)
        except BaseException:
            _give_rows_back(self._rows)
            raise

    @property
    def rows(self) -> Mapping[Bank, Row]:
        """Its row in each bank."""
        return self._rows

    @property
    def step(self) -> int:
        return self.standing.step

    @property
    def is_done(self) -> bool:
        return self.step >= self.num_steps or self.standing.stopped_early

    @property
    def has_diverged(self) -> bool:
        return self.standing.skipped_in_a_row >= MAX_SKIPPED_STEPS

    @property
    def evaluation_is_due(self) -> bool:
        """True once at each multiple of eval_steps and at the end, if there are validation rows."""
        every = self.training.eval_steps
        at_a_mark = self.is_done or (every is not None and self.step % every == 0)
        return bool(self.validation) and at_a_mark and self.standing.last_evaluated != self.step

    @property
    def checkpoint_is_due(self) -> bool:
        every = self.training.checkpoint_steps or self.training.eval_steps
        return every is not None and self.step % every == 0 and not self.is_done

    @property
    def rows_per_pass(self) -> int:
        """Rows of a micro-batch."""
        return self.standing.split_rows or self.training.per_device_train_batch_size

    @property
    def is_mid_step(self) -> bool:
        """True while some micro-batches of a step are done and others are not."""
        return self._current is not None and self._current.done > 0

    @property
    def next_tokens(self) -> int:
        """Tokens of the next micro-batch."""
        return sum(self._sequence(row).num_tokens for row in self._next_rows())

    def split_rows(self, rows: int) -> None:
        """Use micro-batches of so many rows from now on, because larger ones do not fit into memory.

        The step under way begins anew. Sums are then formed in other pieces: the result is no longer that of the job alone, bit
        for bit, and `standing.split_rows` says so.
        """
        self.void_step()
        self.standing = replace(self.standing, split_rows=rows)

    # What the pack asks for.

    def next_batch(self) -> list[Tokens]:
        """Return the rows of the next micro-batch."""
        return [self._sequence(row) for row in self._next_rows()]

    @property
    def denominator(self) -> int:
        """Terms of the loss of the whole step under way."""
        return self._step_under_way().denominator

    def add_micro_batch(self, loss_sum: float, num_tokens: int, seconds: float) -> None:
        """Count a micro-batch whose gradient has been added."""
        current = self._step_under_way()
        current.done += 1
        current.loss_sum += loss_sum
        current.num_tokens += num_tokens
        current.seconds += seconds

    @property
    def step_is_complete(self) -> bool:
        """True when the gradient of the whole step is in the banks."""
        return self._current is not None and self._current.done == len(self._current.batches)

    def void_step(self) -> None:
        """Forget the gradient of the step under way: it begins anew with its first micro-batch."""
        self._current = None
        self.clean_gradients()

    def clean_gradients(self) -> None:
        for bank, row in self._rows.items():
            bank.clean_gradients([row])

    @property
    def learning_rate(self) -> float:
        """Of the step under way."""
        return learning_rate_at(self.training, self.step, self.num_steps)

    @property
    def loss(self) -> float:
        """Nats per supervised token of the step under way, once it is complete."""
        current = self._step_under_way()
        return current.loss_sum / current.denominator

    def finish_step(self, gradient_norm: float, skipped: bool) -> StepResult:
        """Count the step under way as done."""
        current, learning_rate, loss = self._step_under_way(), self.learning_rate, self.loss
        self._current = None
        self.standing = replace(
            self.standing,
            step=self.step + 1,
            skipped_in_a_row=self.standing.skipped_in_a_row + 1 if skipped else 0,
            num_tokens=self.standing.num_tokens + current.num_tokens,
        )
        return StepResult(self.step, loss, gradient_norm, learning_rate, current.num_tokens, current.seconds, skipped)

    def evaluation_batches(self) -> list[list[Tokens]]:
        """Return the validation rows in the portions they are measured in, a function of the job alone."""
        portions: list[list[Tokens]] = []
        room = 0
        for number, example in enumerate(self.validation):
            sequence = make_sequence(example, number, self.base.pooling)
            if not portions or sequence.num_tokens > room:
                portions.append([])
                room = EVALUATION_TOKENS
            portions[-1].append(sequence)
            room -= sequence.num_tokens
        return portions

    def take_evaluation(self, measured: Measured) -> dict[str, float]:
        """Take in what the present weights measured: keep them if they are the best, and count towards early stop.

        Counts once per step: an evaluation that is done again (memory ran out for another) changes nothing.
        """
        if self.standing.last_metrics is not None and self.standing.last_evaluated == self.step:
            return dict(self.standing.last_metrics)
        metrics = measured.metrics(self.validation_bytes)
        best = self.standing.best_metrics
        improved = best is None or metrics["eval/loss"] < best["eval/loss"] or math.isnan(best["eval/loss"])
        if improved:
            self._best = self._read(WEIGHTS)
        without_gain = 0 if improved else self.standing.evaluations_without_gain + 1
        patience = self.training.early_stopping_patience
        self.standing = replace(
            self.standing,
            best_step=self.step if improved else self.standing.best_step,
            best_metrics=metrics if improved else best,
            last_metrics=metrics,
            last_evaluated=self.step,
            evaluations_without_gain=without_gain,
            stopped_early=self.standing.stopped_early or (patience is not None and without_gain >= patience),
        )
        return metrics

    # What it leaves behind.

    @property
    def keeps_best(self) -> bool:
        return self.training.keep == "best" and self.standing.best_metrics is not None

    def kept_tensors(self) -> dict[str, Tensor]:
        """Return the adapter's tensors in PEFT's names: the best by validation loss or the last, as `training.keep` asks."""
        return dict(self._named(self._best if self.keeps_best else self._read(WEIGHTS)))

    def kept_factors(self) -> dict[str, Factors]:
        """Return the layers' part of `kept_tensors` as factors to switch in."""
        tensors, device = self.kept_tensors(), self.base.device
        return {
            name: Factors(
                tensors[f"{PREFIX}{name}.lora_A.weight"].to(device),
                tensors[f"{PREFIX}{name}.lora_B.weight"].to(device),
                self.member.scales[name],
            )
            for name in self.ranks
        }

    def kept_head(self) -> dict[str, Tensor]:
        """Return the head's part of `kept_tensors`, named relative to its module; empty unless it classifies."""
        tensors = self.kept_tensors()
        return {name: tensors[peft_name].to(self.base.device) for peft_name, name in self._names.head.items()}

    def kept_metrics(self) -> dict[str, float]:
        """Return the validation metrics of the weights that `kept_tensors` gives."""
        metrics = self.standing.best_metrics if self.keeps_best else self.standing.last_metrics
        return dict(metrics or {})

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the vectors and the standing from which `restore` goes on bit for bit, also in another pack."""
        vectors = {name: self._read(kind) for name, kind in KINDS.items()}
        return {**vectors, "best_weights": self._best}, dict(vars(self.standing))

    def restore(self, vectors: Mapping[str, Tensor], standing: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._current = None
        self.clean_gradients()
        for name, kind in KINDS.items():
            self._write(kind, dict(self._named(vectors[name])))
        self._best = vectors["best_weights"].clone()
        self.standing = Standing(**standing)

    def _step_under_way(self) -> _Step:
        if self._current is None:
            batches = rows_of_step(self.training, len(self.train), self.step, self.rows_per_pass)
            denominator = sum(self._sequence(row).num_targets for rows in batches for row in rows)
            self._current = _Step(batches, max(1, denominator))
        return self._current

    def _next_rows(self) -> list[int]:
        current = self._step_under_way()
        return current.batches[current.done]

    def _sequence(self, row: int) -> Tokens:
        if row not in self._sequences:
            self._sequences[row] = make_sequence(self.train[row], row, self.base.pooling)
        return self._sequences[row]

    def _read(self, kind: int) -> Tensor:
        """Return a vector of all values: per layer, in the model's order, A row by row and B row by row, then the head."""
        return torch.cat([view.reshape(-1) for view in self._views(kind)]).cpu()

    def _write(self, kind: int, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, view in zip(self._names.shapes, self._views(kind), strict=True):
                view.copy_(tensors[name])

    def _views(self, kind: int) -> Iterator[Tensor]:
        """Yield the views of its tensors in the banks, in the order of their names."""
        for name in self.ranks:
            bank, row = next((bank, row) for bank, row in self._rows.items() if name in row.ranks)
            assert isinstance(bank, LoraBank)
            yield from bank.read(row, kind, name)
        for bank, row in self._rows.items():
            if isinstance(bank, HeadBank):
                yield from (bank.read(row, kind, name) for name in self._names.head.values())

    def _named(self, vector: Tensor) -> list[tuple[str, Tensor]]:
        """Cut a vector as `_read` gives it into copies of tensors under PEFT's names."""
        parts = vector.split([math.prod(shape) for shape in self._names.shapes.values()])
        return [(name, part.view(shape).clone()) for (name, shape), part in zip(self._names.shapes.items(), parts, strict=True)]


PREFIX = "base_model.model."


def shape_of_adapter(base: ResidentBase, peft: PeftSpec) -> tuple[dict[str, int], dict[str, float]]:
    """Return rank and scale of each layer an adapter touches, in the model's order. Raises BadInput if it does not fit."""
    targets = select_targets(peft.target_modules, list(base.layers))
    ranks = ranks_of(peft, targets)
    check_ranks(ranks, {name: (layer.out_features, layer.in_features) for name, layer in base.layers.items()})
    alphas = alphas_of(peft, targets)
    return ranks, {name: scale_of(alphas[name], r, peft.use_rslora) for name, r in ranks.items()}


@dataclass(frozen=True)
class _Names:
    """An adapter's tensors under PEFT's names, in the order of its vector."""

    shapes: Mapping[str, tuple[int, ...]]
    head: Mapping[str, str]
    """The head's: PEFT's name -> name relative to the head's module."""


def _names_of(base: ResidentBase, ranks: Mapping[str, int], num_labels: int) -> _Names:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, r in ranks.items():
        layer = base.layers[name]
        shapes[f"{PREFIX}{name}.lora_A.weight"] = (r, layer.in_features)
        shapes[f"{PREFIX}{name}.lora_B.weight"] = (layer.out_features, r)
    if not num_labels:
        return _Names(shapes, {})
    form = base.head_shape
    own = form.tensor_shapes(num_labels)
    return _Names(
        shapes | {form.peft_name(name): shape for name, shape in own.items()}, {form.peft_name(name): name for name in own}
    )


def _take_rows(banks: Banks, ranks: Mapping[str, int], num_labels: int) -> dict[Bank, Row]:
    """Take a row in the bank of each rank bucket, and in that of its heads if it classifies; all or none."""
    by_bucket: dict[int, dict[str, int]] = {}
    for name, r in ranks.items():
        by_bucket.setdefault(rank_bucket(r), {})[name] = r
    rows: dict[Bank, Row] = {}
    try:
        for rank in sorted(by_bucket):
            lora = banks.lora(rank)
            rows[lora] = lora.add(by_bucket[rank])
        if num_labels:
            head = banks.head(num_labels)
            rows[head] = head.add()
    except BaseException:
        _give_rows_back(rows)
        raise
    return rows


def _give_rows_back(rows: Mapping[Bank, Row]) -> None:
    for bank, row in rows.items():
        bank.remove(row)


def _initial(base: ResidentBase, ranks: Mapping[str, int], num_labels: int, seed: int) -> dict[str, Tensor]:
    """Fresh weights: A random by (seed, layer name), B zero, so that the adapter starts as the plain base; the head as drawn."""
    tensors: dict[str, Tensor] = {}
    for name, r in ranks.items():
        layer = base.layers[name]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = initial_a(r, layer.in_features, generator_of("init", seed, name))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.zeros(layer.out_features, r)
    if num_labels:
        form = base.head_shape
        tensors |= {form.peft_name(name): tensor for name, tensor in fresh_head(form, num_labels, seed).items()}
    return tensors


def _check_names(tensors: Mapping[str, Tensor], names: _Names, ranks: Mapping[str, int]) -> None:
    """Raise BadInput unless layers, ranks and head of given weights are those asked for."""
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != dict(names.shapes):
        layers = sum(name.endswith(".lora_A.weight") for name in tensors)
        raise BadInput(
            f"the initial adapter ({layers} layers) differs in its layers, their rank or its head from what is asked for "
            f"({len(ranks)} layers of rank {', '.join(map(str, sorted(set(ranks.values()))))}); "
            "give peft.target_modules and peft.r what that adapter has."
        )
