"""Attention over sequences of equal length by PyTorch's fused kernel for CPU: fastest where heads are wide and sequences short.

The kernel computes each head of each sequence by itself, in an order that follows from padded length and width alone, and takes
rows [N, P, H, D] as they lie. Key and value heads that several query heads share are repeated for it; their gradients are
added in the order of the heads. Axes: those of `attention_shape`.
"""

import math

import torch
from torch import Tensor

from workers.engine.attention_shape import AttentionShape

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flash_attend(query: Tensor, key: Tensor, value: Tensor, lengths_N: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    """Return the attention of query [N, P, H, D] to key and value [N, P, K, D], and what the backward pass needs besides."""
    heads = (_by_query_head(tensor, shape) for tensor in (query, key, value))
    out, logsumexp = _forward(*heads, 0.0, shape.causal, attn_mask=_mask(query, lengths_N, shape), scale=shape.scale)
    return out.transpose(1, 2), logsumexp


def flash_attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths_N: Tensor,
    shape: AttentionShape,
    out: Tensor,
    logsumexp: Tensor,
    grad_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    heads = (_by_query_head(tensor, shape) for tensor in (grad_out, query, key, value, out))
    mask = _mask(query, lengths_N, shape)
    grad_query, grad_key, grad_value = _backward(*heads, logsumexp, 0.0, shape.causal, attn_mask=mask, scale=shape.scale)
    return grad_query.transpose(1, 2), _add_shared(grad_key, shape), _add_shared(grad_value, shape)


def _mask(query: Tensor, lengths_N: Tensor, shape: AttentionShape) -> Tensor | None:
    """Return what hides the padding's keys [N, 1, 1, P]; None if order hides them."""
    if shape.causal:
        return None
    seen_NP = torch.arange(query.shape[1], device=query.device) < lengths_N[:, None]
    return torch.zeros_like(seen_NP, dtype=query.dtype).masked_fill_(~seen_NP, -math.inf)[:, None, None]


def _by_query_head(rows: Tensor, shape: AttentionShape) -> Tensor:
    """Return rows [N, P, H or K, D] as [N, H, P, D]."""
    times = shape.num_heads // rows.shape[2]
    if times > 1:
        rows = rows[:, :, :, None].expand(-1, -1, -1, times, -1).flatten(2, 3)
    return rows.transpose(1, 2)


def _add_shared(grad: Tensor, shape: AttentionShape) -> Tensor:
    """Return the sum of [N, H, P, D] over the query heads that share a key, as [N, P, K, D]."""
    by_row = grad.transpose(1, 2)
    if shape.group == 1:
        return by_row
    shared = by_row.unflatten(2, (-1, shape.group)).unbind(3)
    total = shared[0] + shared[1]
    for further in shared[2:]:
        total += further
    return total
