"""Several adapters of one base made into one, in delta space: what is combined are the updates s B A of each layer.

Adding the factors instead, as PEFT's `add_weighted_adapter` does for linear, ties and dare_*, gives cross terms B1 A2 that
nobody trained. Here the update of one layer at a time is formed in float64, combined, and brought back to factors:

    cat          the factors side by side, scales and weights folded into B: exact
    linear       sum of w_i D_i: exact as cat, or cut to a rank by its singular values
    svd          linear, cut to a rank (by default the largest of the parents')
    ties         trim each D_i to its largest numbers, elect a sign per entry, mean of those that agree (arXiv:2306.01708)
    dare_linear  drop numbers of each D_i at random, rescale the rest, add (arXiv:2311.03099)
    dare_ties    drop and rescale as DARE, then elect and average as TIES

Parents are taken in the order of their ids, and a drop depends on the seed, the parent and the layer alone, so that neither the
order in which they are named nor that of the layers alters a bit. Trimming is per layer, as in PEFT and mergekit. Axes: O
outputs, I inputs, R rank.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infra.errors import BadInput
from workers.adapter import A_SUFFIX, B_SUFFIX, PREFIX, Adapter, lora_config, make_adapter

EXACT_METHODS = ("cat", "linear")
SPARSE_METHODS = ("ties", "dare_linear", "dare_ties")
"""Those that keep a share of each update's numbers only; their result has full rank until it is cut."""
METHODS = ("linear", "ties", "dare_linear", "dare_ties", "svd", "cat")
DEFAULT_DENSITY = 0.5


@dataclass(frozen=True)
class Recipe:
    """How adapters are merged. With the parents' ids it determines the merged adapter."""

    method: str
    """One of METHODS."""
    weights: tuple[float, ...]
    """One per parent; not scaled to any sum. A negative one takes an update away."""
    density: float | None = None
    """Share of each update's numbers that is kept, above 0 and at most 1, by SPARSE_METHODS (None: DEFAULT_DENSITY)."""
    rank: int | None = None
    """Rank of the result; None: exact for cat and linear, the largest of the parents' for svd, their sum for the others."""
    seed: int = 0
    """Of what DARE drops."""


@dataclass(frozen=True)
class Parent:
    """One of the adapters to merge."""

    adapter_id: str
    adapter: Adapter


@dataclass(frozen=True)
class MergedLayer:
    """What bringing a layer's combined update back to factors cost."""

    module: str
    rank: int
    norm: float
    """Frobenius norm of the combined update."""
    error: float
    """Frobenius norm of what the rank leaves out, relative to `norm`. No factors of this rank do better (Eckart and Young);
    float32 factors add about 1e-7."""


@dataclass(frozen=True)
class Merged:
    """A merged adapter, and how far it is from the update that its recipe asks for."""

    adapter: Adapter
    layers: tuple[MergedLayer, ...]

    @property
    def error(self) -> float:
        """Frobenius norm of all that was left out, relative to that of all updates."""
        norm = math.hypot(*(layer.norm for layer in self.layers))
        return math.hypot(*(layer.norm * layer.error for layer in self.layers)) / norm if norm else 0.0


def merge(parents: Sequence[Parent], recipe: Recipe) -> Merged:
    """Merge adapters of one base. The same parents and recipe give the same bits.

    Raises BadInput if the recipe does not fit them, if they are not of one form, or if the result does nothing.
    """
    check_recipe(parents, recipe)
    ordered = sorted(zip(parents, recipe.weights, strict=True), key=lambda pair: pair[0].adapter_id)
    tensors: dict[str, Tensor] = {}
    layers = []
    with _one_thread():
        for module in _modules(parents):
            a_RI, b_OR, layer = _merge_layer(module, [pair for pair in ordered if module in pair[0].adapter.modules], recipe)
            tensors[f"{PREFIX}{module}{A_SUFFIX}"], tensors[f"{PREFIX}{module}{B_SUFFIX}"] = a_RI, b_OR
            layers.append(layer)
    if not any(tensor.any() for name, tensor in tensors.items() if name.endswith(B_SUFFIX)):
        raise BadInput("the merged adapter changes nothing: its parents cancel out; give other weights.")
    adapters = [parent.adapter for parent, _ in ordered]
    return Merged(make_adapter(_config(adapters, layers), tensors, "the merged adapter"), tuple(layers))


