"""Which rows of a pass meet which factors: for every group of linears, segments of adapters that one product serves.

A segment is what shares a bank, a run of linears that stand side by side (all of query, key, value, or one of them) and the
question whether inputs are dropped. Which segments there are follows from who is in the pass (`Structure`, kept between passes);
where their tokens lie changes from pass to pass (`Plan`). The rows of a segment are a slice of its bank and its tokens, where
they lie together, a slice of the stream: nothing is gathered or copied then. Rows of the slice that have no tokens in this
pass are empty groups. Axes: T tokens of the pass, T' those of the segment, G rows of the slice, n linears of the run.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engine.bank import GRADIENTS, WEIGHTS, Bank, HeadBank, LoraBank, Row, Shape, are_adjacent
from workers.engine.dropout import DropoutRows


@dataclass(frozen=True)
class Member:
    """One adapter as plans see it: its row in each bank, the scale of its layers, and the share of inputs it drops."""

    rows: Mapping[Bank, Row]
    scales: Mapping[str, float]
    dropout: float


@dataclass(frozen=True)
class Part:
    """A segment before it is known where its tokens lie: views of its rows in the bank, made once. Shapes as in `Bank`."""

    rank: int
    names: tuple[str, ...]
    places: tuple[int, ...]
    """Of its linears in their group."""
    members: tuple[int, ...]
    """Places of its adapters in the pass, in the order of their rows."""
    rows: tuple[int, ...]
    drops: bool
    a: Tensor
    """[G, n R, I]"""
    a_transposed: Tensor
    a_gradient: Tensor
    b: tuple[Tensor, ...]
    """[G, O, R] for each linear."""
    b_transposed: tuple[Tensor, ...]
    b_gradients: tuple[Tensor, ...]

    @staticmethod
    def of(
        bank: LoraBank, group: Sequence[str], run: tuple[int, ...], who: Sequence[int], members: Sequence[Member], drops: bool
    ) -> Part:
        """Take the views of a run of linears for some adapters of a bank."""
        names = tuple(group[place] for place in run)
        rows = tuple(members[member].rows[bank].index for member in who)
        part = slice(rows[0], rows[-1] + 1)
        return Part(
            rank=bank.rank,
            names=names,
            places=run,
            members=tuple(who),
            rows=rows,
            drops=drops,
            a=bank.a_run(names)[part],
            a_transposed=bank.a_run(names)[part].transpose(1, 2),
            a_gradient=bank.a_run(names, GRADIENTS)[part],
            b=tuple(bank.b(name)[part] for name in names),
            b_transposed=tuple(bank.b(name)[part].transpose(1, 2) for name in names),
            b_gradients=tuple(bank.b(name, GRADIENTS)[part] for name in names),
        )


@dataclass(frozen=True)
class Segment:
    """A run of linears with the adapters it serves, and where their tokens are. See the module."""

    part: Part
    tokens: slice | Tensor
    ends: Tensor
    scales: Tensor
    """[T', n R]"""
    drops: bool

    def take(self, x_TI: Tensor) -> Tensor:
        """Return the segment's rows of a [T, I] tensor; a view where they lie together."""
        return x_TI[self.tokens] if isinstance(self.tokens, slice) else x_TI.index_select(0, self.tokens)

    def add_to(self, y_TO: Tensor, update: Tensor) -> None:
        """Add the segment's rows to a [T, O] tensor."""
        if isinstance(self.tokens, slice):
            y_TO[self.tokens].add_(update)
        else:
            y_TO.index_add_(0, self.tokens, update)


@dataclass(frozen=True)
class HeadPart:
    """Heads with one number of labels: views of their rows in the bank."""

    bank: HeadBank
    members: tuple[int, ...]
    """Places of their adapters in the pass, in the order of their rows."""
    rows: tuple[int, ...]

    @staticmethod
    def of(bank: HeadBank, members: Sequence[Member]) -> HeadPart:
        """Take those of a bank that are in the pass."""
        own = sorted((member.rows[bank].index, place) for place, member in enumerate(members) if bank in member.rows)
        return HeadPart(bank, tuple(place for _, place in own), tuple(row for row, _ in own))

    def tensor(self, name: str, kind: int = WEIGHTS) -> Tensor:
        """Return a tensor of the slice of rows, [G, L', D]; rows of others may stand between."""
        return self.bank.tensor(name, kind)[self.rows[0] : self.rows[-1] + 1]


class Structure:
    """The segments of each group for adapters in a given order; where their tokens lie is asked for pass by pass.

    Holds views of the banks: void as soon as somebody joins or leaves.
    """

    def __init__(
        self, groups: Sequence[Sequence[str]], shapes: Mapping[str, Shape], banks: Sequence[Bank], members: Sequence[Member]
    ) -> None:
        self._members = members
        lora = [bank for bank in banks if isinstance(bank, LoraBank)]
        self.heads = [HeadPart.of(bank, members) for bank in banks if isinstance(bank, HeadBank) and bank.rows]
        self.parts = [
            [part for bank in lora for drops in (False, True) for part in _parts(group, shapes, bank, members, drops)]
            for group in groups
        ]
        self.heads = [head for head in self.heads if head.members]

    def plan(self, lengths: Sequence[int], device: torch.device, dtype: torch.dtype, dropout: DropoutRows | None) -> Plan:
        """Return the plan of a pass in which each member has so many tokens, laid end to end in their order.

        `dropout` names the tokens; None (an evaluation) drops nothing.
        """
        return Plan(self.parts, self._members, lengths, device, dtype, dropout, self.heads)


class Plan:
    """The segments of one pass."""

    def __init__(
        self,
        parts: Sequence[Sequence[Part]],
        members: Sequence[Member],
        lengths: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        dropout: DropoutRows | None,
        heads: Sequence[HeadPart] = (),
    ) -> None:
        self.heads = heads
        """Of the classifiers in the pass, by number of labels."""
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        """Makes autograd call the functions backward although no weight is a leaf of its graph."""
        self._members, self._lengths, self._device, self._dtype = members, lengths, device, dtype
        self._starts = [0, *itertools.accumulate(lengths)]
        self._dropout = dropout
        self._places: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[slice | Tensor, Tensor]] = {}
        self._scales: dict[tuple[tuple[int, ...], int, tuple[tuple[float, ...], ...]], Tensor] = {}
        self._dropouts: dict[tuple[int, ...], DropoutRows] = {}
        self._segments = [[self._segment(part) for part in group] for group in parts]

    def segments(self, group: int) -> Sequence[Segment]:
        """Return the segments of a group."""
        return self._segments[group]

    def dropout_of(self, segment: Segment) -> tuple[DropoutRows, str]:
        """Return the names of a segment's tokens and layer, from which its mask is drawn."""
        assert self._dropout is not None
        members = segment.part.members
        if members not in self._dropouts:
            shares = torch.tensor([self._members[member].dropout for member in members], dtype=torch.float64)
            self._dropouts[members] = self._dropout.of(segment.tokens, self._spread(shares, members))
        return self._dropouts[members], segment.part.names[0]

    def _segment(self, part: Part) -> Segment:
        key = (part.members, part.rows)
        if key not in self._places:
            self._places[key] = (self._tokens(part.members), self._ends(part))
        return Segment(part, *self._places[key], self._scales_of(part), part.drops and self._dropout is not None)

    def _ends(self, part: Part) -> Tensor:
        """Return where the tokens of each row of the part's slice end among its tokens; rows of others are empty."""
        lengths = [0] * (part.rows[-1] + 1 - part.rows[0])
        for row, member in zip(part.rows, part.members, strict=True):
            lengths[row - part.rows[0]] = self._lengths[member]
        return torch.tensor(list(itertools.accumulate(lengths)), dtype=torch.int32, device=self._device)

    def _tokens(self, members: tuple[int, ...]) -> slice | Tensor:
        first, last = members[0], members[-1]
        if members == tuple(range(first, last + 1)):
            return slice(self._starts[first], self._starts[last + 1])
        pieces = [torch.arange(self._starts[member], self._starts[member + 1]) for member in members]
        return torch.cat(pieces).to(self._device)

    def _scales_of(self, part: Part) -> Tensor:
        scales = tuple(tuple(self._members[member].scales[name] for name in part.names) for member in part.members)
        key = (part.members, part.rank, scales)
        if key not in self._scales:
            columns = torch.tensor(scales, dtype=torch.float64).to(self._dtype).repeat_interleave(part.rank, 1)
            self._scales[key] = self._spread(columns, part.members)
        return self._scales[key]

    def _spread(self, values: Tensor, members: Sequence[int]) -> Tensor:
        """Repeat each member's value (or row) for each of its tokens."""
        counts = torch.tensor([self._lengths[member] for member in members])
        return values.repeat_interleave(counts, 0).to(self._device)


