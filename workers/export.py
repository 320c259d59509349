"""An adapter in the form that a consumer reads right, and why it needs it: pure conversion, no files and no store.

Most consumers read a plain LoRA as it is. Where one would not, the universal form computes the same under every rule there
is: the true scale s of each layer folded into B, lora_alpha = r so that the scale left over is 1, one rank for all layers
(rows and columns of zeros added), pairs of zeros for layers of an adapted type that have none, targets listed, no patterns.

    s B A = 1 [s B, 0] [A; 0]       up to the rounding of s B to float32, which is none where s is a power of two
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from infra.errors import BadInput
from workers.adapter import A_SUFFIX, B_SUFFIX, PREFIX, Adapter, canonical_targets, lora_config, make_adapter
from workers.consumers import CONSUMERS, Consumer
from workers.engine.lora import Factors, scale_of
from workers.targets import can_be_adapted

Form = Literal["plain", "universal", "merged", "refused"]


@dataclass(frozen=True)
class Layers:
    """What of a base an adapter may touch."""

    linears: Mapping[str, tuple[int, int]]
    """Inputs and outputs of each layer that may be adapted, by module name."""
    modules: frozenset[str]
    """Names of all modules, against which short target names must be unambiguous."""


@dataclass(frozen=True)
class Compatibility:
    """How a consumer takes an adapter."""

    consumer: str
    form: Form
    reasons: tuple[str, ...]
    """Why it is refused, or what would be read wrong in the plain form."""
    notes: tuple[str, ...]
    """What whoever starts the server must know."""


def layers_of(model: PreTrainedModel) -> Layers:
    """Return the layers of a model, which may be on the meta device."""
    linears = {name: _shape(layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    return Layers(
        {name: shape for name, shape in linears.items() if can_be_adapted(name)},
        frozenset(name for name, _ in model.named_modules() if name),
    )


def _shape(layer: nn.Linear | Conv1D) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    rows, columns = layer.weight.shape
    return rows, columns


def compatibility(adapter: Adapter, consumer: Consumer, layers: Layers, max_rank: int | None = None) -> Compatibility:
    """Return the form `consumer` needs and why. `max_rank` is the highest rank the server is started for, where that is known."""
    refusals = tuple(_refusals(adapter, consumer))
    if refusals:
        return Compatibility(consumer.name, "refused", refusals, ())
    if consumer.name == "merged":
        return Compatibility(
            "merged", "merged", (), ("the adapter becomes part of the weights: one model, one task, no swapping",)
        )
    misread = tuple(_misread(adapter, consumer, layers))
    rank = export_rank(adapter, consumer, universal=bool(misread))
    limit = min(one for one in (consumer.max_rank, max_rank, rank) if one is not None)
    if rank > limit:
        return Compatibility(consumer.name, "refused", (_too_high(rank, limit, consumer),), ())
    return Compatibility(consumer.name, "universal" if misread else "plain", misread, tuple(_notes(rank, consumer)))


def report(adapter: Adapter, layers: Layers, max_rank: int | None = None) -> list[Compatibility]:
    """Return how every consumer takes the adapter."""
    return [compatibility(adapter, consumer, layers, max_rank) for consumer in CONSUMERS.values()]


def _refusals(adapter: Adapter, consumer: Consumer) -> Iterable[str]:
    config = adapter.config
    if config.get("use_dora") and not consumer.takes_dora:
        yield f"it was trained with DoRA, which {consumer.title} does not compute; serve it with PEFT"
    if config.get("bias", "none") != "none":
        yield f"it trained biases (bias: {config['bias']!r}), which {consumer.title} would drop; train it again with bias 'none'"
    if adapter.head_module is not None and not consumer.takes_heads:
        yield f"it is a classifier with a head of its own, which {consumer.title} does not load; serve it with PEFT (--for peft)"


def _misread(adapter: Adapter, consumer: Consumer, layers: Layers) -> Iterable[str]:
    """Say what of the plain form the consumer would read wrong."""
    config = adapter.config
    if consumer.reads_patterns:
        return
    wrong = [name for name in adapter.modules if plain_scale(adapter, consumer, name) != adapter.scale(name)]
    if wrong:
        cause = "rsLoRA" if config["use_rslora"] and not consumer.reads_rslora else "patterns of rank or alpha"
        yield (
            f"{consumer.title} passes over {cause}: it would scale {wrong[0]} by {plain_scale(adapter, consumer, wrong[0]):.6g} "
            f"instead of {adapter.scale(wrong[0]):.6g} ({len(wrong)} of {len(adapter.modules)} layers)"
        )
    if not consumer.rank_of_tensor and len(_ranks(adapter)) > 1:
        yield f"{consumer.title} expects one rank for all layers, this adapter has {', '.join(map(str, sorted(_ranks(adapter))))}"
    if config["rank_pattern"] and max(_ranks(adapter)) != config["r"] and len(_ranks(adapter)) == 1:
        yield f"{consumer.title} takes r {config['r']} from the configuration, the factors have rank {max(_ranks(adapter))}"
    if not float(config["lora_alpha"]).is_integer():
        yield f"lora_alpha is {config['lora_alpha']}, and PEFT's field is a whole number, as {consumer.title} may insist"
    missing = missing_layers(adapter, layers)
    if consumer.drops_incomplete_types and missing:
        yield f"{consumer.title} drops a type of layer where one lacks it, and {missing[0]} has no factors ({len(missing)} such)"


def plain_scale(adapter: Adapter, consumer: Consumer, module: str) -> float:
    """Return the factor by which a consumer would multiply B A of a layer if it got the adapter as it is stored."""
    return _scale(adapter.config, consumer, adapter.factors(module)[0].shape[0])


def _scale(config: Mapping[str, Any], consumer: Consumer, tensor_rank: int) -> float:
    r = tensor_rank if consumer.rank_of_tensor else int(config["r"])
    return scale_of(float(config["lora_alpha"]), r, bool(config["use_rslora"]) and consumer.reads_rslora)


def _ranks(adapter: Adapter) -> set[int]:
    return {adapter.factors(module)[0].shape[0] for module in adapter.modules}


def _too_high(rank: int, limit: int, consumer: Consumer) -> str:
    if consumer.max_rank is not None and rank > consumer.max_rank:
        return (
            f"its rank is {rank} and {consumer.title} serves {consumer.max_rank} at most; merge it into the base (--for merged)"
        )
    start = f"start the server with {consumer.rank_option} {rank}" if consumer.rank_option else "start the server for it"
    return f"its rank is {rank} and the server takes {limit} at most (--max-rank); {start}, or train a lower r"


def _notes(rank: int, consumer: Consumer) -> Iterable[str]:
    if consumer.default_max_rank is not None and rank > consumer.default_max_rank:
        yield f"start it with {consumer.rank_option} {rank}: the default is {consumer.default_max_rank}"
    if consumer.name == "llama-cpp":
        yield "convert it with llama.cpp's convert_lora_to_gguf.py; this export is its input"


def export_rank(adapter: Adapter, consumer: Consumer, *, universal: bool) -> int:
    """Return the rank of the export: the adapter's highest; for the universal form the next one the consumer has kernels for."""
    highest = max(_ranks(adapter))
    return next((rank for rank in consumer.ranks if rank >= highest), highest) if universal else highest


