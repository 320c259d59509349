"""How much two adapters of one base stand in each other's way, layer by layer, before they are merged. Nothing is combined here.

Conflicting signs cancel when updates are added (TIES, arXiv:2306.01708 section 3.2); the cosine says whether the updates as a
whole point the same way; the overlap says whether they move the same directions of a layer's input and output space: the
normalised subspace similarity |U_a^T U_b|_F^2 / k of LoRA (arXiv:2106.09685 section 7.2), 0 to 1. Axes: O outputs, I inputs,
K directions.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.adapter import Adapter
from workers.merging import Parent, delta_of, product_svd

NUM_DIRECTIONS = 8
"""Top singular directions that are compared, where both updates have as many."""
NEGLIGIBLE = 1e-9
"""Singular values below this share of the largest are rounding, and have no direction."""


@dataclass(frozen=True)
class LayerConflict:
    """Two updates of one layer, side by side."""

    module: str
    sign_conflicts: float
    """Share of the entries, where neither is 0, in which the signs differ; unrelated updates have one half."""
    num_entries: int
    cosine: float
    """Of the updates as vectors, -1 to 1."""
    norms: tuple[float, float]
    """Frobenius norms of the updates."""
    num_directions: int
    overlap_in: float
    """Of the top directions in the layer's input space, 0 to 1."""
    overlap_out: float
    by_chance_in: float
    """Overlap that random directions would have: directions per dimension."""
    by_chance_out: float


@dataclass(frozen=True)
class PairReport:
    """Two adapters, side by side."""

    a: str
    b: str
    layers: tuple[LayerConflict, ...]
    """The layers that both adapt, by name."""
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def sign_conflicts(self) -> float:
        """Share over the entries of all common layers."""
        entries = sum(layer.num_entries for layer in self.layers)
        return sum(layer.sign_conflicts * layer.num_entries for layer in self.layers) / entries if entries else 0.0

    @property
    def cosine(self) -> float:
        """Of all common layers as one vector."""
        norms = math.prod(math.hypot(*(layer.norms[side] for layer in self.layers)) for side in (0, 1))
        return sum(layer.cosine * math.prod(layer.norms) for layer in self.layers) / norms if norms else 0.0

    @property
    def overlap(self) -> tuple[float, float]:
        """Means over the common layers, of input and of output space."""
        number = max(1, len(self.layers))
        return sum(one.overlap_in for one in self.layers) / number, sum(one.overlap_out for one in self.layers) / number


def compare_all(parents: Sequence[Parent]) -> list[PairReport]:
    """Compare every two of the adapters, in the order in which they are given."""
    return [compare(a, b) for a, b in itertools.combinations(parents, 2)]


def compare(a: Parent, b: Parent) -> PairReport:
    """Compare two adapters of one base, one layer at a time."""
    mine, others = set(a.adapter.modules), set(b.adapter.modules)
    layers = tuple(_compare_layer(module, a.adapter, b.adapter) for module in sorted(mine & others))
    return PairReport(a.adapter_id, b.adapter_id, layers, tuple(sorted(mine - others)), tuple(sorted(others - mine)))


def _compare_layer(module: str, a: Adapter, b: Adapter) -> LayerConflict:
    one_OI, other_OI = delta_of(a, module), delta_of(b, module)
    both = (one_OI != 0) & (other_OI != 0)
    num_entries = int(both.sum())
    num_conflicts = int((both & (one_OI.sign() != other_OI.sign())).sum())
    norms = (float(torch.linalg.norm(one_OI)), float(torch.linalg.norm(other_OI)))
    inner = float((one_OI * other_OI).sum())
    (ua, va), (ub, vb) = top_directions(a, module), top_directions(b, module)
    k = min(ua.shape[1], ub.shape[1])
    return LayerConflict(
        module=module,
        sign_conflicts=num_conflicts / num_entries if num_entries else 0.0,
        num_entries=num_entries,
        cosine=inner / math.prod(norms) if all(norms) else 0.0,
        norms=norms,
        num_directions=k,
        overlap_in=subspace_overlap(va, vb, k),
        overlap_out=subspace_overlap(ua, ub, k),
        by_chance_in=k / one_OI.shape[1],
        by_chance_out=k / one_OI.shape[0],
    )


def top_directions(adapter: Adapter, module: str) -> tuple[Tensor, Tensor]:
    """Return the top singular directions of a layer's update: [O, K] and [I, K]."""
    u_OK, s_K, v_KI = product_svd(*adapter.factors(module))
    k = min(NUM_DIRECTIONS, int((s_K > NEGLIGIBLE * s_K[0]).sum()))
    return u_OK[:, :k], v_KI[:k].t()


def subspace_overlap(a: Tensor, b: Tensor, k: int) -> float:
    """Return the normalised similarity of the spaces that the first k columns of each span, 0 to 1; 0 if k is."""
    return float((a[:, :k].t() @ b[:, :k]).square().sum()) / k if k else 0.0
