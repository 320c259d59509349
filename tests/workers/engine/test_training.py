"""The engine against plain PEFT and torch.optim, and against itself after a stop."""

import math
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3NextConfig

from infra.errors import BadInput
from tests.workers.engine.packs import CONFIGS, WIDTH, Alone, alone, examples_of, model_of, padded_loss_sum
from workers.data.render import Example
from workers.engine.batches import make_sequence, make_stream, rows_of_step
from workers.engine.generate import generate_answers
from workers.engine.pack import Pack
from workers.engine.resident import ResidentBase, measure
from workers.engine.schedule import learning_rate_at
from workers.spec import PeftSpec, TrainingSpec


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
    ours = alone(
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
        keep="last",
    )
    names = ["c_attn", "c_proj", "c_fc"] if family == "gpt2" else "all-linear"
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=use_rslora, target_modules=names, task_type="CAUSAL_LM")
    theirs = get_peft_model(model_of(family, torch.float64), config, autocast_adapter_dtype=False).double()
    initial = ours.training.kept_tensors()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(initial[name.replace(".default", "")])
    trainable = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.1)
    theirs.eval()
    for step in range(20):
        parts = [
            padded_loss_sum(theirs, [ours.training.train[row] for row in rows])
            for rows in rows_of_step(ours.training.training, 22, step)
        ]
        total = sum(count for _, count in parts)
        for loss, _ in parts:
            (loss / total).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(ours.training.training, step, 20)
        optimizer.step()
        optimizer.zero_grad()
    ours.run()
    result = ours.training.kept_tensors()
    trained = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert set(trained) == set(result)
    assert max(float((trained[name].detach() - result[name]).abs().max()) for name in result) < 1e-10


def test_training_lowers_the_loss_and_leaves_the_base_alone() -> None:
    row = Example([*range(1, 6), *[7] * 5], [False] * 5 + [True] * 5, "row:0")
    one = alone(max_steps=40, train=[row] * 8)
    before = {name: tensor.clone() for name, tensor in one.pack.base.model.state_dict().items()}
    losses = one.run()
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(torch.equal(before[name], tensor) for name, tensor in one.pack.base.model.state_dict().items())


@pytest.mark.parametrize("stop_at", [1, 4, 7, 11])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_training_ends_with_the_same_bits(stop_at: int, dropout: float) -> None:
    whole = alone(lora_dropout=dropout, weight_decay=0.01)
    whole.run()
    first = alone(lora_dropout=dropout, weight_decay=0.01)
    first.run(stop_at)
    vectors, standing = first.training.state()
    second = alone(lora_dropout=dropout, weight_decay=0.01)
    second.training.restore({name: vector.clone() for name, vector in vectors.items()}, standing)
    second.run()
    assert torch.equal(whole.weights, second.weights)
    assert whole.training.standing == second.training.standing
    kept = zip(whole.training.kept_tensors().values(), second.training.kept_tensors().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in kept)


def test_dropout_masks_are_the_same_when_activations_are_recomputed() -> None:
    plain = alone(lora_dropout=0.4, max_steps=3)
    recomputed = alone(lora_dropout=0.4, max_steps=3, gradient_checkpointing=True)
    without = alone(max_steps=3)
    assert plain.run() == recomputed.run() != without.run()
    assert torch.equal(plain.weights, recomputed.weights)


def test_keep_best_gives_the_weights_of_the_lowest_validation_loss() -> None:
    one = alone(learning_rate=0.3, max_steps=16, keep="best")
    training = one.training
    seen: dict[int, torch.Tensor] = {}
    losses: dict[int, float] = {}
    while not training.is_done:
        one.step()
        if training.evaluation_is_due:
            losses[training.step] = one.pack.evaluate([training])[training]["eval/loss"]
            seen[training.step] = one.weights
    best = min(losses, key=losses.__getitem__)
    assert training.standing.best_step == best
    assert torch.equal(torch.cat([tensor.reshape(-1) for tensor in training.kept_tensors().values()]), seen[best])
    assert training.kept_metrics()["eval/loss"] == losses[best]


