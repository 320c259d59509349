"""LoRA on the linears of a Hugging Face model: installed once, then switched between no adapter, one adapter, and a pack.

    y = W x + b + s * B (A drop(x)),   s = lora_alpha / r   (rsLoRA: lora_alpha / sqrt(r), arXiv:2312.03732)

Every linear that may be adapted is wrapped when a base becomes resident. Linears that are called one after the other on the same
tensor (query, key and value; gate and up) form a group, found by watching one forward: a group is one autograd function, so
that an input is kept once, and the frozen product is done once for all rows of the pack. Beside it the function computes, for
each segment of adapters (`plan`), the update of their rows by grouped products, and in its backward adds their gradients to
the banks directly. Factors are float32 whatever the base's type (PEFT's autocast_adapter_dtype); the branch is computed in
float32 and rounded once, when it is added. Axes: T tokens, I inputs, O outputs, R rank, G adapters of a segment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from workers.engine.bank import Shape
from workers.engine.dropout import dropped
from workers.engine.frozen import Frozen, frozen_of
from workers.engine.kernels import grouped_outer, grouped_rows
from workers.engine.plan import Plan, Segment
from workers.targets import can_be_adapted


@dataclass(frozen=True)
class Factors:
    """One layer's update: `a` [R, I], `b` [O, R] and the scale s."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Share:
    """One layer's update of some tokens of a stream."""

    tokens: slice
    factors: Factors


@dataclass(eq=False)
class Group:
    """Linears that share their input. Holds what the linear called first has computed for those called after it."""

    index: int
    names: list[str] = field(default_factory=list)
    frozen: list[Frozen] = field(default_factory=list)
    plan: Plan | None = None
    _waiting: tuple[Tensor, list[Tensor]] | None = None

    def output(self, place: int, x: Tensor) -> Tensor:
        """Return the output of the linear at `place` for x [..., I]; the first place computes those of all."""
        assert self.plan is not None
        if place == 0:
            outputs = _GroupFunction.apply(x, self.plan.anchor, self, self.plan)
            self._waiting = (x, list(outputs))
        if self._waiting is None or self._waiting[0] is not x:
            raise RuntimeError(
                f"{self.names[place]} was called on another input than {self.names[0]}, unlike in the first forward."
            )
        output = self._waiting[1][place]
        if place == len(self.names) - 1:
            self._waiting = None
        return output

    def release(self) -> None:
        """Leave the pack: the linears are plain again."""
        self.plan = None
        self._waiting = None


