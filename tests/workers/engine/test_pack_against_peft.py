"""Adapters that train in one float64 pack equal plain PEFT with torch.optim.AdamW, each to itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import OPTConfig

from tests.workers.engine.company import Job, job_of
from tests.workers.engine.packs import CONFIGS, model_of, padded_loss_sum
from workers.engine.batches import rows_of_step
from workers.engine.dropout import DropoutRows, dropout_mask, row_key, token_keys
from workers.engine.pack import Pack
from workers.engine.resident import ResidentBase
from workers.engine.schedule import learning_rate_at

Names = dict[str, Any]
LLAMA: Names = {"one": "q_proj", "other": "v_proj", "last": "layers.1.mlp.down_proj"}
GPT2: Names = {"one": "c_attn", "other": "c_fc", "last": "h.1.mlp.c_proj"}


def eight_different(names: Names) -> list[Job]:
    """Adapters that have no number in common, each with an edge of its own."""
    one, other, last = names["one"], names["other"], names["last"]
    common: dict[str, Any] = {"max_steps": 20, "keep": "last", "eval_steps": None}
    changes: list[dict[str, Any]] = [
        {"r": 1, "lora_alpha": 3, "target_modules": [one], "learning_rate": 1e-3, "lr_scheduler_type": "constant"},
        {"r": 8, "lora_alpha": 16, "use_rslora": True, "weight_decay": 0.1, "per_device_train_batch_size": 1},
        {"r": 4, "rank_pattern": {one: 12, last: 2}, "alpha_pattern": {other: 5.0}, "gradient_accumulation_steps": 2},
        {"r": 12, "rank_pattern": {other: 3}, "target_modules": "all-linear", "max_grad_norm": 0.05},
        {"r": 16, "loraplus_lr_ratio": 8.0, "learning_rate": 5e-4, "warmup_steps": 0.3, "weight_decay": 0.01},
        {"r": 9, "target_modules": "mlp", "lr_scheduler_type": "linear", "max_grad_norm": 0.0, "adam_beta1": 0.8},
        {"r": 2, "target_modules": [one, other], "adam_beta2": 0.95, "adam_epsilon": 1e-6, "gradient_accumulation_steps": 3},
        {"r": 5, "lora_alpha": 1, "target_modules": "attention", "per_device_train_batch_size": 7, "warmup_steps": 4},
    ]
    return [job_of(7 + 2 * number, data=number, seed=number, **(common | own)) for number, own in enumerate(changes)]


class Masked(nn.Module):
    """Dropout that asks `dropout_mask` about a padded batch [B, L, I]."""

    def __init__(self, layer: str, p: float) -> None:
        super().__init__()
        self.layer, self.p = layer, p
        self.keys: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        rows, features = len(self.keys), x.shape[-1]
        length = x.numel() // rows // features
        keys = torch.tensor(self.keys, dtype=torch.int32).repeat_interleave(length)
        positions = torch.arange(length, dtype=torch.int32).repeat(rows)
        tokens = DropoutRows(token_keys(keys, positions), torch.full((rows * length, 1), self.p, dtype=torch.float64))
        return x * dropout_mask(tokens, self.layer, features).view(x.shape) / (1.0 - self.p)


def peft_of(family: str, job: Job, layers: Sequence[str], initial: Mapping[str, Tensor]) -> PeftModel:
    """The job's adapter as PEFT makes it, with the initial weights given."""
    config = LoraConfig(
        r=job.peft.r,
        lora_alpha=job.peft.lora_alpha,  # type: ignore[arg-type]  # PEFT takes floats
        use_rslora=job.peft.use_rslora,
        rank_pattern=dict(job.peft.rank_pattern),
        alpha_pattern=dict(job.peft.alpha_pattern),
        target_modules=list(layers),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model_of(family, torch.float64), config, autocast_adapter_dtype=False).double().eval()
    assert isinstance(model, PeftModel)
    with torch.no_grad():
        for name, parameter in trained_of(model).items():
            parameter.copy_(initial[name])
    for name in layers:
        dropouts: Any = model.get_submodule(f"base_model.model.{name}.lora_dropout")
        dropouts["default"] = Masked(name, job.peft.lora_dropout)
    return model


