"""Attention over a stream as one autograd function: gather some sequences of a bucket, attend, put their rows back.

Padded rows exist for a few sequences at a time only: they stay in the cache, and nothing of their size is kept or asked of
the system for each layer. The gradient of a gather by an index would be an `index_add`; since every token has one row of its own,
it is a copy here. Which kernel sequences get follows from head shape and padded length alone, so a sequence meets the same
one whoever stands beside it. Axes: T tokens, H query heads, K key/value heads, D head width, C channels (heads times width).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from workers.engine.attention_shape import NARROW_HEAD, AttentionShape
from workers.engine.blocked_attention import TOKENS_PER_BLOCK, attend, attend_backward
from workers.engine.flash_attention import flash_attend, flash_attend_backward
from workers.engine.sequences import Bucket, Sequences

BLOCKED_FROM = {"narrow": 0, "grouped": 128, "plain": 256}
"""Padded length from which explicit blocks beat the fused kernel [tokens]; measured on one core: 0.6 of its time at 16 to 48
tokens and 0.55 at 256 for heads of 8, 0.8 at 128 and 0.7 at 256 where heads share keys, 0.9 at 256 else."""

SCORES_AT_A_TIME = 262_144
"""Scores of a block that are computed together: 1 MiB in float32, the second-level cache of common servers."""

QUERIES_AT_A_TIME = 131_072
"""Numbers in the queries that the fused kernel is given together: 512 KiB in float32."""


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


@dataclass(frozen=True)
class _Work:
    """Some sequences of a bucket, and whether explicit blocks compute them."""

    part: Bucket
    blocked: bool


def _work(query: Tensor, value: Tensor, sequences: Sequences, shape: AttentionShape) -> Iterator[_Work]:
    for padded in sequences.padded_lengths:
        blocked = uses_blocks(padded, query, value, shape)
        of_a_row = padded * shape.num_heads
        fit = SCORES_AT_A_TIME // (of_a_row * TOKENS_PER_BLOCK) if blocked else QUERIES_AT_A_TIME // (of_a_row * query.shape[3])
        for part in sequences.parts(padded, max(1, fit)):
            yield _Work(part, blocked)


class _BucketedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, shape: AttentionShape) -> Tensor:
        streams = [tensor[0].transpose(0, 1).flatten(1) for tensor in (query, key, value)]
        ctx.sequences, ctx.shape, ctx.widths = sequences, shape, [tensor.shape[3] for tensor in (query, key, value)]
        ctx.work = list(_work(query, value, sequences, shape))
        out = sequences.new_stream(query, shape.num_heads * value.shape[3])
        sums: list[Tensor | None] = []
        for work in ctx.work:
            query_rows, key_rows, value_rows = _gather(work.part, streams, ctx.widths)
            if work.blocked:
                rows, logsumexp = attend(query_rows, key_rows, value_rows, work.part.lengths_N, shape), None
            else:
                rows, logsumexp = flash_attend(query_rows, key_rows, value_rows, work.part.lengths_N, shape)
            work.part.put(out, rows)
            sums.append(logsumexp)
        ctx.save_for_backward(*streams, out if any(not work.blocked for work in ctx.work) else None, *sums)
        return out[:-1].unflatten(1, (shape.num_heads, -1))[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *sums = ctx.saved_tensors  # read once: more is an error where activations are recomputed
        grad_out, shape = grad_outputs[0][0].flatten(1), ctx.shape
        grads = [ctx.sequences.new_stream(stream, stream.shape[1]) for stream in (query, key, value)]
        for work, logsumexp in zip(ctx.work, sums, strict=True):
            part, width = work.part, ctx.widths[2]
            query_rows, key_rows, value_rows = _gather(part, (query, key, value), ctx.widths)
            grad_rows = part.gather_gradient(grad_out).unflatten(2, (-1, width))
            given = (query_rows, key_rows, value_rows, part.lengths_N, shape)
            if work.blocked:
                found = attend_backward(*given, grad_rows)
            else:
                found = flash_attend_backward(*given, part.gather(out).unflatten(2, (-1, width)), logsumexp, grad_rows)
            for grad, rows in zip(grads, found, strict=True):
                part.put(grad, rows)
        by_head = (grad[:-1].unflatten(1, (-1, width)) for grad, width in zip(grads, ctx.widths, strict=True))
        return *(grad.transpose(0, 1)[None] for grad in by_head), None, None


def _gather(part: Bucket, streams: Sequence[Tensor], widths: Sequence[int]) -> list[Tensor]:
    """Return the part's rows [N, P, heads, width] of each stream."""
    return [part.gather(stream).unflatten(2, (-1, width)) for stream, width in zip(streams, widths, strict=True)]
