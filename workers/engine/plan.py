"""Which rows of a pass meet which factors: for every group of linears, segments of adapters that one product serves.

A segment is what shares a bank, a run of linears that stand side by side (all of query, key, value, or one of them) and the
question whether inputs are dropped. Which segments there are follows from who is in the pass (`Structure`, kept between passes);
where their tokens lie changes from pass to pass (`Plan`). The rows of a segment are a slice of its bank and its tokens, where
they lie together, a slice of the stream: nothing is gathered or copied then. Rows of the slice that have no tokens in this
pass are empty groups. Axes: T tokens of the pass, T' those of the segment, G rows of the slice, n linears of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engine.bank import Bank, Row, Shape, are_adjacent
from workers.engine.dropout import DropoutRows


@dataclass(frozen=True)
class Member:
    """One adapter as plans see it: its row in each bank, the scale of its layers, and the share of inputs it drops."""

    rows: Mapping[int, Row]
    """By rank bucket."""
    scales: Mapping[str, float]
    dropout: float


@dataclass(frozen=True)
class _Part:
    """A segment before it is known where its tokens lie."""

    bank: Bank
    names: tuple[str, ...]
    places: tuple[int, ...]
    members: tuple[int, ...]
    """Places of its adapters in the pass, in the order of their rows."""
    drops: bool


@dataclass(frozen=True)
class Segment:
    """A run of linears, the adapters it serves, and where they are. See the module."""

    bank: Bank
    names: tuple[str, ...]
    places: tuple[int, ...]
    rows: slice
    tokens: slice | Tensor
    ends: Tensor
    scales: Tensor
    """[T', n]"""
    drops: bool
    members: tuple[int, ...]

    def take(self, x_TI: Tensor) -> Tensor:
        """Return the segment's rows of a [T, I] tensor; a view where they lie together."""
        return x_TI[self.tokens] if isinstance(self.tokens, slice) else x_TI.index_select(0, self.tokens)

    def add_to(self, y_TO: Tensor, update: Tensor) -> None:
        """Add the segment's rows to a [T, O] tensor."""
        if isinstance(self.tokens, slice):
            y_TO[self.tokens].add_(update)
        else:
            y_TO.index_add_(0, self.tokens, update)


class Structure:
    """The segments of each group for adapters in a given order; where their tokens lie is asked for pass by pass."""

    def __init__(
        self, groups: Sequence[Sequence[str]], shapes: Mapping[str, Shape], banks: Mapping[int, Bank], members: Sequence[Member]
    ) -> None:
        self._members = members
        self.parts = [
            [part for bank in banks.values() for drops in (False, True) for part in _parts(group, shapes, bank, members, drops)]
            for group in groups
        ]

    def plan(self, lengths: Sequence[int], device: torch.device, dtype: torch.dtype, dropout: DropoutRows | None) -> Plan:
        """Return the plan of a pass in which each member has so many tokens, laid end to end in their order.

        `dropout` names the tokens; None (an evaluation) drops nothing.
        """
        return Plan(self.parts, self._members, lengths, device, dtype, dropout)


class Plan:
    """The segments of one pass."""

    def __init__(
        self,
        parts: Sequence[Sequence[_Part]],
        members: Sequence[Member],
        lengths: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        dropout: DropoutRows | None,
    ) -> None:
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        """Makes autograd call the functions backward although no weight is a leaf of its graph."""
        self._members, self._lengths, self._device, self._dtype = members, lengths, device, dtype
        self._starts = [0]
        for length in lengths:
            self._starts.append(self._starts[-1] + length)
        self._dropout = dropout
        self._places: dict[tuple[Bank, tuple[int, ...]], tuple[slice, slice | Tensor, Tensor]] = {}
        self._scales: dict[tuple[tuple[int, ...], tuple[tuple[float, ...], ...]], Tensor] = {}
        self._dropouts: dict[tuple[int, ...], DropoutRows] = {}
        self._segments = [[self._segment(part) for part in group] for group in parts]

    def segments(self, group: int) -> Sequence[Segment]:
        """Return the segments of a group."""
        return self._segments[group]

    def dropout_of(self, segment: Segment) -> tuple[DropoutRows, str]:
        """Return the names of a segment's tokens and layer, from which its mask is drawn."""
        assert self._dropout is not None
        if segment.members not in self._dropouts:
            shares = torch.tensor([self._members[member].dropout for member in segment.members])
            self._dropouts[segment.members] = self._dropout.of(segment.tokens, self._spread(shares, segment.members))
        return self._dropouts[segment.members], segment.names[0]

    def _segment(self, part: _Part) -> Segment:
        key = (part.bank, part.members)
        if key not in self._places:
            self._places[key] = self._place(part)
        rows, tokens, ends = self._places[key]
        drops = part.drops and self._dropout is not None
        return Segment(part.bank, part.names, part.places, rows, tokens, ends, self._scales_of(part), drops, part.members)

    def _place(self, part: _Part) -> tuple[slice, slice | Tensor, Tensor]:
        own = [self._members[member].rows[part.bank.rank].index for member in part.members]
        rows = slice(own[0], own[-1] + 1)
        lengths = torch.zeros(rows.stop - rows.start, dtype=torch.int32)
        for index, member in zip(own, part.members, strict=True):
            lengths[index - rows.start] = self._lengths[member]
        ends = lengths.cumsum(0, dtype=torch.int32).to(self._device)
        first, last = part.members[0], part.members[-1]
        if part.members == tuple(range(first, last + 1)):
            return rows, slice(self._starts[first], self._starts[last + 1]), ends
        pieces = [torch.arange(self._starts[member], self._starts[member + 1]) for member in part.members]
        return rows, torch.cat(pieces).to(self._device), ends

    def _scales_of(self, part: _Part) -> Tensor:
        scales = tuple(tuple(self._members[member].scales[name] for name in part.names) for member in part.members)
        key = (part.members, scales)
        if key not in self._scales:
            self._scales[key] = self._spread(torch.tensor(scales, dtype=torch.float64), part.members).to(self._dtype)
        return self._scales[key]

    def _spread(self, values: Tensor, members: Sequence[int]) -> Tensor:
        """Repeat each member's value (or row) for each of its tokens."""
        counts = torch.tensor([self._lengths[member] for member in members])
        return values.repeat_interleave(counts, 0).to(self._device)


def _parts(group: Sequence[str], shapes: Mapping[str, Shape], bank: Bank, members: Sequence[Member], drops: bool) -> list[_Part]:
    """Cut a group into runs of linears, each with the adapters that have exactly that run in this bank."""
    fused = not drops and are_adjacent(bank.rank, shapes[group[0]].in_features)
    found: dict[tuple[int, ...], list[int]] = {}
    for number, member in enumerate(members):
        row = member.rows.get(bank.rank)
        if row is None or (member.dropout > 0.0) != drops:
            continue
        for run in _runs([place for place, name in enumerate(group) if name in row.ranks], fused):
            found.setdefault(run, []).append(number)
    # In the order of places: an adapter's updates are summed in an order of its own, whoever came first.
    return [_Part(bank, tuple(group[place] for place in run), run, tuple(who), drops) for run, who in sorted(found.items())]


def _runs(places: Sequence[int], fused: bool) -> list[tuple[int, ...]]:
    """Cut places into runs of neighbours; each alone if they are not to be `fused`."""
    runs: list[list[int]] = []
    for place in places:
        if fused and runs and runs[-1][-1] == place - 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return [tuple(run) for run in runs]
