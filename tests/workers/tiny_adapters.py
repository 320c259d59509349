"""Adapters for tests: made by PEFT on tiny bases, or of one random module."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from tests.workers.tiny_bases import CLASSIFIER_TARGETS, TARGETS, logits, make_classifier, make_model
from workers.adapter import Adapter, lora_config, make_adapter
from workers.adapter_files import adapter_files

BASE = "b" * 32
OTHER_BASE = "c" * 32
BODY: dict[str, Any] = {"job_id": "j" * 32, "prompt_contract": "p" * 32, "training_view": "v" * 32, "data": {}, "created": 0.0}


def train_with_peft(folder: Path, family: str = "llama", *, seed: int = 0, zero: bool = False, **options: Any) -> torch.Tensor:
    """Save a PEFT adapter of random factors to `folder`; return the logits it gives on its base."""
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": TARGETS[family],
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": family == "gpt2",
    }
    return _randomise(get_peft_model(make_model(family), LoraConfig(**(settings | options))), folder, seed, zero)


def classify_with_peft(folder: Path, family: str, num_labels: int = 3, *, seed: int = 0, **options: Any) -> torch.Tensor:
    """Save a PEFT classifier of random factors, and a head other than the model's own; return the logits it gives."""
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": CLASSIFIER_TARGETS[family],
        "task_type": "SEQ_CLS",
        "fan_in_fan_out": family == "gpt2",
    }
    model = get_peft_model(make_classifier(family, num_labels=num_labels), LoraConfig(**(settings | options)))
    return _randomise(model, folder, seed, zero=False)


def _randomise(model: Any, folder: Path, seed: int, zero: bool) -> torch.Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or ("lora_B" in name and not zero) or "modules_to_save" in name:
                parameter.normal_()
    model.eval()
    expected = logits(model)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return expected


def write_files(folder: Path, adapter: Adapter) -> Path:
    folder.mkdir()
    for name, data in adapter_files(adapter).items():
        (folder / name).write_bytes(data)
    return folder


def random_adapter(seed: int = 0, *, alpha: float = 8, dropout: float = 0.0, name: str = "base") -> Adapter:
    """An adapter of one module, four to four features, rank 2."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "base_model.model.layer.q_proj.lora_A.weight": torch.randn(2, 4, generator=generator),
        "base_model.model.layer.q_proj.lora_B.weight": torch.randn(4, 2, generator=generator),
    }
    config = lora_config(
        r=2, lora_alpha=alpha, lora_dropout=dropout, use_rslora=False, target_modules=["q_proj"], base_model_name_or_path=name
    )
    return make_adapter(config, tensors, "a test")
