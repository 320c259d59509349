"""The engine against plain PEFT and torch.optim, and against itself after a stop."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3NextConfig,
)

from infra.errors import BadInput
from workers.data.render import Example
from workers.engine.batches import make_stream, rows_of_step
from workers.engine.generate import generate_answers
from workers.engine.resident import ResidentBase, measure
from workers.engine.schedule import learning_rate_at
from workers.engine.training import Training
from workers.spec import PeftSpec, TrainingSpec

WIDTH = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
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


def training_of(family: str = "llama", *, dtype: torch.dtype = torch.float32, **changes: object) -> Training:
    peft = PeftSpec(r=4, lora_alpha=8, **{k: v for k, v in changes.items() if k in PeftSpec.model_fields})  # type: ignore[arg-type]
    values = {"learning_rate": 5e-3, "max_steps": 12, "per_device_train_batch_size": 4, "eval_steps": 4, "seed": 3}
    values |= {k: v for k, v in changes.items() if k in TrainingSpec.model_fields}
    base = ResidentBase(model_of(family, dtype))
    return Training(base, peft, TrainingSpec(**values), examples_of(22), examples_of(6, 1), dtype=dtype)  # type: ignore[arg-type]


def run(training: Training, steps: int | None = None) -> list[float]:
    losses = []
    while not training.is_done and (steps is None or len(losses) < steps):
        losses.append(training.train_step().loss)
        if training.evaluation_is_due:
            training.evaluate()
    return losses


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


@pytest.mark.parametrize("family", CONFIGS)
def test_a_stream_measures_what_padded_rows_measure(family: str) -> None:
    rows = examples_of(7)
    model = model_of(family, torch.float64)
    expected, count = padded_loss_sum(model, rows)
    losses = measure(ResidentBase(model), rows, rows_per_pass=3)
    assert losses.num_targets == count
    assert losses.loss_sum == pytest.approx(float(expected.detach()), rel=1e-12)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_weights_equal_those_of_peft_and_torch_adamw_in_float64(family: str, use_rslora: bool) -> None:
    ours = training_of(
        family,
        dtype=torch.float64,
        use_rslora=use_rslora,
        weight_decay=0.1,
        max_grad_norm=0.5,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
        warmup_steps=0.2,
        max_steps=20,
        eval_steps=None,
    )
    names = ["c_attn", "c_proj", "c_fc"] if family == "gpt2" else "all-linear"
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=use_rslora, target_modules=names, task_type="CAUSAL_LM")
    theirs = get_peft_model(model_of(family, torch.float64), config, autocast_adapter_dtype=False).double()
    initial = ours.bank.tensors()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(initial[name.replace(".default", "")])
    trainable = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.1)
    theirs.eval()
    for step in range(20):
        parts = [padded_loss_sum(theirs, [ours.train[row] for row in rows]) for rows in rows_of_step(ours.training, 22, step)]
        total = sum(count for _, count in parts)
        for loss, _ in parts:
            (loss / total).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(ours.training, step, 20)
        optimizer.step()
        optimizer.zero_grad()
    run(ours)
    result = ours.bank.tensors()
    trained = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert set(trained) == set(result)
    assert max(float((trained[name].detach() - result[name]).abs().max()) for name in result) < 1e-10


def test_training_lowers_the_loss_and_leaves_the_base_alone() -> None:
    training = training_of(max_steps=40)
    training.train = [Example([*range(1, 6), *[7] * 5], [False] * 5 + [True] * 5, "row:0")] * 8
    before = {name: tensor.clone() for name, tensor in training.base.model.state_dict().items()}
    losses = run(training)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(torch.equal(before[name], tensor) for name, tensor in training.base.model.state_dict().items())


@pytest.mark.parametrize("stop_at", [1, 4, 7, 11])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_training_ends_with_the_same_bits(stop_at: int, dropout: float) -> None:
    whole = training_of(lora_dropout=dropout, weight_decay=0.01)
    run(whole)
    first = training_of(lora_dropout=dropout, weight_decay=0.01)
    run(first, stop_at)
    vectors, standing = first.state()
    second = training_of(lora_dropout=dropout, weight_decay=0.01)
    second.restore({name: vector.clone() for name, vector in vectors.items()}, standing)
    run(second)
    assert torch.equal(whole.bank.weights, second.bank.weights)
    assert whole.standing == second.standing
    assert all(torch.equal(a, b) for a, b in zip(whole.kept_tensors().values(), second.kept_tensors().values(), strict=True))


def test_dropout_masks_are_drawn_again_when_activations_are_recomputed() -> None:
    plain = training_of(lora_dropout=0.4, max_steps=3)
    recomputed = training_of(lora_dropout=0.4, max_steps=3, gradient_checkpointing=True)
    without = training_of(max_steps=3)
    assert run(plain) == run(recomputed) != run(without)
    assert torch.equal(plain.bank.weights, recomputed.bank.weights)


def test_two_trainings_that_take_turns_on_one_base_do_not_touch_each_other() -> None:
    alone = training_of()
    run(alone)
    first = training_of()
    second = Training(first.base, PeftSpec(r=2, target_modules="attention"), first.training, examples_of(9, 5), [])
    while not first.is_done:
        run(first, 1)
        second.train_step()
    assert torch.equal(alone.bank.weights, first.bank.weights)


def test_keep_best_gives_the_weights_of_the_lowest_validation_loss() -> None:
    training = training_of(learning_rate=0.3, max_steps=16, keep="best")
    seen: dict[int, dict[str, torch.Tensor]] = {}
    losses: dict[int, float] = {}
    while not training.is_done:
        training.train_step()
        if training.evaluation_is_due:
            losses[training.step] = training.evaluate()["eval/loss"]
            seen[training.step] = training.bank.tensors()
    best = min(losses, key=losses.__getitem__)
    assert training.standing.best_step == best
    assert all(torch.equal(tensor, seen[best][name]) for name, tensor in training.kept_tensors().items())
    assert training.kept_metrics()["eval/loss"] == losses[best]


def test_early_stopping_ends_after_evaluations_without_gain() -> None:
    training = training_of(
        learning_rate=1.0, max_steps=200, eval_steps=2, early_stopping_patience=2, lr_scheduler_type="constant"
    )
    run(training)
    assert training.step < 200
    assert training.step == training.standing.best_step + 4


def test_a_non_finite_step_is_skipped_and_many_in_a_row_are_told() -> None:
    training = training_of(eval_steps=None)
    before = training.bank.weights.detach().clone()
    with torch.no_grad():
        training.base.model.get_input_embeddings().weight[1:] = math.inf
    results = [training.train_step() for _ in range(5)]
    assert all(result.skipped for result in results)
    assert torch.equal(before, training.bank.weights)
    assert training.has_diverged


def test_a_bfloat16_base_trains_with_float32_factors() -> None:
    base = ResidentBase(model_of("llama", torch.bfloat16))
    spec = TrainingSpec(learning_rate=5e-3, max_steps=20, per_device_train_batch_size=4)
    training = Training(base, PeftSpec(r=4), spec, examples_of(22), [])
    losses = run(training)
    assert training.bank.weights.dtype == torch.float32
    assert sum(losses[-4:]) < sum(losses[:4])


def test_a_target_that_matches_nothing_lists_what_there_is() -> None:
    with pytest.raises(BadInput, match=r"'q_prj' matches no linear layer.*Did you mean 'q_proj'.*k_proj"):
        training_of(target_modules=["q_prj"])


def test_a_rank_larger_than_the_layer_is_refused() -> None:
    base = ResidentBase(model_of("llama"))
    with pytest.raises(BadInput, match="peft.r is 64, larger than the layer"):
        Training(base, PeftSpec(r=64), TrainingSpec(max_steps=1), examples_of(4), [])


def test_every_epoch_holds_each_row_once_in_another_order() -> None:
    spec = TrainingSpec(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    epochs = [
        [row for step in range(3) for rows in rows_of_step(spec, 22, 3 * epoch + step) for row in rows] for epoch in range(3)
    ]
    assert all(sorted(epoch) == list(range(22)) for epoch in epochs)
    assert all(first != second for first, second in pairwise(epochs))


def test_the_first_token_of_a_sequence_is_never_predicted_from_its_neighbour() -> None:
    stream = make_stream([Example([5, 6, 7], [True] * 3, "a"), Example([8, 9], [True] * 2, "b")])
    assert stream.predicting_K.tolist() == [0, 1, 3]
    assert stream.targets_K.tolist() == [6, 7, 9]
    assert stream.position_ids_T.tolist() == [0, 1, 2, 0, 1]


def test_an_adapter_of_another_rank_or_other_layers_is_no_start() -> None:
    one, other = training_of(target_modules=["q_proj"]), training_of(target_modules=["q_proj", "v_proj"])
    thin = Training(one.base, PeftSpec(r=1, target_modules=["q_proj"]), one.training, one.train, [])
    for tensors in (other.bank.tensors(), thin.bank.tensors()):
        with pytest.raises(BadInput, match="initial adapter"):
            one.bank.load(tensors)


def test_answers_are_the_likeliest_whatever_a_base_says_of_sampling() -> None:
    model = model_of("llama")
    model.generation_config.repetition_penalty = 50.0
    (answer,) = generate_answers(ResidentBase(model), [[5, 6, 7]], 12, [])
    ids = [5, 6, 7]
    for _ in range(12):
        ids.append(int(model_of("llama")(torch.tensor([ids])).logits[0, -1].argmax()))
    assert answer == ids[3:]


def test_a_base_that_mixes_tokens_otherwise_is_refused() -> None:
    mixed = Qwen3NextConfig(
        **WIDTH, intermediate_size=48, num_key_value_heads=2, head_dim=8, layer_types=["linear_attention", "full_attention"]
    )
    with pytest.raises(BadInput, match="linear_attention"):
        ResidentBase(AutoModelForCausalLM.from_config(mixed))
    capped = ResidentBase(
        AutoModelForCausalLM.from_config(Gemma2Config(**WIDTH, intermediate_size=48, num_key_value_heads=2, head_dim=8))
    )
    with pytest.raises(BadInput, match="softcap"):
        measure(capped, examples_of(2), 2)


@pytest.mark.parametrize("beta", ["adam_beta1", "adam_beta2"])
def test_a_beta_of_one_divides_by_zero_and_is_refused(beta: str) -> None:
    with pytest.raises(ValueError, match=beta):
        TrainingSpec.model_validate({beta: 1.0})
