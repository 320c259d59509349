"""Adapters as PEFT's two files: our own, always the same bytes for the same adapter, and folders that others wrote.

A classifier's labels stand in the header of its weights (safetensors' own metadata), since PEFT's configuration has no
place for them; PEFT and others pass them over.

Others' folders are read strictly: what this version does not carry out is refused by name rather than dropped. Nothing is
looked up on a hub and nothing is unpickled.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from infra.errors import BadInput
from workers.adapter import (
    HEAD_MODULES,
    Adapter,
    by_pattern,
    canonical_targets,
    head_module_of,
    head_tensors,
    lora_config,
    make_adapter,
    modules_of,
    num_outputs,
)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FILE_NAMES = (CONFIG_NAME, WEIGHTS_NAME)
LABELS_KEY = "labels"
"""Key of the metadata in the weights' header: a JSON list of a classifier's labels, in the order of its logits."""
# fmt: off
CARRIED = frozenset({
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out",
    "bias", "target_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "init_lora_weights",
})
"""Keys of a foreign configuration that are read."""
WITHOUT_EFFECT = frozenset({
    "revision", "inference_mode", "peft_version", "auto_mapping", "megatron_core", "runtime_config", "qalora_group_size",
    "exclude_modules", "layers_to_transform", "layers_pattern", "eva_config", "loftq_config", "corda_config", "lora_ga_config",
    "ensure_weight_tying",
})
"""Keys that only steered how the adapter was made; which layers it has is read from its tensors. Others must be empty."""
# fmt: on
HARMLESS_INITS = ("true", "false", "gaussian", "orthogonal", "eva")
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that alter the base's weights (PEFT: convert with path_initial_model_for_weight_conversion)."""


