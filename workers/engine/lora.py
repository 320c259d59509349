"""LoRA on the linears of a Hugging Face model, installed once and switched per adapter.

    y = W x + b + s * B (A drop(x)),   s = lora_alpha / r   (rsLoRA: lora_alpha / sqrt(r), arXiv:2312.03732)

Every Linear and Conv1D (GPT-2) that may be adapted is wrapped when a base becomes resident; a wrapped layer with no
factors is the plain layer. Factors are float32 whatever the base's type (PEFT's autocast_adapter_dtype); the branch is
computed in float32 and rounded once, when it is added. Axes: T tokens, I inputs, O outputs, R rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from workers.engine.dropout import DropoutKey, dropout_mask
from workers.targets import can_be_adapted


@dataclass(frozen=True)
class Factors:
    """One layer's update: `a` [R, I], `b` [O, R], the scale s, and the share of inputs dropped while training."""

    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0


class LoraLinear(nn.Module):
    """A frozen linear and the factors that stand beside it at the moment (None: the plain layer)."""

    def __init__(self, base: nn.Module, index: int) -> None:
        super().__init__()
        self.base = base
        self.index = index
        """Place of the layer in the model: part of the dropout key."""
        self.factors: Factors | None = None
        self.dropout_key: DropoutKey | None = None
        """Set while a training forward runs; None drops nothing."""

    @property
    def in_features(self) -> int:
        return int(self.base.weight.shape[0] if isinstance(self.base, Conv1D) else self.base.weight.shape[1])  # type: ignore[index]

    @property
    def out_features(self) -> int:
        return int(self.base.weight.shape[1] if isinstance(self.base, Conv1D) else self.base.weight.shape[0])  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., I] to [..., O]."""
        y = self.base(x)
        if self.factors is None:
            return y
        return y + self._update(x.to(self.factors.a.dtype), self.factors).to(y.dtype)

    def _update(self, x: Tensor, factors: Factors) -> Tensor:
        if factors.dropout > 0.0 and self.dropout_key is not None:
            x = x * dropout_mask(x, factors.dropout, self.dropout_key, self.index)
        return nn.functional.linear(nn.functional.linear(x, factors.a), factors.b) * factors.scale


def scale_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """Return the factor s by which B A is multiplied."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def install(model: PreTrainedModel) -> dict[str, LoraLinear]:
    """Wrap every adaptable linear of `model` in place; return them by PEFT's module names, in the model's order."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and can_be_adapted(name)
    ]
    wrapped: dict[str, LoraLinear] = {}
    for index, (name, module) in enumerate(found):
        parent, _, leaf = name.rpartition(".")
        wrapped[name] = LoraLinear(module, index)
        setattr(model.get_submodule(parent), leaf, wrapped[name])
    return wrapped


def switch(layers: Mapping[str, LoraLinear], factors: Mapping[str, Factors]) -> None:
    """Put `factors` in place, by layer name; layers that are not named become plain."""
    for name, layer in layers.items():
        layer.factors = factors.get(name)


def set_dropout_key(layers: Mapping[str, LoraLinear], key: DropoutKey | None) -> None:
    """Name the forward that follows, so that its dropout masks can be drawn again by a recomputation."""
    for layer in layers.values():
        layer.dropout_key = key


def initial_a(r: int, in_features: int, generator: torch.Generator) -> Tensor:
    """Return a fresh A [r, in_features]: uniform in +-1/sqrt(in_features), which is kaiming_uniform(a=sqrt(5)) as in PEFT."""
    bound = 1.0 / math.sqrt(in_features)
    return torch.empty(r, in_features).uniform_(-bound, bound, generator=generator)
