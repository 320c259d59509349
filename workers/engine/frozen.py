"""The products with a frozen linear that a pack needs: W x + b for all of its rows, and the gradient of the input.

A frozen linear has no gradient of its own, therefore these two products are all there is; they are written without autograd, so
that the packed LoRA function decides what is kept. They are the operations that autograd would run, so that a layer gives the
same bits either way. Of a 4-bit layer (bitsandbytes; QLoRA, arXiv:2305.14314) each product dequantises the weight
once, however many adapters have rows in it. Axes: T tokens (any leading axes will do), I inputs, O outputs.
"""

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Frozen(Protocol):
    """A frozen linear y = W x + b. Its weights stay where its module has them: a module that moves takes its products along."""

    @property
    def in_features(self) -> int:
        """I."""

    @property
    def out_features(self) -> int:
        """O."""

    def product(self, x_TI: Tensor) -> Tensor:
        """Return y [T, O] in the type of `x_TI`; autograd does not see it."""

    def input_gradient(self, gy_TO: Tensor) -> Tensor:
        """Return gx [T, I] = gy W in the type of `gy_TO`; autograd does not see it."""


def frozen_of(module: nn.Module) -> Frozen | None:
    """Return the products of `module`, None if it is no linear whose products are known here.

    A 4-bit layer must hold its quantised weight, and keeps it in the layout of training from here on (see `FrozenLinear4bit`).
    """
    if isinstance(module, Conv1D):
        return FrozenConv1D(module)
    if _is_linear_4bit(module):
        return FrozenLinear4bit(module)
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return FrozenLinear(module)
    return None


@dataclass(frozen=True)
class FrozenLinear:
    """`nn.Linear`: weight [O, I]."""

    module: nn.Linear

    @property
    def in_features(self) -> int:
        """I."""
        return int(self.module.weight.shape[1])

    @property
    def out_features(self) -> int:
        """O."""
        return int(self.module.weight.shape[0])

    @torch.no_grad()
    def product(self, x_TI: Tensor) -> Tensor:
        """Return y [T, O]."""
        return nn.functional.linear(x_TI, self.module.weight, self.module.bias)

    @torch.no_grad()
    def input_gradient(self, gy_TO: Tensor) -> Tensor:
        """Return gx [T, I]."""
        return gy_TO @ self.module.weight


@dataclass(frozen=True)
class FrozenConv1D:
    """transformers' `Conv1D` (GPT-2): weight [I, O], and always a bias."""

    module: Conv1D

    @property
    def in_features(self) -> int:
        """I."""
        return int(self.module.weight.shape[0])

    @property
    def out_features(self) -> int:
        """O."""
        return int(self.module.weight.shape[1])

    @torch.no_grad()
    def product(self, x_TI: Tensor) -> Tensor:
        """Return y [T, O]."""
        y_TO = torch.addmm(self.module.bias, x_TI.reshape(-1, self.in_features), self.module.weight)
        return y_TO.view(*x_TI.shape[:-1], self.out_features)

    @torch.no_grad()
    def input_gradient(self, gy_TO: Tensor) -> Tensor:
        """Return gx [T, I]."""
        return gy_TO @ self.module.weight.t()


class FrozenLinear4bit:
    """bitsandbytes' `Linear4bit`: packed codes, dequantised to [O, I] for each product and forgotten after it.

    The module's own forward differs on two kinds of CPU (bitsandbytes 0.50.2), and is not to be used where this is:
    with AVX-512, where I is a multiple of 16 and not of the block size, it takes the constants of wrong blocks; with AVX-512
    bfloat16 instructions, a forward without gradients rewrites weight and constants for an inference kernel, rounding the
    constants for good. The first is avoided by dequantising the blocks as rows, the second is switched off for the module.
    """

    def __init__(self, module: Any) -> None:
        """Raises ValueError if the module's weight is not quantised yet, or is in the layout of inference already."""
        state = getattr(module.weight, "quant_state", None)
        if state is None or getattr(state, "packing_format_for_cpu", False):
            raise ValueError("a 4-bit layer must hold its weight quantised, in the layout of training; load the base anew.")
        keep_training_layout(module)
        self.module = module
        self.out_features, self.in_features = (int(size) for size in state.shape)
        self._stored_shape = _rows_of_blocks(self.out_features * self.in_features, state.blocksize)

    @torch.no_grad()
    def product(self, x_TI: Tensor) -> Tensor:
        """Return y [T, O], computed in the layer's compute type."""
        weight_OI = self._dequantised(x_TI.dtype)
        bias_O = None if self.module.bias is None else self.module.bias.to(weight_OI.dtype)
        return nn.functional.linear(x_TI.to(weight_OI.dtype), weight_OI, bias_O).to(x_TI.dtype)

    @torch.no_grad()
    def input_gradient(self, gy_TO: Tensor) -> Tensor:
        """Return gx [T, I], computed in the layer's compute type."""
        weight_OI = self._dequantised(gy_TO.dtype)
        return (gy_TO.to(weight_OI.dtype) @ weight_OI).to(gy_TO.dtype)

    def _dequantised(self, default: torch.dtype) -> Tensor:
        """Return the weight [O, I] in the layer's compute type, in `default` where the layer has none."""
        from bitsandbytes.functional import dequantize_4bit  # loading it takes seconds: only where there is such a layer

        weight = self.module.weight
        state = copy.copy(weight.quant_state)
        state.shape = self._stored_shape
        values = dequantize_4bit(weight.data, state)
        if values.numel() != self.out_features * self.in_features:
            values = values.view(-1)[:-1]
        return values.view(self.out_features, self.in_features).to(self.module.compute_dtype or default)


def _rows_of_blocks(num_elements: int, blocksize: int) -> torch.Size:
    """Return a shape whose rows are blocks; if the last block is not full, one row of all (of even length: a byte holds two)."""
    if num_elements % blocksize == 0:
        return torch.Size((num_elements // blocksize, blocksize))
    return torch.Size((1, num_elements + num_elements % 2))


def keep_training_layout(module: nn.Module) -> None:
    """Forbid bitsandbytes to rewrite the weights of 4-bit layers in `module` for inference, see `FrozenLinear4bit`."""
    for layer in module.modules():
        if _is_linear_4bit(layer):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _is_linear_4bit(module: nn.Module) -> bool:
    """Tell a 4-bit layer by the names of its classes: bitsandbytes is not loaded to ask."""
    classes = {(one.__module__.partition(".")[0], one.__name__) for one in type(module).__mro__}
    return ("bitsandbytes", "Linear4bit") in classes
