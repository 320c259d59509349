"""Rows of many adapters measured in one pass without gradients, each row with the bits it has where its adapter is alone.

A *portion* is some rows and the adapter they are measured with. Alone it would be a stream of its own, filled up to TILE; here
portions lie end to end, each filled up to TILE by tokens of nobody. The products with an adapter's factors are computed portion
by portion, in the shape they have alone, and products with frozen weights keep a row's bits beside any others (see the package).
So it does not matter which portions share a pass, nor whether a portion has a pass to itself.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from workers.data.render import Example
from workers.engine.batches import TILE, Stream, Tokens, make_sequence, make_stream
from workers.engine.lora import Factors
from workers.engine.resident import Guest, Measured, ResidentBase


@dataclass(frozen=True)
class Worn:
    """What an adapter puts on a base: nothing at all is the plain base."""

    factors: Mapping[str, Factors] = field(default_factory=dict)
    """By layer."""
    head: Mapping[str, Tensor] = field(default_factory=dict)
    """Of a classifier; names are relative to the head's module."""


@dataclass(frozen=True)
class Portion:
    """Rows that are measured with one adapter."""

    sequences: Sequence[Tokens]
    worn: Worn

    @property
    def num_tokens(self) -> int:
        """Of its part of a stream, what it is filled up by included."""
        return -(-sum(sequence.num_tokens for sequence in self.sequences) // TILE) * TILE


def measure_portions(base: ResidentBase, portions: Sequence[Portion]) -> list[list[Measured]]:
    """Measure each row of each portion, all in one pass."""
    with base.shared(_guests(portions)):
        measured = iter(base.measure_stream(_stream(base, portions)))
    found = []
    for portion in portions:
        found.append(list(itertools.islice(measured, len(portion.sequences))))
        if _fill_of(portion):
            next(measured)
    return found


def have_effect(base: ResidentBase, worn: Sequence[Worn], example: Example) -> list[bool]:
    """Tell of each adapter whether it moves the base's logits on `example`, to finite values; see `resident.has_effect`.

    The plain base is computed in the same places of an equal pass, so that nothing but the adapter can make a difference.
    """
    sequence = make_sequence(example, 0, base.pooling)
    portions = [Portion([sequence], one) for one in worn]
    plain = [replace(portion, worn=Worn(head=portion.worn.head)) for portion in portions]
    pairs = zip(_logits(base, portions), _logits(base, plain), strict=True)
    return [bool(torch.isfinite(moved).all()) and not torch.equal(moved, still) for moved, still in pairs]


def _logits(base: ResidentBase, portions: Sequence[Portion]) -> Sequence[Tensor]:
    counts = [_num_predictions(portion) for portion in portions]
    with base.shared(_guests(portions)):
        return base.logits(_stream(base, portions)).split(counts)


def _guests(portions: Sequence[Portion]) -> list[Guest]:
    ends = list(itertools.accumulate(portion.num_tokens for portion in portions))
    return [
        Guest(slice(end - portion.num_tokens, end), _num_predictions(portion), portion.worn.factors, portion.worn.head)
        for portion, end in zip(portions, ends, strict=True)
    ]


def _stream(base: ResidentBase, portions: Sequence[Portion]) -> Stream:
    """Lay portions end to end. Each row, and what a portion is filled up by, counts as an adapter of its own: sums stay apart."""
    batches: list[list[Tokens]] = []
    for portion in portions:
        batches += [[sequence] for sequence in portion.sequences]
        if fill := _fill_of(portion):
            nothing = torch.zeros(0, dtype=torch.long)
            batches.append([Tokens(torch.zeros(fill, dtype=torch.long), nothing, nothing, -1)])
    return make_stream(batches, base.device, base.first_position)


def _fill_of(portion: Portion) -> int:
    return portion.num_tokens - sum(sequence.num_tokens for sequence in portion.sequences)


def _num_predictions(portion: Portion) -> int:
    return sum(sequence.num_targets for sequence in portion.sequences)
