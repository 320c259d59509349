"""Classification heads: what stands behind a frozen model's hidden states, by family, and the weights one starts from.

A base serves jobs with different numbers of labels, so a head belongs to an adapter and the one that transformers builds
into the model is never used. Its form is transformers' own, and its tensors bear PEFT's names, so that a saved adapter works in
both. The formula, h [T, D] being the last hidden states of a sequence (after the final norm):

    p = h[first]        BERT, RoBERTa: the token that the tokenizer puts in front ([CLS], <s>)
      | h[last]         decoders: the last token, which alone has seen all others
    p = pooler(p)       BERT: a frozen dense layer and tanh, part of the base
    logits = layers(p)  affine, with tanh between RoBERTa's two

Heads have no dropout, unlike transformers' own while training: the adapter's dropout is the only one, on its LoRA branch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from workers.architecture import ROBERTAS
from workers.engine.dropout import generator_of
from workers.families import BERTS, refuse_other_families

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class HeadLayer:
    """One affine layer of a head: x W^T + b, then the activation."""

    name: str
    """Relative to the head's module: "" for the module itself, else "dense", "out_proj"."""
    in_features: int
    out_features: int | None
    """None: as many as there are labels."""
    has_bias: bool
    activation: Literal["tanh"] | None = None

    def tensor_name(self, part: Literal["weight", "bias"]) -> str:
        """Return the name of a tensor relative to the head's module: "weight", "dense.weight"."""
        return f"{self.name}.{part}" if self.name else part


@dataclass(frozen=True)
class HeadShape:
    """The form of a family's head."""

    module: Literal["score", "classifier"]
    """The module's name in the model, which PEFT lists in modules_to_save."""
    layers: tuple[HeadLayer, ...]
    """In the order they are applied."""
    pooling: Literal["first", "last"]
    """Which position of a sequence is classified."""
    pooler: str | None
    """Path of a frozen module of the base that is applied before; it takes hidden states [N, 1, D] and gives [N, D]."""
    initializer_range: float
    """Standard deviation of fresh weights."""

    def tensor_shapes(self, num_labels: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor by its name relative to the head's module, in the order of the layers."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in self.layers:
            out_features = layer.out_features or num_labels
            shapes[layer.tensor_name("weight")] = (out_features, layer.in_features)
            if layer.has_bias:
                shapes[layer.tensor_name("bias")] = (out_features,)
        return shapes

    def peft_name(self, name: str) -> str:
        """Return the name under which PEFT saves a tensor: "weight" -> "base_model.model.score.weight"."""
        return f"{_PEFT_PREFIX}{self.module}.{name}"


def head_of(model: PreTrainedModel) -> HeadShape:
    """Return the form of the head that a model's family has. Raises BadInput for a family that cannot be used to classify."""
    config = model.config
    refuse_other_families(config.model_type)
    width, deviation = int(config.hidden_size), float(getattr(config, "initializer_range", None) or 0.02)
    match config.model_type:
        case family if family in BERTS:
            single = (HeadLayer("", width, None, True),)
            return HeadShape("classifier", single, "first", f"{model.base_model_prefix}.pooler", deviation)
        case family if family in ROBERTAS:
            double = (HeadLayer("dense", width, width, True, "tanh"), HeadLayer("out_proj", width, None, True))
            return HeadShape("classifier", double, "first", None, deviation)
        case _:
            return HeadShape("score", (HeadLayer("", width, None, False),), "last", None, deviation)


def first_position(model: PreTrainedModel) -> int:
    """Return the position id of a sequence's first token: RoBERTa counts from behind its padding id, all others from 0."""
    return int(model.config.pad_token_id) + 1 if model.config.model_type in ROBERTAS else 0


def fresh_head(shape: HeadShape, num_labels: int, seed: int) -> dict[str, Tensor]:
    """Return a head to start from, as transformers does: weights normal, biases zero. A function of seed and names alone.

    Float32 on the CPU, under names relative to the head's module.
    """
    tensors = {name: torch.zeros(size) for name, size in shape.tensor_shapes(num_labels).items()}
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            tensor.normal_(0.0, shape.initializer_range, generator=generator_of("head", seed, f"{shape.module}.{name}"))
    return tensors


def apply_head(shape: HeadShape, tensors: Mapping[str, Tensor], pooled_ND: Tensor) -> Tensor:
    """Return logits [N, labels] of pooled states: one adapter's head alone. `tensors` are named as `fresh_head` names them."""
    x = pooled_ND
    for layer in shape.layers:
        bias = tensors[layer.tensor_name("bias")] if layer.has_bias else None
        x = torch.nn.functional.linear(x, tensors[layer.tensor_name("weight")], bias)
        x = torch.tanh(x) if layer.activation == "tanh" else x
    return x
