"""Tiny random models, ragged rows, and packs of them, for the engine's tests."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)

from workers.data.render import Example
from workers.engine.pack import Pack
from workers.engine.resident import ResidentBase
from workers.engine.training import StepResult, Training
from workers.spec import PeftSpec, TrainingSpec

WIDTH: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**WIDTH, intermediate_size=48, num_key_value_heads=2),
    "qwen2": Qwen2Config(**WIDTH, intermediate_size=48, num_key_value_heads=2),
    "mistral-window": MistralConfig(**WIDTH, intermediate_size=48, num_key_value_heads=2, sliding_window=5),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0),
}


def model_of(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family])).to(dtype).eval()


def examples_of(count: int, seed: int = 0) -> list[Example]:
    """Ragged rows of 4 to 20 tokens; the first third of each is prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = int(torch.randint(4, 21, (1,), generator=generator))
        ids = torch.randint(1, 97, (length,), generator=generator).tolist()
        rows.append(Example(ids, [place >= length // 3 for place in range(length)], f"row:{index}"))
    return rows


class Alone:
    """A pack of one: a training and the pack it is in."""

    def __init__(self, pack: Pack, training: Training) -> None:
        self.pack, self.training = pack, training

    def step(self) -> StepResult:
        """Do one optimiser step."""
        while True:
            done = self.pack.advance([self.training])
            if done:
                return done[self.training]

    def run(self, steps: int | None = None) -> list[float]:
        """Train to the end, or so many steps, with the evaluations that are due; return the losses."""
        losses: list[float] = []
        while not self.training.is_done and (steps is None or len(losses) < steps):
            losses.append(self.step().loss)
            if self.training.evaluation_is_due:
                self.pack.evaluate([self.training])
        return losses

    @property
    def weights(self) -> Tensor:
        return self.training.state()[0]["weights"]


def alone(
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    train: Sequence[Example] | None = None,
    validation: Sequence[Example] | None = None,
    **changes: Any,
) -> Alone:
    """A fresh base with one adapter on it; `changes` are fields of PeftSpec and TrainingSpec."""
    pack = Pack(ResidentBase(model_of(family, dtype)), dtype)
    peft, training = specs_of(**changes)
    return Alone(
        pack,
        pack.join(
            peft,
            training,
            examples_of(22) if train is None else train,
            examples_of(6, 1) if validation is None else validation,
        ),
    )


def specs_of(**changes: Any) -> tuple[PeftSpec, TrainingSpec]:
    """A small adapter and a short training, with `changes` of their fields."""
    peft = {"r": 4, "lora_alpha": 8} | {k: v for k, v in changes.items() if k in PeftSpec.model_fields}
    values = {"learning_rate": 5e-3, "max_steps": 12, "per_device_train_batch_size": 4, "eval_steps": 4, "seed": 3}
    values |= {k: v for k, v in changes.items() if k in TrainingSpec.model_fields}
    return PeftSpec.model_validate(peft), TrainingSpec.model_validate(values)


def padded_loss_sum(model: nn.Module, rows: list[Example]) -> tuple[torch.Tensor, int]:
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in rows])
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows])
    labels = torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        for place, supervised in enumerate(row.supervised):
            if supervised and place > 0:
                labels[index, place] = row.input_ids[place]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    targets = labels[:, 1:]
    loss = nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100, reduction="sum"
    )
    return loss, int((targets != -100).sum())
