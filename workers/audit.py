"""What an adapter does to its base, layer by layer, and how two adapters of one base differ. No rows and no model here.

Of an update s B A everything is read from the singular values of a small matrix (`merging.product_svd`): QR of A^T and of B, then
an SVD of r x r; the update itself, as large as the layer, is never formed. Two updates are compared the same way, their
difference being the update of the factors side by side. The base's weights are read from its files one tensor at a time.
Axes: O outputs, I inputs, R rank, K singular values.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from infra.errors import BadInput
from workers.adapter import Adapter
from workers.export_merged import candidate_names
from workers.merge_report import subspace_overlap, top_directions
from workers.merging import product_svd
from workers.weight_files import find_weights, read_header

PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""Types whose numbers are the weights themselves; 8- and 4-bit types need scales that lie elsewhere."""
ROWS_PER_PIECE = 1024
LOW_SHARE = 0.5
"""A layer whose effective rank is below this share of r could do with half the rank."""
FULL_SHARE = 0.9
"""A layer whose effective rank is above this share of r has a nearly flat spectrum: nothing shows that r was enough."""


@dataclass(frozen=True)
class LayerAudit:
    """The update of one layer."""

    module: str
    r: int
    norm: float
    """Frobenius norm of s B A."""
    base_norm: float | None
    """Frobenius norm of the layer's weight; None where the base does not store it as plain numbers."""
    spectrum: tuple[float, ...]
    """Singular values of s B A, largest first."""
    effective_rank: float
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007): 1 to r; 0 for no update."""

    @property
    def ratio(self) -> float | None:
        """Size of the update against the weight it is added to."""
        return self.norm / self.base_norm if self.base_norm else None


@dataclass(frozen=True)
class LayerDiff:
    """One layer of two adapters, side by side."""

    module: str
    distance: float
    """Frobenius norm of the difference of the updates, relative to the larger of the two: 0 for equal ones, at most 2."""
    cosine: float
    """Of the updates as vectors, -1 to 1; 0 if one of them is nothing."""
    norms: tuple[float, float]
    overlap_in: float
    """Overlap of the leading directions in the layer's input space, 0 to 1 (see `merge_report`)."""
    overlap_out: float


@dataclass(frozen=True)
class AdapterDiff:
    """Two adapters of one base, side by side."""

    layers: tuple[LayerDiff, ...]
    """The layers that both adapt, by name."""
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def distance(self) -> float:
        """Of all common layers as one vector, relative to the larger adapter."""
        larger = max(math.hypot(*(layer.norms[side] for layer in self.layers)) for side in (0, 1)) if self.layers else 0.0
        return math.hypot(*(layer.distance * max(layer.norms) for layer in self.layers)) / larger if larger else 0.0

    @property
    def cosine(self) -> float:
        """Of all common layers as one vector."""
        norms = math.prod(math.hypot(*(layer.norms[side] for layer in self.layers)) for side in (0, 1))
        return sum(layer.cosine * math.prod(layer.norms) for layer in self.layers) / norms if norms else 0.0


def audit_layers(adapter: Adapter, base: Path) -> list[LayerAudit]:
    """Measure every layer's update against the weight in the base folder, in the order of the layers' names."""
    base_norms = norms_of_base(base, adapter)
    return [_audit_layer(adapter, module, base_norms.get(module)) for module in adapter.modules]


def _audit_layer(adapter: Adapter, module: str, base_norm: float | None) -> LayerAudit:
    a_RI, b_OR = adapter.factors(module)
    spectrum_K = product_svd(a_RI, b_OR)[1] * abs(adapter.scale(module))
    spectrum = tuple(map(float, spectrum_K))
    return LayerAudit(module, a_RI.shape[0], math.hypot(*spectrum), base_norm, spectrum, effective_rank(spectrum))


def effective_rank(spectrum: Sequence[float]) -> float:
    """Return exp(-sum p ln p) with p the singular values' shares of their sum (Roy and Vetterli 2007); 0 if all are 0."""
    total = math.fsum(spectrum)
    if total == 0.0:
        return 0.0
    return math.exp(-math.fsum(share * math.log(share) for share in (value / total for value in spectrum) if share > 0.0))


def norms_of_base(base: Path, adapter: Adapter) -> dict[str, float]:
    """Return the Frobenius norm of each adapted layer's weight in the folder `base`; layers that are not stored plainly are left
    out (packed in 4 bits, joined with others, under another name)."""
    wanted = {name: module for module in adapter.modules for name in candidate_names(module)}
    norms: dict[str, float] = {}
    for path in find_weights(base):
        plain = {tensor.name for tensor in read_header(path) if tensor.dtype in PLAIN_DTYPES}
        with safe_open(path, framework="pt") as file:
            for name in sorted(plain & wanted.keys()):
                weight = file.get_tensor(name)
                if weight.numel() == _num_entries(adapter, wanted[name]):
                    norms[wanted[name]] = _norm(weight)
    return norms


