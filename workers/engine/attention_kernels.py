"""Exact attention over buckets of sequences of equal padded length: what runs on CPU, and on CUDA where no varlen kernel fits.

Explicit mathematics by blocks of query rows, so that what lies above the diagonal or outside the window is never computed:

    S = scale * Q K^T (+ mask),  P = softmax(S),  O = P V
    dV = P^T dO,  dP = dO V^T,  dS = P * (dP - rowsum(P * dP)),  dQ = scale * dS K,  dK = scale * dS^T Q

Q, K and V alone are kept for the backward pass; P is computed again there, block by block in a scratch that stays in the
cache (FlashAttention's idea, arXiv:2205.14135, with PyTorch's batched products as kernels). With a cap (Gemma 2,
arXiv:2408.00118) S becomes cap * tanh(S / cap) before the mask.

What is exact: a batched product computes each matrix by itself, softmax each row by itself; block borders, kernels and
reduction order are functions of padded length, head shape and window alone, so a sequence's bits are its own.
Axes: N sequences of a bucket, P padded length, K key/value heads, G query heads per key/value head, D head width;
B = N K matrices of a batched product, whose rows are G stacked blocks of queries.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

ROWS_PER_BLOCK = 32
"""Query rows that are computed together; with it, a third of the square above the diagonal is skipped at 96 tokens."""

SCRATCH_ELEMENTS = 131_072
"""Scores held at a time: 512 KiB in float32, half of the second-level cache of common servers."""

NARROW_HEAD = 16
"""Below this width a product's result is computed transposed: 8 columns run at 16 GFLOP/s, 8 rows at 57 (one core, MKL)."""


@dataclass(frozen=True)
class AttentionShape:
    """What one attention call computes, the same for every sequence."""

    num_heads: int
    num_key_value_heads: int
    scale: float
    causal: bool
    window: int | None = None
    """Keys that a query sees, itself included; None: all."""
    softcap: float | None = None

    @property
    def group(self) -> int:
        return self.num_heads // self.num_key_value_heads


@dataclass(frozen=True)
class Block:
    """Query rows [start, stop) and the keys [low, high) that any of them sees."""

    start: int
    stop: int
    low: int
    high: int

    def rows(self, group: int) -> slice:
        """Return where the block's queries stand among the rows of a head, `group` for each token."""
        return slice(self.start * group, self.stop * group)


def blocks_of(padded: int, shape: AttentionShape) -> Iterator[Block]:
    """Yield the blocks of a sequence of `padded` tokens; borders are multiples of 16, so that rows stay aligned to 64 bytes."""
    for start in range(0, padded, ROWS_PER_BLOCK):
        stop = min(start + ROWS_PER_BLOCK, padded)
        low = 0 if shape.window is None else max(0, start - shape.window + 1) // 16 * 16
        yield Block(start, stop, low, stop if shape.causal else padded)