def test_early_stopping_ends_after_evaluations_without_gain() -> None:
    one = alone(learning_rate=1.0, max_steps=200, eval_steps=2, early_stopping_patience=2, lr_scheduler_type="constant")
    one.run()
    assert one.training.step < 200
    assert one.training.step == one.training.standing.best_step + 4


def test_a_non_finite_step_is_skipped_and_many_in_a_row_are_told() -> None:
    one = alone(eval_steps=None)
    before = one.weights
    with torch.no_grad():
        one.pack.base.model.get_input_embeddings().weight[1:] = math.inf
    results = [one.step() for _ in range(5)]
    assert all(result.skipped for result in results)
    assert torch.equal(before, one.weights)
    assert one.training.has_diverged


def test_a_bfloat16_base_trains_with_float32_factors() -> None:
    pack = Pack(ResidentBase(model_of("llama", torch.bfloat16)))
    spec = TrainingSpec(learning_rate=5e-3, max_steps=20, per_device_train_batch_size=4)
    one = Alone(pack, pack.join(PeftSpec(r=4), spec, examples_of(22), []))
    losses = one.run()
    assert one.weights.dtype == torch.float32
    assert sum(losses[-4:]) < sum(losses[:4])


def test_a_target_that_matches_nothing_lists_what_there_is() -> None:
    with pytest.raises(BadInput, match=r"'q_prj' matches no linear layer.*Did you mean 'q_proj'.*k_proj"):
        alone(target_modules=["q_prj"])


def test_a_rank_larger_than_the_layer_is_refused() -> None:
    with pytest.raises(BadInput, match="peft.r is 64, larger than the layer"):
        alone(r=64)


def test_a_pattern_that_names_no_adapted_layer_is_refused() -> None:
    with pytest.raises(BadInput, match="peft.rank_pattern: 'up_proj' names no adapted layer"):
        alone(target_modules="attention", rank_pattern={"up_proj": 2})


def test_every_epoch_holds_each_row_once_in_another_order() -> None:
    spec = TrainingSpec(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    epochs = [
        [row for step in range(3) for rows in rows_of_step(spec, 22, 3 * epoch + step) for row in rows] for epoch in range(3)
    ]
    assert all(sorted(epoch) == list(range(22)) for epoch in epochs)
    assert all(first != second for first, second in pairwise(epochs))


def test_the_first_token_of_a_sequence_is_never_predicted_from_its_neighbour() -> None:
    rows = [Example([5, 6, 7], [True] * 3, "a"), Example([8, 9], [True] * 2, "b")]
    stream = make_stream([[make_sequence(row, number) for number, row in enumerate(rows)]])
    assert stream.predicting_K[:3].tolist() == [0, 1, 3]
    assert stream.targets_K[:3].tolist() == [6, 7, 9]
    assert stream.owners_K.tolist() == [0, 0, 0] + [1] * 29
    assert stream.position_ids_T[:5].tolist() == [0, 1, 2, 0, 1]


def test_an_adapter_of_another_rank_or_other_layers_is_no_start() -> None:
    one = alone(target_modules=["q_proj"])
    for other in (alone(target_modules=["q_proj", "v_proj"]), alone(target_modules=["q_proj"], r=1)):
        with pytest.raises(BadInput, match="initial adapter"):
            one.pack.join(one.training.peft, one.training.training, one.training.train, [], init=other.training.kept_tensors())


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


@pytest.mark.parametrize("beta", ["adam_beta1", "adam_beta2"])
def test_a_beta_of_one_divides_by_zero_and_is_refused(beta: str) -> None:
    with pytest.raises(ValueError, match=beta):
        TrainingSpec.model_validate({beta: 1.0})