def trained_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name.replace(".default", ""): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train_with_peft(model: PeftModel, job: Job, num_steps: int) -> dict[str, Tensor]:
    """A plain loop over padded micro-batches with torch.optim.AdamW: the oracle."""
    spec, trained = job.training, trained_of(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameter for name, parameter in trained.items() if "lora_A" in name], "ratio": 1.0},
            {"params": [parameter for name, parameter in trained.items() if "lora_B" in name], "ratio": spec.loraplus_lr_ratio},
        ],
        betas=(spec.adam_beta1, spec.adam_beta2),
        eps=spec.adam_epsilon,
        weight_decay=spec.weight_decay,
    )
    for step in range(num_steps):
        parts = []
        for rows in rows_of_step(spec, len(job.train), step):
            for module in model.modules():
                if isinstance(module, Masked):
                    module.keys = [row_key(spec.seed, step, row) for row in rows]
            parts.append(padded_loss_sum(model, [job.train[row] for row in rows]))
        total = sum(count for _, count in parts)
        for loss, _ in parts:  # divided before: RMSNorm rounds gradients to float32, also in a float64 model
            (loss / total).backward()
        if spec.max_grad_norm:
            nn.utils.clip_grad_norm_(trained.values(), spec.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(spec, step, num_steps) * group["ratio"]
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in trained.items()}


def largest_difference(family: str, jobs: Sequence[Job]) -> float:
    """Train jobs in one float64 pack and each with PEFT; return the largest difference of two parameters."""
    pack = Pack(ResidentBase(model_of(family, torch.float64)), torch.float64)
    trainings = [job.join(pack) for job in jobs]
    initial = [training.kept_tensors() for training in trainings]
    while live := [training for training in trainings if not training.is_done]:
        pack.advance(live)
    found = 0.0
    for job, training, start in zip(jobs, trainings, initial, strict=True):
        expected = train_with_peft(peft_of(family, job, list(training.ranks), start), job, training.num_steps)
        result = training.kept_tensors()
        assert set(expected) == set(result)
        found = max(found, *(float((expected[name] - result[name]).abs().max()) for name in result))
        assert any(not torch.equal(start[name], result[name]) for name in result)
    return found


@pytest.mark.parametrize(("family", "names"), [("llama", LLAMA), ("qwen2", LLAMA), ("gpt2", GPT2)])
def test_eight_different_adapters_of_a_pack_equal_peft_and_torch_adamw_each(family: str, names: Names) -> None:
    assert largest_difference(family, eight_different(names)) < 1e-10


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "names"), [("llama", LLAMA), ("gpt2", GPT2)])
def test_with_dropout_a_pack_equals_autograd_with_the_same_masks(family: str, names: Names, checkpointing: bool) -> None:
    common: dict[str, Any] = {"max_steps": 4, "keep": "last", "eval_steps": None, "gradient_checkpointing": checkpointing}
    own: list[dict[str, Any]] = [
        {"lora_dropout": 0.1, "gradient_accumulation_steps": 2},
        {"lora_dropout": 0.5, "rank_pattern": {names["one"]: 12}, "max_grad_norm": 0.1},
        {"target_modules": [names["one"], names["other"]]},
        {"lora_dropout": 0.1, "target_modules": "mlp", "seed": 9},
    ]
    jobs = [job_of(7, data=number, **(common | changes)) for number, changes in enumerate(own)]
    assert largest_difference(family, jobs) < 1e-10


def test_layers_that_a_model_calls_in_another_order_than_it_holds_them_equal_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = OPTConfig(
        vocab_size=97,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=64,
    )
    monkeypatch.setitem(CONFIGS, "opt", opt)
    names = [["q_proj", "k_proj", "v_proj"], ["q_proj", "v_proj"], ["k_proj", "v_proj", "fc1"]]
    jobs = [job_of(7, max_steps=5, keep="last", eval_steps=None, target_modules=targets) for targets in names]
    assert largest_difference("opt", jobs) < 1e-10
