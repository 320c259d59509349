"""Attention kept inside each sequence of a padding-free stream.

A pass is one stream of T tokens, `input_ids [1, T]`, its sequences laid end to end. The attention function registered here
under the name STREAM_ATTENTION lets no token see another sequence's. Where the sequences lie is said once per pass, to the
AttentionPlan that every module of the model holds: autograd's own threads, which recompute activations on a GPU, find it there.

On CPU, and for what no kernel of a GPU can do, sequences are gathered into buckets of equal padded length (`sequences`) and
computed exactly (`bucketed_attention`): what a kernel sees depends on the sequence alone. On CUDA in bfloat16 and float16 it is
PyTorch's variable-length kernel. Axes: T tokens, H query heads, K key/value heads (K divides H), D head width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from infra.errors import BadInput
from workers.engine.attention_shape import AttentionShape
from workers.engine.bucketed_attention import bucketed_attention
from workers.engine.sequences import Sequences

STREAM_ATTENTION = "lorafleet_stream"

MAX_VARLEN_WIDTH = 256
"""Head width that the variable-length kernel takes at most; it must be a multiple of 8 (FlashAttention-2)."""

_PLAN = "stream_attention_plan"


class AttentionPlan:
    """Where the sequences of the pass under way lie. Each attention call of the pass reads it, the recomputed ones too."""

    def __init__(self) -> None:
        self._lengths: tuple[int, ...] | None = None
        self._sequences: Sequences | None = None

    @contextmanager
    def sequences(self, lengths: Sequence[int], total: int | None = None) -> Iterator[None]:
        """Set the lengths of the stream's sequences [tokens]; must span the forward and its backward.

        Tokens behind the last sequence belong to nobody: their attention and its gradient are 0. `total` is the
        stream's length with them, if it is to be held against what comes.
        """
        assert total is None or sum(lengths) <= total, "the sequences are longer than their stream"
        before = self._lengths, self._sequences
        self._lengths, self._sequences = tuple(lengths), None
        try:
            yield
        finally:
            self._lengths, self._sequences = before

    def buckets(self, total: int, device: torch.device) -> Sequences:
        """Return the buckets of the pass, made at its first attention call."""
        assert self._lengths is not None, "attention outside of `sequences`"
        if self._sequences is None:
            self._sequences = Sequences(self._lengths, total, device)
        assert self._sequences.total == total, (self._sequences.total, total)
        return self._sequences


def install_attention(model: PreTrainedModel) -> AttentionPlan:
    """Let `model` attend to streams from now on; return what is told where their sequences lie."""
    model.set_attn_implementation(STREAM_ATTENTION)
    return hold_plan(model)


def hold_plan(model: nn.Module) -> AttentionPlan:
    """Give every module of `model` a new plan to attend by, and return it."""
    plan = AttentionPlan()
    for module in model.modules():
        setattr(module, _PLAN, plan)
    return plan


@contextmanager
def padded_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model attend as it was made to (padded rows and a cache), which generation needs."""
    caps = getattr(model.config, "attn_logit_softcapping", None) is not None
    model.set_attn_implementation("eager" if caps else "sdpa")  # PyTorch's kernel has no cap, and leaves it out silently
    try:
        yield
    finally:
        model.set_attn_implementation(STREAM_ATTENTION)


def stream_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend query [1, H, T, D] to key and value [1, K, T, D] inside each sequence; return [1, T, H, D].

    The signature is that of transformers' AttentionInterface; `is_causal` is the module's own where it is not given. Raises
    BadInput for a base whose attention has sinks, or a window but no direction: leaving them out would train on another model.
    """
    assert attention_mask is None, "a stream's borders are its mask"
    assert dropout == 0.0, "the frozen branch drops nothing"
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    _refuse_unknown(causal, sliding_window, kwargs)
    shape = AttentionShape(
        num_heads=query.shape[1],
        num_key_value_heads=key.shape[1],
        scale=query.shape[3] ** -0.5 if scaling is None else scaling,
        causal=causal,
        window=sliding_window,
        softcap=softcap,
    )
    plan: AttentionPlan = getattr(module, _PLAN)
    sequences = plan.buckets(query.shape[2], query.device)
    if _has_varlen_kernel(query, value, shape):
        return _varlen(query, key, value, sequences, shape), None
    return bucketed_attention(query, key, value, sequences, shape), None


def _refuse_unknown(causal: bool, window: int | None, kwargs: dict[str, Any]) -> None:
    if kwargs.get("s_aux") is not None:
        raise BadInput("the base's attention uses sinks ('s_aux'), which cannot be trained yet; use a base without them.")
    if window is not None and not causal:
        raise BadInput("the base looks both ways through a sliding window, which cannot be trained yet; use a base without one.")


def _has_varlen_kernel(query: Tensor, value: Tensor, shape: AttentionShape) -> bool:
    width = query.shape[3]
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and shape.softcap is None
        and width == value.shape[3]
        and width % 8 == 0
        and width <= MAX_VARLEN_WIDTH
    )


def _varlen(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, shape: AttentionShape) -> Tensor:
    """Attend with PyTorch's variable-length kernel (CUDA). Tokens of nobody are cut off before it and are 0 behind it."""
    from torch.nn.attention.varlen import varlen_attn  # its operators are registered on import, which a CPU host never needs

    before = -1 if shape.window is None else shape.window - 1  # the kernel's window leaves the token itself out
    query_THD, key_TKD, value_TKD = (tensor[0].transpose(0, 1)[: sequences.num_owned] for tensor in (query, key, value))
    out: Any = varlen_attn(
        query_THD,
        key_TKD,
        value_TKD,
        sequences.borders,
        sequences.borders,
        sequences.max_length,
        sequences.max_length,
        scale=shape.scale,
        window_size=(before, 0) if shape.causal else (-1, -1),
        enable_gqa=shape.group > 1,
    )
    return nn.functional.pad(out, (0, 0, 0, 0, 0, sequences.total - sequences.num_owned))[None]


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The stream's borders are the mask."""


AttentionInterface.register(STREAM_ATTENTION, stream_attention)
AttentionMaskInterface.register(STREAM_ATTENTION, _no_mask)
