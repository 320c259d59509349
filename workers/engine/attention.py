"""Attention kept inside each sequence of a padding-free stream.

A micro-batch is one stream of T tokens, `input_ids [1, T]`, its sequences laid end to end. The attention function
registered here under the name STREAM_ATTENTION splits queries, keys and values at the sequence borders, so that
no token sees a neighbour's and no padding is ever computed; what a kernel sees depends on the sequence alone.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from infra.errors import BadInput

STREAM_ATTENTION = "lorafleet_stream"

_current = threading.local()


@contextmanager
def sequences_of(lengths: Sequence[int]) -> Iterator[None]:
    """Set the lengths of the stream's sequences, in tokens; must span the forward and its backward (checkpointing recomputes)."""
    _current.lengths = list(lengths)
    try:
        yield
    finally:
        del _current.lengths


@contextmanager
def padded_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model attend as it was made to (padded rows and a cache), which generation needs."""
    model.set_attn_implementation("sdpa")
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of query [1, H, T, D] to key and value [1, K, T, D] (K divides H) inside each sequence.

    Returns [1, T, H, D]. The signature is that of transformers' AttentionInterface. Raises BadInput for a base whose attention
    caps its scores or has sinks: leaving them out would train on another model.
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise BadInput(f"the base's attention uses '{name}', which cannot be trained yet; use a base without it.")
    lengths = _current.lengths
    pieces = [
        _attend(*piece, scaling, sliding_window)
        for piece in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(pieces, 2).transpose(1, 2).contiguous(), None


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, sliding_window: int | None) -> Tensor:
    length = query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    attend = torch.nn.functional.scaled_dot_product_attention
    if sliding_window is None or length <= sliding_window:
        return attend(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position[None, :]
    window = (distance >= 0) & (distance < sliding_window)
    return attend(query, key, value, attn_mask=window, scale=scaling, enable_gqa=grouped)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The stream's borders are the mask."""


AttentionInterface.register(STREAM_ATTENTION, stream_attention)
AttentionMaskInterface.register(STREAM_ATTENTION, _no_mask)
