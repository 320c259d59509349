"""Attention over sequences of equal length as products by blocks of query rows: fastest for narrow heads and long sequences.

    S = scale * Q K^T + mask,  P = softmax(S),  O = P V
    dV = P^T dO,  dP = dO V^T,  dS = P * (dP - rowsum(P * dP)),  dQ = scale * dS K,  dK = scale * dS^T Q

What lies above the diagonal or outside the window is not computed but for the block on its border. Q, K and V alone are kept for
the backward pass; P is computed again there, a block at a time, so that it stays in the cache (FlashAttention's idea,
arXiv:2205.14135, with batched products as kernels). With a cap (Gemma 2, arXiv:2408.00118) S becomes cap * tanh(S / cap)
before the mask.

What is exact: a batched product computes each matrix by itself, softmax each row by itself; borders of blocks, kernels and
the order of sums follow from padded length, head shape and window alone. So a sequence's bits are its own.
Axes: those of `attention_shape`; G query heads for each key/value head; B = N K matrices of a batched product;
R = rows of a block, G for each of its tokens.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engine.attention_shape import NARROW_HEAD, AttentionShape

TOKENS_PER_BLOCK = 32
"""Query tokens that are computed together; with it, a third of the square above the diagonal is skipped at 96 tokens."""


@dataclass(frozen=True)
class Block:
    """Some query rows of each sequence, the keys that any of them sees, and what is hidden from them by order."""

    rows: slice
    keys: slice
    hidden: tuple[tuple[slice, Tensor], ...]
    """Columns of the block's scores, and what is added to them [R, columns]: 0 or -inf."""


def attend(query: Tensor, key: Tensor, value: Tensor, lengths_N: Tensor, shape: AttentionShape) -> Tensor:
    """Return the attention [N, P, H, D] of query [N, P, H, D] to key and value [N, P, K, D]."""
    query_BRD, key_BPD, value_BPD = _heads(query, key, value, shape)
    out_BRD = value_BPD.new_empty(*query_BRD.shape[:2], value_BPD.shape[2])
    padding = _padding(lengths_N, key, shape)
    for block in _blocks_for(query, shape):
        weights, _ = _weights(query_BRD[:, block.rows], key_BPD[:, block.keys], block, padding, shape.softcap)
        out_BRD[:, block.rows].copy_(_product(weights, value_BPD[:, block.keys]))
    return _by_row(out_BRD, query, shape.group)


