"""Classification heads in a pack: each adapter's own head on its own rows, by grouped products, and the losses.

The form of a head is its family's (`head_shapes`). Heads with one number of labels are done together, in one product per layer.
Axes: K positions (one per row of data, filled up), M those of one number of labels, G heads, D hidden size, L labels (L' with
what they are filled up by).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from workers.engine.bank import GRADIENTS
from workers.engine.class_metrics import class_metrics
from workers.engine.head_shapes import HeadLayer, HeadShape, apply_head, head_of
from workers.engine.kernels import grouped_outer, grouped_rows
from workers.engine.plan import HeadPart

_ONES = 8
"""Columns of ones by which a bias's gradient is summed as a product: as many as the grouped kernel asks for."""


@dataclass(frozen=True)
class Classified:
    """What a no-grad pass over rows measured of one classifier."""

    loss_sum: float = 0.0
    """Nats over all rows."""
    predicted: tuple[int, ...] = ()
    expected: tuple[int, ...] = ()
    num_labels: int = 0

    def __add__(self, other: "Classified") -> "Classified":
        return Classified(
            self.loss_sum + other.loss_sum,
            self.predicted + other.predicted,
            self.expected + other.expected,
            max(self.num_labels, other.num_labels),
        )

    def metrics(self, num_bytes: int) -> dict[str, float]:
        """Return eval/loss (nats per row), eval/accuracy and eval/macro_f1; bytes of text play no part."""
        return class_metrics(self.loss_sum, self.predicted, self.expected, self.num_labels)


class ClassHead:
    """What stands behind a frozen model that classifies, but for the adapters' own tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises BadInput for a family that cannot be used to classify."""
        self.shape: HeadShape = head_of(model)
        self._pooler = model.get_submodule(self.shape.pooler) if self.shape.pooler is not None else None

    def losses_and_gradient(
        self, hidden_KD: Tensor, targets_K: Tensor, weights_K: Tensor, counts: Sequence[int], parts: Sequence[HeadPart]
    ) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy [nats] of each row, and the gradient [K, D] of their sum weighted by `weights_K`.

        `counts` are the rows of each adapter. The heads' own gradients are added to their banks.
        """
        losses_K = torch.zeros(len(targets_K), dtype=weights_K.dtype, device=hidden_KD.device)
        hidden = hidden_KD.detach().requires_grad_(True)
        with torch.enable_grad():
            pooled_KD = self._pooled(hidden)
            total = torch.zeros((), device=hidden_KD.device)
            for part in parts:
                rows_M, ends_G = _rows_of(part, counts, hidden_KD.device)
                logits_ML = self._logits(part, pooled_KD.index_select(0, rows_M), ends_G)
                losses_M = nn.functional.cross_entropy(logits_ML, targets_K[rows_M], reduction="none")
                losses_K[rows_M] = losses_M.detach().to(losses_K.dtype)
                total = total + (losses_M * weights_K[rows_M].to(losses_M.dtype)).sum()
            (gradient_KD,) = torch.autograd.grad(total, hidden)
        return losses_K, gradient_KD

    @torch.no_grad()
    def losses_and_predictions(
        self, hidden_KD: Tensor, targets_K: Tensor, counts: Sequence[int], parts: Sequence[HeadPart]
    ) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy [nats] of each row and its likeliest label."""
        losses_K = torch.zeros(len(targets_K), dtype=torch.float64, device=hidden_KD.device)
        predicted_K = torch.zeros_like(targets_K)
        pooled_KD = self._pooled(hidden_KD)
        for part in parts:
            rows_M, ends_G = _rows_of(part, counts, hidden_KD.device)
            logits_ML = self._logits(part, pooled_KD.index_select(0, rows_M), ends_G)
            losses_K[rows_M] = nn.functional.cross_entropy(logits_ML, targets_K[rows_M], reduction="none").double()
            predicted_K[rows_M] = logits_ML.argmax(-1)
        return losses_K, predicted_K

    @torch.no_grad()
    def logits_of_one(self, hidden_KD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return logits [K, L] of one head alone; `tensors` are named relative to the head's module."""
        pooled = self._pooled(hidden_KD)
        return apply_head(self.shape, {name: tensor.to(pooled) for name, tensor in tensors.items()}, pooled).float()

    def _pooled(self, hidden_KD: Tensor) -> Tensor:
        return hidden_KD if self._pooler is None else self._pooler(hidden_KD[:, None])

    def _logits(self, part: HeadPart, x_MD: Tensor, ends_G: Tensor) -> Tensor:
        anchor = torch.zeros((), device=x_MD.device, requires_grad=True)
        x = x_MD.to(part.bank.dtype)
        for layer in self.shape.layers:
            filled = _GroupedAffine.apply(x, anchor, part, layer, ends_G)
            x = filled[:, : layer.out_features or part.bank.num_labels]
            x = torch.tanh(x) if layer.activation == "tanh" else x
        return x


class _GroupedAffine(torch.autograd.Function):
    """x W^T + b, each group of rows with its own head's layer. Gradients of W and b go to their bank."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, anchor: Tensor, part: HeadPart, layer: HeadLayer, ends_G: Tensor) -> Tensor:
        weight = part.tensor(layer.tensor_name("weight"))
        y = grouped_rows(x_MD, weight.transpose(1, 2), ends_G)
        if layer.has_bias:
            bias_GL = part.tensor(layer.tensor_name("bias"))[:, :, 0]
            y = y + bias_GL.repeat_interleave(ends_G.diff(prepend=ends_G.new_zeros(1)), 0)
        ctx.part, ctx.layer = part, layer
        ctx.save_for_backward(x_MD, ends_G)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gy,) = gradients
        gy = gy.contiguous()
        x_MD, ends_G = ctx.saved_tensors
        part, layer = ctx.part, ctx.layer
        part.tensor(layer.tensor_name("weight"), GRADIENTS).add_(grouped_outer(gy, x_MD, ends_G))
        if layer.has_bias:
            sums = grouped_outer(gy, gy.new_ones(len(gy), _ONES), ends_G)
            part.tensor(layer.tensor_name("bias"), GRADIENTS).add_(sums[:, :, :1])
        return grouped_rows(gy, part.tensor(layer.tensor_name("weight")), ends_G), None, None, None, None


def _rows_of(part: HeadPart, counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the positions of the part's data rows, in the order of its heads, and where those of each head end."""
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    lengths = [0] * (part.rows[-1] + 1 - part.rows[0])
    for row, member in zip(part.rows, part.members, strict=True):
        lengths[row - part.rows[0]] = counts[member]
    pieces = [torch.arange(starts[member], starts[member + 1]) for member in part.members]
    return torch.cat(pieces).to(device), torch.tensor(lengths).cumsum(0, dtype=torch.int32).to(device)
