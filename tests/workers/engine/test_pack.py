"""A pack leaves each of its adapters with the bits it has alone, in float32 on one thread."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PretrainedConfig,
    RobertaConfig,
)

from tests.workers.engine.company import Company, Job, alone_outcomes, base_of, digest_of, job_of, varied_job, varied_jobs
from tests.workers.engine.packs import CONFIGS, examples_of, specs_of
from workers.data.render import Example
from workers.engine.pack import Pack
from workers.engine.resident import ResidentBase


@pytest.mark.parametrize("most", [1, 8, 16])
def test_sixteen_different_adapters_have_the_bits_they_have_alone(most: int) -> None:
    jobs, alone = varied_jobs("llama", 16)
    assert Company(base_of("llama"), jobs).finish(most=most) == alone


@pytest.mark.parametrize("family", [name for name in CONFIGS if name != "llama"])
def test_every_family_keeps_the_bits_of_its_adapters(family: str) -> None:
    jobs, alone = varied_jobs(family, 8)
    assert Company(base_of(family), jobs).finish() == alone


@pytest.mark.parametrize("budget", [1, 60, 200])
def test_a_token_budget_decides_when_an_adapter_moves_and_not_how(budget: int) -> None:
    jobs, alone = varied_jobs("llama", 16)
    assert Company(base_of("llama"), jobs).finish(most=9, budget=budget) == alone


def llama_of(hidden: int, intermediate: int, *, vocabulary: int = 97, head: int = 0, layers: int = 1) -> LlamaConfig:
    heads = hidden // (head or min(64, hidden // 2))
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        max_position_embeddings=64,
    )


def fresh_base(config: PretrainedConfig) -> ResidentBase:
    torch.manual_seed(0)
    return ResidentBase(AutoModelForCausalLM.from_config(config).eval())


def a_few(**changes: Any) -> list[Job]:
    """Jobs of two steps whose micro-batches lie at odd places of a stream: one row of few tokens, many rows, dropout."""
    own: list[dict[str, Any]] = [
        {"r": 4, "per_device_train_batch_size": 1},
        {"r": 16, "per_device_train_batch_size": 5, "target_modules": "mlp", "weight_decay": 0.1},
        {"r": 3, "lora_dropout": 0.1, "per_device_train_batch_size": 2, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"r": 4, "rank_pattern": {"q_proj": 12}, "target_modules": "attention", "per_device_train_batch_size": 3},
        {"r": 16, "per_device_train_batch_size": 2},
    ]
    common = {"max_steps": 2, "eval_steps": None, "keep": "last"} | changes
    return [job_of(9, data=number, seed=number, **(common | one)) for number, one in enumerate(own)]


@pytest.mark.parametrize(
    ("hidden", "intermediate"), [(64, 50), (64, 172), (100, 250), (128, 344), (256, 341), (512, 1408), (896, 1216), (1024, 688)]
)
def test_bits_are_kept_at_widths_from_64_to_1024_and_at_odd_ones(hidden: int, intermediate: int) -> None:
    base, jobs = fresh_base(llama_of(hidden, intermediate, head=10 if hidden == 100 else 0)), a_few()
    assert Company(base, jobs).finish() == alone_outcomes(base, jobs)


@pytest.mark.parametrize("vocabulary", [98, 1000, 5003])
def test_bits_are_kept_at_any_size_of_the_vocabulary(vocabulary: int) -> None:
    base, jobs = fresh_base(llama_of(64, 96, vocabulary=vocabulary)), a_few()
    assert Company(base, jobs).finish() == alone_outcomes(base, jobs)


def test_bits_are_kept_where_logits_are_computed_in_several_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, alone = varied_jobs("llama", 16)
    monkeypatch.setattr("workers.engine.lm_head.PORTION_BYTES", 4 * 97 * 32)
    assert Company(base_of("llama"), jobs).finish() == alone


def test_a_row_of_two_tokens_has_the_bits_it_has_alone() -> None:
    rows = [Example([5, 6 + number], [True, True], f"row:{number}") for number in range(3)]
    tiny = [Job(*specs_of(r=r, per_device_train_batch_size=1, max_steps=3, keep="last"), rows) for r in (1, 8, 12)]
    jobs = [*tiny, *a_few()]
    alone = alone_outcomes(base_of("llama"), jobs)
    assert Company(base_of("llama"), jobs).finish() == alone
    assert Company(base_of("llama"), tiny).finish() == alone[:3]


def test_a_batch_without_a_supervised_token_harms_nobody() -> None:
    rows = [Example([5, 6, 7], [False] * 3, "row:0")]
    silent = Job(*specs_of(per_device_train_batch_size=1, max_steps=3, weight_decay=0.0), rows)
    jobs = [silent, *a_few()]
    company = Company(base_of("llama"), jobs)
    assert company.finish() == alone_outcomes(base_of("llama"), jobs)
    assert "loss=0.0" in company.outcomes[0].steps[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_neighbours_that_recompute_activations_change_no_bit(family: str) -> None:
    jobs, alone = varied_jobs(family, 8)
    recomputed = [
        Job(job.peft, job.training.model_copy(update={"gradient_checkpointing": number % 3 == 0}), job.train, job.validation)
        for number, job in enumerate(jobs)
    ]
    assert Company(base_of(family), recomputed).finish() == alone


def test_early_stops_and_evaluations_in_company_are_those_of_each_alone() -> None:
    changes: dict[str, Any] = {"max_steps": 40, "eval_steps": 2, "early_stopping_patience": 1, "lr_scheduler_type": "constant"}
    jobs = [varied_job(seed, **changes, learning_rate=[1e-3, 0.5, 2.0][seed % 3]) for seed in range(6)]
    jobs = [Job(job.peft, job.training, job.train, examples_of(2 + number, 50)) for number, job in enumerate(jobs)]
    alone = alone_outcomes(base_of("llama"), jobs)
    assert any("stopped_early=True" in one.standing for one in alone)
    assert len({len(one.steps) for one in alone}) > 2
    assert Company(base_of("llama"), jobs).finish(most=4) == alone


def test_long_validation_sets_are_measured_in_the_same_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.engine.training.EVALUATION_TOKENS", 50)
    jobs = [varied_job(seed, eval_steps=2, lora_dropout=0.0) for seed in range(5)]
    jobs = [Job(job.peft, job.training, job.train, examples_of(1 + 7 * number, 50)) for number, job in enumerate(jobs)]
    assert Company(base_of("llama"), jobs).finish() == alone_outcomes(base_of("llama"), jobs)


NUM_ACTORS = 7
SCRIPTS = st.lists(
    st.tuples(
        st.sampled_from(["join", "advance", "advance", "advance", "preempt"]),
        st.sets(st.integers(0, NUM_ACTORS - 1), min_size=1),
        st.integers(0, 1),
    ),
    max_size=40,
)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(SCRIPTS)
def test_no_order_of_joining_leaving_and_preempting_changes_a_bit(script: list[tuple[str, set[int], int]]) -> None:
    jobs, alone = varied_jobs("llama", NUM_ACTORS)
    company = Company(base_of("llama"), jobs, num_packs=2)
    for action, numbers, pack in script:
        if action == "advance":
            company.advance(sorted(numbers))
        for number in sorted(numbers):
            if action == "join" and number in company.waiting:
                company.join(number, pack)
            elif action == "preempt" and number in company.live:
                company.preempt(number)
    assert company.finish() == alone


@pytest.mark.parametrize("seed", range(3))
def test_sixteen_adapters_that_come_and_go_at_random_keep_their_bits(seed: int) -> None:
    jobs, alone = varied_jobs("llama", 16)
    company, draw = Company(base_of("llama"), jobs, num_packs=2), random.Random(seed)
    while company.waiting or company.live:
        for number in company.waiting:
            if draw.random() < 0.3:
                company.join(number, draw.randrange(2))
        company.advance([number for number in list(company.live) if draw.random() < 0.6])
        for number in list(company.live):
            if draw.random() < 0.06:
                company.preempt(number)
    assert [company.outcomes[number] for number in range(16)] == alone


def test_adapters_with_rows_in_several_banks_share_a_pass_in_any_order_of_arrival() -> None:
    common: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "max_steps": 3, "keep": "last", "eval_steps": None}
    patterns: list[dict[str, Any]] = [
        {"r": 4, "rank_pattern": {"q_proj": 12}},
        {"r": 4, "rank_pattern": {"v_proj": 12}},
        {"r": 12},
        {"r": 16, "rank_pattern": {"layers.0.self_attn.q_proj": 2}},
        {"r": 4, "lora_dropout": 0.2, "rank_pattern": {"layers.1.self_attn.v_proj": 16}},
    ]
    jobs = [job_of(5, data=number, **(common | own)) for number, own in enumerate(patterns)]
    alone = alone_outcomes(base_of("llama"), jobs)
    for seed in range(6):
        company, order = Company(base_of("llama"), jobs), list(range(len(jobs)))
        random.Random(seed).shuffle(order)
        for number in order:
            company.join(number)
        assert company.finish() == alone


def test_classifiers_of_a_width_that_is_no_multiple_of_eight_have_the_bits_they_have_alone() -> None:
    config = RobertaConfig(
        vocab_size=97,
        hidden_size=50,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=48,
        eos_token_id=2,
    )
    base = ResidentBase(AutoModelForSequenceClassification.from_config(config).eval())
    jobs = [(2, 1, 4), (3, 5, 12), (9, 2, 2), (3, 3, 4)]  # labels, rows of a micro-batch, rank

    def trained(numbers: Sequence[int]) -> list[str]:
        pack = Pack(base)
        joined = []
        for labels, batch, r in (jobs[number] for number in numbers):
            rows = [replace(row, label=place % labels) for place, row in enumerate(examples_of(11, labels))]
            specs = specs_of(r=r, per_device_train_batch_size=batch, max_steps=4, seed=batch)
            joined.append(pack.join(*specs, rows, [], num_labels=labels))
        for _ in range(4):
            pack.advance(joined)
        return [digest_of(training.kept_tensors()) for training in joined]

    alone = [trained([number])[0] for number in range(len(jobs))]
    assert trained(range(4)) == alone
    assert trained([3, 1]) == [alone[3], alone[1]]
