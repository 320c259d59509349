"""Tiny random bases of real families, written to disk as people have them, for tests."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

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

ENCODER: dict[str, Any] = {key: value for key, value in WIDE.items() if key != "num_key_value_heads"} | {"type_vocab_size": 2}
ENCODER_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: BertConfig(**ENCODER),
    "roberta": lambda: RobertaConfig(**ENCODER | {"pad_token_id": 1, "bos_token_id": 0}),
}
CLASSIFIER_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    **CONFIGS,
    **ENCODER_CONFIGS,
    "gemma": lambda: GemmaConfig(**WIDE, head_dim=8),
    "mistral": lambda: MistralConfig(**WIDE),
    "phi": lambda: PhiConfig(**WIDE),
    "phi3": lambda: Phi3Config(**WIDE),
    "qwen3": lambda: Qwen3Config(**WIDE, head_dim=8),
}
CLASSIFIERS = sorted(CLASSIFIER_CONFIGS)
CLASSIFIER_TARGETS = {
    **TARGETS,
    "bert": ["query", "output.dense"],
    "roberta": ["query", "output.dense"],
    "gemma": ["q_proj"],
    "mistral": ["q_proj"],
    "phi": ["q_proj", "fc1"],
    "phi3": ["qkv_proj"],
    "qwen3": ["q_proj"],
}
WORDS = ("hello", "good", "morning", "bye", "see", "you", "later", "pay", "my", "bill", "now", "card", "lost", "money", "sent")


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


def make_classifier(family: str, *, num_labels: int = 2, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random model for classification, head and all; `changes` are set in its configuration."""
    torch.manual_seed(seed)
    config = CLASSIFIER_CONFIGS[family]()
    for key, value in ({"num_labels": num_labels} | changes).items():
        setattr(config, key, value)
    return AutoModelForSequenceClassification.from_config(config).eval()


def make_encoder_base(folder: Path, family: str = "bert", *, seed: int = 0, **changes: Any) -> Path:
    """Write a random encoder without any head, and its tokenizer, to `folder`: as encoders lie on hubs."""
    save(make_classifier(family, seed=seed, **changes).base_model, folder)
    write_tokenizer(folder, family)
    return folder


def write_tokenizer(folder: Path, family: str) -> None:
    """Write a tokenizer of a few WORDS that frames a text as the family does."""
    specials = {
        "bert": ["[PAD]", "[CLS]", "[SEP]", "[UNK]"],
        "roberta": ["<s>", "<pad>", "</s>", "<unk>"],
    }.get(family, ["<pad>", "<s>", "</s>", "<unk>"])
    front, behind = {"bert": ("[CLS]", "[SEP]"), "roberta": ("<s>", "</s>")}.get(family, ("<s>", ""))
    numbers = {word: number for number, word in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(WordLevel(numbers, unk_token=specials[3]))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{front} $A {behind}".strip(), special_tokens=[(token, numbers[token]) for token in (front, behind) if token]
    )
    names = {"pad_token": specials[1 if family == "roberta" else 0], "unk_token": specials[3], "eos_token": specials[2]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


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