def _parts(
    group: Sequence[str], shapes: Mapping[str, Shape], bank: LoraBank, members: Sequence[Member], drops: bool
) -> list[Part]:
    """Cut a group into runs of linears, each with the adapters that have exactly that run in this bank."""
    fused = not drops and are_adjacent(bank.rank, shapes[group[0]].in_features)
    own = [(number, member.rows[bank]) for number, member in enumerate(members) if bank in member.rows]
    model_order = {name: place for place, name in enumerate(shapes)}
    neighbours = [place for place in range(1, len(group)) if model_order[group[place]] == model_order[group[place - 1]] + 1]
    found: dict[tuple[int, ...], list[int]] = {}
    # In the order of rows, which is not that of the stream where adapters have rows in several banks.
    for number, row in sorted(own, key=lambda one: one[1].index):
        if (members[number].dropout > 0.0) != drops:
            continue
        for run in _runs([place for place, name in enumerate(group) if name in row.ranks], neighbours if fused else ()):
            found.setdefault(run, []).append(number)
    # In the order of places: an adapter's updates are summed in an order of its own, whoever came first.
    return [Part.of(bank, group, run, who, members, drops) for run, who in sorted(found.items())]


def _runs(places: Sequence[int], neighbours: Sequence[int]) -> list[tuple[int, ...]]:
    """Cut places into runs; those of `neighbours` go on with the run of the place before them, if it is there.

    A bank holds layers in the model's order. Some models call them in another one (OPT: query first, key and value before it in
    the model), and then they do not stand side by side.
    """
    runs: list[list[int]] = []
    for place in places:
        if runs and place in neighbours and runs[-1][-1] == place - 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return [tuple(run) for run in runs]