def missing_layers(adapter: Adapter, layers: Layers) -> list[str]:
    """Return the layers of an adapted type (the same name but for the layer's number) that the adapter has no factors for."""
    types = {layer_type(module) for module in adapter.modules}
    return sorted(name for name in layers.linears if layer_type(name) in types and name not in set(adapter.modules))


def layer_type(module: str) -> str:
    """Return a module's name with its numbers taken out: "model.layers.#.self_attn.q_proj"."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", module)


def exported(adapter: Adapter, consumer: Consumer, form: Form, layers: Layers, base_string: str | None) -> Adapter:
    """Return the adapter in a form; `base_string`, where given, becomes its base_model_name_or_path.

    Raises BadInput if folding the scale makes a number infinite.
    """
    name = adapter.config["base_model_name_or_path"] if base_string is None else base_string
    if form == "universal":
        return universal(adapter, export_rank(adapter, consumer, universal=True), layers, name)
    return replace(adapter, config=adapter.config | {"base_model_name_or_path": name})


def universal(adapter: Adapter, rank: int, layers: Layers, base_string: str | None) -> Adapter:
    """Return an adapter that computes the same under every consumer's rule. See the head of this module."""
    if adapter.head_module is not None:
        raise BadInput("a classifier's head has no universal form; export it for PEFT.")
    tensors: dict[str, Tensor] = {}
    for module in adapter.modules:
        tensors |= _pair(module, *_folded(adapter, module, rank))
    for module in missing_layers(adapter, layers):
        in_features, out_features = layers.linears[module]
        tensors |= _pair(module, torch.zeros(rank, in_features), torch.zeros(out_features, rank))
    modules = [*adapter.modules, *missing_layers(adapter, layers)]
    config = lora_config(
        r=rank,
        lora_alpha=rank,
        lora_dropout=adapter.config["lora_dropout"],
        use_rslora=False,
        target_modules=canonical_targets(modules, layers.modules),
        base_model_name_or_path=base_string,
        task_type=adapter.config["task_type"],
        fan_in_fan_out=adapter.config["fan_in_fan_out"],
    )
    return make_adapter(config, tensors, "the universal form of the adapter")


def _pair(module: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {f"{PREFIX}{module}{A_SUFFIX}": a, f"{PREFIX}{module}{B_SUFFIX}": b}


def _folded(adapter: Adapter, module: str, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [rank, in] and s B [out, rank], padded with zeros. The product is rounded once, from float64."""
    a, b = adapter.factors(module)
    padding = rank - a.shape[0]
    folded = (b.double() * adapter.scale(module)).float()
    return nn.functional.pad(a, (0, 0, 0, padding)), nn.functional.pad(folded, (0, padding))


def served_factors(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], consumer: Consumer, layers: Layers
) -> dict[str, Factors]:
    """Return what a consumer makes of an adapter's files: its rule in place of PEFT's. Patterns are passed over."""
    held = sorted(name.removeprefix(PREFIX).removesuffix(A_SUFFIX) for name in tensors if name.endswith(A_SUFFIX))
    pairs = {name: (tensors[f"{PREFIX}{name}{A_SUFFIX}"], tensors[f"{PREFIX}{name}{B_SUFFIX}"]) for name in held}
    if consumer.drops_incomplete_types:
        incomplete = {layer_type(name) for name in layers.linears if name not in pairs}
        pairs = {name: pair for name, pair in pairs.items() if layer_type(name) not in incomplete}
    return {name: Factors(a, b, _scale(config, consumer, a.shape[0])) for name, (a, b) in pairs.items()}
