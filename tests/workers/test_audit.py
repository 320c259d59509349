"""What an audit says of an adapter's layers, against sums that form every update, and what it advises."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.errors import BadInput
from tests.workers.tiny_bases import make_base
from workers.adapter import A_SUFFIX, B_SUFFIX, PREFIX, Adapter, lora_config, make_adapter
from workers.audit import LayerAudit, audit_layers, config_differences, diff_adapters, effective_rank, rank_advice
from workers.merging import delta_of

LAYERS = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.down_proj": (48, 32)}
"""Inputs and outputs of two layers of the tiny Llama."""


def adapter(seed: int = 0, *, r: int = 4, rslora: bool = False, layers: dict[str, tuple[int, int]] = LAYERS) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (inputs, outputs) in layers.items():
        tensors[f"{PREFIX}{module}{A_SUFFIX}"] = torch.randn(r, inputs, generator=generator)
        tensors[f"{PREFIX}{module}{B_SUFFIX}"] = torch.randn(outputs, r, generator=generator)
    targets = sorted({module.rpartition(".")[2] for module in layers})
    config = lora_config(
        r=r, lora_alpha=6, lora_dropout=0.0, use_rslora=rslora, target_modules=targets, base_model_name_or_path="base"
    )
    return make_adapter(config, tensors, "a test")


def layer(r: int, *spectrum: float) -> LayerAudit:
    return LayerAudit("layer", r, math.hypot(*spectrum), 1.0, spectrum, effective_rank(spectrum))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.mark.parametrize("rslora", [False, True])
def test_sizes_and_spectra_are_those_of_the_whole_update_and_the_stored_weight(base: Path, rslora: bool) -> None:
    one, weights = adapter(rslora=rslora), load_file(base / "model.safetensors")
    for found in audit_layers(one, base):
        delta, weight = delta_of(one, found.module), weights[f"{found.module}.weight"].double()
        assert found.norm == pytest.approx(float(delta.norm()), rel=1e-10)
        assert found.spectrum == pytest.approx(torch.linalg.svdvals(delta)[: found.r].tolist(), rel=1e-8)
        assert found.ratio == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-10)


def test_transposed_weights_and_models_saved_without_their_outermost_name_are_found(tmp_path: Path) -> None:
    base = make_base(tmp_path / "gpt2", "gpt2")
    one = adapter(layers={"transformer.h.0.attn.c_attn": (32, 96)})
    stored = load_file(base / "model.safetensors")
    save_file({name.removeprefix("transformer."): tensor for name, tensor in stored.items()}, base / "model.safetensors")
    [found] = audit_layers(one, base)
    assert found.base_norm == pytest.approx(float(stored["transformer.h.0.attn.c_attn.weight"].double().norm()), rel=1e-10)


def test_weight_that_is_stored_packed_has_no_size_rather_than_a_wrong_one(base: Path, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(weights | {name: torch.ones(weights[name].shape, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    packed, plain = audit_layers(adapter(), tmp_path)
    assert (packed.base_norm, packed.ratio) == (None, None)
    assert plain.ratio is not None


def test_effective_rank_counts_equal_directions_and_passes_over_absent_ones() -> None:
    assert effective_rank([3.0] * 5) == pytest.approx(5.0)
    assert effective_rank([3.0, 0.0, 0.0]) == pytest.approx(1.0)
    assert effective_rank([0.0, 0.0]) == 0.0
    assert 1.0 < effective_rank([3.0, 0.5]) < 2.0


@pytest.mark.parametrize(
    ("layers", "verdict", "told"),
    [
        ([layer(16, 5.0, *[0.01] * 15)] * 3, "too_high", "try r = 2."),
        ([layer(4, 1.0, 0.99, 0.98, 0.97)] * 3, "too_low", "try r = 8."),
        ([layer(4, 1.0, 0.6, 0.3, 0.1)] * 3, "fits", "looks right"),
        ([layer(4, 1.0, 1.0, 1.0, 1.0), layer(4, 1.0, 0.6, 0.3, 0.1)], "fits", "looks right"),
        ([layer(1, 2.0)], "fits", "does not say"),
        ([layer(4, 0.0, 0.0, 0.0, 0.0)], "fits", "does nothing"),
    ],
)
def test_advice_on_the_rank_follows_most_layers(layers: list[LayerAudit], verdict: str, told: str) -> None:
    found, sentence = rank_advice(layers)
    assert found == verdict
    assert told in sentence
    assert ". " not in sentence


def test_difference_of_two_adapters_is_that_of_their_whole_updates() -> None:
    a, b = adapter(0), adapter(1, r=3, rslora=True)
    for found in diff_adapters(a, b).layers:
        one, other = delta_of(a, found.module), delta_of(b, found.module)
        assert found.distance == pytest.approx(float((one - other).norm() / max(one.norm(), other.norm())), rel=1e-9)
        assert found.cosine == pytest.approx(float((one * other).sum() / one.norm() / other.norm()), rel=1e-9, abs=1e-12)
        assert found.norms == pytest.approx((float(one.norm()), float(other.norm())), rel=1e-9)


def test_adapter_written_with_other_factors_does_not_differ() -> None:
    a = adapter(0)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(9)))[0]
    turned = {name: turn @ tensor if name.endswith(A_SUFFIX) else tensor @ turn.t() for name, tensor in a.tensors.items()}
    found = diff_adapters(a, make_adapter(a.config, turned, "a test"))
    assert found.distance < 1e-6
    assert found.cosine == pytest.approx(1.0, abs=1e-9)
    assert all(layer.overlap_in > 0.999 and layer.overlap_out > 0.999 for layer in found.layers)


def test_layers_of_one_adapter_only_are_named_and_those_of_another_base_refused() -> None:
    [first, *_] = LAYERS
    found = diff_adapters(adapter(), adapter(layers={first: LAYERS[first]}))
    assert (found.only_a, found.only_b) == (("model.layers.1.mlp.down_proj",), ())
    with pytest.raises(BadInput, match="do not belong to one base"):
        diff_adapters(adapter(), adapter(layers={first: (16, 16)}))


def test_settings_that_differ_are_listed_with_both_values() -> None:
    differences = config_differences(adapter(r=4).config, adapter(r=2, rslora=True).config)
    assert differences == {"r": (4, 2), "use_rslora": (False, True)}
