"""Where the sequences of a stream lie, and how they are gathered into buckets of equal padded length.

A stream is T tokens, its sequences laid end to end; tokens behind the last one belong to nobody. A sequence is padded to a
multiple of PAD_MULTIPLE, a function of its own length, so that kernels see the same shape whoever stands beside it. The padding
repeats its last token: finite, never seen, and without gradient. Axes: T tokens of the stream, N sequences of a bucket, P padded
length, C channels (heads times their width).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAD_MULTIPLE = 16
"""Rows stay aligned to 64 bytes, and vectors of 16 floats have no remainder. At about 90 tokens 8 % of the rows are padding;
with 32 it is 16 %, which costs more than the fewer buckets save."""


@dataclass(frozen=True)
class Bucket:
    """Sequences of the same padded length."""

    padded: int
    lengths_N: Tensor
    take_NP: Tensor
    """The token of the stream at each place; the last of its sequence where it is padding."""
    put_NP: Tensor
    """The same, but T where it is padding: a row behind the stream takes what nobody wants."""
    padding_NP: Tensor

    def split(self, num_sequences: int) -> list["Bucket"]:
        """Return the same in parts of so many sequences."""
        tensors = (self.lengths_N, self.take_NP, self.put_NP, self.padding_NP)
        return [Bucket(self.padded, *part) for part in zip(*(tensor.split(num_sequences) for tensor in tensors), strict=True)]

    def gather(self, stream_TC: Tensor) -> Tensor:
        """Return the bucket's rows [N, P, C]."""
        return stream_TC.index_select(0, self.take_NP.view(-1)).view(-1, self.padded, stream_TC.shape[1])

    def gather_gradient(self, stream_TC: Tensor) -> Tensor:
        """Return the bucket's rows [N, P, C], 0 where they are padding."""
        return self.gather(stream_TC).masked_fill_(self.padding_NP[:, :, None], 0.0)

    def put(self, stream_TC: Tensor, rows_NPC: Tensor) -> None:
        """Write the bucket's rows into a stream with a row behind it [T + 1, C]."""
        stream_TC.index_copy_(0, self.put_NP.view(-1), rows_NPC.reshape(-1, stream_TC.shape[1]))


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
        self.borders = torch.cat([torch.zeros(1, dtype=torch.long), ends_N]).to(device=device, dtype=torch.int32)
        """Where each sequence starts, and where the last one ends [N + 1]."""
        self._buckets = list(_buckets(lengths_N, ends_N - lengths_N, total, device))
        self._parts: dict[tuple[int, int], list[Bucket]] = {}

    @property
    def padded_lengths(self) -> list[int]:
        """The padded lengths that occur, ascending."""
        return [bucket.padded for bucket in self._buckets]

    def parts(self, padded: int, num_sequences: int) -> list[Bucket]:
        """Return the bucket of that padded length in parts of so many sequences; cut once for all calls of a pass."""
        key = (padded, num_sequences)
        if key not in self._parts:
            self._parts[key] = next(bucket for bucket in self._buckets if bucket.padded == padded).split(num_sequences)
        return self._parts[key]

    def new_stream(self, like: Tensor, channels: int) -> Tensor:
        """Return memory for a stream with a row behind it [T + 1, C]; tokens of nobody are 0, the others are to be put."""
        stream = like.new_empty(self.total + 1, channels)
        stream[self.num_owned :] = 0.0
        return stream


def _buckets(lengths_N: Tensor, starts_N: Tensor, total: int, device: torch.device | str) -> Iterator[Bucket]:
    padded_N = (lengths_N + PAD_MULTIPLE - 1) // PAD_MULTIPLE * PAD_MULTIPLE
    for padded in padded_N.unique().tolist():
        members = (padded_N == padded).nonzero()[:, 0]
        starts, lengths = starts_N[members, None], lengths_N[members, None]
        place_NP = torch.arange(padded).expand(len(members), padded)
        padding_NP = place_NP >= lengths
        take_NP = starts + place_NP.minimum(lengths - 1)
        put_NP = take_NP.masked_fill(padding_NP, total)
        tensors = (lengths_N[members], take_NP, put_NP, padding_NP)
        yield Bucket(padded, *(tensor.to(device) for tensor in tensors))