def adapter_files(adapter: Adapter) -> dict[str, bytes]:
    """Return the content of PEFT's files by name; the bytes are a function of the adapter alone."""
    config = json.dumps(adapter.config, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return {CONFIG_NAME: config.encode(), WEIGHTS_NAME: _weights(adapter)}


def _weights(adapter: Adapter) -> bytes:
    metadata = {LABELS_KEY: json.dumps(adapter.labels, ensure_ascii=False)} if adapter.labels else None
    return safetensors.torch.save(adapter.tensors, metadata)


def parse_adapter(files: Mapping[str, bytes], where: str, labels: Sequence[str] | None = None) -> Adapter:
    """Read the content of PEFT's files; raise BadInput, naming `where`, if they are damaged or ask for what is not plain LoRA.

    `labels` name a classifier's outputs where the files themselves do not; without them they are called as transformers does:
    LABEL_0, LABEL_1, ...
    """
    raw = _json_object(files[CONFIG_NAME], where)
    _refuse_unsupported(raw, where)
    tensors = _tensors(files[WEIGHTS_NAME], where)
    heads = sorted({module for module in map(head_module_of, tensors) if module is not None})
    config = _canonical(raw, modules_of(tensors), heads, where)
    if not heads:
        return make_adapter(config, tensors, where)
    adapter_labels = _labels(files[WEIGHTS_NAME], where) or labels or _default_labels(heads[0], tensors)
    return make_adapter(config, tensors, where, adapter_labels)


def _default_labels(head: str, tensors: Mapping[str, Tensor]) -> list[str]:
    return [f"LABEL_{number}" for number in range(num_outputs(head_tensors(head, tensors)) or 0)]


def _labels(data: bytes, where: str) -> list[str]:
    """Return the labels that stand in the header of weights which `safetensors` has accepted; empty if there are none."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    text = (header.get("__metadata__") or {}).get(LABELS_KEY)
    if text is None:
        return []
    try:
        labels = json.loads(text)
    except (ValueError, RecursionError):
        labels = None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise BadInput(f"{where}: the metadata '{LABELS_KEY}' of {WEIGHTS_NAME} is no JSON list of texts; remove it.")
    return labels


def read_adapter_folder(path: Path) -> Adapter:
    """Read an adapter from a PEFT folder on disk; raise BadInput with the way out if it cannot be taken as it is."""
    if not path.is_dir():
        raise BadInput(f"there is no adapter folder {path}; give a folder with {CONFIG_NAME} and {WEIGHTS_NAME}.")
    if not (path / CONFIG_NAME).is_file():
        hint = "it holds a base model" if (path / "config.json").is_file() else "save the adapter with PEFT's save_pretrained"
        raise BadInput(f"{path} has no {CONFIG_NAME}; {hint}.")
    if not (path / WEIGHTS_NAME).is_file():
        if (path / "adapter_model.bin").is_file():
            raise BadInput(
                f"{path} has pickle weights only (adapter_model.bin); lorafleet never unpickles; where you trust them, load the "
                "adapter with PEFT and save it again (save_pretrained writes safetensors)."
            )
        raise BadInput(f"{path} has no {WEIGHTS_NAME}; save the adapter with PEFT's save_pretrained.")
    files = {name: (path / name).read_bytes() for name in FILE_NAMES}
    return parse_adapter(files, str(path), _labels_beside(path))


def _labels_beside(path: Path) -> list[str] | None:
    """Return the label names of a model's config.json that was saved with the adapter (id2label), if there is one."""
    if not (path / "config.json").is_file():
        return None
    by_number = _json_object((path / "config.json").read_bytes(), str(path)).get("id2label")
    if not isinstance(by_number, dict):
        return None
    labels = [by_number.get(str(number)) for number in range(len(by_number))]
    if not all(isinstance(label, str) for label in labels):
        raise BadInput(f"{path}: id2label in config.json does not name the labels 0 to {len(labels) - 1}; correct or remove it.")
    return [str(label) for label in labels]


def _json_object(data: bytes, where: str) -> dict[str, Any]:
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        raise BadInput(f"{where}: {CONFIG_NAME} is not valid JSON; copy the adapter again.") from None
    if not isinstance(raw, dict):
        raise BadInput(f"{where}: {CONFIG_NAME} is not a JSON object; copy the adapter again.")
    return raw


def _tensors(data: bytes, where: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise BadInput(f"{where}: {WEIGHTS_NAME} is truncated or damaged ({str(error)[:120]}); copy the adapter again.") from None


def _refuse_unsupported(raw: Mapping[str, Any], where: str) -> None:
    method = raw.get("peft_type")
    if method != "LORA":
        raise BadInput(f"{where} is a {method} adapter; this version takes LORA only.")
    if raw.get("use_dora"):
        raise BadInput(f"{where} was trained with DoRA (use_dora); this version takes plain LoRA only, train it again without.")
    if raw.get("bias", "none") != "none":
        raise BadInput(
            f"{where} trained biases (bias: {raw['bias']!r}), which belong to the base; train it again with bias 'none'."
        )
    init = str(raw.get("init_lora_weights", True)).lower()
    if init.startswith(BASE_CHANGING_INITS):
        raise BadInput(
            f"{where} was initialised with {init}, which changed its base; save it again with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    if init not in HARMLESS_INITS:
        raise BadInput(
            f"{where} uses init_lora_weights {init[:60]!r}, which this version does not know; it takes plain LoRA only."
        )
    saved = raw.get("modules_to_save") or []
    carried = CARRIED if isinstance(saved, list) and set(saved) <= set(HEAD_MODULES) else CARRIED - {"modules_to_save"}
    for key in sorted(raw.keys() - carried - WITHOUT_EFFECT):
        if raw[key]:
            raise BadInput(f"{where} uses {key[:60]!r} ({str(raw[key])[:60]}), which this version does not carry out.")


def _canonical(raw: Mapping[str, Any], modules: list[str], heads: list[str], where: str) -> dict[str, Any]:
    """Return the configuration in our form; patterns over modules become values by module."""
    r = _number(raw, "r", where)
    if not isinstance(r, int):
        raise BadInput(f"{where}: {CONFIG_NAME} has r {r!r}, expected a whole number.")
    return lora_config(
        r=r,
        lora_alpha=_number(raw, "lora_alpha", where),
        lora_dropout=_number(raw, "lora_dropout", where) if raw.get("lora_dropout") else 0.0,
        use_rslora=bool(raw.get("use_rslora", False)),
        target_modules=_targets(raw, modules, where),
        base_model_name_or_path=_text(raw, "base_model_name_or_path", where),
        task_type=_text(raw, "task_type", where),
        fan_in_fan_out=bool(raw.get("fan_in_fan_out", False)),
        modules_to_save=heads,
        rank_pattern=_by_module(raw, "rank_pattern", modules, where),
        alpha_pattern=_by_module(raw, "alpha_pattern", modules, where),
    )


def _targets(raw: Mapping[str, Any], modules: list[str], where: str) -> list[str]:
    """Return a plain list as it is; what narrows or matches by regular expression becomes the modules' full names."""
    targets = raw.get("target_modules")
    narrowed = any(raw.get(key) is not None for key in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    if narrowed or isinstance(targets, str) or targets is None:
        return canonical_targets(modules)
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise BadInput(f"{where}: target_modules in {CONFIG_NAME} is not a list of names.")
    return sorted(set(targets))


def _number(raw: Mapping[str, Any], key: str, where: str) -> int | float:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise BadInput(f"{where}: {CONFIG_NAME} has {key} {value!r}, expected a positive number.")
    return value


def _text(raw: Mapping[str, Any], key: str, where: str) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise BadInput(f"{where}: {CONFIG_NAME} has {key} {value!r}, expected a text.")
    return value


def _by_module(raw: Mapping[str, Any], key: str, modules: list[str], where: str) -> dict[str, Any]:
    """Return what a pattern over module names gives each module it matches."""
    patterns = raw.get(key) or {}
    if not isinstance(patterns, dict):
        raise BadInput(f"{where}: {key} in {CONFIG_NAME} is not an object of numbers by module.")
    values = {pattern: _number(patterns, pattern, where) for pattern in patterns}
    try:
        found = {module: by_pattern(values, module, None) for module in modules}
    except re.error:
        raise BadInput(f"{where}: {key} in {CONFIG_NAME} holds a pattern that is no regular expression.") from None
    return {module: value for module, value in found.items() if value is not None}
