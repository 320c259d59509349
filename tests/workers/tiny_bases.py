"""Tiny random bases of real families, written to disk as people have them, for tests."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from workers.loading import quiet

SHARED: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE: dict[str, Any] = SHARED | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**WIDE, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**WIDE, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(**SHARED, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
FAMILIES = sorted(CONFIGS)
TARGETS = {"llama": ["q_proj", "down_proj"], "qwen2": ["v_proj", "gate_proj"], "gpt2": ["c_attn", "c_fc"]}


def make_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random model; `changes` are set in its configuration."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_config(config).eval()


def make_base(folder: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """Write a random base to `folder`."""
    save(make_model(family, seed=seed, **changes), folder)
    return folder


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Save a model without the progress bar that transformers draws."""
    with quiet():
        model.save_pretrained(folder, **options)
    return folder


def copy_with_config(base: Path, folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """Copy a base with its raw config.json edited in place by `edit`."""
    shutil.copytree(base, folder)
    raw = json.loads((folder / "config.json").read_text())
    edit(raw)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def logits(model: Any) -> torch.Tensor:
    """Return the logits of a fixed row."""
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 23)[None]).logits
