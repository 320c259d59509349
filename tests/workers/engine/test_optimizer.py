"""AdamW over the rows of banks: torch's own numbers for each adapter, and nothing for those that are not named."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workers.engine.bank import FIRST_MOMENT, GRADIENTS, SECOND_MOMENT, WEIGHTS, Bank, LoraBank, Row, Shape
from workers.engine.optimizer import Update, adamw_step, clip_of, gradient_norms
from workers.spec import TrainingSpec

SHAPES = {"q": Shape(20, 12), "v": Shape(20, 7), "out": Shape(12, 20)}
RANKS: list[dict[str, int]] = [{"q": 3, "v": 8}, {"out": 1}, {"v": 2, "out": 5}, {"q": 8}, {"q": 1, "v": 1, "out": 1}]
KINDS = (WEIGHTS, GRADIENTS, FIRST_MOMENT, SECOND_MOMENT)


def filled_bank(
    ranks: list[dict[str, int]], dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> tuple[LoraBank, list[Row]]:
    """A bank with weights and gradients drawn for each adapter by its own number."""
    bank = LoraBank(8, SHAPES, torch.device("cpu"), dtype)
    rows = [bank.add(own) for own in ranks]
    for row in rows:
        fill(bank, row, scale)
    return bank, rows


def fill(bank: LoraBank, row: Row, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(sum(row.ranks.values()) + 100 * len(row.ranks))
    for name in row.ranks:
        for kind in (WEIGHTS, GRADIENTS):
            for factor in bank.read(row, kind, name):
                factor.copy_(torch.randn(factor.shape, generator=generator, dtype=torch.float64) * scale)


def values_of(bank: LoraBank, row: Row, kind: int) -> list[Tensor]:
    """An adapter's own values, A and B of each of its layers."""
    return [factor.clone() for name in sorted(row.ranks) for factor in bank.read(row, kind, name)]


def update_of(bank: Bank, row: Row, *, rate: float = 0.01, step: int = 1, clip: float = 1.0, **changes: Any) -> Update:
    return Update({bank: row}, TrainingSpec.model_validate(changes), rate, step, clip)


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


OWN: list[dict[str, Any]] = [
    {"rate": 0.02, "weight_decay": 0.1},
    {"rate": 0.5, "adam_beta1": 0.5, "clip": 0.25},
    {"rate": 1e-4, "adam_beta2": 0.9, "adam_epsilon": 1e-3},
    {"rate": 0.01, "loraplus_lr_ratio": 16.0, "weight_decay": 0.3},
    {"rate": 0.0},
]


