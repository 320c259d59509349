"""Rows of banks: nobody else's values move when one joins, trains or leaves, and what nobody owns is zero."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.workers.engine.company import Job, base_of, job_of
from workers.engine.bank import (
    ALIGNED,
    FIRST_MOMENT,
    GRADIENTS,
    SECOND_MOMENT,
    WEIGHTS,
    Bank,
    HeadBank,
    LoraBank,
    Row,
    Shape,
    rank_bucket,
)
from workers.engine.pack import Pack
from workers.engine.training import Training

KINDS = (WEIGHTS, GRADIENTS, FIRST_MOMENT, SECOND_MOMENT)
SHAPES = {"q": Shape(20, 12), "k": Shape(20, 7), "out": Shape(12, 20), "up": Shape(20, 50)}
CPU = torch.device("cpu")


@pytest.mark.parametrize(("r", "bucket"), [(1, 8), (7, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 64), (64, 64), (320, 512)])
def test_the_bucket_of_a_rank_is_the_next_power_of_two_and_eight_at_least(r: int, bucket: int) -> None:
    assert rank_bucket(r) == bucket


def factors(bank: LoraBank, row: Row) -> Iterator[Tensor]:
    """All that a row owns: four kinds of A and B of each of its layers."""
    for kind in KINDS:
        for name in row.ranks:
            yield from bank.read(row, kind, name)


def mark(bank: LoraBank, row: Row, value: float) -> None:
    for number, factor in enumerate(factors(bank, row)):
        factor.fill_(value + number / 100)


def is_marked(bank: LoraBank, row: Row, value: float) -> bool:
    return all(bool((factor == torch.tensor(value + number / 100)).all()) for number, factor in enumerate(factors(bank, row)))


def owned_by_nobody(bank: LoraBank) -> Tensor:
    """All values of the rows in use but those that an adapter owns."""
    regions = [bank.region(kind, which).clone() for kind in KINDS for which in ("a", "b")]
    for row in bank.rows:
        for factor in factors(bank, row):
            factor.zero_()
    left = torch.cat([bank.region(kind, which).flatten() for kind in KINDS for which in ("a", "b")])
    for region, (kind, which) in zip(regions, [(kind, which) for kind in KINDS for which in ("a", "b")], strict=True):
        bank.region(kind, which).copy_(region)
    return left


LAYERS = st.dictionaries(st.sampled_from(list(SHAPES)), st.integers(1, 8), min_size=1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.one_of(LAYERS, st.integers(0, 9)), max_size=25))
def test_every_adapter_keeps_its_values_whoever_comes_and_goes(script: list[Any]) -> None:
    bank = LoraBank(8, SHAPES, CPU)
    marks: dict[Row, float] = {}
    for number, action in enumerate(script):
        if isinstance(action, dict):
            row = bank.add(action)
            assert not any(factor.any() for factor in factors(bank, row))
            marks[row] = float(number + 1)
            mark(bank, row, marks[row])
        elif marks:
            row = list(marks)[action % len(marks)]
            bank.remove(row)
            del marks[row]
            assert row.index == -1
        assert sorted(row.index for row in marks) == list(range(len(marks)))
        assert all(is_marked(bank, row, value) for row, value in marks.items())
        assert not owned_by_nobody(bank).any()
    for row in list(marks):
        bank.remove(row)
    assert bank.num_bytes == 0


def test_adapters_of_equal_targets_stand_side_by_side() -> None:
    bank = LoraBank(8, SHAPES, CPU)
    rows = [bank.add(dict.fromkeys(names, 4)) for names in (["q", "k"], ["up"], ["q", "k"], ["out"], ["up"], ["q", "k"])]
    assert sorted(rows[number].index for number in (0, 2, 5)) == [0, 1, 2]
    assert abs(rows[1].index - rows[4].index) == 1


def test_blocks_of_layers_begin_at_multiples_of_what_a_vectorised_loop_takes() -> None:
    bank = LoraBank(8, SHAPES, CPU)
    bank.add(dict.fromkeys(SHAPES, 3))
    bank.add({"q": 1})
    start = bank.region(WEIGHTS, "a").data_ptr()
    for kind in KINDS:
        for name in SHAPES:
            for view in (bank.a_run((name,), kind), bank.b(name, kind)):
                assert (view.data_ptr() - start) % (ALIGNED * view.element_size()) == 0
                assert view.stride(0) % ALIGNED == 0


def test_layers_that_do_not_stand_side_by_side_are_not_taken_as_one() -> None:
    bank = LoraBank(16, SHAPES, CPU)
    bank.add({"q": 2, "k": 2, "out": 2, "up": 2})
    assert bank.a_run(("q", "k")).shape == (1, 32, 20)
    for names in (("k", "q"), ("q", "up"), ("q", "q")):
        with pytest.raises(AssertionError, match="side by side"):
            bank.a_run(names)


def test_many_joins_and_leaves_do_not_let_a_bank_grow() -> None:
    bank = LoraBank(8, SHAPES, CPU)
    rows = [bank.add({"q": 2}) for _ in range(4)]
    bank.remove(rows.pop())
    size = bank.num_bytes
    for number in range(300):
        rows.append(bank.add({"q": 1 + number % 8}))
        bank.remove(rows.pop(number % 3))
    assert bank.num_bytes == size


def test_heads_keep_their_values_whoever_comes_and_goes_and_their_fillings_are_zero() -> None:
    bank = HeadBank(3, {"dense.weight": (16, 16), "out.weight": (3, 16), "out.bias": (3,)}, CPU)
    rows = []
    for number in range(5):
        rows.append(bank.add())
        for kind in KINDS:
            for name in ("dense.weight", "out.weight", "out.bias"):
                assert not bank.read(rows[-1], kind, name).any()
                bank.read(rows[-1], kind, name).fill_(float(number + kind))
    for gone in (3, 0):
        bank.remove(rows.pop(gone))
    for number, row in zip((1, 2, 4), rows, strict=True):
        for kind in KINDS:
            assert bool((bank.read(row, kind, "out.weight") == number + kind).all())
            assert bool((bank.read(row, kind, "out.bias") == number + kind).all())
            assert not bank.tensor("out.weight", kind)[row.index, 3:].any()
            assert not bank.tensor("out.bias", kind)[row.index, 3:].any()


# In a pack.

RANKS = [1, 3, 8, 9, 12, 16]


def a_pack(**changes: Any) -> tuple[Pack, list[Training]]:
    """Adapters of all kinds of ranks and targets on one base."""
    pack = Pack(base_of("llama"))
    targets: list[Any] = ["attention", "mlp", "all-linear", ["q_proj", "v_proj"]]
    spec = {"weight_decay": 0.5, "learning_rate": 0.05, "max_steps": 50, "eval_steps": None} | changes
    jobs = [
        job_of(7, data=number, seed=number, r=r, target_modules=targets[number % 4], **spec) for number, r in enumerate(RANKS)
    ]
    return pack, [job.join(pack) for job in jobs]


def banks_of(trainings: list[Training]) -> list[LoraBank]:
    found: dict[Bank, None] = {}
    for training in trainings:
        found |= dict.fromkeys(training.rows)
    return [bank for bank in found if isinstance(bank, LoraBank)]


def vectors_of(training: Training) -> list[Tensor]:
    return list(training.state()[0].values())


@pytest.mark.parametrize(
    "changes", [{}, {"lora_dropout": 0.3}, {"gradient_accumulation_steps": 2}, {"rank_pattern": {"q_proj": 2}}]
)
def test_tails_of_ranks_and_blocks_of_others_are_exactly_zero_after_steps(changes: dict[str, Any]) -> None:
    if "rank_pattern" in changes:
        changes = changes | {"target_modules": "attention"}
    pack, trainings = a_pack() if "target_modules" in changes else a_pack(**changes)
    if "target_modules" in changes:
        trainings.append(job_of(7, r=9, max_steps=50, **changes).join(pack))
    for number in range(5):
        pack.advance(trainings[number % 2 :])
        for bank in banks_of(trainings):
            assert not owned_by_nobody(bank).any()
    assert all(any(vector.any() for vector in vectors_of(training)) for training in trainings)


def test_an_idle_adapter_is_untouched_by_the_steps_of_its_neighbours() -> None:
    pack, trainings = a_pack(gradient_accumulation_steps=2, per_device_train_batch_size=2)
    pack.advance(trainings)
    pack.advance(trainings)
    pack.advance(trainings[1::2])  # some idle ones hold the gradient of half a step
    idle, busy = trainings[:3], trainings[3:]
    before = [gradient.clone() for one in idle for gradient in gradients_of(one)], [vectors_of(one) for one in idle]
    for _ in range(4):
        pack.advance(busy)
    assert all(torch.equal(a, b) for a, b in zip(before[0], [g for one in idle for g in gradients_of(one)], strict=True))
    for vectors, one in zip(before[1], idle, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(vectors, vectors_of(one), strict=True))
    assert any(gradient.any() for gradient in gradients_of(idle[1]))
    assert not any(gradient.any() for gradient in gradients_of(idle[0]))


def gradients_of(training: Training) -> Iterator[Tensor]:
    for bank, row in training.rows.items():
        assert isinstance(bank, LoraBank)
        for name in row.ranks:
            yield from bank.read(row, GRADIENTS, name)


def test_a_row_that_is_used_again_begins_with_zero_gradients_and_moments() -> None:
    pack, trainings = a_pack(gradient_accumulation_steps=2)
    for _ in range(3):
        pack.advance(trainings)  # in the middle of a step
    for training in trainings[:4]:
        pack.leave(training)
    again = job_of(7, r=16, target_modules="all-linear").join(pack)
    vectors, standing = again.state()
    assert not vectors["first_moment"].any()
    assert not vectors["second_moment"].any()
    assert not any(gradient.any() for gradient in gradients_of(again))
    assert standing["step"] == 0
    for bank in banks_of([again]):
        assert not owned_by_nobody(bank).any()


def test_restoring_in_the_middle_of_a_step_forgets_its_gradient() -> None:
    pack, trainings = a_pack(gradient_accumulation_steps=2, per_device_train_batch_size=2)
    pack.advance(trainings)
    training = trainings[2]
    assert any(gradient.any() for gradient in gradients_of(training))
    training.restore(*training.state())
    assert not any(gradient.any() for gradient in gradients_of(training))
    assert not training.is_mid_step


def test_gradients_are_zero_after_each_step() -> None:
    pack, trainings = a_pack()
    pack.advance(trainings)
    assert not any(gradient.any() for training in trainings for gradient in gradients_of(training))


def test_an_adapter_with_other_targets_that_joins_moves_nobody() -> None:
    pack = Pack(base_of("llama"))
    spec: dict[str, Any] = {"max_steps": 50, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    first = [job_of(7, target_modules=["v_proj"], seed=seed, **spec).join(pack) for seed in range(3)]
    for _ in range(3):
        pack.advance(first)
    before = [[*vectors_of(one), *(gradient.clone() for gradient in gradients_of(one))] for one in first]
    others: list[Any] = [["q_proj"], ["down_proj", "q_proj"], "all-linear", ["v_proj", "o_proj"]]
    for targets in others:
        job_of(7, target_modules=targets, **spec).join(pack)
    pack.leave(pack.trainings[4])
    for values, one in zip(before, first, strict=True):
        now = [*vectors_of(one), *gradients_of(one)]
        assert all(torch.equal(a, b) for a, b in zip(values, now, strict=True))


def test_leaving_twice_and_leaving_all_gives_every_byte_back() -> None:
    pack, trainings = a_pack()
    pack.advance(trainings)
    for training in trainings:
        pack.leave(training)
        pack.leave(training)
    assert pack.trainings == []
    assert pack.bytes_in_use() == 0


def test_hundreds_of_joins_and_leaves_do_not_let_a_pack_grow() -> None:
    pack, trainings = a_pack()
    job: Job = job_of(3, r=4, max_steps=1, target_modules=["q_proj"])
    pack.leave(job.join(pack))
    size = pack.bytes_in_use()
    for number in range(300):
        joined = job.join(pack)
        if number % 50 == 0:
            pack.advance([joined, *trainings])
        pack.leave(joined)
    assert pack.bytes_in_use() == size