def sequences_per_chunk(padded: int, shape: AttentionShape) -> int:
    """Return how many sequences are computed together: as many as the scratch holds, at least one."""
    return max(1, SCRATCH_ELEMENTS // (shape.num_heads * ROWS_PER_BLOCK * padded))


def attend(query: Tensor, key: Tensor, value: Tensor, out: Tensor, lengths: Tensor, shape: AttentionShape) -> None:
    """Write the attention of query [N, P, H, D] to key and value [N, P, K, D] into `out` [N, P, H, D]; `lengths` [N]."""
    scratch = _Scratch(query, shape)
    chunks = (tensor.split(scratch.num_sequences) for tensor in (query, key, value, out, lengths))
    for query_part, key_part, value_part, out_part, lengths_part in zip(*chunks, strict=True):
        query_BRD, key_BPD, value_BPD = _by_head(query_part, shape.group), _by_head(key_part, 1), _by_head(value_part, 1)
        out_BRD = value_BPD.new_empty(*query_BRD.shape[:2], value_BPD.shape[2])
        for block in blocks_of(query.shape[1], shape):
            rows, keys = block.rows(shape.group), slice(block.low, block.high)
            weights, _ = _weights(query_BRD[:, rows], key_BPD[:, keys], block, lengths_part, shape, scratch)
            out_BRD[:, rows] = _product(weights, value_BPD[:, keys])
        _put(out_part, out_BRD, shape.group)


@dataclass(frozen=True)
class Backward:
    """What `attend` was given, the gradient of its result, and where the gradients of its inputs are to be written."""

    lengths: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor

    def split(self, num_sequences: int) -> "Iterator[Backward]":
        """Yield the same for some sequences at a time."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return itertools.starmap(Backward, zip(*(tensor.split(num_sequences) for tensor in tensors), strict=True))


def attend_backward(tensors: Backward, shape: AttentionShape) -> None:
    """Write the gradients of `attend`."""
    scratch = _Scratch(tensors.query, shape)
    for part in tensors.split(scratch.num_sequences):
        _attend_backward(part, shape, scratch)


def _attend_backward(part: Backward, shape: AttentionShape, scratch: "_Scratch") -> None:
    query_BRD, grad_BRD = _by_head(part.query, shape.group), _by_head(part.grad_out, shape.group)
    key_BPD, value_BPD = _by_head(part.key, 1), _by_head(part.value, 1)
    grad_query, grad_key, grad_value = torch.empty_like(query_BRD), _zeros(key_BPD), _zeros(value_BPD)
    for block in blocks_of(part.query.shape[1], shape):
        rows, keys = block.rows(shape.group), slice(block.low, block.high)
        weights, tanh = _weights(query_BRD[:, rows], key_BPD[:, keys], block, part.lengths, shape, scratch)
        grad_value[:, keys] += _product(weights.mT, grad_BRD[:, rows])
        scores = scratch.take(1, weights.shape)
        torch.bmm(grad_BRD[:, rows], value_BPD[:, keys].mT, out=scores)
        torch.ops.aten._softmax_backward_data.out(scores, weights, -1, weights.dtype, grad_input=scores)
        if tanh is not None:
            torch.ops.aten.tanh_backward.grad_input(scores, tanh, grad_input=scores)
        grad_query[:, rows] = _product(scores, key_BPD[:, keys])
        grad_key[:, keys] += _product(scores.mT, query_BRD[:, rows])
    _put(part.grad_query, grad_query.mul_(shape.scale), shape.group)
    _put(part.grad_key, grad_key.mul_(shape.scale), 1)
    _put(part.grad_value, grad_value, 1)


def _weights(
    query_BRD: Tensor, key_BPD: Tensor, block: Block, lengths: Tensor, shape: AttentionShape, scratch: "_Scratch"
) -> tuple[Tensor, Tensor | None]:
    """Return the softmax weights [B, R, keys] of a block, and tanh of its scores where they are capped."""
    mask = _mask(block, lengths, shape, query_BRD)
    scores = scratch.take(0, (*query_BRD.shape[:2], key_BPD.shape[1]))
    if shape.softcap is None:
        torch.baddbmm(mask, query_BRD, key_BPD.mT, alpha=shape.scale, out=scores)
        return torch.softmax(scores, -1, out=scores), None
    tanh = torch.bmm(query_BRD, key_BPD.mT).mul_(shape.scale / shape.softcap).tanh_()
    torch.add(mask, tanh, alpha=shape.softcap, out=scores)
    return torch.softmax(scores, -1, out=scores), tanh


class _Scratch:
    """Two blocks of scores, written over and over: fresh memory would cost a page fault every 4 KiB and leave the cache."""

    def __init__(self, query: Tensor, shape: AttentionShape) -> None:
        self.num_sequences = sequences_per_chunk(query.shape[1], shape)
        chunk = min(self.num_sequences, query.shape[0])
        rows = min(ROWS_PER_BLOCK, query.shape[1])
        self._flat = query.new_empty(2, chunk * shape.num_heads * rows * query.shape[1], dtype=_computing(query))

    def take(self, place: int, size: Sequence[int]) -> Tensor:
        return self._flat[place, : math.prod(size)].view(size)


def _mask(block: Block, lengths: Tensor, shape: AttentionShape, like: Tensor) -> Tensor:
    """Return what is added to the scores, 0 or -inf, to be broadcast to [B, R, keys]."""
    if shape.causal:
        return _causal_mask(block, shape.group, shape.window, like.dtype, like.device)
    seen_NP = torch.arange(block.low, block.high, device=like.device) < lengths[:, None]
    mask_NP = torch.zeros_like(seen_NP, dtype=like.dtype).masked_fill_(~seen_NP, -math.inf)
    return mask_NP.repeat_interleave(shape.num_key_value_heads, 0)[:, None]


@functools.lru_cache(maxsize=512)
def _causal_mask(block: Block, group: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    query = torch.arange(block.start, block.stop, device=device).repeat_interleave(group)
    distance = query[:, None] - torch.arange(block.low, block.high, device=device)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)


def _is_narrow(width: int) -> bool:
    return width < NARROW_HEAD


def _by_head(rows: Tensor, group: int) -> Tensor:
    """Return rows [N, P, H, D] as [N K, P G, D]: the query heads of a token that share a key stand one after another."""
    num, length, heads, width = rows.shape
    split = rows.view(num, length, heads // group, group, width).to(_computing(rows))
    # Contiguous, never a view that a single sequence happens to allow: kernels are to see the same strides for one as for many.
    return split.transpose(1, 2).contiguous().view(num * heads // group, length * group, width)


def _computing(rows: Tensor) -> torch.dtype:
    """Return the type that scores and sums are computed in."""
    return torch.promote_types(rows.dtype, torch.float32)


def _put(rows: Tensor, by_head: Tensor, group: int) -> None:
    """Write by_head [N K, P G, D] back into rows [N, P, H, D]."""
    num, length, heads, width = rows.shape
    split = by_head.unflatten(1, (length, group)).unflatten(0, (num, heads // group))
    rows.view(num, length, heads // group, group, width).copy_(split.transpose(1, 2))


def _zeros(like_BPD: Tensor) -> Tensor:
    """Return zeros of that shape, in memory as `_product` gives its results."""
    batch, length, width = like_BPD.shape
    return like_BPD.new_zeros(batch, width, length).mT if _is_narrow(width) else torch.zeros_like(like_BPD)


def _product(weights: Tensor, rows_BPD: Tensor) -> Tensor:
    """Return weights [B, R, P] times rows [B, P, D]; a narrow result lies in memory as [B, D, R]."""
    if _is_narrow(rows_BPD.shape[2]):
        return torch.bmm(rows_BPD.mT, weights.mT).mT
    return torch.bmm(weights, rows_BPD)