def test_each_adapter_gets_the_step_of_torch_adamw_with_its_own_numbers() -> None:
    bank, rows = filled_bank(RANKS)
    parameters, optimizers = [], []
    for row, own in zip(rows, OWN, strict=True):
        values = [nn.Parameter(value) for value in values_of(bank, row, WEIGHTS)]
        spec = TrainingSpec.model_validate({key: value for key, value in own.items() if key not in ("rate", "clip")})
        parameters.append(values)
        optimizers.append(
            torch.optim.AdamW(
                [
                    {"params": values[0::2], "lr": own["rate"]},
                    {"params": values[1::2], "lr": own["rate"] * spec.loraplus_lr_ratio},
                ],
                betas=(spec.adam_beta1, spec.adam_beta2),
                eps=spec.adam_epsilon,
                weight_decay=spec.weight_decay,
            )
        )
    for step in range(1, 6):
        for row in rows:
            for name in row.ranks:
                for factor in bank.read(row, GRADIENTS, name):
                    factor.copy_(torch.randn(factor.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step)))
        for row, own, values, optimizer in zip(rows, OWN, parameters, optimizers, strict=True):
            for parameter, gradient in zip(values, values_of(bank, row, GRADIENTS), strict=True):
                parameter.grad = gradient * own.get("clip", 1.0)
            optimizer.step()
        adamw_step([bank], [update_of(bank, row, step=step, **own) for row, own in zip(rows, OWN, strict=True)])
    for row, values in zip(rows, parameters, strict=True):
        for found, expected in zip(values_of(bank, row, WEIGHTS), values, strict=True):
            assert torch.allclose(found, expected.detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("named", [[0], [1, 2], [0, 2, 4], [4, 1], [0, 1, 2, 3, 4]])
def test_adapters_that_are_not_named_keep_weights_gradients_and_moments(named: list[int]) -> None:
    bank, rows = filled_bank(RANKS, torch.float32)
    adamw_step([bank], [update_of(bank, row, weight_decay=0.5) for row in rows])  # moments are no longer zero
    for row in rows:
        fill(bank, row)
    before = [[values_of(bank, row, kind) for kind in KINDS] for row in rows]
    adamw_step([bank], [update_of(bank, rows[number], step=2, weight_decay=0.5) for number in named])
    for number, row in enumerate(rows):
        for kind in KINDS:
            same = equal(before[number][kind], values_of(bank, row, kind))
            if number not in named:
                assert same, (number, kind)
            elif kind != GRADIENTS:  # those of a step that is done are used up
                assert not same, (number, kind)


@pytest.mark.parametrize("company", [[0], [0, 1], [0, 2, 4], [0, 1, 2, 3, 4], [0, 3]])
def test_an_adapters_step_has_the_same_bits_in_any_company(company: list[int]) -> None:
    alone, (row_alone,) = filled_bank(RANKS[:1], torch.float32)
    bank, rows = filled_bank(RANKS, torch.float32)
    for step in range(1, 4):
        for one, own in ((alone, [row_alone]), (bank, rows)):
            for row in own:
                fill(one, row, scale=10.0**-step)
        adamw_step([alone], [update_of(alone, row_alone, step=step, weight_decay=0.1, clip=0.3)])
        adamw_step([bank], [update_of(bank, rows[number], step=step, weight_decay=0.1, clip=0.3) for number in company])
    for kind in (WEIGHTS, FIRST_MOMENT, SECOND_MOMENT):
        assert equal(values_of(alone, row_alone, kind), values_of(bank, rows[0], kind))


def test_what_nobody_owns_stays_exactly_zero_under_decay_and_large_rates() -> None:
    bank, rows = filled_bank(RANKS, torch.float32)
    for step in range(1, 4):
        adamw_step([bank], [update_of(bank, row, rate=1e3, step=step, weight_decay=0.5) for row in rows])
    for kind in (WEIGHTS, FIRST_MOMENT, SECOND_MOMENT):
        for row in rows:
            for name in row.ranks:
                for factor in bank.read(row, kind, name):
                    factor.zero_()
        assert not any(bank.region(kind, which).any() for which in ("a", "b"))


def test_norms_are_those_of_each_adapter_and_have_the_same_bits_in_any_company() -> None:
    bank, rows = filled_bank(RANKS, torch.float32, scale=1e-3)
    norms = gradient_norms([bank], [{bank: row} for row in rows])
    for number, row in enumerate(rows):
        expected = torch.cat([value.double().flatten() for value in values_of(bank, row, GRADIENTS)]).norm()
        assert norms[number] == pytest.approx(float(expected), rel=1e-6)
        alone, (own,) = filled_bank([RANKS[number]], torch.float32, scale=1e-3)
        assert gradient_norms([alone], [{alone: own}]) == [norms[number]]


def test_layers_that_only_others_have_add_nothing_to_a_norm_not_even_rounding() -> None:
    shapes = {f"layer{number}": Shape(96, 160) for number in range(12)}
    own = {name: 8 for number, name in enumerate(shapes) if number % 3 == 1}
    found = []
    for others in ([], [{"layer0": 1}], [dict.fromkeys(shapes, 2)]):
        bank = LoraBank(8, shapes, torch.device("cpu"))
        row = [*(bank.add(other) for other in others), bank.add(own)][-1]
        for number, name in enumerate(own):
            generator = torch.Generator().manual_seed(number)
            for factor in bank.read(row, GRADIENTS, name):  # of such sizes that a sum in float64 rounds
                sizes = torch.rand(factor.shape, generator=generator) * -6
                factor.copy_(torch.randn(factor.shape, generator=generator) * 10 ** sizes.sort(0).values)
        found += gradient_norms([bank], [{bank: row}])
    assert found[0] == found[1] == found[2]


def test_an_adapter_in_two_banks_has_one_norm() -> None:
    small, (first, *_) = filled_bank(RANKS, torch.float32)
    large = LoraBank(16, SHAPES, torch.device("cpu"))
    second = large.add({"out": 12})
    fill(large, second)
    (norm,) = gradient_norms([large, small], [{large: second, small: first}])
    both = [*values_of(small, first, GRADIENTS), *values_of(large, second, GRADIENTS)]
    assert norm == pytest.approx(float(torch.cat([value.flatten() for value in both]).double().norm()), rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_gradient_that_is_no_number_spoils_no_other_norm(value: float) -> None:
    bank, rows = filled_bank(RANKS, torch.float32)
    expected = gradient_norms([bank], [{bank: row} for row in rows])
    bank.read(rows[2], GRADIENTS, "v")[0][0, 0] = value
    found = gradient_norms([bank], [{bank: row} for row in rows])
    assert not torch.isfinite(torch.tensor(found[2]))
    assert [*found[:2], *found[3:]] == [*expected[:2], *expected[3:]]


@pytest.mark.parametrize(("norm", "limit"), [(0.5, 1.0), (1.0, 1.0), (2.0, 1.0), (1e6, 0.3), (5.0, 0.0)])
def test_the_clip_is_that_of_torch_and_zero_does_not_clip(norm: float, limit: float) -> None:
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    parameter.grad = torch.tensor([norm, 0.0], dtype=torch.float64)
    if limit:
        nn.utils.clip_grad_norm_([parameter], limit)
    assert norm * clip_of(norm, limit) == pytest.approx(float(parameter.grad[0]), rel=2e-6)  # torch clips at the limit already
