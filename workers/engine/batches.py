"""Which rows a step trains on: a function of seed, number of rows and batch size alone.

An epoch is a seeded permutation of the rows; its last step may be smaller. A step's rows are cut into micro-batches in order.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.data.render import Example
from workers.spec import TrainingSpec


@dataclass(frozen=True)
class Stream:
    """Sequences laid end to end. Axes: T tokens of the stream, K supervised predictions."""

    input_ids_T: Tensor
    position_ids_T: Tensor
    lengths: tuple[int, ...]
    predicting_K: Tensor
    """Positions whose next token is supervised."""
    targets_K: Tensor
    """Those next tokens."""

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids_T.numel())

    @property
    def num_targets(self) -> int:
        return int(self.targets_K.numel())


def rows_of_step(training: TrainingSpec, num_rows: int, step: int) -> list[list[int]]:
    """Return the row numbers of optimiser step `step` (from 0), one list per micro-batch."""
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    epoch, index = divmod(step, math.ceil(num_rows / per_step))
    rows = _permutation(training.seed, epoch, num_rows)[index * per_step : (index + 1) * per_step]
    size = training.per_device_train_batch_size
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _permutation(seed: int, epoch: int, num_rows: int) -> list[int]:
    rows = list(range(num_rows))
    random.Random(f"rows/{seed}/{epoch}").shuffle(rows)
    return rows


def make_stream(examples: Sequence[Example], device: torch.device | str = "cpu") -> Stream:
    """Lay examples end to end. The first token of a sequence is never predicted, whatever its mask says."""
    ids: list[int] = []
    positions: list[int] = []
    predicting: list[int] = []
    for example in examples:
        start = len(ids)
        ids += example.input_ids
        positions += range(len(example.input_ids))
        predicting += [start + place - 1 for place, target in enumerate(example.supervised) if target and place > 0]
    ids_T = torch.tensor(ids, dtype=torch.long)
    predicting_K = torch.tensor(predicting, dtype=torch.long)
    return Stream(
        ids_T.to(device),
        torch.tensor(positions, dtype=torch.long).to(device),
        tuple(len(example.input_ids) for example in examples),
        predicting_K.to(device),
        ids_T[predicting_K + 1].to(device),
    )
