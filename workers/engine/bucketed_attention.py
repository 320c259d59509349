"""Attention over a stream as one autograd function: gather the rows into buckets, attend in each, scatter back.

The gradient of a gather by an index is an `index_add`; here each way is a gather by the inverse index, since every token of
a sequence has one row of its own. Which kernel a bucket gets follows from head shape and padded length alone, so a sequence
meets the same one whoever is in its bucket. Axes: T tokens, H query heads, K key/value heads, D head width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from workers.engine.attention_kernels import NARROW_HEAD, AttentionShape, Backward, attend, attend_backward
from workers.engine.flash_attention import flash_attend, flash_attend_backward
from workers.engine.sequences import Sequences

BLOCKED_FROM = {"narrow": 64, "grouped": 128, "plain": 256}
"""Padded length from which explicit blocks beat the fused kernel [tokens]; measured on one core, 8 sequences to a bucket: 0.85 of
its time at 64 and 0.55 at 256 tokens for heads of 8, 0.8 at 128 and 0.7 at 256 where heads share keys, 0.9 at 256 else."""


def bucketed_attention(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, shape: AttentionShape) -> Tensor:
    """Attend query [1, H, T, D] to key and value [1, K, T, D] inside each sequence.

    Returns [1, T, H, D]; tokens of nobody get 0.
    """
    out: Tensor = _BucketedAttention.apply(query, key, value, sequences, shape)
    return out


def uses_blocks(padded: int, query: Tensor, value: Tensor, shape: AttentionShape) -> bool:
    """Tell whether sequences of `padded` tokens are computed by explicit blocks, else by the fused kernel."""
    width = query.shape[-1]
    if shape.softcap is not None or width != value.shape[-1] or query.device.type != "cpu":
        return True
    if shape.window is not None and shape.window < padded:
        return True
    return padded >= BLOCKED_FROM["narrow" if width < NARROW_HEAD else "grouped" if shape.group > 1 else "plain"]


class _BucketedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, shape: AttentionShape) -> Tensor:
        rows = [sequences.gather(tensor[0].transpose(0, 1)) for tensor in (query, key, value)]
        out = sequences.new_rows(query, shape.num_heads, value.shape[3])
        sums: list[Tensor | None] = []
        for bucket in sequences.buckets:
            query_rows, key_rows, value_rows = (bucket.of(tensor) for tensor in rows)
            if uses_blocks(bucket.padded, query, value, shape):
                attend(query_rows, key_rows, value_rows, bucket.of(out), bucket.lengths_N, shape)
                sums.append(None)
            else:
                sums.append(flash_attend(query_rows, key_rows, value_rows, bucket.of(out), bucket.lengths_N, shape))
        ctx.save_for_backward(*rows, out if any(one is not None for one in sums) else None, *sums)
        ctx.sequences, ctx.shape = sequences, shape
        return sequences.scatter(out)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        sequences: Sequences = ctx.sequences
        query, key, value, out, *sums_of_buckets = ctx.saved_tensors  # read once: activations that are recomputed allow no more
        rows = (query, key, value)
        grad_out = sequences.gather_gradient(grad_outputs[0][0])
        grads = [sequences.new_rows(tensor, *tensor.shape[1:]) for tensor in rows]
        for bucket, sums in zip(sequences.buckets, sums_of_buckets, strict=True):
            tensors = Backward(bucket.lengths_N, *(bucket.of(tensor) for tensor in (*rows, grad_out, *grads)))
            if sums is None:
                attend_backward(tensors, ctx.shape)
            else:
                flash_attend_backward(tensors, bucket.of(out), sums, ctx.shape)
        return *(sequences.scatter(tensor).transpose(0, 1)[None] for tensor in grads), None, None
