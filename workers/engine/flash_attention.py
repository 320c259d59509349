"""Attention over a bucket of sequences by PyTorch's fused kernel for CPU: fastest where heads are wide and sequences short.

The kernel computes each head of each sequence by itself, in an order that follows from padded length and width alone, and takes
rows [N, P, H, D] as they lie. Key and value heads that several query heads share are repeated for it; their gradients are
added in the order of the heads. Axes as in `attention_kernels`.
"""

import math

import torch
from torch import Tensor

from workers.engine.attention_kernels import AttentionShape, Backward

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flash_attend(query: Tensor, key: Tensor, value: Tensor, out: Tensor, lengths: Tensor, shape: AttentionShape) -> Tensor:
    """Write the attention of query [N, P, H, D] to key and value [N, P, K, D] into `out`; return the log of each row's sum."""
    heads = (_by_query_head(tensor, shape) for tensor in (query, key, value))
    mask = None if shape.causal else _key_mask(query, lengths)
    result, logsumexp = _forward(*heads, 0.0, shape.causal, attn_mask=mask, scale=shape.scale)
    out.copy_(result.transpose(1, 2))
    found: Tensor = logsumexp
    return found


def flash_attend_backward(tensors: Backward, out: Tensor, logsumexp: Tensor, shape: AttentionShape) -> None:
    """Write the gradients of `flash_attend`, given its results."""
    given = (tensors.grad_out, tensors.query, tensors.key, tensors.value, out)
    heads = (_by_query_head(tensor, shape) for tensor in given)
    mask = None if shape.causal else _key_mask(tensors.query, tensors.lengths)
    grads = _backward(*heads, logsumexp, 0.0, shape.causal, attn_mask=mask, scale=shape.scale)
    tensors.grad_query.copy_(grads[0].transpose(1, 2))
    _add_shared(tensors.grad_key, grads[1])
    _add_shared(tensors.grad_value, grads[2])


def _key_mask(query: Tensor, lengths: Tensor) -> Tensor:
    """Return what is added to scores [N, H, P, P]: padding is seen by nobody."""
    seen = torch.arange(query.shape[1], device=query.device) < lengths[:, None]
    return torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, -math.inf)[:, None, None]


def _by_query_head(rows: Tensor, shape: AttentionShape) -> Tensor:
    """Return rows [N, P, H or K, D] as [N, H, P, D]."""
    times = shape.num_heads // rows.shape[2]
    if times > 1:
        rows = rows[:, :, :, None].expand(-1, -1, -1, times, -1).flatten(2, 3)
    return rows.transpose(1, 2)


def _add_shared(grad: Tensor, grad_by_query_head: Tensor) -> None:
    """Write the sum of [N, H, P, D] over the query heads that share a key into grad [N, P, K, D]."""
    shared = grad_by_query_head.transpose(1, 2).unflatten(2, (grad.shape[2], -1))
    grad.copy_(shared[:, :, :, 0])
    for place in range(1, shared.shape[3]):
        grad += shared[:, :, :, place]
