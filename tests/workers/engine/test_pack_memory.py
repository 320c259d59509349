"""Memory that runs out, wherever it does, changes no bit of an adapter whose step is done again."""

import contextlib
import functools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.workers.engine.company import (
    PRODUCTS,
    Company,
    Job,
    ScarceMemory,
    alone_outcomes,
    base_of,
    job_of,
    shares_memory,
    varied_jobs,
)
from tests.workers.engine.packs import specs_of
from workers.data.render import Example
from workers.engine.pack import Pack
from workers.engine.resident import ResidentBase
from workers.engine.training import Training


def test_a_neighbour_that_is_split_for_memory_changes_nobody_and_says_so() -> None:
    jobs, alone = varied_jobs("llama", 8)
    split = job_of(16, per_device_train_batch_size=8, max_steps=5)
    company = Company(base_of("llama"), [split, *jobs])
    for number in range(9):
        company.join(number)
    company.advance(range(9))
    training = company.live[0][1]
    training.split_rows(3)
    assert len(training.next_batch()) == 3
    outcomes = company.finish()
    assert outcomes[1:] == alone
    assert "split_rows=3" in outcomes[0].standing


class Failing:
    """Passes of more than `most` tokens run out of memory, at one of three moments."""

    def __init__(self, base: ResidentBase, most: int, moment: str) -> None:
        self.base, self.most, self.moment = base, most, moment
        self.raised = 0
        self._pass = base.backward_stream

    def __enter__(self) -> "Failing":
        self.base.backward_stream = self._limited  # type: ignore[method-assign]
        return self

    def __exit__(self, *exception: object) -> None:
        self.base.backward_stream = self._pass  # type: ignore[method-assign]

    def _limited(self, stream: Any, denominators: Any) -> list[float]:
        if stream.num_tokens <= self.most:
            return self._pass(stream, denominators)
        self.raised += 1
        match self.moment:
            case "before":
                raise torch.OutOfMemoryError("no memory for this pass")
            case "after":
                self._pass(stream, denominators)
                raise torch.OutOfMemoryError("no memory behind this pass")
        with FailingGradient(self.base):
            return self._pass(stream, denominators)


class FailingGradient(TorchDispatchMode):
    """Lets the gradient of the first layer's attention run out of memory: later layers have added theirs to the banks."""

    def __init__(self, base: ResidentBase) -> None:
        super().__init__()
        self._weight = base.groups[1].frozen[0].module.weight  # type: ignore[attr-defined]
        self._products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and any(shares_memory(arg, self._weight) for arg in args):
            self._products += 1
            if self._products == 2:
                raise torch.OutOfMemoryError("no memory in the middle of the backward pass")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("moment", ["before", "in the middle", "after"])
def test_a_pass_that_runs_out_of_memory_and_is_tried_again_with_fewer_changes_no_bit(moment: str) -> None:
    jobs, alone = varied_jobs("llama", 16)
    company = Company(base_of("llama"), jobs)
    for number in range(16):
        company.join(number)
    with Failing(base_of("llama"), 170, moment) as failing:
        budget, turn = 1_400, 0
        while company.live:
            turn += 1
            try:
                company.advance(company.within(budget, turn))
            except torch.OutOfMemoryError:
                budget = max(170, budget // 2)
    assert failing.raised >= 3
    assert [company.outcomes[number] for number in range(16)] == alone


def test_a_step_that_is_voided_halfway_begins_anew_with_its_first_micro_batch() -> None:
    job = job_of(8, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2)
    pack = Pack(base_of("llama"))
    training = job.join(pack)
    first = training.next_batch()
    pack.advance([training])
    pack.advance([training])
    assert training.is_mid_step
    with Failing(base_of("llama"), 0, "after"), pytest.raises(torch.OutOfMemoryError):
        pack.advance([training])
    assert not training.is_mid_step
    assert [one.row for one in training.next_batch()] == [one.row for one in first]


def test_joining_without_memory_for_the_factors_leaves_everybody_as_they_were() -> None:
    jobs, alone = varied_jobs("llama", 8)
    company = Company(base_of("llama"), jobs)
    for number in range(4):
        company.join(number)
    company.advance([1, 2])
    bytes_before = company.packs[0].bytes_in_use()
    big = job_of(r=16, rank_pattern={"q_proj": 2})
    for most in (100, 1_000, 10_000, 50_000):
        with ScarceMemory(most) as scarce, pytest.raises(torch.OutOfMemoryError):
            big.join(company.packs[0])
        assert scarce.refused
        assert len(company.packs[0].trainings) == 4
    assert company.packs[0].bytes_in_use() <= 2 * bytes_before
    assert company.finish() == alone
    assert company.packs[0].bytes_in_use() == 0


def test_an_evaluation_that_is_done_again_after_memory_ran_out_counts_once() -> None:
    rows = [Example([5, 6], [True, True], "row:0")]
    specs = {"max_steps": 6, "eval_steps": 1, "early_stopping_patience": 2, "per_device_train_batch_size": 1}
    jobs = [Job(*specs_of(r=r, target_modules=["q_proj"], **specs), rows, rows) for r in (1, 2)]
    jobs.append(Job(*specs_of(r=16, **specs), rows, rows))
    alone = alone_outcomes(base_of("llama"), jobs)
    company = Company(base_of("llama"), jobs)
    refused = 0

    def evaluate_twice(pack: Pack, due: list[Training]) -> None:
        nonlocal refused
        with ScarceMemory(10_000) as scarce, contextlib.suppress(torch.OutOfMemoryError):  # one adapter's copy has more
            Pack.evaluate(pack, due)
        refused += len(scarce.refused)
        for training in due:
            Pack.evaluate(pack, [training])

    company.packs[0].evaluate = functools.partial(evaluate_twice, company.packs[0])  # type: ignore[method-assign,assignment]
    assert company.finish() == alone
    assert refused


def test_an_optimiser_step_that_runs_out_of_memory_is_as_if_it_had_not_begun() -> None:
    rows = [Example([5, 6 + number], [True, True], f"row:{number}") for number in range(3)]
    jobs = [
        Job(*specs_of(r=r, per_device_train_batch_size=2, max_steps=4, weight_decay=0.1, keep="last", seed=r), rows)
        for r in (16, 15, 8, 7)
    ]
    alone = alone_outcomes(base_of("llama"), jobs)
    for called in ([0, 1, 2, 3], [0, 1], [1, 3]):  # rows side by side, in one bank and two, and not
        refused = 0
        for most in range(4_000, 60_000, 5_000):  # activations of 32 tokens have less
            company = Company(base_of("llama"), jobs)
            for number in range(4):
                company.join(number)
            company.advance(range(4))
            with ScarceMemory(most) as scarce, contextlib.suppress(torch.OutOfMemoryError):
                company.advance(called)
            refused += len(scarce.refused)
            assert company.finish() == alone, (called, most, scarce.refused)
        assert refused
