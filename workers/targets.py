"""Which linear layers an adapter touches: presets and module names against what a base has.

Works on names and shapes alone, so that a job is checked without building the model.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import TypeVar

from infra.errors import BadInput
from workers.spec import PeftSpec

ATTENTION_PARTS = ("attn", "attention", "self_attention")
MLP_PARTS = ("mlp", "feed_forward", "ffn", "fc1", "fc2", "intermediate", "output")
NOT_ADAPTED = (
    "lm_head", "embed_tokens", "embed_positions", "embeddings", "wte", "wpe", "score", "classifier", "embed_out", "pooler", "cls",
)  # fmt: skip
"""Heads and embeddings, as PEFT's all-linear leaves the output head alone; BERT's pooler, which is part of what a head reads,
and its heads of pretraining."""


Value = TypeVar("Value")


def linears_of_tensors(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    """Return module name -> weight shape of the layers that can be adapted, from a base's tensor names and shapes."""
    modules = {
        name.removesuffix(".weight"): (int(shape[0]), int(shape[1]))
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }
    return {name: shape for name, shape in modules.items() if can_be_adapted(name)}


def can_be_adapted(module: str) -> bool:
    """Tell whether a linear layer of this name is one an adapter may touch: not a head, not an embedding."""
    return not any(part in NOT_ADAPTED for part in module.split("."))


def select_targets(target_modules: str | Sequence[str], modules: Sequence[str]) -> list[str]:
    """Return the full names that a preset or a list of names selects, in the model's order.

    A listed name matches a module that equals it or ends with "." + it, as in PEFT. Raises BadInput, listing what
    there is, when the preset or any one name matches nothing.
    """
    if isinstance(target_modules, str):
        chosen = [name for name in modules if _in_preset(target_modules, name)]
        if not chosen:
            raise BadInput(f"the preset '{target_modules}' matches no layer of this base; {_what_there_is(modules)}")
        return chosen
    for wanted in target_modules:
        if not any(_matches(wanted, name) for name in modules):
            raise BadInput(f"target_modules: '{wanted}' matches no linear layer of this base. {_hint(wanted, modules)}")
    return [name for name in modules if any(_matches(wanted, name) for wanted in target_modules)]


def ranks_of(peft: PeftSpec, targets: Sequence[str]) -> dict[str, int]:
    """Return the rank of each target: `rank_pattern` where it names the layer (the longest name that does), else `r`.

    Raises BadInput if the pattern names a layer that is not adapted.
    """
    _check_pattern("rank_pattern", peft.rank_pattern, targets)
    return {name: _of_pattern(peft.rank_pattern, name, peft.r) for name in targets}


def alphas_of(peft: PeftSpec, targets: Sequence[str]) -> dict[str, float]:
    """Return lora_alpha of each target: `alpha_pattern` where it names the layer (the longest name that does), else `lora_alpha`.

    Raises BadInput if the pattern names a layer that is not adapted.
    """
    _check_pattern("alpha_pattern", peft.alpha_pattern, targets)
    return {name: _of_pattern(peft.alpha_pattern, name, peft.lora_alpha) for name in targets}


def _of_pattern(pattern: Mapping[str, Value], name: str, default: Value) -> Value:
    wanted = max((key for key in pattern if _matches(key, name)), key=len, default=None)
    return default if wanted is None else pattern[wanted]


def _check_pattern(what: str, pattern: Mapping[str, object], targets: Sequence[str]) -> None:
    for key in pattern:
        if not any(_matches(key, name) for name in targets):
            raise BadInput(f"peft.{what}: '{key}' names no adapted layer. {_hint(key, targets)}")


def check_ranks(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise BadInput if a rank exceeds the smaller side of its layer: such an update has more parameters than the layer."""
    for name, r in ranks.items():
        if r > min(shapes[name]):
            rows, columns = shapes[name]
            raise BadInput(
                f"peft.r is {r}, larger than the layer {name} of {rows} x {columns} allows; use at most {min(shapes[name])}."
            )


def short_names(modules: Sequence[str]) -> list[str]:
    """Return the distinct last parts of module names, sorted: q_proj, k_proj, ..."""
    return sorted({name.rsplit(".", 1)[-1] for name in modules})


def _matches(wanted: str, name: str) -> bool:
    return name == wanted or name.endswith("." + wanted)


def _in_preset(preset: str, name: str) -> bool:
    parents = name.split(".")
    in_attention = any(part in ATTENTION_PARTS or part.endswith("_attn") for part in parents)
    match preset:
        case "attention":
            return in_attention
        case "mlp":
            return not in_attention and any(part in MLP_PARTS for part in parents)
        case _:
            return True


def _hint(wanted: str, modules: Sequence[str]) -> str:
    close = difflib.get_close_matches(wanted, short_names(modules), n=1)
    return f"Did you mean '{close[0]}'? There is: {', '.join(short_names(modules))}." if close else _what_there_is(modules)


def _what_there_is(modules: Sequence[str]) -> str:
    return f"There is: {', '.join(short_names(modules))}."
