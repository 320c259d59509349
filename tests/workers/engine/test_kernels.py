"""Grouped products: right, zero where a group is empty, and each group with the bits it has alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.engine.kernels import grouped_outer, grouped_rows, loop_outer, loop_rows

WIDTHS = [1, 2, 8, 31, 50, 64, 172, 333, 896]
"""Of inputs and outputs: even and odd, rows that are a multiple of 16 bytes and rows that are not."""


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ends_of(lengths: list[int]) -> Tensor:
    return torch.tensor(lengths).cumsum(0).to(torch.int32)


def bank_of(seed: int, groups: int, rows: int, columns: int) -> Tensor:
    """Matrices that lie in a store as a bank's do: at a multiple of 64 values, other values between them."""
    return drawn(seed, groups, rows * columns + 64 + -(rows * columns) % 64)[:, : rows * columns].unflatten(1, (rows, columns))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", WIDTHS)
def test_grouped_products_are_those_of_each_group(width: int, dtype: torch.dtype) -> None:
    lengths = [3, 0, 17, 1]
    x, w, y = drawn(0, 21, width, dtype=dtype), drawn(1, 4, 8, width, dtype=dtype), drawn(2, 21, 8, dtype=dtype)
    parts = zip(x.split(lengths), w, y.split(lengths), strict=True)
    rows, outer = [], []
    for x_part, w_part, y_part in parts:
        rows.append(x_part.double() @ w_part.double().t())
        outer.append(y_part.double().t() @ x_part.double())
    tolerance = 1e-13 if dtype == torch.float64 else 1e-4
    found = grouped_rows(x, w.transpose(1, 2), ends_of(lengths))
    assert torch.allclose(found.double(), torch.cat(rows), rtol=tolerance, atol=tolerance)
    found = grouped_outer(y, x, ends_of(lengths))
    assert torch.allclose(found.double(), torch.stack(outer), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_loop_is_the_oracle_of_the_grouped_kernel(width: int) -> None:
    lengths = [3, 0, 17, 1]
    x, w, y = drawn(0, 21, width), drawn(1, 4, 8, width).transpose(1, 2), drawn(2, 21, 8)
    ends = ends_of(lengths)
    assert torch.allclose(grouped_rows(x, w, ends), loop_rows(x, w, ends), rtol=1e-4, atol=1e-4)
    assert torch.allclose(grouped_outer(y, x, ends), loop_outer(y, x, ends), rtol=1e-4, atol=1e-4)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=8),
    st.data(),
    st.sampled_from(WIDTHS),
    st.sampled_from([8, 16, 24, 64]),
    st.integers(0, 40),
)
def test_a_group_has_the_bits_it_has_alone(lengths: list[int], data: st.DataObject, width: int, rank: int, before: int) -> None:
    mine = data.draw(st.integers(0, len(lengths) - 1))
    start, stop = sum(lengths[:mine]), sum(lengths[: mine + 1])
    total, alone = sum(lengths), torch.tensor([stop - start], dtype=torch.int32)
    x = drawn(3, before + total, width)[before:]  # begins anywhere in a stream
    y = drawn(4, before + total, 3 * rank)[before:, rank : 2 * rank]  # a column of several
    w, ends = bank_of(5, len(lengths), rank, width), ends_of(lengths)
    my_x, my_y, my_w = x[start:stop].clone(), y[start:stop].clone(), w[mine : mine + 1].clone()
    assert torch.equal(grouped_rows(x, w.transpose(1, 2), ends)[start:stop], grouped_rows(my_x, my_w.transpose(1, 2), alone))
    assert torch.equal(grouped_rows(y, w, ends)[start:stop], grouped_rows(my_y, my_w, alone))
    assert torch.equal(grouped_outer(y, x, ends)[mine], grouped_outer(my_y, my_x, alone)[0])
    assert torch.equal(grouped_outer(x, y, ends)[mine], grouped_outer(my_x, my_y, alone)[0])


@pytest.mark.parametrize("width", [31, 64])
def test_what_is_no_number_stays_in_its_group_and_empty_groups_are_zero(width: int) -> None:
    lengths = [4, 0, 5, 0, 6]
    x, y, w = drawn(0, 15, width), drawn(1, 15, 8), drawn(2, 5, 8, width)
    poisoned_x, poisoned_w = x.clone(), w.clone()
    poisoned_x[4:9] = torch.nan
    poisoned_w[1:4] = torch.inf  # those of the empty groups, too
    ends = ends_of(lengths)
    rows = grouped_rows(poisoned_x, poisoned_w.transpose(1, 2), ends)
    clean = grouped_rows(x, w.transpose(1, 2), ends)
    assert torch.equal(rows[:4], clean[:4])
    assert torch.equal(rows[9:], clean[9:])
    outer = grouped_outer(y, poisoned_x, ends)
    assert torch.equal(outer[[0, 1, 3, 4]], grouped_outer(y, x, ends)[[0, 1, 3, 4]])
    assert not outer[[1, 3]].any()


@pytest.mark.parametrize("rows", [32, 64, 416])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 50), (172, 64), (896, 128), (128, 896), (1024, 96), (50, 64)])
def test_rows_of_a_frozen_product_have_the_same_bits_in_any_multiple_of_32(rows: int, inputs: int, outputs: int) -> None:
    """What streams are filled up for; holds for all widths but those of a few outputs, which no layer has."""
    weight, x = drawn(0, outputs, inputs), drawn(1, rows, inputs)
    whole = torch.nn.functional.linear(x, weight)
    for start in (0, 5, 17):
        part = drawn(2, 32, inputs)
        size = min(27, rows - start)
        part[:size] = x[start : start + size]
        assert torch.equal(torch.nn.functional.linear(part, weight)[:size], whole[start : start + size])
