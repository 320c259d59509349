"""The bank: one adapter's factors in one flat buffer, with gradient and moments of the same shape.

Factors A and B of all layers are views into `weights`, their gradients views into `gradients`. AdamW, clipping, copying
and checking are then a few operations over one vector, whatever the number of layers. Offsets follow the model's order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infra.errors import BadInput
from workers.engine.dropout import generator_of
from workers.engine.lora import Factors, LoraLinear, initial_a, scale_of
from workers.spec import PeftSpec


@dataclass(frozen=True)
class _Place:
    a: slice
    b: slice
    in_features: int
    out_features: int


class Bank:
    """Weights, gradients and Adam's two moments of one adapter; vectors of `num_parameters`, float32 unless told otherwise."""

    def __init__(
        self,
        layers: Mapping[str, LoraLinear],
        targets: Sequence[str],
        peft: PeftSpec,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.peft = peft
        self.scale = scale_of(peft.lora_alpha, peft.r, peft.use_rslora)
        self._places = _lay_out(layers, targets, peft.r)
        self.num_parameters = sum(place.b.stop - place.a.start for place in self._places.values())
        self.weights = torch.zeros(self.num_parameters, device=device, dtype=dtype)
        self.gradients = torch.zeros_like(self.weights)
        self.first_moment = torch.zeros_like(self.weights)
        self.second_moment = torch.zeros_like(self.weights)
        self.factors = {name: self._factors(place) for name, place in self._places.items()}

    def _factors(self, place: _Place) -> Factors:
        r = self.peft.r
        a = self._leaf(place.a, (r, place.in_features))
        b = self._leaf(place.b, (place.out_features, r))
        return Factors(a, b, self.scale, self.peft.lora_dropout)

    def _leaf(self, part: slice, shape: tuple[int, int]) -> Tensor:
        """Return a leaf tensor that shares memory with `weights`, its gradient with `gradients` (autograd adds in place)."""
        leaf = self.weights[part].view(shape).requires_grad_(True)
        leaf.grad = self.gradients[part].view(shape)
        return leaf

    def initialise(self, seed: int) -> None:
        """Fresh weights: A random by (seed, layer name), B zero, so that the adapter starts as the plain base."""
        with torch.no_grad():
            for name, factors in self.factors.items():
                factors.a.copy_(initial_a(self.peft.r, factors.a.shape[1], generator_of("init", seed, name)))
                factors.b.zero_()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take weights in PEFT's names, as `tensors()` gives them. Raises BadInput unless layers and rank are the bank's."""
        self._check(tensors)
        with torch.no_grad():
            for name, factors in self.factors.items():
                factors.a.copy_(tensors[f"base_model.model.{name}.lora_A.weight"])
                factors.b.copy_(tensors[f"base_model.model.{name}.lora_B.weight"])

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        expected = {
            f"base_model.model.{name}.{part}.weight": factor.shape
            for name, factors in self.factors.items()
            for part, factor in (("lora_A", factors.a), ("lora_B", factors.b))
        }
        if {name: tensor.shape for name, tensor in tensors.items()} != expected:
            raise BadInput(
                f"the initial adapter ({len(tensors) // 2} layers) differs in its layers or their rank from what is asked for "
                f"({len(self.factors)} layers of rank {self.peft.r}); give peft.target_modules and peft.r what that adapter has."
            )

    def tensors(self, weights: Tensor | None = None) -> dict[str, Tensor]:
        """Return copies of all factors in PEFT's names, from `weights` (a vector like the bank's) or the bank's own."""
        source = (self.weights if weights is None else weights).detach().cpu()
        named: dict[str, Tensor] = {}
        for name, place in self._places.items():
            named[f"base_model.model.{name}.lora_A.weight"] = source[place.a].view(self.peft.r, place.in_features).clone()
            named[f"base_model.model.{name}.lora_B.weight"] = source[place.b].view(place.out_features, self.peft.r).clone()
        return named


def _lay_out(layers: Mapping[str, LoraLinear], targets: Sequence[str], r: int) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    start = 0
    for name in targets:
        inputs, outputs = layers[name].in_features, layers[name].out_features
        middle, end = start + r * inputs, start + r * (inputs + outputs)
        places[name] = _Place(slice(start, middle), slice(middle, end), inputs, outputs)
        start = end
    return places
