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
from workers.engine.bank import Bank
from workers.engine.batches import Stream, Tokens, make_stream
from workers.engine.dropout import DropoutRows, row_key, token_keys
from workers.engine.lora import shapes_of
from workers.engine.optimizer import Update, adamw_step, clip_of, gradient_norms
from workers.engine.plan import Plan, Structure
from workers.engine.resident import Losses, ResidentBase
from workers.engine.training import StepResult, Training
from workers.spec import PeftSpec, TrainingSpec

MAX_STRUCTURES = 64
"""Orders of adapters whose segments are remembered."""


class Pack:
    """The adapters that train on one base at the moment."""

    def __init__(self, base: ResidentBase, dtype: torch.dtype = torch.float32) -> None:
        """Factors, gradients and moments are kept in `dtype`."""
        self.base, self.dtype = base, dtype
        self._shapes = shapes_of(base.layers)
        self._banks: dict[int, Bank] = {}
        self._trainings: list[Training] = []
        self._structures: dict[tuple[int, ...], Structure] = {}

    @property
    def trainings(self) -> list[Training]:
        return list(self._trainings)

    def bytes_in_use(self) -> int:
        """Return the bytes of all banks."""
        return sum(bank.num_bytes for bank in self._banks.values())

    def join(
        self,
        peft: PeftSpec,
        training: TrainingSpec,
        train: Sequence[Example],
        validation: Sequence[Example],
        *,
        init: Mapping[str, Tensor] | None = None,
        validation_bytes: int = 0,
    ) -> Training:
        """Take an adapter in, with fresh weights or those of `init` (PEFT names); nobody else notices.

        Raises BadInput if targets or rank do not fit the base, torch.OutOfMemoryError if there is no room for its factors.
        """
        self._structures.clear()
        joined = Training(self.base, self._bank, peft, training, train, validation, init=init, validation_bytes=validation_bytes)
        self._trainings.append(joined)
        return joined

    def leave(self, training: Training) -> None:
        """Let an adapter go; its rows are cleaned. May be repeated."""
        if training not in self._trainings:
            return
        self._structures.clear()
        self._trainings.remove(training)
        for rank, row in training.rows.items():
            self._banks[rank].remove(row)

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
        except BaseException:
            for training in order:
                training.void_step()
            raise
        share = (time.perf_counter() - started) / max(1, stream.num_tokens)
        for training, loss_sum, num_tokens in zip(order, sums, stream.tokens, strict=True):
            training.add_micro_batch(loss_sum, num_tokens, share * num_tokens)
        return self._optimise([training for training in order if training.step_is_complete])

    def evaluate(self, trainings: Sequence[Training]) -> dict[Training, dict[str, float]]:
        """Measure each adapter on its validation rows, all in the same no-grad passes, and count the result in its standing."""
        portions = {training: training.evaluation_batches() for training in trainings}
        losses = {training: Losses(0.0, 0, 0) for training in trainings}
        for number in range(max(map(len, portions.values()), default=0)):
            order = sorted((one for one in trainings if number < len(portions[one])), key=_place_in_stream)
            stream = make_stream([portions[one][number] for one in order], self.base.device, self.base.first_position)
            with self.base.packed(self._plan(order, stream.tokens, None)):
                for training, measured in zip(order, self.base.measure_stream(stream), strict=True):
                    losses[training] += measured
        return {training: training.take_evaluation(losses[training]) for training in trainings}

    def _bank(self, rank: int) -> Bank:
        if rank not in self._banks:
            self._banks[rank] = Bank(rank, self._shapes, self.base.device, self.dtype)
        return self._banks[rank]

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
            banks = [bank for _, bank in sorted(self._banks.items())]
            self._structures[key] = Structure(names, self._shapes, banks, [training.member for training in order])
        return self._structures[key].plan(tokens, self.base.device, self.dtype, dropout)

    def _optimise(self, ready: Sequence[Training]) -> dict[Training, StepResult]:
        if not ready:
            return {}
        banks = list(self._banks.values())
        norms = gradient_norms(banks, [training.rows for training in ready])
        finite = [math.isfinite(norm) and math.isfinite(one.loss) for one, norm in zip(ready, norms, strict=True)]
        updates = [
            Update(one.rows, one.training, one.learning_rate, one.step + 1, clip_of(norm, one.training.max_grad_norm))
            for one, norm, is_finite in zip(ready, norms, finite, strict=True)
            if is_finite
        ]
        adamw_step(banks, updates)
        for bank in banks:
            bank.clean_gradients([one.rows[bank.rank] for one in ready if bank.rank in one.rows])
        return {
            one: one.finish_step(norm, skipped=not is_finite) for one, norm, is_finite in zip(ready, norms, finite, strict=True)
        }


def _place_in_stream(training: Training) -> tuple[tuple[int, int], ...]:
    """Adapters lie in the stream as their rows lie in the banks, so that segments are slices of both."""
    return tuple(sorted((rank, row.index) for rank, row in training.rows.items()))


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
