"""What training needs in memory, predicted, and what a device has: whether a job fits, and how many tokens a pass may have.

    base         bytes of its parameters, counted as they lie in memory
    banks        per adapter: weights, gradient and two moments, and a copy of its best weights beside them
    activations  per token, what autograd keeps between forward and backward (below)
    head         one portion of logits and its gradient, whatever the tokens

Per token and layer autograd keeps, in units of the hidden size h and the intermediate size i, with k the width of keys and
values: inputs of two norms (2 h), the normed inputs that the adapters see (2 h), query, keys, values and the attention's output
(2 h + 2 k), gate, its activation, up and their product (4 i), and the rotated query and keys (h + k). Where the base is not in
float32, the adapters' branches keep their inputs (3 h + i) in float32 as well. With checkpointing only each layer's input (h) is
kept, and one layer at a time is computed again.

A prediction is a bound for planning, not a promise of the allocator: `SLACK` covers what it does not know.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

SLACK = 1.25
"""Fragments, temporaries of the kernels, buffers of libraries."""
SHARE_OF_FREE = 0.8
"""Of what a device has free, so much may be planned with: other processes live beside us."""
HEAD_BYTES = 3 * (128 << 20)
"""One portion of logits in the head, its softmax and its gradient (see `engine/lm_head.py`)."""
BANK_COPIES = 5
"""Weights, gradient, two moments, best weights."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class BaseShape:
    """The sides of a base that memory depends on."""

    num_bytes: int
    """Of its parameters and buffers."""
    hidden: int
    intermediate: int
    keys: int
    """Width of keys (and of values)."""
    num_layers: int
    vocabulary: int
    element_bytes: int
    """Of one activation."""

    def bytes_per_token(self, *, checkpointing: bool) -> int:
        """Return what a pass keeps for each of its tokens."""
        h, i, k = self.hidden, self.intermediate, self.keys
        layer = (7 * h + 3 * k + 4 * i) * self.element_bytes
        if self.element_bytes < 4:
            layer += (3 * h + i) * 4
        if checkpointing:
            return int(SLACK * (self.num_layers * h * self.element_bytes + layer))
        return int(SLACK * self.num_layers * layer)

    @property
    def head_bytes(self) -> int:
        """Return what the head needs beside the tokens' own."""
        return min(HEAD_BYTES, 3 * 4 * 8192 * self.vocabulary)


def shape_of(model: nn.Module) -> BaseShape:
    """Return the shape of a loaded base; sides that its configuration does not name are taken from the hidden size."""
    config = _text_config(model)
    hidden = int(_first(config, ("hidden_size", "n_embd", "d_model"), 1))
    heads = int(_first(config, ("num_attention_heads", "n_head"), 1))
    per_head = int(_first(config, ("head_dim",), hidden // heads))
    tensors = [*model.parameters(), *model.buffers()]
    dtypes = [tensor.element_size() for tensor in model.parameters() if tensor.is_floating_point()]
    return BaseShape(
        num_bytes=sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values()),
        hidden=hidden,
        intermediate=int(_first(config, ("intermediate_size", "n_inner", "ffn_dim"), 4 * hidden)),
        keys=int(_first(config, ("num_key_value_heads",), heads)) * per_head,
        num_layers=int(_first(config, ("num_hidden_layers", "n_layer"), 1)),
        vocabulary=int(_first(config, ("vocab_size",), 1)),
        element_bytes=max(dtypes, default=4),
    )


def _text_config(model: nn.Module) -> Mapping[str, Any]:
    config = model.config
    return config.get_text_config().to_dict()  # type: ignore[union-attr,operator]


def _first(config: Mapping[str, Any], names: tuple[str, ...], otherwise: int) -> int:
    return next((config[name] for name in names if config.get(name) is not None), otherwise)


def bank_bytes(num_parameters: int, element_bytes: int = 4) -> int:
    """Return what an adapter of so many parameters needs in the banks."""
    return BANK_COPIES * num_parameters * element_bytes


@dataclass(frozen=True)
class Memory:
    """What a host may use beside its base and the banks it has. Used by one thread."""

    shape: BaseShape
    device: torch.device
    limit_bytes: int | None = None
    """For base, banks and passes together; None is what the device has."""

    def room(self, bank_bytes: int, extra_bytes: int = 0) -> int:
        """Return the bytes that are left beside banks of this size, and `extra_bytes` that are to come; 0 at least."""
        if self.limit_bytes is not None:
            return max(0, self.limit_bytes - self.shape.num_bytes - bank_bytes - extra_bytes)
        return max(0, int(SHARE_OF_FREE * free_bytes(self.device)) - extra_bytes)

    def tokens_that_fit(self, bank_bytes: int, extra_bytes: int = 0, *, checkpointing: bool) -> int:
        """Return how many tokens a pass may have, 0 if there is no room for any."""
        left = self.room(bank_bytes, extra_bytes) - self.shape.head_bytes
        return max(0, left) // max(1, self.shape.bytes_per_token(checkpointing=checkpointing))

    def refuses(self, bank_bytes: int, tokens: int, *, checkpointing: bool) -> bool:
        """Tell whether a pass of so many tokens must not be tried.

        An accelerator says so itself. A CPU does not: the system ends the process that took too much.
        """
        if self.limit_bytes is None and self.device.type != "cpu":
            return False
        needed = tokens * self.shape.bytes_per_token(checkpointing=checkpointing)
        if self.limit_bytes is not None:
            return needed > self.room(bank_bytes) - self.shape.head_bytes
        return needed / SLACK > free_bytes(self.device)


def free_bytes(device: torch.device) -> int:
    """Return what a device has free for this process: on CUDA also what torch holds and does not use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    bounds = [psutil.virtual_memory().available, _cgroup_room(CGROUP)]
    return min(bound for bound in bounds if bound is not None)


def _cgroup_room(folder: Path) -> int | None:
    """Return what a container may still take (files it cached count as free), None if it is not bounded."""
    for limit, usage, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
            stat = (folder / limit).with_name("memory.stat").read_text().split()
        except (OSError, ValueError):  # no such file, or "max"
            continue
        files = int(stat[stat.index(cached) + 1]) if cached in stat else 0
        return max(0, most - used + files)
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an allocator refused: torch's on an accelerator, torch's on the CPU (a plain RuntimeError), or Python's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def give_back_cache(device: torch.device) -> None:
    """Return what torch holds and does not use, after memory ran out."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
