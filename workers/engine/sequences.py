"""Where the sequences of a stream lie, and how they are gathered into buckets of equal padded length.

A stream is T tokens, its sequences laid end to end; tokens behind the last one belong to nobody. A sequence is padded to a
multiple of PAD_MULTIPLE, a function of its own length, so that kernels see the same shape whoever stands beside it. The padding
repeats its last token: finite, never seen, and without gradient. Axes: T tokens of the stream, R rows of all buckets (N sequences
of P padded tokens each), H heads, D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAD_MULTIPLE = 16
"""Rows stay aligned to 64 bytes, and vectors of 16 floats have no remainder."""


@dataclass(frozen=True)
class Bucket:
    """Sequences of the same padded length: rows [start, start + N * padded) of the gathered tensors."""

    padded: int
    start: int
    lengths_N: Tensor

    def of(self, rows_RHD: Tensor) -> Tensor:
        """Return the bucket's rows as a view [N, P, H, D]."""
        num = len(self.lengths_N)
        return rows_RHD[self.start : self.start + num * self.padded].view(num, self.padded, *rows_RHD.shape[1:])


class Sequences:
    """The buckets of one stream. Made once for a pass, used by each of its attention calls."""

    def __init__(self, lengths: Sequence[int], total: int, device: torch.device | str = "cpu") -> None:
        """`lengths` [tokens] in the stream's order, each at least 1; `total` tokens of the stream, those of nobody included."""
        assert min(lengths, default=1) > 0, lengths
        assert sum(lengths) <= total, (lengths, total)
        self.num_owned = sum(lengths)
        self.total = total
        self.max_length = max(lengths, default=0)
        lengths_N = torch.tensor(lengths, dtype=torch.long)
        ends_N = lengths_N.cumsum(0)
        padded_N = (lengths_N + PAD_MULTIPLE - 1) // PAD_MULTIPLE * PAD_MULTIPLE
        take: list[Tensor] = []
        own: list[Tensor] = []
        self.buckets: list[Bucket] = []
        start = 0
        for padded in padded_N.unique().tolist():
            members = (padded_N == padded).nonzero()[:, 0]
            place_NP = torch.arange(padded).expand(len(members), padded)
            last_N1 = lengths_N[members, None] - 1
            take.append((ends_N[members, None] - 1 - last_N1 + place_NP.minimum(last_N1)).flatten())
            own.append((place_NP <= last_N1).flatten())
            self.buckets.append(Bucket(padded, start, lengths_N[members].to(device)))
            start += len(members) * padded
        self.num_rows = start
        self._index(torch.cat(take), torch.cat(own), device)
        self.borders = torch.cat([torch.zeros(1, dtype=torch.long), ends_N]).to(device=device, dtype=torch.int32)
        """Where each sequence starts, and where the last one ends [N + 1]."""

    def _index(self, take_R: Tensor, own_R: Tensor, device: torch.device | str) -> None:
        back_T = torch.full((self.total,), self.num_rows)  # the row behind the last one is zero
        back_T[take_R[own_R]] = own_R.nonzero()[:, 0]
        self._take_R = take_R.to(device)
        self._padding = (~own_R).nonzero()[:, 0].to(device)
        self._back_T = back_T.to(device)

    def gather(self, stream_THD: Tensor) -> Tensor:
        """Return the rows [R, H, D] of all buckets, padding filled with its sequence's last token."""
        flat = stream_THD.reshape(self.total, -1)
        return flat.index_select(0, self._take_R).view(self.num_rows, *stream_THD.shape[1:])

    def gather_gradient(self, stream_THD: Tensor) -> Tensor:
        """Return the rows [R, H, D] of all buckets, padding filled with 0."""
        return self.gather(stream_THD).index_fill_(0, self._padding, 0.0)

    def new_rows(self, like: Tensor, num_heads: int, width: int) -> Tensor:
        """Return memory for rows [R + 1, H, D] that `scatter` takes; the last row, that of nobody, is 0."""
        rows = like.new_empty(self.num_rows + 1, num_heads, width)
        rows[-1] = 0.0
        return rows

    def scatter(self, rows: Tensor) -> Tensor:
        """Return the stream [T, H, D] of rows [R + 1, H, D]: the padding is dropped, tokens of nobody are 0."""
        return rows.flatten(1).index_select(0, self._back_T).view(self.total, *rows.shape[1:])
