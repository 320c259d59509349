"""A pack is one: its operations do not grow with the number of its adapters."""

from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.workers.engine.company import PRODUCTS, Job, base_of
from tests.workers.engine.packs import specs_of
from workers.data.render import Example
from workers.engine.pack import Pack
from workers.engine.resident import ResidentBase


class Dispatches(TorchDispatchMode):
    """Counts operations, and the products with each weight of the frozen base."""

    def __init__(self, base: ResidentBase) -> None:
        super().__init__()
        self.total = 0
        self.products = {name: 0 for name, parameter in base.model.named_parameters() if parameter.dim() == 2}
        self._owners = {
            parameter.untyped_storage().data_ptr(): name
            for name, parameter in base.model.named_parameters()
            if parameter.dim() == 2
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += 1
        if func in PRODUCTS:
            for arg in args:
                owner = self._owners.get(arg.untyped_storage().data_ptr()) if isinstance(arg, Tensor) else None
                if owner is not None:
                    self.products[owner] += 1
        return func(*args, **(kwargs or {}))


ROWS = [Example([*range(1, 13)], [True] * 12, f"row:{number}") for number in range(16)]


def dispatches_of(jobs: Sequence[Job], whole_step: bool = False) -> Dispatches:
    """What one pass of all jobs dispatches: its forward and backward, or all that `advance` does."""
    base = base_of("llama")
    pack = Pack(base)
    trainings = [job.join(pack) for job in jobs]
    for _ in ROWS:
        pack.advance(trainings)  # what is made once per row and per membership is made
    counted: list[Dispatches] = []
    plain = base.backward_stream

    def counting(stream: Any, denominators: Any) -> list[float]:
        with Dispatches(base) as dispatches:
            counted.append(dispatches)
            return plain(stream, denominators)

    if whole_step:
        with Dispatches(base) as dispatches:
            pack.advance(trainings)
        return dispatches
    base.backward_stream = counting  # type: ignore[method-assign]
    try:
        pack.advance(trainings)
    finally:
        base.backward_stream = plain  # type: ignore[method-assign]
    return counted[0]


def equal_jobs(count: int, **changes: Any) -> list[Job]:
    """Jobs that have sixteen rows of twelve tokens in a pass together."""
    values = {"per_device_train_batch_size": 16 // count, "max_steps": 20, "eval_steps": None} | changes
    return [Job(*specs_of(**(values | {"seed": seed})), ROWS) for seed in range(count)]


def mixed_jobs(count: int) -> list[Job]:
    """Equal but for their ranks, which belong to three buckets."""
    return [
        Job(
            *specs_of(
                r=[2, 8, 9, 16, 24, 32][seed % 6], target_modules="mlp", per_device_train_batch_size=16 // count, max_steps=20
            ),
            ROWS,
        )
        for seed in range(count)
    ]


def test_each_frozen_weight_is_multiplied_once_each_way_whatever_the_number_of_adapters() -> None:
    one, sixteen, mixed = (dispatches_of(jobs) for jobs in (equal_jobs(1), equal_jobs(16), mixed_jobs(16)))
    assert one.products == sixteen.products == mixed.products
    own = {name: count for name, count in one.products.items() if name.endswith(".base.weight") or "lm_head" in name}
    assert len(own) == 2 * 7 + 1
    first = {f"model.{name.removeprefix('model.')}.base.weight" for name in base_of("llama").groups[0].names}
    assert {name for name, count in own.items() if count == 1} == first  # nobody asks for the gradient of the embeddings
    assert set(own.values()) == {1, 2}  # forward, and the gradient of the input


def test_recomputing_activations_leaves_no_trace_in_the_base() -> None:
    before = dispatches_of(equal_jobs(1))
    recomputing = dispatches_of(equal_jobs(2, gradient_checkpointing=True))
    after, again = dispatches_of(equal_jobs(1)), dispatches_of(equal_jobs(2, gradient_checkpointing=True))
    assert (before.total, before.products) == (after.total, after.products)
    assert (recomputing.total, recomputing.products) == (again.total, again.products)
    assert recomputing.total > before.total


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_pass_dispatches_as_many_operations_for_sixteen_adapters_as_for_one(dropout: float) -> None:
    one, sixteen = (dispatches_of(equal_jobs(count, lora_dropout=dropout)).total for count in (1, 16))
    assert sixteen <= one


def test_operations_of_a_pass_grow_with_the_buckets_of_ranks_and_not_with_the_adapters() -> None:
    one, eight, sixteen = (
        dispatches_of(jobs).total for jobs in (equal_jobs(1, target_modules="mlp"), mixed_jobs(8), mixed_jobs(16))
    )
    assert one < eight == sixteen < 3 * one


def test_a_whole_step_dispatches_as_much_for_sixteen_adapters_as_for_two() -> None:
    two, sixteen = (dispatches_of(equal_jobs(count), whole_step=True).total for count in (2, 16))
    assert sixteen == two