class LoraLinear(nn.Module):
    """A frozen linear and what stands beside it at the moment: nothing, one adapter's factors, those of several adapters that
    share a stream without training, or its group's pack."""

    def __init__(self, base: nn.Module, frozen: Frozen) -> None:
        super().__init__()
        self.base = base
        self.frozen = frozen
        self.factors: Factors | None = None
        self.shares: Sequence[Share] = ()
        self.group: Group | None = None
        self.place = 0

    @property
    def in_features(self) -> int:
        return self.frozen.in_features

    @property
    def out_features(self) -> int:
        return self.frozen.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., I] to [..., O]; only a pack has gradients."""
        if self.group is not None and self.group.plan is not None:
            return self.group.output(self.place, x)
        y = self.frozen.product(x)  # not the module's own, which may differ where it is held in 4 bits: see FrozenLinear4bit
        for share in self.shares:
            y[..., share.tokens, :] += _update(x[..., share.tokens, :], share.factors).to(y.dtype)
        if self.factors is None:
            return y
        return y + _update(x, self.factors).to(y.dtype)


def _update(x: Tensor, factors: Factors) -> Tensor:
    """Return s B A x [..., O]."""
    return nn.functional.linear(nn.functional.linear(x.to(factors.a.dtype), factors.a), factors.b) * factors.scale


class _GroupFunction(torch.autograd.Function):
    """All outputs of a group of linears, with the updates of the plan's adapters. Gradients of factors go to their banks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, group: Group, plan: Plan) -> tuple[Tensor, ...]:
        x_TI = x.reshape(-1, x.shape[-1])
        outputs = [frozen.product(x_TI) for frozen in group.frozen]
        shrunk = []
        for segment in plan.segments(group.index):
            h = _shrink(segment, x_TI, plan)
            shrunk.append(h)
            for number, place in enumerate(segment.part.places):
                update = grouped_rows(_column(h, segment, number), segment.part.b_transposed[number], segment.ends)
                segment.add_to(outputs[place], update.to(outputs[place].dtype))
        ctx.group, ctx.plan, ctx.shape = group, plan, x.shape
        ctx.save_for_backward(x_TI, *shrunk)
        return tuple(output.view(*x.shape[:-1], output.shape[-1]) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        x_TI, *shrunk = ctx.saved_tensors
        group, plan = ctx.group, ctx.plan
        flat = [None if gradient is None else gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        wanted = ctx.needs_input_grad[0]
        gx_TI = _frozen_gradient(group, flat) if wanted else None
        for segment, h in zip(plan.segments(group.index), shrunk, strict=True):
            dx = _backward_of_segment(segment, x_TI, h, flat, plan, wanted)
            if gx_TI is not None and dx is not None:
                segment.add_to(gx_TI, dx.to(gx_TI.dtype))
        return (None if gx_TI is None else gx_TI.view(ctx.shape)), None, None, None


def _shrink(segment: Segment, x_TI: Tensor, plan: Plan) -> Tensor:
    """Return s * A drop(x) [T', n R] of the segment's rows, for its n layers."""
    a_GIR = segment.part.a_transposed
    return grouped_rows(_input_of(segment, x_TI, a_GIR.dtype, plan), a_GIR, segment.ends).mul_(segment.scales)


def _input_of(segment: Segment, x_TI: Tensor, dtype: torch.dtype, plan: Plan) -> Tensor:
    x = segment.take(x_TI).to(dtype)
    return dropped(x, plan.dropout_of(segment)) if segment.drops else x


def _backward_of_segment(
    segment: Segment, x_TI: Tensor, h: Tensor, gradients: Sequence[Tensor | None], plan: Plan, wanted: bool
) -> Tensor | None:
    """Add the gradients of the segment's factors to its bank; return that of its rows' input, if wanted."""
    part, ends = segment.part, segment.ends
    columns = []
    for number, place in enumerate(part.places):
        gradient = gradients[place]
        if gradient is None:
            columns.append(torch.zeros_like(_column(h, segment, number)))
            continue
        gy = segment.take(gradient).to(h.dtype)
        part.b_gradients[number].add_(grouped_outer(gy, _column(h, segment, number), ends))
        columns.append(grouped_rows(gy, part.b[number], ends))
    dh = (columns[0] if len(columns) == 1 else torch.cat(columns, 1)).mul_(segment.scales)
    part.a_gradient.add_(grouped_outer(dh, _input_of(segment, x_TI, h.dtype, plan), ends))
    if not wanted:
        return None
    dx = grouped_rows(dh, part.a, ends)
    return dropped(dx, plan.dropout_of(segment)) if segment.drops else dx


def _column(h: Tensor, segment: Segment, number: int) -> Tensor:
    """Return the part of h [T', n R] that belongs to one linear."""
    if len(segment.part.names) == 1:
        return h
    rank = segment.part.rank
    return h[:, number * rank : (number + 1) * rank]


def _frozen_gradient(group: Group, gradients: Sequence[Tensor | None]) -> Tensor:
    """Return the sum of W^T g over the group's linears, in their order."""
    total: Tensor | None = None
    for frozen, gradient in zip(group.frozen, gradients, strict=True):
        if gradient is not None:
            part = frozen.input_gradient(gradient)
            total = part if total is None else total.add_(part)
    assert total is not None
    return total


def scale_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """Return the factor s by which B A is multiplied."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def install(model: PreTrainedModel) -> dict[str, LoraLinear]:
    """Wrap every adaptable linear of `model` in place; return them by PEFT's module names, in the model's order."""
    found = [(name, module, frozen_of(module)) for name, module in model.named_modules() if can_be_adapted(name)]
    wrapped: dict[str, LoraLinear] = {}
    for name, module, frozen in found:
        if frozen is None:
            continue
        parent, _, leaf = name.rpartition(".")
        wrapped[name] = LoraLinear(module, frozen)
        setattr(model.get_submodule(parent), leaf, wrapped[name])
    return wrapped


class Watch:
    """Notes which linears are called on the same tensor, one after the other, while it is open. One forward suffices."""

    def __init__(self, layers: Mapping[str, LoraLinear]) -> None:
        self._layers = layers
        self._calls: list[tuple[str, Tensor]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Watch:
        for name, layer in self._layers.items():
            hook = layer.register_forward_pre_hook(lambda _, inputs, name=name: self._calls.append((name, inputs[0])))
            self._hooks.append(hook)
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def groups(self) -> list[Group]:
        """Form the groups, in the order of calls, and tell each linear its own. A linear called never or twice stands alone."""
        calls = [name for name, _ in self._calls]
        groups: list[Group] = []
        last: Tensor | None = None
        for name, x in self._calls:
            alone = calls.count(name) > 1
            if not groups or alone or x is not last:
                groups.append(Group(len(groups)))
            last = None if alone else x
            if name not in groups[-1].names and not any(name in group.names for group in groups):
                groups[-1].names.append(name)
                groups[-1].frozen.append(self._layers[name].frozen)
        groups = [group for group in groups if group.names]
        self._calls.clear()
        for index, group in enumerate(groups):
            group.index = index
            for place, name in enumerate(group.names):
                self._layers[name].group, self._layers[name].place = group, place
        return groups


def switch(layers: Mapping[str, LoraLinear], factors: Mapping[str, Factors]) -> None:
    """Put one adapter's factors in place, by layer name; layers that are not named become plain."""
    for name, layer in layers.items():
        layer.factors = factors.get(name)


def shapes_of(layers: Mapping[str, LoraLinear]) -> dict[str, Shape]:
    """Return the sides of the layers, in the model's order."""
    return {name: Shape(layer.in_features, layer.out_features) for name, layer in layers.items()}


def initial_a(r: int, in_features: int, generator: torch.Generator) -> Tensor:
    """Return a fresh A [r, in_features]: uniform in +-1/sqrt(in_features), which is kaiming_uniform(a=sqrt(5)) as in PEFT."""
    bound = 1.0 / math.sqrt(in_features)
    return torch.empty(r, in_features).uniform_(-bound, bound, generator=generator)
