"""Which rows a step trains on, and the stream that a pass computes on.

The rows of a step are a function of seed, number of rows and batch size alone: an epoch is a seeded permutation of the rows, its
last step may be smaller; a step's rows are cut into micro-batches in order. A stream lays the micro-batches of several adapters
end to end without padding between them; at its end it is filled up to a multiple of TILE tokens that belong to nobody, because
the matrix kernels of CPUs treat a row alike whoever stands beside it only from so many rows on (measured, see the package).
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from workers.data.render import Example
from workers.spec import TrainingSpec

Pooling = Literal["first", "last"]
TILE = 32
"""Rows; also makes the number of values of every activation a multiple of what a vectorised loop takes in one round."""


@dataclass(frozen=True)
class Tokens:
    """One row as tensors. Axes: L tokens, K supervised predictions."""

    input_ids_L: Tensor
    predicting_K: Tensor
    """Positions whose next token is supervised; of a row that is classified, the one position that its head reads."""
    targets_K: Tensor
    """Those next tokens; the number of the label."""
    row: int
    """Number of the row among the job's rows: names it to dropout."""

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids_L.numel())

    @property
    def num_targets(self) -> int:
        """Terms of the loss: supervised tokens, or one for a label."""
        return int(self.targets_K.numel())


@dataclass(frozen=True)
class Stream:
    """Micro-batches of N adapters end to end. Axes: T tokens and K predictions, both filled up to a multiple of TILE."""

    input_ids_T: Tensor
    position_ids_T: Tensor
    lengths: tuple[int, ...]
    """Of the sequences; what lies beyond their sum belongs to nobody."""
    tokens: tuple[int, ...]
    """Of each adapter."""
    targets: tuple[int, ...]
    """Terms of the loss of each adapter."""
    predicting_K: Tensor
    targets_K: Tensor
    owners_K: Tensor
    """Place of the adapter of each prediction; those beyond `num_targets` belong to nobody and have the place N."""

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def num_targets(self) -> int:
        return sum(self.targets)


def rows_of_step(training: TrainingSpec, num_rows: int, step: int, rows_per_pass: int | None = None) -> list[list[int]]:
    """Return the row numbers of optimiser step `step` (from 0), one list per micro-batch of `rows_per_pass` rows at most."""
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    epoch, index = divmod(step, math.ceil(num_rows / per_step))
    rows = _permutation(training.seed, epoch, num_rows)[index * per_step : (index + 1) * per_step]
    size = rows_per_pass or training.per_device_train_batch_size
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


@lru_cache(maxsize=256)
def _permutation(seed: int, epoch: int, num_rows: int) -> tuple[int, ...]:
    rows = list(range(num_rows))
    random.Random(f"rows/{seed}/{epoch}").shuffle(rows)
    return tuple(rows)


def make_sequence(example: Example, row: int, pooling: Pooling = "last") -> Tokens:
    """Turn a row into tensors. The first token of a sequence is never predicted, whatever its mask says.

    `pooling` is the position that classifies the row, if it has a label.
    """
    ids_L = torch.tensor(example.input_ids, dtype=torch.long)
    if example.label is not None:
        place = 0 if pooling == "first" else len(example.input_ids) - 1
        return Tokens(ids_L, torch.tensor([place]), torch.tensor([example.label]), row)
    places = [place - 1 for place, target in enumerate(example.supervised) if target and place > 0]
    predicting_K = torch.tensor(places, dtype=torch.long)
    return Tokens(ids_L, predicting_K, ids_L[predicting_K + 1], row)


def make_stream(batches: Sequence[Sequence[Tokens]], device: torch.device | str = "cpu", first_position: int = 0) -> Stream:
    """Lay the micro-batches of several adapters end to end. Positions of a sequence count from `first_position`."""
    sequences = [sequence for batch in batches for sequence in batch]
    lengths = [sequence.num_tokens for sequence in sequences]
    fill = -sum(lengths) % TILE
    lengths_M = torch.tensor([*lengths, fill])
    starts_M = lengths_M.cumsum(0) - lengths_M
    num_K = torch.tensor([sequence.predicting_K.numel() for sequence in sequences])
    targets = [sum(sequence.predicting_K.numel() for sequence in batch) for batch in batches]
    fill_K = -sum(targets) % TILE
    nobody = torch.zeros(fill_K, dtype=torch.long)
    predicting_K = torch.cat([sequence.predicting_K for sequence in sequences]) + starts_M[:-1].repeat_interleave(num_K)
    return Stream(
        torch.cat([*(sequence.input_ids_L for sequence in sequences), torch.zeros(fill, dtype=torch.long)]).to(device),
        (torch.arange(sum(lengths) + fill) - starts_M.repeat_interleave(lengths_M) + first_position).to(device),
        tuple(lengths),
        tuple(sum(sequence.num_tokens for sequence in batch) for batch in batches),
        tuple(targets),
        torch.cat([predicting_K, nobody]).to(device),
        torch.cat([*(sequence.targets_K for sequence in sequences), nobody]).to(device),
        torch.arange(len(batches) + 1).repeat_interleave(torch.tensor([*targets, fill_K])).to(device),
    )
