"""A base with an adapter's updates added to its weights, W' = W + s B A, written as a plain Hugging Face folder.

Tensors are read and written file by file, so that no model is built: a layer's update is formed in float64 and rounded once,
to the type its weight is stored in. Everything else in the folder (configuration, tokenizer, other tensors) stays byte for byte
what it was; two merges of the same adapter give the same bytes.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from infra.errors import BadInput
from workers.adapter import Adapter
from workers.weight_files import find_weights


def write_merged(adapter: Adapter, base: Path, files: tuple[str, ...], target: Path) -> None:
    """Write the merged base to the empty folder `target`; `files` are the names of those that make up the base.

    Raises BadInput if a layer's weight is not stored as such: under another name, packed in 4 bits, or joined with others.
    """
    weights = find_weights(base)
    names = _names_by_module(adapter, weights)
    for path in weights:
        _write_weights(adapter, path, {name: module for module, name in names.items()}, target / path.name)
    for name in set(files) - {path.name for path in weights}:
        shutil.copyfile(base / name, target / name)


def rounding_of(adapter: Adapter, base: Path) -> float:
    """Return the epsilon of the coarsest type in which an adapted weight is stored, and hence to which its sum is rounded."""
    weights = find_weights(base)
    wanted = set(_names_by_module(adapter, weights).values())
    found = {torch.float32}
    for path in weights:
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name)[:1].dtype for name in wanted & set(file.keys())}
    return max(torch.finfo(dtype).eps for dtype in found)


def _names_by_module(adapter: Adapter, weights: tuple[Path, ...]) -> dict[str, str]:
    """Return the stored name of each adapted layer's weight: the module's own, or without the model's outermost name."""
    stored: set[str] = set()
    for path in weights:
        with safe_open(path, framework="pt") as file:
            stored |= set(file.keys())
    found = {}
    for module in adapter.modules:
        candidates = candidate_names(module)
        name = next((one for one in candidates if one in stored), None)
        if name is None:
            raise BadInput(
                f"the base stores no tensor {candidates[0]}, so the adapter cannot be merged into its files; "
                "export the adapter for PEFT and merge with merge_and_unload."
            )
        found[module] = name
    return found


def candidate_names(module: str) -> tuple[str, str]:
    """Return the names under which a base may store a layer's weight, the likelier one first."""
    return f"{module}.weight", f"{module.partition('.')[2]}.weight"


def _write_weights(adapter: Adapter, path: Path, modules: Mapping[str, str], target: Path) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    for name in tensors.keys() & modules.keys():
        tensors[name] = _merged(adapter, modules[name], tensors[name])
    save_file(tensors, target, metadata or {"format": "pt"})


def _merged(adapter: Adapter, module: str, weight: Tensor) -> Tensor:
    a, b = adapter.factors(module)
    update = (b.double() @ a.double()) * adapter.scale(module)
    if adapter.config["fan_in_fan_out"]:  # Conv1D keeps its weight transposed
        update = update.T
    if not weight.is_floating_point() or weight.shape != update.shape:
        raise BadInput(
            f"the base stores {module} as {str(weight.dtype).removeprefix('torch.')} of {'x'.join(map(str, weight.shape))}, not "
            f"as a plain {'x'.join(map(str, update.shape))} weight; merge into a base that is not quantised."
        )
    return (weight.double() + update).to(weight.dtype).contiguous()
