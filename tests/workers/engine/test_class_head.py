"""Classifiers in packs: the head of each is its own, and what it learns is what it learns alone."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    RobertaConfig,
)

from tests.workers.engine.packs import specs_of
from workers.data.render import Example
from workers.engine.batches import rows_of_step
from workers.engine.class_head import Classified
from workers.engine.head_shapes import apply_head, head_of
from workers.engine.lora import LoraLinear
from workers.engine.optimizer import clip_of
from workers.engine.pack import Pack
from workers.engine.resident import ResidentBase, has_effect
from workers.engine.schedule import learning_rate_at
from workers.engine.training import Training

WIDTH: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
}
CONFIGS = {
    "bert": BertConfig(**WIDTH, intermediate_size=48),
    "roberta": RobertaConfig(**WIDTH, intermediate_size=48, pad_token_id=1),
    "llama": LlamaConfig(**WIDTH, intermediate_size=48, num_key_value_heads=2, pad_token_id=0),
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=48, bos_token_id=0, pad_token_id=0),
}
JOBS: list[dict[str, Any]] = [
    {"r": 4, "learning_rate": 5e-3, "seed": 1},
    {"r": 8, "learning_rate": 2e-3, "seed": 2, "weight_decay": 0.1, "gradient_accumulation_steps": 2},
    {"r": 2, "learning_rate": 1e-2, "seed": 3, "max_grad_norm": 0.2, "per_device_train_batch_size": 3},
    {"r": 16, "learning_rate": 1e-3, "seed": 4, "target_modules": "attention", "lr_scheduler_type": "linear"},
]
LABELS = [2, 3, 15, 2]


def model_of(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[family])
    config.num_labels = 7  # the model's own head is not used
    return AutoModelForSequenceClassification.from_config(config).to(dtype).eval()


def rows_of(count: int, num_labels: int, seed: int) -> list[Example]:
    """Rows of 2 to 11 tokens whose label can be read off one token."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = int(torch.randint(2, 12, (1,), generator=generator))
        label = index % num_labels
        ids = [2, *torch.randint(30, 61, (length - 1,), generator=generator).tolist(), 3 + label]
        rows.append(Example(ids, [False] * len(ids), f"row:{index}", label=label))
    return rows


def join(pack: Pack, number: int) -> Training:
    peft, training = specs_of(**JOBS[number])
    count = LABELS[number]
    return pack.join(peft, training, rows_of(18, count, number), rows_of(7, count, 50 + number), num_labels=count)


def train(pack: Pack, trainings: Sequence[Training], steps: int) -> None:
    while any(one.step < steps for one in trainings):
        pack.advance([one for one in trainings if one.step < steps])


def padded_logits(model: PreTrainedModel, head: dict[str, Tensor], rows: Sequence[Example]) -> Tensor:
    """Logits of rows by the model's own padded forward, and the formula of its family's head."""
    shape = head_of(model)
    width = max(len(row.input_ids) for row in rows)
    pad = model.config.pad_token_id
    ids = torch.tensor([row.input_ids + [pad] * (width - len(row.input_ids)) for row in rows])
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows])
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    last = torch.tensor([0 if shape.pooling == "first" else len(row.input_ids) - 1 for row in rows])
    pooled = hidden[torch.arange(len(rows)), last]
    if shape.pooler is not None:
        pooled = model.get_submodule(shape.pooler)(pooled[:, None])
    return apply_head(shape, head, pooled)


class PlainLora(nn.Module):
    """W x + b + s B A x by autograd alone."""

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.a, self.b, self.scale = base, nn.Parameter(a), nn.Parameter(b), scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + (x @ self.a.t() @ self.b.t()) * self.scale
        return y


@pytest.mark.parametrize("family", CONFIGS)
def test_heads_and_factors_equal_those_of_autograd_and_torch_adamw_in_float64(family: str) -> None:
    pack = Pack(ResidentBase(model_of(family, torch.float64)), torch.float64)
    ours = [join(pack, number) for number in range(4)]
    start = [one.kept_tensors() for one in ours]
    train(pack, ours, 6)
    for number, one in enumerate(ours):
        expected = alone_by_autograd(family, one, start[number])
        result = one.kept_tensors()
        assert max(float((expected[name] - result[name]).abs().max()) for name in result) < 1e-10


