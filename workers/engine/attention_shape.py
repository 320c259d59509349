"""What one attention call computes, the same for every sequence: what a kernel for attention is told.

There are two, `blocked_attention` and `flash_attention`. Axes of both: N sequences, P padded length, H query heads, K key/value
heads (K divides H), D head width.
"""

from dataclasses import dataclass

NARROW_HEAD = 16
"""Head width below which products of common libraries are slow unless they are turned round (see `blocked_attention`)."""


@dataclass(frozen=True)
class AttentionShape:
    """See the module."""

    num_heads: int
    num_key_value_heads: int
    scale: float
    causal: bool
    window: int | None = None
    """Keys that a query sees, itself included; None: all. Causal attention only."""
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap)."""

    @property
    def group(self) -> int:
        """Query heads that share a key."""
        return self.num_heads // self.num_key_value_heads