def check_recipe(parents: Sequence[Parent], recipe: Recipe) -> None:
    """Raise BadInput, in one sentence, unless the adapters can be merged so."""
    _check_parents(parents)
    if recipe.method not in METHODS:
        raise BadInput(f"there is no method {recipe.method[:60]!r} to merge by; give one of {', '.join(METHODS)}.")
    if len(recipe.weights) != len(parents):
        raise BadInput(f"there are {len(recipe.weights)} weights for {len(parents)} adapters; give one for each, in their order.")
    odd = [weight for weight in recipe.weights if not math.isfinite(weight) or weight == 0.0]
    if odd:
        raise BadInput(f"the weight {odd[0]:g} is no weight; give a number other than 0, or leave that adapter out.")
    if recipe.density is not None and recipe.method not in SPARSE_METHODS:
        raise BadInput(f"{recipe.method} keeps every number and has no density; leave it out, or use {SPARSE_METHODS[0]}.")
    if recipe.density is not None and not 0.0 < recipe.density <= 1.0:
        raise BadInput(f"the density is {recipe.density:g}, expected a share above 0 and at most 1.")
    _check_rank(parents, recipe)


def _check_parents(parents: Sequence[Parent]) -> None:
    if len(parents) < 2:
        raise BadInput(f"{len(parents)} adapter was named, and merging takes two or more.")
    ids = [parent.adapter_id for parent in parents]
    twice = [one for one in ids if ids.count(one) > 1]
    if twice:
        raise BadInput(f"the adapter {twice[0]} was named twice; name each once and give it a greater weight.")
    heads = [parent.adapter_id for parent in parents if parent.adapter.head_module is not None]
    if heads:
        raise BadInput(
            f"the adapter {heads[0]} is a classifier, whose head tells apart its own labels; only adapters without a head can "
            "be merged."
        )
    types = sorted({str(parent.adapter.config["task_type"] or "CAUSAL_LM") for parent in parents})
    if len(types) > 1:
        raise BadInput(f"the adapters are of different task types ({', '.join(types)}); merge those of one type only.")


def _check_rank(parents: Sequence[Parent], recipe: Recipe) -> None:
    if recipe.rank is None:
        return
    if recipe.method == "cat":
        raise BadInput("cat is exact and takes no rank; use svd to cut the sum of the updates to one.")
    possible = max(_largest_rank(parents, module, recipe.method) for module in _modules(parents))
    if not 1 <= recipe.rank <= possible:
        raise BadInput(f"the rank {recipe.rank} cannot be had: {recipe.method} of these adapters gives 1 to {possible}.")


def _largest_rank(parents: Sequence[Parent], module: str, method: str) -> int:
    """Return the rank at which nothing of a layer's combined update is left out."""
    factors = [parent.adapter.factors(module) for parent in parents if module in parent.adapter.modules]
    sides = factors[0][0].shape[1], factors[0][1].shape[0]
    return min(*sides) if method in SPARSE_METHODS else min(*sides, sum(a_RI.shape[0] for a_RI, _ in factors))


def _modules(parents: Sequence[Parent]) -> list[str]:
    return sorted({module for parent in parents for module in parent.adapter.modules})


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products over several threads add in another order: the result must not depend on how many a machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _merge_layer(module: str, parents: Sequence[tuple[Parent, float]], recipe: Recipe) -> tuple[Tensor, Tensor, MergedLayer]:
    if recipe.method in SPARSE_METHODS:
        delta_OI = _combine(module, parents, recipe)
        parts = torch.linalg.svd(delta_OI, full_matrices=False)
    else:
        a_RI, b_OR = _side_by_side(module, parents)
        if recipe.method in EXACT_METHODS and recipe.rank is None:
            norm = float(torch.linalg.norm(product_svd(a_RI, b_OR)[1]))
            return a_RI.float(), b_OR.float(), MergedLayer(module, a_RI.shape[0], norm, 0.0)
        parts = product_svd(a_RI, b_OR)
    return _cut(module, parts, _rank_of(module, [parent for parent, _ in parents], recipe))


def _rank_of(module: str, parents: Sequence[Parent], recipe: Recipe) -> int:
    ranks = [parent.adapter.factors(module)[0].shape[0] for parent in parents]
    asked = recipe.rank or (max(ranks) if recipe.method == "svd" else sum(ranks))
    return min(asked, _largest_rank(parents, module, recipe.method))


