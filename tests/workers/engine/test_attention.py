"""Attention inside the sequences of a stream: right, and a sequence's bits are its own."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from infra.errors import BadInput
from workers.engine.attention import hold_plan, install_attention, stream_attention

LENGTHS = st.integers(1, 70) | st.sampled_from([16, 32, 63, 64, 65, 96, 127, 129, 270])


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Case:
    """One attention call's shape."""

    num_heads: int
    num_key_value_heads: int
    width: int
    causal: bool = True
    window: int | None = None
    softcap: float | None = None

    def row(self, length: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Draw a sequence's query, key, value and the gradient of its attention, each [length, heads, width]."""
        generator = torch.Generator().manual_seed(seed)
        heads = (self.num_heads, self.num_key_value_heads, self.num_key_value_heads, self.num_heads)
        return tuple(torch.randn(length, number, self.width, generator=generator).to(dtype) for number in heads)

    def through_stream(self, rows: list[tuple[Tensor, ...]], tail: int = 0) -> list[tuple[Tensor, ...]]:
        """Attend to the rows laid end to end; return each one's result and its gradients of query, key and value."""
        lengths = [len(row[0]) for row in rows]
        ends = self.row(tail, 7, rows[0][0].dtype)
        query, key, value, grad = (
            torch.cat([row[place] for row in rows] + [ends[place]])[None].transpose(1, 2) for place in range(4)
        )
        inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
        options: dict[str, Any] = {"sliding_window": self.window, "softcap": self.softcap, "is_causal": self.causal}
        module = nn.Module()
        with hold_plan(module).sequences(lengths, sum(lengths) + tail):
            out, _ = stream_attention(module, query, key, value, None, **options)
            grads = torch.autograd.grad(out, inputs, grad.transpose(1, 2))
        found = [out[0], *(tensor[0].transpose(0, 1) for tensor in grads)]
        parts = [tensor.split([*lengths, tail]) for tensor in found]
        assert all(bool((part[-1] == 0.0).all()) for part in parts)
        return [tuple(part[number] for part in parts) for number in range(len(rows))]

    def by_hand(self, row: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Compute what `through_stream` does for one row, straight from the definition."""
        query, key, value = (tensor.detach().clone().requires_grad_() for tensor in row[:3])
        group = self.num_heads // self.num_key_value_heads
        scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(group, 1)) * self.width**-0.5
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        place = torch.arange(len(query))
        distance = place[:, None] - place
        hidden = (distance < 0) & self.causal | (distance >= (math.inf if self.window is None else self.window))
        weights = torch.softmax(scores.masked_fill(hidden, -math.inf), -1)
        out = torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(group, 1))
        return out, *torch.autograd.grad(out, (query, key, value), row[3])


CASES = {
    "narrow-heads": Case(4, 4, 8),
    "narrow-heads-that-share-keys": Case(8, 4, 8),
    "one-key-head": Case(4, 1, 16),
    "wide-heads": Case(2, 2, 64),
    "wide-heads-that-share-keys": Case(6, 2, 64),
    "odd-width": Case(3, 3, 5),
    "window": Case(4, 2, 16, window=20),
    "window-of-one-block-and-a-bit": Case(2, 2, 8, window=33),
    "window-of-itself": Case(2, 1, 8, window=1),
    "capped": Case(4, 2, 8, softcap=1.5),
    "capped-window": Case(2, 2, 32, window=7, softcap=1.5),
    "both-ways": Case(4, 4, 8, causal=False),
    "both-ways-wide": Case(2, 1, 64, causal=False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_and_its_gradients_are_those_of_the_definition(case: Case) -> None:
    rows = [case.row(length, seed, torch.float64) for seed, length in enumerate([1, 5, 40, 16, 96, 33, 300, 40])]
    for found, row in zip(case.through_stream(rows, tail=9), rows, strict=True):
        for tensor, own in zip(found, case.by_hand(row), strict=True):
            torch.testing.assert_close(tensor, own, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(LENGTHS, min_size=1, max_size=9), tail=st.integers(0, 31), data=st.data())
def test_bits_of_a_sequence_do_not_depend_on_who_stands_beside_it(
    case: Case, lengths: list[int], tail: int, data: st.DataObject
) -> None:
    rows = [case.row(length, seed) for seed, length in enumerate(lengths)]
    order = data.draw(st.permutations(range(len(rows))))
    packed = case.through_stream([rows[number] for number in order], tail)
    for found, number in zip(packed, order, strict=True):
        (alone,) = case.through_stream([rows[number]])
        assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True)), (lengths, order, number)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("length", [20, 90])
def test_bits_of_a_sequence_do_not_depend_on_how_many_are_of_its_length(case: Case, length: int) -> None:
    rows = [case.row(length, seed) for seed in range(64)]
    alone = case.through_stream(rows[:1])[0]
    for number in (2, 3, 17, 64):
        found = case.through_stream(rows[:number])[0]
        assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True)), number


def test_a_sequence_of_nans_stays_alone_with_them() -> None:
    case = CASES["narrow-heads"]
    rows = [case.row(40, seed) for seed in range(3)]
    poisoned = [rows[0], tuple(torch.full_like(tensor, math.nan) for tensor in rows[1]), rows[2]]
    found, clean = case.through_stream(poisoned, tail=3), case.through_stream(rows, tail=3)
    for number in (0, 2):
        assert all(torch.equal(one, other) for one, other in zip(found[number], clean[number], strict=True))


def test_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    case = CASES["capped"]
    rows = [case.row(40, seed, torch.bfloat16) for seed in range(2)]
    whole = case.through_stream([tuple(tensor.float() for tensor in row) for row in rows])
    for found, exact in zip(case.through_stream(rows), whole, strict=True):
        assert all(torch.equal(one, other.bfloat16()) for one, other in zip(found, exact, strict=True))


@pytest.mark.parametrize(
    ("options", "word"), [({"s_aux": torch.zeros(2)}, "sinks"), ({"is_causal": False, "sliding_window": 4}, "both ways")]
)
def test_attention_that_is_not_known_here_is_refused(options: dict[str, Any], word: str) -> None:
    query = torch.zeros(1, 2, 3, 8)
    module = nn.Module()
    with hold_plan(module).sequences([3]), pytest.raises(BadInput, match=word):
        stream_attention(module, query, query, query, None, **options)


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, use_cache=False
    )
    return LlamaForCausalLM(config).eval()


def test_models_in_threads_attend_each_to_its_own_sequences_also_from_threads_of_autograd() -> None:
    lengths = [[5, 40, 3], [20, 28], [48], [1] * 48]
    alone = [gradient_of(tiny_llama(seed), own) for seed, own in enumerate(lengths)]
    models = [tiny_llama(seed) for seed in range(len(lengths))]
    with ThreadPoolExecutor(len(lengths)) as threads:
        found = list(threads.map(gradient_of, models, lengths))
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


def gradient_of(model: LlamaForCausalLM, lengths: list[int]) -> Tensor:
    """Return a gradient whose activations are recomputed on another thread, as autograd does on a GPU."""
    plan = install_attention(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    positions = torch.cat([torch.arange(length) for length in lengths])
    torch.set_num_threads(1)  # each thread has its own number
    with plan.sequences(lengths, 48), ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as other:
        loss = model(input_ids=torch.arange(48)[None], position_ids=positions[None]).logits.square().sum()
        other.submit(loss.backward).result()
    grad = model.model.layers[0].self_attn.q_proj.weight.grad
    assert grad is not None
    return grad
