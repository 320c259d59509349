"""Dropout masks: a function of seed, step, row, position, layer and feature alone, and as good as drawn."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.workers.engine.company import Company, alone_outcomes, base_of, job_of
from workers.engine.dropout import DropoutRows, dropout_mask, dropped, row_key, token_keys

LAYER = "model.layers.0.self_attn.q_proj"
TOKENS, FEATURES = 256, 512


def tokens_of(seed: int = 0, step: int = 0, row: int = 0, *, p: float = 0.5, length: int = TOKENS) -> DropoutRows:
    keys = torch.full((length,), row_key(seed, step, row), dtype=torch.int32)
    return DropoutRows(token_keys(keys, torch.arange(length, dtype=torch.int32)), torch.full((length, 1), p, dtype=torch.float64))


def mask_of(seed: int = 0, step: int = 0, row: int = 0, layer: str = LAYER, p: float = 0.5) -> Tensor:
    return dropout_mask(tokens_of(seed, step, row, p=p), layer, FEATURES)


@pytest.mark.parametrize("p", [0.0, 0.001, 0.05, 0.1, 0.3, 0.5, 0.9, 0.99])
def test_the_share_that_is_kept_is_one_minus_p(p: float) -> None:
    kept = float(torch.stack([mask_of(seed, p=p) for seed in range(8)]).double().mean())
    deviation = (p * (1 - p) / (8 * TOKENS * FEATURES)) ** 0.5
    assert abs(kept - (1 - p)) <= 5 * deviation


@pytest.mark.parametrize("axis", [0, 1])
def test_no_token_and_no_feature_is_dropped_more_than_others(axis: int) -> None:
    share = torch.cat([mask_of(seed) for seed in range(8)]).double() if axis == 0 else mask_of().double()
    means = share.mean(axis)
    deviation = 0.5 / share.shape[axis] ** 0.5
    assert float((means - 0.5).abs().max()) < 5.5 * deviation
    assert 0.8 < float(means.std()) / deviation < 1.2


def test_masks_of_another_seed_step_row_layer_position_or_feature_are_unrelated() -> None:
    mask = mask_of()
    others = [
        *(mask_of(seed=seed) for seed in (1, 2, 2**31 - 1)),
        *(mask_of(step=step) for step in (1, 2, 1000)),
        *(mask_of(row=row) for row in (1, 2, 1000)),
        *(mask_of(layer=LAYER.replace("0", number)) for number in "123"),
        mask_of(layer=LAYER.replace("q", "k")),
        *(mask.roll(shift, 0) for shift in (1, 2, 16)),
        *(mask.roll(shift, 1) for shift in (1, 2, 64)),
    ]
    deviation = 0.5 / (TOKENS * FEATURES) ** 0.5
    for one, other in itertools.combinations([mask, *others], 2):
        assert abs(float((one == other).double().mean()) - 0.5) < 5.5 * deviation


def test_seed_step_and_row_are_not_interchangeable() -> None:
    keys = {row_key(seed, step, row) for seed, step, row in itertools.product(range(12), repeat=3)}
    assert len(keys) == 12**3
    assert row_key(1, 11, 1) != row_key(11, 1, 1) != row_key(1, 1, 11)


def test_a_mask_does_not_depend_on_where_and_beside_whom_its_tokens_stand() -> None:
    one, other = tokens_of(seed=3, p=0.2), tokens_of(seed=4, p=0.7)
    assert one.p is not None
    assert other.p is not None
    together = DropoutRows(torch.cat([other.keys[:5], one.keys, other.keys]))
    shares = torch.cat([other.p[:5], one.p, other.p])[:, 0]
    whole = dropout_mask(together.of(slice(0, 5 + 2 * TOKENS), shares), LAYER, FEATURES)
    assert torch.equal(whole[5 : 5 + TOKENS], dropout_mask(one, LAYER, FEATURES))
    assert torch.equal(whole[5 + TOKENS :], dropout_mask(other, LAYER, FEATURES))
    order = torch.arange(5 + TOKENS - 1, 4, -1)
    picked = dropout_mask(together.of(order, one.p[:, 0]), LAYER, FEATURES)
    assert torch.equal(picked, dropout_mask(one, LAYER, FEATURES).flip(0))


def test_a_mask_of_fewer_features_is_the_beginning_of_that_of_more() -> None:
    assert torch.equal(dropout_mask(tokens_of(), LAYER, 50), mask_of()[:, :50])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_kept_is_divided_by_the_share_that_is_kept(dtype: torch.dtype) -> None:
    x = torch.randn(TOKENS, FEATURES, dtype=dtype, generator=torch.Generator().manual_seed(0))
    found, kept = dropped(x, (tokens_of(p=0.1), LAYER)), mask_of(p=0.1)
    assert not found[~kept].any()
    assert torch.allclose(found[kept], x[kept] / (1 - 0.1), rtol=4 * torch.finfo(dtype).eps, atol=0.0)
    assert found.dtype == dtype


def test_dropout_of_nothing_gives_the_input() -> None:
    x = torch.randn(TOKENS, FEATURES, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dropped(x, (tokens_of(p=0.0), LAYER)), x)


def test_adapters_that_drop_train_as_if_alone_beside_those_that_do_not() -> None:
    shares = [0.0, 0.1, 0.9, 0.5, 0.0, 0.1]
    jobs = [
        job_of(7, data=number, seed=number % 2, lora_dropout=share, max_steps=3, r=[4, 16][number % 2], eval_steps=None)
        for number, share in enumerate(shares)
    ]
    alone = alone_outcomes(base_of("llama"), jobs)
    assert Company(base_of("llama"), jobs).finish() == alone
    assert Company(base_of("llama"), jobs[::-1]).finish() == alone[::-1]


def test_dropout_changes_with_every_step_and_evaluations_drop_nothing() -> None:
    spec: dict[str, Any] = {
        "max_steps": 4,
        "eval_steps": 1,
        "learning_rate": 1e-30,
        "per_device_train_batch_size": 4,
        "keep": "last",
    }
    company = Company(base_of("llama"), [job_of(4, validation=3, lora_dropout=0.5, **spec), job_of(4, validation=3, **spec)])
    for number in range(2):
        company.join(number)
    measured = []
    for _, training in company.live.values():
        factor = next(bank.b(next(iter(row.ranks)), 0) for bank, row in training.rows.items())  # type: ignore[attr-defined]
        factor.fill_(0.1)  # an adapter that does something
    training_losses: list[list[float]] = [[], []]
    (pack, dropping), (_, plain) = company.live[0], company.live[1]
    for _ in range(4):
        results = pack.advance([dropping, plain])
        training_losses[0].append(results[dropping].loss)
        training_losses[1].append(results[plain].loss)
        metrics = pack.evaluate([dropping, plain])
        measured.append((metrics[dropping]["eval/loss"], metrics[plain]["eval/loss"]))
    assert len(set(training_losses[0])) == 4
    assert max(training_losses[1]) == pytest.approx(min(training_losses[1]), rel=1e-6)
    # Not to the last bit: factors of layers that drop on their own are not laid side by side, as those of the plain job are.
    assert all(one == pytest.approx(other, rel=1e-6) for one, other in measured)
    assert len(set(measured)) == 1
