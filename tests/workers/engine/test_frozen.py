"""The products with a frozen linear are those of its forward and of autograd; a 4-bit weight is dequantised once for each."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from workers.engine.frozen import Frozen, frozen_of

FORMS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
NUM_TOKENS = 37


def linear_4bit(
    inputs: int, outputs: int, quant_type: str, double: bool, *, dtype: torch.dtype = torch.float32, bias: bool = True
) -> Any:
    """Return a random 4-bit layer and leave the weight it was made of in `original`."""
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layer = Linear4bit(inputs, outputs, bias, dtype, compress_statistics=double, quant_type=quant_type)
    layer.original = layer.weight.data.clone()
    layer.weight.data = layer.weight.data.to(dtype)
    return layer.to("cpu").requires_grad_(False)


def products(module: nn.Module) -> Frozen:
    frozen = frozen_of(module)
    assert frozen is not None
    return frozen


def assert_products_are_those_of_autograd(module: nn.Module, frozen: Frozen, dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(1)
    x = torch.randn(NUM_TOKENS, frozen.in_features, dtype=dtype, requires_grad=True)
    y = module(x)
    gy = torch.randn_like(y)
    (gx,) = torch.autograd.grad(y, x, gy)
    assert y.shape == (NUM_TOKENS, frozen.out_features)
    assert torch.equal(frozen.product(x), y)
    assert torch.equal(frozen.input_gradient(gy), gx)
    assert not frozen.product(x).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [lambda: nn.Linear(48, 33), lambda: nn.Linear(48, 33, bias=False), lambda: Conv1D(33, 48)],
    ids=["bias", "bare", "conv"],
)
def test_products_are_those_of_forward_and_autograd(make: Any, dtype: torch.dtype) -> None:
    module = make().to(dtype).requires_grad_(False)
    frozen = products(module)
    assert (frozen.in_features, frozen.out_features) == (48, 33)
    assert_products_are_those_of_autograd(module, frozen, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("quant_type", "double"), FORMS)
def test_products_of_a_4_bit_layer_are_those_of_forward_and_autograd(quant_type: str, double: bool, dtype: torch.dtype) -> None:
    module = linear_4bit(128, 33, quant_type, double, dtype=dtype)
    assert_products_are_those_of_autograd(module, products(module), dtype)


@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 8), lambda: Conv1D(8, 64), lambda: linear_4bit(64, 8, "nf4", True)])
def test_leading_axes_stay(make: Any) -> None:
    module = make().requires_grad_(False)
    x = torch.randn(2, 3, 64)
    assert torch.allclose(products(module).product(x), module(x))
    gy = torch.randn(2, 3, 8)
    assert products(module).input_gradient(gy).shape == (2, 3, 64)


def dequantised(module: Any) -> Tensor:
    """Return the weight [O, I] of a layer without double quantisation, by the definition of the format."""
    state = module.weight.quant_state
    packed = module.weight.data.flatten().long()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: module.original.numel()]
    scales = state.absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    return (state.code[codes] * scales).view(module.original.shape)


@pytest.mark.parametrize("inputs", [32, 48, 64, 96, 172, 688])
@pytest.mark.parametrize(("quant_type", "double"), FORMS)
def test_4_bit_weight_is_near_the_one_it_was_made_of_whatever_the_width(inputs: int, quant_type: str, double: bool) -> None:
    module = linear_4bit(inputs, 40, quant_type, double, bias=False)
    weight = products(module).product(torch.eye(inputs)).t()
    # nf4 is off by 0.07, fp4 by 0.1 of the standard deviation of a normal weight; with constants of other blocks it is twice that
    assert (weight - module.original).abs().mean() < 0.11 * module.original.std()
    if not double:
        assert torch.equal(weight, dequantised(module))


@pytest.mark.parametrize(("inputs", "outputs"), [(33, 17), (34, 17), (6, 3), (200, 3)])
def test_4_bit_weight_may_end_in_a_part_of_a_block(inputs: int, outputs: int) -> None:
    module = linear_4bit(inputs, outputs, "nf4", False, bias=False)
    assert torch.equal(products(module).product(torch.eye(inputs)).t(), dequantised(module))


class Counting(TorchDispatchMode):
    """Counts the operations by name while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("quant_type", "double"), FORMS)
def test_4_bit_weight_is_dequantised_once_for_all_rows(quant_type: str, double: bool) -> None:
    frozen = products(linear_4bit(64, 32, quant_type, double))
    for work in (lambda: frozen.product(torch.randn(500, 64)), lambda: frozen.input_gradient(torch.randn(500, 32))):
        with Counting() as counting:
            work()
        assert [call for call in counting.calls if "dequantize_4bit" in call] == ["bitsandbytes.dequantize_4bit.default"]
        assert sum("mm" in call for call in counting.calls) == 1


@pytest.mark.parametrize("double", [True, False])
def test_4_bit_layer_keeps_its_weight_through_inference(double: bool) -> None:
    """On CPUs with AVX-512 bfloat16 instructions, bitsandbytes rewrites a layer's weight in a forward without gradients."""
    module = linear_4bit(64, 32, "nf4", double).eval()
    module.support_avx512bf16_for_cpu = True
    frozen = products(module)
    x = torch.randn(5, 64)
    before = frozen.product(x), module.weight.data.clone()
    assert torch.equal(module(x), before[0])
    assert torch.equal(frozen.product(x), before[0])
    assert torch.equal(module.weight.data, before[1])


def test_4_bit_layer_whose_weight_was_rewritten_or_is_not_quantised_yet_is_refused() -> None:
    from bitsandbytes.nn import Linear4bit

    rewritten = linear_4bit(64, 32, "nf4", True)
    rewritten.weight.quant_state.packing_format_for_cpu = True
    for module in (rewritten, Linear4bit(64, 32)):
        with pytest.raises(ValueError, match="load the base anew"):
            frozen_of(module)


def test_modules_that_compute_otherwise_have_no_products() -> None:
    class Clipped(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).clamp(-1, 1)

    from bitsandbytes.nn import Linear8bitLt

    for module in (nn.Embedding(8, 8), Clipped(8, 8), nn.Bilinear(2, 2, 2), Linear8bitLt(64, 64)):
        assert frozen_of(module) is None


def test_products_follow_a_module_whose_weights_change_place() -> None:
    module = nn.Linear(8, 4).requires_grad_(False)
    frozen = products(module)
    twin = copy.deepcopy(module)
    module.double()
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.allclose(frozen.product(x), twin(x.float()).double())
    assert frozen.product(x).dtype == torch.float64


def test_asking_for_the_products_of_a_plain_layer_does_not_load_bitsandbytes() -> None:
    code = (
        "import sys, torch; from workers.engine.frozen import frozen_of; frozen_of(torch.nn.Linear(2, 2)); "
        "assert 'bitsandbytes' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
