"""A pack: many adapters train on one resident base, in one forward and backward, each as if alone.

A pass takes the next micro-batch of each adapter it is given, lays them end to end, and adds to each adapter's gradient; those
whose step is then complete get their optimiser step, all in one vectorised update. Which adapters share a pass decides when
their micro-batches run and alters nothing else (see the package for why).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from workers.data.render import Example
from workers.engine.bank import Bank, HeadBank, LoraBank, Shape
from workers.engine.batches import Stream, Tokens, make_stream
from workers.engine.dropout import DropoutRows, row_key, token_keys
from workers.engine.lora import shapes_of
from workers.engine.optimizer import Update, adamw_step, clip_of, gradient_norms, in_order
from workers.engine.plan import Plan, Structure
from workers.engine.resident import Measured, ResidentBase
from workers.engine.training import StepResult, Training
from workers.spec import PeftSpec, TrainingSpec

MAX_STRUCTURES = 64
"""Orders of adapters whose segments are remembered."""


class Pack:
    """The adapters that train on one base at the moment."""

    def __init__(self, base: ResidentBase, dtype: torch.dtype = torch.float32) -> None:
        """Factors, gradients and moments are kept in `dtype`."""
        self.base, self.dtype = base, dtype
        self._banks = _Banks(base, shapes_of(base.layers), dtype)
        self._trainings: list[Training] = []
        self._structures: dict[tuple[int, ...], Structure] = {}

    @property
    def trainings(self) -> list[Training]:
        return list(self._trainings)

    def bytes_in_use(self) -> int:
        """Return the bytes of all banks."""
        return sum(bank.num_bytes for bank in self._banks.all())

    def join(
        self,
        peft: PeftSpec,
        training: TrainingSpec,
        train: Sequence[Example],
        validation: Sequence[Example],
        *,
        init: Mapping[str, Tensor] | None = None,
        validation_bytes: int = 0,
        num_labels: int = 0,
    ) -> Training:
        """Take an adapter in, with fresh weights or those of `init` (PEFT names); nobody else notices.

        `num_labels` is that of a classifier, 0 of a language model.

        Raises BadInput if targets or rank do not fit the base, torch.OutOfMemoryError if there is no room for its factors.
        """
        self._structures.clear()
        joined = Training(
            self.base,
            self._banks,
            peft,
            training,
            train,
            validation,
            init=init,
            validation_bytes=validation_bytes,
            num_labels=num_labels,
        )
        self._trainings.append(joined)
        return joined

    def leave(self, training: Training) -> None:
        """Let an adapter go; its rows are cleaned. May be repeated."""
        if training not in self._trainings:
            return
        self._structures.clear()
        self._trainings.remove(training)
        for bank, row in training.rows.items():
            bank.remove(row)

    def advance(self, trainings: Sequence[Training]) -> dict[Training, StepResult]:
        """Do the next micro-batch of each, and the optimiser step of those whose last one it was; only these are returned.

        If it raises (out of memory), the step under way of each is void and begins anew when it is called again.
        """
        started = time.perf_counter()
        order = sorted(trainings, key=_place_in_stream)
        batches = [training.next_batch() for training in order]
        stream = make_stream(batches, self.base.device, self.base.first_position)
        try:
            sums = self._loss_and_gradient(order, stream, batches)
            share = (time.perf_counter() - started) / max(1, stream.num_tokens)
            for training, loss_sum, num_tokens in zip(order, sums, stream.tokens, strict=True):
                training.add_micro_batch(loss_sum, num_tokens, share * num_tokens)
            return self._optimise([training for training in order if training.step_is_complete])
        except BaseException:
            for training in order:
                training.void_step()
            raise

    def evaluate(self, trainings: Sequence[Training]) -> dict[Training, dict[str, float]]:
        """Measure each adapter on its validation rows, all in the same no-grad passes, and count the result in its standing."""
        portions = {training: training.evaluation_batches() for training in trainings}
        measured: dict[Training, Measured] = {}
        for number in range(max(map(len, portions.values()), default=0)):
            order = sorted((one for one in trainings if number < len(portions[one])), key=_place_in_stream)
            stream = make_stream([portions[one][number] for one in order], self.base.device, self.base.first_position)
            with self.base.packed(self._plan(order, stream.tokens, None)):
                for training, part in zip(order, self.base.measure_stream(stream), strict=True):
                    measured[training] = measured[training] + part if training in measured else part  # type: ignore[operator]
        return {training: training.take_evaluation(measured[training]) for training in trainings}

    def _loss_and_gradient(self, order: Sequence[Training], stream: Stream, batches: Sequence[Sequence[Tokens]]) -> list[float]:
        """Add the gradient of the pass to the banks; return the sum of each adapter's losses."""
        plan = self._plan(order, stream.tokens, _dropout_rows(order, batches, stream))
        recomputes = any(training.training.gradient_checkpointing for training in order)
        denominators = [training.denominator for training in order]
        with self.base.packed(plan), self.base.recomputing(recomputes):
            return self.base.backward_stream(stream, denominators)

    def _plan(self, order: Sequence[Training], tokens: Sequence[int], dropout: DropoutRows | None) -> Plan:
        key = tuple(map(id, order))
        if key not in self._structures:
            if len(self._structures) >= MAX_STRUCTURES:
                self._structures.clear()
            names = [group.names for group in self.base.groups]
            members = [training.member for training in order]
            self._structures[key] = Structure(names, self._banks.shapes, self._banks.all(), members)
        return self._structures[key].plan(tokens, self.base.device, self.dtype, dropout)

    def _optimise(self, ready: Sequence[Training]) -> dict[Training, StepResult]:
        if not ready:
            return {}
        banks = self._banks.all()
        norms = gradient_norms(banks, [training.rows for training in ready])
        finite = [math.isfinite(norm) and math.isfinite(one.loss) for one, norm in zip(ready, norms, strict=True)]
        updates = [
            Update(one.rows, one.training, one.learning_rate, one.step + 1, clip_of(norm, one.training.max_grad_norm))
            for one, norm, is_finite in zip(ready, norms, finite, strict=True)
            if is_finite
        ]
        adamw_step(banks, updates)
        for bank in banks:
            bank.clean_gradients([one.rows[bank] for one in ready if bank in one.rows])
        return {
            one: one.finish_step(norm, skipped=not is_finite) for one, norm, is_finite in zip(ready, norms, finite, strict=True)
        }


