"""Banks: the factors of many adapters, stacked by rank, with gradients and Adam's two moments of the same shape.

A bank holds adapters' factors of one rank bucket R. Its store is [4, S, P]: weights, gradients, first and second moment of S
rows (one adapter each) with P values. The columns of a row are the factors A [R, I] of all layers that some adapter of the bank
targets, in the model's order, then the factors B [O, R]; the factors of one layer are therefore one strided view [S, R, I] over
all adapters, and AdamW, clip, copy and clean are a few operations over rows.

    true rank r <= R: rows r..R of A and columns r..R of B are zero and stay exactly zero (their gradients are exact zeros)
    rows in use are a contiguous prefix, sorted by what they target, so that those who share a layer stand side by side
    joining and leaving moves rows; a row is zeroed before it is used again: weights, gradients, moments

Every block starts at a multiple of ALIGNED values, so that no vectorised kernel has a tail that depends on neighbours.
An adapter whose ranks differ by layer (rank_pattern) has a row in the bank of each bucket; a classifier has one more in the
bank of the heads with as many labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHTS, GRADIENTS, FIRST_MOMENT, SECOND_MOMENT = range(4)
ALIGNED = 64
"""Values; at least two AVX-512 vectors of float32, which one round of torch's vectorised loops takes."""
SMALLEST_RANK = 8


def rank_bucket(r: int) -> int:
    """Return the rank that is computed with: the next power of two, at least 8. A function of the job alone."""
    return max(SMALLEST_RANK, 1 << (r - 1).bit_length())


@dataclass(frozen=True)
class Shape:
    """A linear layer's sides."""

    in_features: int
    out_features: int


@dataclass(eq=False)
class Row:
    """One adapter's place in a bank: the layers it has there, each with its true rank (a head: one name, and its labels)."""

    ranks: Mapping[str, int]
    order: tuple[int, int]
    """First and last layer, as places in the model: rows are sorted by it."""
    index: int = -1


@dataclass(frozen=True)
class _Columns:
    """Where the factors of each layer begin in a row."""

    a: Mapping[str, int]
    b: Mapping[str, int]
    size_a: int
    size: int


