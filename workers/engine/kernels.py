"""Grouped matrix products: each adapter's rows with its own factors, in one dispatch for a whole pack.

Axes: T rows (tokens) laid end to end by group, G groups, K and N features. `ends` [G] (int32) is where each group's rows end;
a group may be empty. A group's result has the bits it has alone: the kernel below sees each group's own shape.

Kernels by case: `torch.nn.functional.grouped_mm`, and a loop over the groups, which is the tests' oracle and serves what
grouped_mm refuses: float64, and rows that are not a multiple of 16 bytes. The loop copies a group's rows first: where they
begin in the stream would else decide how they are aligned in memory, and with that the last bits (odd widths; measured).
"""

from functools import lru_cache

import torch
from torch import Tensor

ALIGNMENT_BYTES = 16
"""What grouped_mm asks of every stride (torch 2.13)."""


def grouped_rows(x_TK: Tensor, w_GKN: Tensor, ends_G: Tensor) -> Tensor:
    """Return [T, N]: each group's rows of x times that group's matrix."""
    if _is_taken(x_TK, w_GKN):
        return torch.nn.functional.grouped_mm(x_TK, w_GKN, offs=ends_G)
    return loop_rows(x_TK, w_GKN, ends_G)


def grouped_outer(x_TK: Tensor, y_TN: Tensor, ends_G: Tensor) -> Tensor:
    """Return [G, K, N]: per group the sum over its rows of x^T y; zero where a group is empty."""
    if _is_taken(x_TK, y_TN):
        return torch.nn.functional.grouped_mm(x_TK.t(), y_TN, offs=ends_G)
    return loop_outer(x_TK, y_TN, ends_G)


def loop_rows(x_TK: Tensor, w_GKN: Tensor, ends_G: Tensor) -> Tensor:
    """The oracle of `grouped_rows`."""
    starts = [0, *ends_G.tolist()]
    return torch.cat([x_TK[start:end].clone() @ w for start, end, w in zip(starts, starts[1:], w_GKN, strict=False)])


def loop_outer(x_TK: Tensor, y_TN: Tensor, ends_G: Tensor) -> Tensor:
    """The oracle of `grouped_outer`."""
    starts = [0, *ends_G.tolist()]
    return torch.stack(
        [x_TK[start:end].clone().t() @ y_TN[start:end].clone() for start, end in zip(starts, starts[1:], strict=False)]
    )


def _is_taken(x: Tensor, y: Tensor) -> bool:
    """Tell whether grouped_mm takes the operands: a function of their type and feature sizes alone."""
    return _is_aligned(x.dtype, x.stride()) and _is_aligned(y.dtype, y.stride())


@lru_cache(maxsize=4096)
def _is_aligned(dtype: torch.dtype, strides: tuple[int, ...]) -> bool:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    others = list(strides)
    if 1 in others:
        others.remove(1)  # of neighbours in memory; any other, even if it is 1 too (a layer with one output), must be aligned
    return all(stride * dtype.itemsize % ALIGNMENT_BYTES == 0 for stride in others)
