"""Merging combines updates, not factors: held against dense sums, PEFT's own functions, and PEFT's logits."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils import merge_utils
from torch import Tensor

from infra.errors import BadInput
from tests.workers.tiny_adapters import BASE, classify_with_peft, random_adapter, train_with_peft, write_files
from tests.workers.tiny_bases import logits, make_model
from workers.adapter import A_SUFFIX, B_SUFFIX, PREFIX, Adapter, adapter_id, lora_config, make_adapter
from workers.adapter_files import read_adapter_folder
from workers.merge_report import compare, compare_all
from workers.merging import METHODS, Merged, Parent, Recipe, delta_of, dropped, merge

SIDES = {"a.q_proj": (12, 10), "a.v_proj": (12, 6), "b.q_proj": (9, 16)}
"""(inputs, outputs) of layers."""


def adapter_of(seed: int, r: int, *, alpha: float = 8, rslora: bool = False, modules: tuple[str, ...] = tuple(SIDES)) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        inputs, outputs = SIDES[module]
        tensors[f"{PREFIX}{module}{A_SUFFIX}"] = torch.randn(r, inputs, generator=generator)
        tensors[f"{PREFIX}{module}{B_SUFFIX}"] = torch.randn(outputs, r, generator=generator)
    config = lora_config(
        r=r, lora_alpha=alpha, lora_dropout=0.1, use_rslora=rslora, target_modules=modules, base_model_name_or_path="base"
    )
    return make_adapter(config, tensors, "a test")


def parent_of(adapter: Adapter) -> Parent:
    return Parent(adapter_id(BASE, adapter), adapter)


@pytest.fixture
def parents() -> list[Parent]:
    """Of different rank, scale and layers."""
    return [parent_of(adapter_of(1, 2)), parent_of(adapter_of(2, 3, rslora=True, modules=("a.q_proj", "b.q_proj")))]


def summed(parents: list[Parent], weights: tuple[float, ...], module: str) -> Tensor:
    pairs = zip(parents, weights, strict=True)
    return sum(
        (weight * delta_of(one.adapter, module) for one, weight in pairs if module in one.adapter.modules),
        torch.zeros(SIDES[module][1], SIDES[module][0], dtype=torch.float64),
    )


def distance(merged: Merged, module: str, expected: Tensor) -> float:
    return float(torch.linalg.norm(delta_of(merged.adapter, module) - expected) / torch.linalg.norm(expected))


@pytest.mark.parametrize(
    "recipe", [Recipe("cat", (0.7, -1.5)), Recipe("linear", (0.7, -1.5)), Recipe("linear", (0.7, -1.5), rank=5)]
)
def test_sum_of_updates_is_exact(parents: list[Parent], recipe: Recipe) -> None:
    merged = merge(parents, recipe)
    assert merged.error < 1e-12
    for module in SIDES:
        assert distance(merged, module, summed(parents, recipe.weights, module)) < 1e-6
        assert merged.adapter.scale(module) == 1.0


@pytest.mark.parametrize(
    "recipe", [Recipe("svd", (1.0, 1.0)), Recipe("svd", (1.0, 1.0), rank=1), Recipe("linear", (1.0, 1.0), rank=2)]
)
def test_stated_error_is_that_of_the_stored_factors(parents: list[Parent], recipe: Recipe) -> None:
    merged = merge(parents, recipe)
    expected = {module: summed(parents, recipe.weights, module) for module in SIDES}
    assert [layer.module for layer in merged.layers] == sorted(SIDES)
    for layer in merged.layers:
        assert layer.rank <= (recipe.rank or 3)
        assert layer.norm == pytest.approx(float(torch.linalg.norm(expected[layer.module])))
        assert layer.error == pytest.approx(distance(merged, layer.module, expected[layer.module]), abs=1e-6)
    left_out = sum(float(torch.linalg.norm(delta_of(merged.adapter, one) - expected[one])) ** 2 for one in SIDES) ** 0.5
    whole = sum(float(torch.linalg.norm(one)) ** 2 for one in expected.values()) ** 0.5
    assert merged.error == pytest.approx(left_out / whole, rel=1e-5)
    assert merged.error > 0.01


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_ties_is_that_of_peft_on_whole_updates(density: float) -> None:
    parents = [parent_of(adapter_of(seed, 3)) for seed in range(3)]
    merged = merge(parents, Recipe("ties", (1 / 3,) * 3, density=density, rank=10))
    for module in SIDES:
        deltas = [delta_of(parent.adapter, module) for parent in parents]
        thinned = [merge_utils.magnitude_based_pruning(delta, density) for delta in deltas]
        stacked = torch.stack(thinned)
        expected = merge_utils.disjoint_merge(stacked, merge_utils.calculate_majority_sign_mask(stacked))
        assert distance(merged, module, expected) < 1e-6


def test_dare_keeps_each_number_rescaled_or_drops_it() -> None:
    delta = torch.randn(200, 300, dtype=torch.float64)
    thinned = dropped(delta, 0.3, torch.Generator().manual_seed(0))
    kept = thinned != 0
    assert torch.equal(thinned[kept], delta[kept] / 0.3)
    assert kept.double().mean() == pytest.approx(0.3, abs=0.01)


def test_dare_of_full_density_is_the_sum(parents: list[Parent]) -> None:
    merged = merge(parents, Recipe("dare_linear", (0.5, 0.5), density=1.0, rank=10))
    for module in SIDES:
        assert distance(merged, module, summed(parents, (0.5, 0.5), module)) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_is_the_same_again_in_any_order_and_on_any_number_of_threads(parents: list[Parent], method: str) -> None:
    ids = {adapter_id(BASE, merge(parents, Recipe(method, (0.3, 0.6))).adapter)}
    ids.add(adapter_id(BASE, merge(parents[::-1], Recipe(method, (0.6, 0.3))).adapter))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ids.add(adapter_id(BASE, merge(parents, Recipe(method, (0.3, 0.6))).adapter))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert len(ids) == 1
    other_seed = adapter_id(BASE, merge(parents, Recipe(method, (0.3, 0.6), seed=1)).adapter)
    assert (other_seed in ids) != method.startswith("dare")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_adapter_gives_in_peft_the_logits_of_the_added_updates(tmp_path: Path, family: str) -> None:
    for seed, name in enumerate("ab"):
        train_with_peft(tmp_path / name, family, seed=seed, use_rslora=name == "b")
    parents = [parent_of(read_adapter_folder(tmp_path / name)) for name in "ab"]
    merged = merge(parents, Recipe("linear", (0.02, 0.03)))
    ours = PeftModel.from_pretrained(make_model(family), write_files(tmp_path / "ours", merged.adapter)).eval()
    expected = make_model(family)
    with torch.no_grad():
        for module in parents[0].adapter.modules:
            delta = sum(w * delta_of(one.adapter, module) for one, w in zip(parents, (0.02, 0.03), strict=True)).float()  # type: ignore[union-attr]
            weight = expected.get_parameter(f"{module}.weight")
            weight.add_(delta.t() if family == "gpt2" else delta)
    assert torch.allclose(logits(ours), logits(expected), atol=1e-4)
    assert not torch.allclose(logits(ours), logits(make_model(family)), atol=1e-2)


WRONG: dict[str, tuple[Recipe, str]] = {
    "too few weights": (Recipe("cat", (1.0,)), "there are 1 weights for 2 adapters"),
    "a weight of nothing": (Recipe("cat", (1.0, 0.0)), "the weight 0 is no weight"),
    "a weight that is no number": (Recipe("cat", (1.0, float("nan"))), "the weight nan is no weight"),
    "an unknown method": (Recipe("average", (1.0, 1.0)), "no method 'average'"),
    "no density": (Recipe("ties", (1.0, 1.0), density=0.0), "density is 0"),
    "too much density": (Recipe("dare_ties", (1.0, 1.0), density=1.1), "density is 1.1"),
    "density without effect": (Recipe("svd", (1.0, 1.0), density=0.5), "svd keeps every number"),
    "rank without effect": (Recipe("cat", (1.0, 1.0), rank=2), "cat is exact"),
    "a rank too large": (Recipe("svd", (1.0, 1.0), rank=6), "gives 1 to 5"),
    "a dense rank too large": (Recipe("ties", (1.0, 1.0), rank=11), "gives 1 to 10"),
    "no rank": (Recipe("svd", (1.0, 1.0), rank=0), "the rank 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_merged_so_is_one_sentence(parents: list[Parent], case: str) -> None:
    recipe, sentence = WRONG[case]
    with pytest.raises(BadInput, match=sentence):
        merge(parents, recipe)


def test_what_does_not_belong_together_is_refused(parents: list[Parent], tmp_path: Path) -> None:
    classify_with_peft(tmp_path / "classifier", "llama")
    classifier = parent_of(read_adapter_folder(tmp_path / "classifier"))
    other_sides = parent_of(random_adapter())
    renamed = make_adapter(
        other_sides.adapter.config | {"target_modules": ["a.q_proj"]},
        {name.replace("layer.q_proj", "a.q_proj"): tensor for name, tensor in other_sides.adapter.tensors.items()},
        "a test",
    )
    first = parents[0]
    for pair, sentence in (
        ([first], "takes two or more"),
        ([first, first], "named twice"),
        ([first, classifier], "is a classifier"),
        ([first, parent_of(renamed)], "different shapes for a.q_proj"),
    ):
        for method in ("cat", "ties"):
            with pytest.raises(BadInput, match=sentence):
                merge(pair, Recipe(method, (1.0,) * len(pair)))


def test_a_merge_in_which_nothing_is_left_is_refused() -> None:
    one = adapter_of(1, 2)
    negative = make_adapter(
        one.config, {name: -tensor if name.endswith(B_SUFFIX) else tensor for name, tensor in one.tensors.items()}, "a test"
    )
    with pytest.raises(BadInput, match="its parents cancel out"):
        merge([parent_of(one), parent_of(negative)], Recipe("ties", (0.5, 0.5)))


def test_report_tells_equal_opposite_and_unrelated_updates_apart() -> None:
    one = adapter_of(1, 2)
    opposite = make_adapter(
        one.config, {name: -2 * tensor if name.endswith(B_SUFFIX) else tensor for name, tensor in one.tensors.items()}, "a test"
    )
    same, against = compare(parent_of(one), parent_of(one)), compare(parent_of(one), parent_of(opposite))
    assert (same.sign_conflicts, against.sign_conflicts) == (0.0, 1.0)
    assert same.cosine == pytest.approx(1.0)
    assert against.cosine == pytest.approx(-1.0)
    assert same.overlap == pytest.approx((1.0, 1.0))
    assert against.overlap == pytest.approx((1.0, 1.0)), "opposite updates move the same directions"
    other = compare(parent_of(one), parent_of(adapter_of(2, 2)))
    assert 0.3 < other.sign_conflicts < 0.7
    assert abs(other.cosine) < 0.5
    assert max(other.overlap) < 0.6


def test_report_finds_no_overlap_where_directions_are_orthogonal() -> None:
    (inputs, outputs) = SIDES["a.q_proj"]
    made = []
    for start in (0, 3):
        tensors = {
            f"{PREFIX}a.q_proj{A_SUFFIX}": torch.eye(inputs)[start : start + 3],
            f"{PREFIX}a.q_proj{B_SUFFIX}": torch.eye(outputs)[:, :3].contiguous(),
        }
        config = lora_config(
            r=3, lora_alpha=3, lora_dropout=0.0, use_rslora=False, target_modules=["q_proj"], base_model_name_or_path=None
        )
        made.append(parent_of(make_adapter(config, tensors, "a test")))
    [layer] = compare(*made).layers
    assert (layer.overlap_in, layer.overlap_out) == pytest.approx((0.0, 1.0))
    assert (layer.cosine, layer.num_entries, layer.num_directions) == (0.0, 0, 3)
    assert layer.by_chance_in == 3 / inputs


def test_report_compares_every_two_and_names_the_layers_of_one_only(parents: list[Parent]) -> None:
    third = parent_of(adapter_of(3, 1, modules=("a.v_proj",)))
    reports = compare_all([*parents, third])
    assert [(one.a, one.b) for one in reports] == [
        (parents[0].adapter_id, parents[1].adapter_id),
        (parents[0].adapter_id, third.adapter_id),
        (parents[1].adapter_id, third.adapter_id),
    ]
    assert (reports[0].only_a, reports[0].only_b) == (("a.v_proj",), ())
    assert (reports[2].layers, reports[2].sign_conflicts, reports[2].cosine) == ((), 0.0, 0.0)