class Bank:
    """Rows of values with their gradients and moments. What the columns are is the kinds' matter: `LoraBank`, `HeadBank`."""

    def __init__(self, order: tuple[int, int], device: torch.device, dtype: torch.dtype) -> None:
        self.order = order
        """Banks are gone through in this order wherever one adapter has rows in several."""
        self.device, self.dtype = device, dtype
        self.rows: list[Row] = []
        self._size, self._size_a = 0, 0
        self._store = torch.zeros(4, 0, 0, device=device, dtype=dtype)
        self._views: dict[tuple[int, str, tuple[str, ...]], Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return self._store.numel() * self._store.element_size()

    def remove(self, row: Row) -> None:
        """Clean the row and close the gap it leaves; an empty bank gives its memory back."""
        at = row.index
        last = len(self.rows) - 1
        for index in range(at, last):  # one by one: all at once would need a copy of the bank
            self._store[:, index].copy_(self._store[:, index + 1])
        self._store[:, last].zero_()
        self.rows.remove(row)
        row.index = -1
        self._number()
        if not self.rows:
            self._clear()

    def region(self, kind: int, which: str) -> Tensor:
        """Return all factors A ("a": a head's tensors, too) or B ("b") of all rows in use, [rows, size], as a view."""
        part = slice(0, self._size_a) if which == "a" else slice(self._size_a, self._size)
        return self._store[kind, : len(self.rows), part]

    def clean_gradients(self, rows: Iterable[Row]) -> None:
        """Set the gradients of rows to zero."""
        for first, last in _runs(row.index for row in rows):
            self._store[GRADIENTS, first : last + 1].zero_()

    def _insert(self, row: Row) -> None:
        """Put a row into its place, for which there is room, and clean it."""
        at = next((index for index, other in enumerate(self.rows) if other.order > row.order), len(self.rows))
        for index in range(len(self.rows), at, -1):
            self._store[:, index].copy_(self._store[:, index - 1])
        self._store[:, at].zero_()
        self.rows.insert(at, row)
        self._number()

    def _clear(self) -> None:
        self._replace(torch.zeros(4, 0, 0, device=self.device, dtype=self.dtype))
        self._size, self._size_a = 0, 0

    def _replace(self, store: Tensor) -> None:
        self._store = store
        self._views.clear()

    def _view(self, kind: int, start: int, shape: tuple[int, int]) -> Tensor:
        rows, columns = shape
        flat = self._store[kind, :, start : start + rows * columns]
        return flat.view(-1, rows, columns)

    def _number(self) -> None:
        for index, row in enumerate(self.rows):
            row.index = index


class LoraBank(Bank):
    """Factors of adapters of one rank bucket. See the module."""

    def __init__(self, rank: int, shapes: Mapping[str, Shape], device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """`shapes` are those of all adaptable layers of the base, in the model's order."""
        super().__init__((0, rank), device, dtype)
        self.rank, self.shapes = rank, shapes
        self._columns = _lay_out(rank, shapes, ())
        self._places = {name: place for place, name in enumerate(shapes)}

    def add(self, ranks: Mapping[str, int]) -> Row:
        """Give a clean row for layers of these true ranks. May raise torch.OutOfMemoryError, and then changes nothing."""
        places = [self._places[name] for name in ranks]
        self._make_room(len(self.rows) + 1, ranks)
        row = Row(dict(ranks), (min(places), max(places)))
        self._insert(row)
        return row

    def a_run(self, names: tuple[str, ...], kind: int = WEIGHTS) -> Tensor:
        """Return the factors A of layers that stand side by side (`are_adjacent`) as one view [S, n R, I] over all rows."""
        key = (kind, "a", names)
        if key not in self._views:
            start, inputs = self._columns.a[names[0]], self.shapes[names[0]].in_features
            starts = [start + number * self.rank * inputs for number in range(len(names))]
            assert [self._columns.a[name] for name in names] == starts, f"{names} do not stand side by side"
            self._views[key] = self._view(kind, start, (len(names) * self.rank, inputs))
        return self._views[key]

    def b(self, name: str, kind: int = WEIGHTS) -> Tensor:
        """Return the factors B of a layer, [S, O, R], over all rows, as a view."""
        key = (kind, "b", (name,))
        if key not in self._views:
            self._views[key] = self._view(kind, self._columns.b[name], (self.shapes[name].out_features, self.rank))
        return self._views[key]

    def read(self, row: Row, kind: int, name: str) -> tuple[Tensor, Tensor]:
        """Return A [r, I] and B [O, r] of a layer of one row, at its true rank, as views."""
        r = row.ranks[name]
        return self.a_run((name,), kind)[row.index, :r], self.b(name, kind)[row.index, :, :r]

    def _clear(self) -> None:
        super()._clear()
        self._columns = _lay_out(self.rank, self.shapes, ())

    def _make_room(self, num_rows: int, names: Iterable[str]) -> None:
        """Grow the store to hold so many rows (capacities double) and these layers."""
        wanted = set(self._columns.a) | set(names)
        capacity = self._store.shape[1]
        if wanted == set(self._columns.a) and num_rows <= capacity:
            return
        columns = _lay_out(self.rank, self.shapes, wanted)
        capacity = max(capacity, 1 << (num_rows - 1).bit_length())
        store = torch.zeros(4, capacity, columns.size, device=self.device, dtype=self.dtype)
        for name in self._columns.a:
            a, b = self.rank * self.shapes[name].in_features, self.rank * self.shapes[name].out_features
            for start, old, size in (
                (columns.a[name], self._columns.a[name], a),
                (columns.b[name], self._columns.b[name], b),
            ):
                store[:, : len(self.rows), start : start + size] = self._store[:, : len(self.rows), old : old + size]
        self._columns, self._size, self._size_a = columns, columns.size, columns.size_a
        self._replace(store)


class HeadBank(Bank):
    """Classification heads with one number of labels: their tensors, named relative to the head's module.

    A matrix [L, D] is kept as [L', D], L' being L rounded up to a multiple of 8, which the grouped kernel asks for; the
    rows beyond L are zero and stay so.
    """

    def __init__(
        self, num_labels: int, shapes: Mapping[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__((1, num_labels), device, dtype)
        self.num_labels, self._shapes = num_labels, dict(shapes)
        sizes = [_padded(shape[0]) * (shape[1] if len(shape) == 2 else 1) for shape in shapes.values()]
        starts, self._full_size = _starts(sizes, 0)
        self._starts = dict(zip(shapes, starts, strict=True))

    def add(self) -> Row:
        """Give a clean row. May raise torch.OutOfMemoryError, and then changes nothing."""
        capacity = self._store.shape[1]
        if len(self.rows) == capacity:
            store = torch.zeros(4, max(1, 2 * capacity), self._full_size, device=self.device, dtype=self.dtype)
            if capacity:
                store[:, :capacity] = self._store
            self._size = self._size_a = self._full_size
            self._replace(store)
        row = Row({}, (0, 0))
        self._insert(row)
        return row

    def tensor(self, name: str, kind: int = WEIGHTS) -> Tensor:
        """Return a tensor over all rows, filled up: [S, L', D], or [S, L', 1] of a bias, as a view."""
        key = (kind, "head", (name,))
        if key not in self._views:
            shape = self._shapes[name]
            self._views[key] = self._view(kind, self._starts[name], (_padded(shape[0]), shape[1] if len(shape) == 2 else 1))
        return self._views[key]

    def read(self, row: Row, kind: int, name: str) -> Tensor:
        """Return a tensor of one row in its true shape, as a view."""
        shape = self._shapes[name]
        filled = self.tensor(name, kind)[row.index, : shape[0]]
        return filled if len(shape) == 2 else filled[:, 0]


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return the first and last of each run of neighbouring numbers."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def are_adjacent(rank: int, in_features: int) -> bool:
    """Tell whether the factors A of layers with one input stand side by side without a gap, so that one product serves all."""
    return rank * in_features % ALIGNED == 0


def _lay_out(rank: int, shapes: Mapping[str, Shape], used: Iterable[str]) -> _Columns:
    wanted = set(used)
    names = [name for name in shapes if name in wanted]
    a, size_a = _starts([rank * shapes[name].in_features for name in names], 0)
    b, size = _starts([rank * shapes[name].out_features for name in names], size_a)
    return _Columns(dict(zip(names, a, strict=True)), dict(zip(names, b, strict=True)), size_a, size)


def _starts(sizes: Sequence[int], start: int) -> tuple[list[int], int]:
    starts = []
    for size in sizes:
        starts.append(start)
        start += -(-size // ALIGNED) * ALIGNED
    return starts, start