def _num_entries(adapter: Adapter, module: str) -> int:
    a_RI, b_OR = adapter.factors(module)
    return a_RI.shape[1] * b_OR.shape[0]


def _norm(weight: Tensor) -> float:
    """Return a Frobenius norm, summed in float64 without a float64 copy of the whole."""
    return math.sqrt(math.fsum(float(piece.double().square().sum()) for piece in weight.split(ROWS_PER_PIECE)))


def rank_advice(layers: Sequence[LayerAudit]) -> tuple[str, str]:
    """Return what the spectra say of the rank, "too_high", "too_low" or "fits", and the advice as one sentence.

    A hint for the next sweep, not a measurement of quality: what another rank does is only known by training it.
    """
    moved = [layer for layer in layers if layer.norm > 0.0]
    spread = [layer for layer in moved if layer.r > 1]
    effective = sorted(layer.effective_rank for layer in spread)
    if not moved:
        return "fits", "No layer is changed at all: the adapter does nothing."
    if not spread:
        return "fits", "All ranks are 1, and a spectrum of one value does not say whether that is enough."
    median = effective[len(effective) // 2]
    low = sum(layer.effective_rank < LOW_SHARE * layer.r for layer in spread)
    full = sum(layer.effective_rank > FULL_SHARE * layer.r for layer in spread)
    told = f"median effective rank {median:.1f}"
    if 2 * low > len(spread):
        smaller = _power_of_two(effective[math.ceil(0.9 * len(effective)) - 1])
        return "too_high", (
            f"The rank looks too high: {low} of {len(spread)} layers use less than half of r ({told}); try r = {smaller}."
        )
    if 2 * full > len(spread):
        largest = max(layer.r for layer in spread)
        return "too_low", (
            f"The rank may be too low: {full} of {len(spread)} layers use all of r with a flat spectrum ({told}); "
            f"try r = {2 * largest}."
        )
    return "fits", f"The rank looks right: most layers use more than half of r, and few all of it ({told})."


def _power_of_two(value: float) -> int:
    return int(2 ** math.ceil(math.log2(max(1.0, value))))


def by_kind(layers: Iterable[LayerAudit]) -> dict[str, list[LayerAudit]]:
    """Group layers by the last part of their names: q_proj, down_proj, ..."""
    groups: dict[str, list[LayerAudit]] = defaultdict(list)
    for layer in layers:
        groups[layer.module.rpartition(".")[2]].append(layer)
    return dict(groups)


def diff_adapters(a: Adapter, b: Adapter) -> AdapterDiff:
    """Compare two adapters of one base, layer by layer. Raises BadInput if their factors do not have the sides of one base."""
    mine, others = set(a.modules), set(b.modules)
    layers = tuple(_diff_layer(module, a, b) for module in sorted(mine & others))
    return AdapterDiff(layers, tuple(sorted(mine - others)), tuple(sorted(others - mine)))


def _diff_layer(module: str, a: Adapter, b: Adapter) -> LayerDiff:
    (a_RI, a_OR), (b_RI, b_OR) = _scaled(a, module), _scaled(b, module)
    if a_RI.shape[1] != b_RI.shape[1] or a_OR.shape[0] != b_OR.shape[0]:
        raise BadInput(f"the adapters have factors of different shapes for {module}; they do not belong to one base.")
    norms = (_product_norm(a_RI, a_OR), _product_norm(b_RI, b_OR))
    difference = _product_norm(torch.cat([a_RI, b_RI]), torch.cat([a_OR, -b_OR], 1))
    inner = float(((a_OR.t() @ b_OR) * (a_RI @ b_RI.t())).sum())  # <B A, B' A'> by the r x r' Gram matrices
    (ua, va), (ub, vb) = top_directions(a, module), top_directions(b, module)
    k = min(ua.shape[1], ub.shape[1])
    return LayerDiff(
        module=module,
        distance=difference / max(norms) if any(norms) else 0.0,
        cosine=inner / math.prod(norms) if all(norms) else 0.0,
        norms=norms,
        overlap_in=subspace_overlap(va, vb, k),
        overlap_out=subspace_overlap(ua, ub, k),
    )


def _scaled(adapter: Adapter, module: str) -> tuple[Tensor, Tensor]:
    a_RI, b_OR = adapter.factors(module)
    return a_RI.double(), b_OR.double() * adapter.scale(module)


def _product_norm(a_RI: Tensor, b_OR: Tensor) -> float:
    return float(torch.linalg.norm(product_svd(a_RI, b_OR)[1]))


def config_differences(a: Mapping[str, object], b: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """Return the settings in which two configurations differ, by key."""
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}