def alone_by_autograd(family: str, one: Training, start: dict[str, Tensor]) -> dict[str, Tensor]:
    model = model_of(family, torch.float64)
    prefix = "base_model.model."
    layers: dict[str, PlainLora] = {}
    for name in one.ranks:
        a, b = (start[f"{prefix}{name}.lora_{part}.weight"].double() for part in "AB")
        parent, _, leaf = name.rpartition(".")
        layers[name] = PlainLora(model.get_submodule(name), a, b, one.member.scales[name])
        setattr(model.get_submodule(parent), leaf, layers[name])
    shape = one.base.head_shape
    head = {
        name: nn.Parameter(start[shape.peft_name(name)].double())
        for name in shape.tensor_shapes(max(row.label or 0 for row in one.train) + 1)
    }
    parameters = {f"{prefix}{name}.lora_A.weight": layer.a for name, layer in layers.items()}
    parameters |= {f"{prefix}{name}.lora_B.weight": layer.b for name, layer in layers.items()}
    parameters |= {shape.peft_name(name): tensor for name, tensor in head.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0, weight_decay=one.training.weight_decay)
    for step in range(6):
        batches = rows_of_step(one.training, len(one.train), step)
        total = sum(map(len, batches))
        for rows in batches:
            part = [one.train[row] for row in rows]
            labels = torch.tensor([row.label for row in part])
            logits = padded_logits(model, dict(head), part)
            (nn.functional.cross_entropy(logits, labels, reduction="sum") / total).backward()
        nn.utils.clip_grad_norm_(parameters.values(), one.training.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(one.training, step, one.num_steps)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_a_classifier_has_the_same_bits_alone_and_in_company(family: str) -> None:
    base = ResidentBase(model_of(family))
    together = Pack(base)
    company = [join(together, number) for number in (3, 1, 0, 2)]
    company = [company[2], company[1], company[3], company[0]]
    train(together, company, 5)
    told = together.evaluate(company)
    for number in range(4):
        pack = Pack(base)
        one = join(pack, number)
        train(pack, [one], 5)
        assert pack.evaluate([one])[one] == told[company[number]]
        kept, expected = company[number].kept_tensors(), one.kept_tensors()
        assert all(torch.equal(kept[name], expected[name]) for name in expected)


def test_a_classifier_learns_its_labels_and_is_measured() -> None:
    pack = Pack(ResidentBase(model_of("bert")))
    peft, training = specs_of(r=8, learning_rate=2e-2, max_steps=60, per_device_train_batch_size=9, eval_steps=None)
    one = pack.join(peft, training, rows_of(27, 3, 0), rows_of(9, 3, 1), num_labels=3)
    before = pack.evaluate([one])[one]
    train(pack, [one], 60)
    after = pack.evaluate([one])[one]
    assert after["eval/accuracy"] > before["eval/accuracy"]
    assert after["eval/loss"] < before["eval/loss"]
    assert set(after) == {"eval/loss", "eval/accuracy", "eval/macro_f1"}
    assert has_effect(pack.base, one.kept_factors(), one.train[0], one.kept_head())


def test_a_resumed_classifier_goes_on_bit_for_bit_in_another_pack() -> None:
    base = ResidentBase(model_of("roberta"))
    pack = Pack(base)
    whole = join(pack, 1)
    train(pack, [whole], 8)
    first, second = Pack(base), Pack(base)
    half = join(first, 1)
    train(first, [half], 3)
    vectors, standing = half.state()
    other, rest = join(second, 2), join(second, 1)
    rest.restore(vectors, standing)
    train(second, [other, rest], 8)
    assert torch.equal(whole.state()[0]["weights"], rest.state()[0]["weights"])


def test_parts_of_a_measurement_add_up() -> None:
    whole = Classified(1.0, (0,), (1,), 2) + Classified(2.0, (1, 1), (1, 0), 2)
    assert whole == Classified(3.0, (0, 1, 1), (1, 1, 0), 2)
    assert whole.metrics(0)["eval/loss"] == 1.0


def test_no_linear_of_the_head_is_adapted() -> None:
    base = ResidentBase(model_of("bert"))
    assert all(isinstance(layer, LoraLinear) for layer in base.layers.values())
    assert not any("classifier" in name or "pooler" in name for name in base.layers)


def test_a_norm_within_bounds_is_not_clipped() -> None:
    assert clip_of(0.5, 1.0) == 1.0
    assert clip_of(2.0, 0.0) == 1.0
    assert clip_of(2.0, 1.0) == pytest.approx(0.5)