class _Banks:
    """The banks of a pack, made when they are first asked for."""

    def __init__(self, base: ResidentBase, shapes: Mapping[str, Shape], dtype: torch.dtype) -> None:
        self.shapes = shapes
        self._base, self._dtype = base, dtype
        self._lora: dict[int, LoraBank] = {}
        self._heads: dict[int, HeadBank] = {}

    def lora(self, rank: int) -> LoraBank:
        """Return the bank of a rank bucket."""
        if rank not in self._lora:
            self._lora[rank] = LoraBank(rank, self.shapes, self._base.device, self._dtype)
        return self._lora[rank]

    def head(self, num_labels: int) -> HeadBank:
        """Return the bank of heads with so many labels."""
        if num_labels not in self._heads:
            tensors = self._base.head_shape.tensor_shapes(num_labels)
            self._heads[num_labels] = HeadBank(num_labels, tensors, self._base.device, self._dtype)
        return self._heads[num_labels]

    def all(self) -> list[Bank]:
        """Return all banks in their order."""
        return in_order([*self._lora.values(), *self._heads.values()])


def _place_in_stream(training: Training) -> tuple[tuple[tuple[int, int], int], ...]:
    """Adapters lie in the stream as their rows lie in the banks, so that segments are slices of both."""
    return tuple((bank.order, row.index) for bank, row in sorted(training.rows.items(), key=lambda item: item[0].order))


def _dropout_rows(order: Sequence[Training], batches: Sequence[Sequence[Tokens]], stream: Stream) -> DropoutRows | None:
    """Name the tokens of a pass, if any of its adapters drops inputs."""
    if not any(training.peft.lora_dropout for training in order):
        return None
    keys = [
        row_key(training.training.seed, training.step, sequence.row) if training.peft.lora_dropout else 0
        for training, batch in zip(order, batches, strict=True)
        for sequence in batch
    ]
    lengths = torch.tensor([*stream.lengths, len(stream.input_ids_T) - stream.num_tokens])
    rows = torch.tensor([*keys, 0], dtype=torch.int32).repeat_interleave(lengths).to(stream.position_ids_T.device)
    return DropoutRows(token_keys(rows, stream.position_ids_T.to(torch.int32)))