def attend_backward(
    query: Tensor, key: Tensor, value: Tensor, lengths_N: Tensor, shape: AttentionShape, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    query_BRD, key_BPD, value_BPD = _heads(query, key, value, shape)
    grad_BRD = _by_head(grad_out, shape.group)
    grad_query, grad_key, grad_value = torch.empty_like(query_BRD), _zeros(key_BPD), _zeros(value_BPD)
    padding = _padding(lengths_N, key, shape)
    for block in _blocks_for(query, shape):
        rows, keys = block.rows, block.keys
        weights, tanh = _weights(query_BRD[:, rows], key_BPD[:, keys], block, padding, shape.softcap)
        grad_value[:, keys].add_(_product(weights.mT, grad_BRD[:, rows]))
        scores = _grad_scores(torch.bmm(grad_BRD[:, rows], value_BPD[:, keys].mT), weights, tanh)
        grad_query[:, rows].copy_(_product(scores, key_BPD[:, keys]))
        grad_key[:, keys].add_(_product(scores.mT, query_BRD[:, rows]))
    grad_query *= shape.scale
    return _by_row(grad_query, query, shape.group), _by_row(grad_key, key, 1), _by_row(grad_value, value, 1)


def _weights(
    query_BRD: Tensor, key_BPD: Tensor, block: Block, padding: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return the softmax weights [B, R, keys] of a block, and tanh of its scores where they are capped."""
    scores, tanh = torch.bmm(query_BRD, key_BPD.mT), None
    if softcap is not None:
        tanh = scores.mul_(1.0 / softcap).tanh_()
        scores = tanh * softcap
    for columns, mask in block.hidden:
        scores[:, :, columns].add_(mask)
    if padding is not None:
        scores.add_(padding)
    return torch.softmax(scores, -1, out=scores), tanh


def _grad_scores(grad_weights: Tensor, weights: Tensor, tanh: Tensor | None) -> Tensor:
    """Turn the gradient of softmax weights into that of the scores, in place."""
    torch.ops.aten._softmax_backward_data.out(grad_weights, weights, -1, weights.dtype, grad_input=grad_weights)
    if tanh is not None:
        torch.ops.aten.tanh_backward.grad_input(grad_weights, tanh, grad_input=grad_weights)
    return grad_weights


def _blocks_for(query: Tensor, shape: AttentionShape) -> tuple[Block, ...]:
    return _blocks(query.shape[1], shape, _computing(query), query.device)


@functools.lru_cache(maxsize=256)
def _blocks(padded: int, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> tuple[Block, ...]:
    """Cut a sequence of `padded` tokens into blocks whose borders are multiples of 16: rows stay aligned to 64 bytes."""
    blocks = []
    for start in range(0, padded, TOKENS_PER_BLOCK):
        stop = min(start + TOKENS_PER_BLOCK, padded)
        low = 0 if shape.window is None else max(0, start - shape.window + 1) // 16 * 16
        hidden: list[tuple[slice, Tensor]] = []
        if shape.causal:
            hidden.append((slice(start - low, stop - low), _triangle(stop - start, shape.group, dtype, device)))
        if shape.window is not None and low < stop - shape.window:
            position = torch.arange(start, stop).repeat_interleave(shape.group)
            far = position[:, None] - torch.arange(low, stop - shape.window) >= shape.window
            hidden.append((slice(0, stop - shape.window - low), _mask(far, dtype, device)))
        rows = slice(start * shape.group, stop * shape.group)
        blocks.append(Block(rows, slice(low, stop if shape.causal else padded), tuple(hidden)))
    return tuple(blocks)


@functools.lru_cache(maxsize=64)
def _triangle(length: int, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    position = torch.arange(length)
    return _mask(position.repeat_interleave(group)[:, None] < position, dtype, device)


def _mask(hidden: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf).to(device)


def _padding(lengths_N: Tensor, key: Tensor, shape: AttentionShape) -> Tensor | None:
    """Return what hides the padding's keys [B, 1, P]; None if order hides them."""
    if shape.causal:
        return None
    seen_NP = torch.arange(key.shape[1], device=key.device) < lengths_N[:, None]
    mask_NP = torch.zeros_like(seen_NP, dtype=_computing(key)).masked_fill_(~seen_NP, -math.inf)
    return mask_NP.repeat_interleave(shape.num_key_value_heads, 0)[:, None]


def _computing(rows: Tensor) -> torch.dtype:
    """Return the type that scores and sums are computed in."""
    return torch.promote_types(rows.dtype, torch.float32)


def _heads(query: Tensor, key: Tensor, value: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor, Tensor]:
    """Return scaled queries [B, R, D], keys and values [B, P, D]."""
    return _by_head(query, shape.group) * shape.scale, _by_head(key, 1), _by_head(value, 1)


def _by_head(rows: Tensor, group: int) -> Tensor:
    """Return rows [N, P, H, D] as [N K, P G, D]: the query heads of a token that share a key stand one after another."""
    num, length, heads, width = rows.shape
    split = rows.view(num, length, heads // group, group, width).to(_computing(rows))
    # Contiguous, never a view that a single sequence happens to allow: kernels are to see the same strides for one as for many.
    return split.transpose(1, 2).contiguous().view(num * heads // group, length * group, width)


def _by_row(by_head: Tensor, like: Tensor, group: int) -> Tensor:
    """Return by_head [N K, P G, D] as rows [N, P, H, D], of the type and length of `like`."""
    num, length, heads = like.shape[:3]
    split = by_head.unflatten(1, (length, group)).unflatten(0, (num, heads // group))
    return split.transpose(1, 2).to(like.dtype).reshape(num, length, heads, by_head.shape[2])


def _product(weights: Tensor, rows_BPD: Tensor) -> Tensor:
    """Return weights [B, R, P] times rows [B, P, D]; a narrow result lies in memory as [B, D, R].

    With 8 columns a product runs at 16 GFLOP/s, with 8 rows at 57 (one core, MKL).
    """
    if rows_BPD.shape[2] < NARROW_HEAD:
        return torch.bmm(rows_BPD.mT, weights.mT).mT
    return torch.bmm(weights, rows_BPD)


def _zeros(like_BPD: Tensor) -> Tensor:
    """Return zeros of that shape, in memory as `_product` gives its results."""
    batch, length, width = like_BPD.shape
    return like_BPD.new_zeros(batch, width, length).mT if width < NARROW_HEAD else torch.zeros_like(like_BPD)