def _cut(module: str, parts: tuple[Tensor, Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor, MergedLayer]:
    """Return the nearest factors of a rank to U S V, the singular values shared between both of them."""
    u_OK, s_K, v_KI = parts
    norm, left_out = float(torch.linalg.norm(s_K)), float(torch.linalg.norm(s_K[rank:]))
    root_R = s_K[:rank].sqrt()
    layer = MergedLayer(module, rank, norm, left_out / norm if norm else 0.0)
    return (root_R[:, None] * v_KI[:rank]).float(), (u_OK[:, :rank] * root_R).float(), layer


def _side_by_side(module: str, parents: Sequence[tuple[Parent, float]]) -> tuple[Tensor, Tensor]:
    """Return A [R, I] and B [O, R] in float64 of the weighted sum of updates, R the sum of the parents' ranks."""
    pairs = [(*parent.adapter.factors(module), weight * parent.adapter.scale(module)) for parent, weight in parents]
    _check_sides(module, pairs)
    return torch.cat([a_RI.double() for a_RI, _, _ in pairs]), torch.cat([b_OR.double() * scale for _, b_OR, scale in pairs], 1)


def _check_sides(module: str, pairs: Sequence[tuple[Tensor, Tensor, float]]) -> None:
    if len({(a_RI.shape[1], b_OR.shape[0]) for a_RI, b_OR, _ in pairs}) > 1:
        raise BadInput(f"the adapters have factors of different shapes for {module}; they do not belong to one base.")


def product_svd(a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [O, K], S [K], V [K, I] of B A without forming it: K is R, or the shorter side of the layer if that is less."""
    qa_IK, ra_KR = torch.linalg.qr(a_RI.double().t())
    qb_OK, rb_KR = torch.linalg.qr(b_OR.double())
    u, s_K, v = torch.linalg.svd(rb_KR @ ra_KR.t(), full_matrices=False)
    return qb_OK @ u, s_K, v @ qa_IK.t()


def delta_of(adapter: Adapter, module: str) -> Tensor:
    """Return a layer's update s B A [O, I] in float64."""
    a_RI, b_OR = adapter.factors(module)
    return (b_OR.double() @ a_RI.double()) * adapter.scale(module)


def _combine(module: str, parents: Sequence[tuple[Parent, float]], recipe: Recipe) -> Tensor:
    _check_sides(module, [(*parent.adapter.factors(module), weight) for parent, weight in parents])
    density = DEFAULT_DENSITY if recipe.density is None else recipe.density
    thinned = []
    for parent, weight in parents:
        delta_OI = delta_of(parent.adapter, module)
        if recipe.method == "ties":
            thinned.append(trimmed(delta_OI, density) * weight)
        else:
            thinned.append(dropped(delta_OI, density, _generator(recipe.seed, parent.adapter_id, module)) * weight)
    if recipe.method == "dare_linear":
        return torch.stack(thinned).sum(0)
    return agreeing_mean(thinned, [weight for _, weight in parents], sum(map(abs, recipe.weights)))


def trimmed(delta: Tensor, density: float) -> Tensor:
    """Return `delta` with the share `density` of its numbers that are largest in magnitude, at least one, and 0 elsewhere."""
    magnitudes = delta.abs().flatten()
    num_kept = max(1, round(density * magnitudes.numel()))
    kept = torch.argsort(magnitudes, descending=True, stable=True)[:num_kept]
    return torch.zeros_like(magnitudes).index_copy_(0, kept, delta.flatten()[kept]).view_as(delta)


def dropped(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return `delta` with each number kept with probability `density` and divided by it, 0 elsewhere: the mean stays."""
    kept = torch.rand(delta.shape, generator=generator, dtype=torch.float64) < density
    return torch.where(kept, delta / density, 0.0)


def agreeing_mean(weighted: Sequence[Tensor], weights: Sequence[float], factor: float) -> Tensor:
    """Return `factor` times the mean, weighted, of those numbers of each entry whose sign is that of the entry's sum.

    `weighted` are updates times their weights. `factor` is TIES' lambda: for weights of 1/n it is 1, the paper's plain mean.
    An update of 0 takes no part in the mean; an entry whose sum is 0 stays 0.
    """
    elected = torch.stack(list(weighted)).sum(0).sign()
    total, shares = torch.zeros_like(elected), torch.zeros_like(elected)
    for one, weight in zip(weighted, weights, strict=True):
        agrees = (one.sign() == elected) & (elected != 0)
        total += torch.where(agrees, one, 0.0)
        shares += agrees * abs(weight)
    return torch.where(shares > 0, total / shares, 0.0) * factor


def _generator(seed: int, adapter_id: str, module: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{adapter_id}/{module}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _config(adapters: Sequence[Adapter], layers: Sequence[MergedLayer]) -> Mapping[str, Any]:
    """Return the configuration of factors whose scale is 1: lora_alpha is the rank, in every layer."""
    ranks = [layer.rank for layer in layers]
    r = max(ranks, key=lambda rank: (ranks.count(rank), rank))
    others = {layer.module: layer.rank for layer in layers if layer.rank != r}
    return lora_config(
        r=r,
        lora_alpha=r,
        lora_dropout=0.0,
        use_rslora=False,
        # each target of a parent matches none but that parent's layers of the base, hence their union none but the merged ones
        target_modules={target for adapter in adapters for target in adapter.config["target_modules"]},
        base_model_name_or_path=adapters[0].config["base_model_name_or_path"],
        task_type=adapters[0].config["task_type"] or "CAUSAL_LM",
        fan_in_fan_out=any(adapter.config["fan_in_fan_out"] for adapter in adapters),
        rank_pattern=others,
        alpha_pattern={module: float(rank) for module, rank in others.items()},
    )
