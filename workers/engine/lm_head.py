"""The language-model head: from hidden states at supervised positions to losses, in portions that bound memory.

Logits are V values per position, more than everything else a pass keeps; so a portion's logits, losses and gradients are computed
together and forgotten before the next portion. The weight of each position in the total is known beforehand (one over the terms
of its own adapter's step), therefore the gradient is exact at once. Axes: K positions, D hidden size, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from infra.errors import BadInput

PORTION_BYTES = 128 << 20
"""Of logits at a time; their gradients take as much again."""
TILE = 32


@dataclass(frozen=True)
class Losses:
    """What a no-grad pass over rows measured."""

    loss_sum: float = 0.0
    """Nats over all supervised tokens."""
    num_targets: int = 0
    num_correct: int = 0
    """Supervised tokens whose likeliest prediction was right."""

    def __add__(self, other: "Losses") -> "Losses":
        return Losses(self.loss_sum + other.loss_sum, self.num_targets + other.num_targets, self.num_correct + other.num_correct)

    def metrics(self, num_bytes: int) -> dict[str, float]:
        """Return eval/loss (nats per token), perplexity, token accuracy, and bits per byte over `num_bytes` of target text."""
        loss = self.loss_sum / self.num_targets
        return {
            "eval/loss": loss,
            "eval/perplexity": math.exp(loss) if loss < 700.0 else math.inf,  # exp overflows at 709.8
            "eval/bits_per_byte": self.loss_sum / math.log(2.0) / max(1, num_bytes),
            "eval/token_accuracy": self.num_correct / self.num_targets,
        }


class LanguageHead:
    """The frozen head of a causal language model, with what its family does to the logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises BadInput if the model has none."""
        module = model.get_output_embeddings()
        if not isinstance(module, nn.Module):
            raise BadInput("the base has no language-model head; use a causal language model.")
        config = model.config
        self._module = module
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._factor = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)

    def logits(self, hidden_KD: Tensor) -> Tensor:
        """Return logits [K, V], in float32 at least."""
        logits: Tensor = self._module(hidden_KD)
        if self._factor != 1.0:
            logits = logits * self._factor
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def losses_and_gradient(self, hidden_KD: Tensor, targets_K: Tensor, weights_K: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy [nats] of each position, and the gradient [K, D] of their sum weighted by `weights_K`."""
        losses_K = torch.empty(len(targets_K), dtype=weights_K.dtype, device=hidden_KD.device)
        gradient_KD = torch.empty_like(hidden_KD)
        for part in self._portions(hidden_KD):
            hidden = hidden_KD[part].detach().requires_grad_(True)
            with torch.enable_grad():
                losses = nn.functional.cross_entropy(self.logits(hidden), targets_K[part], reduction="none")
            losses_K[part] = losses.detach()
            (gradient_KD[part],) = torch.autograd.grad(losses, hidden, weights_K[part].to(losses.dtype))
        return losses_K, gradient_KD

    @torch.no_grad()
    def losses_and_predictions(self, hidden_KD: Tensor, targets_K: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy [nats] of each position and its likeliest token."""
        losses_K = torch.empty(len(targets_K), dtype=torch.float64, device=hidden_KD.device)
        predicted_K = torch.empty_like(targets_K)
        for part in self._portions(hidden_KD):
            logits = self.logits(hidden_KD[part])
            losses_K[part] = nn.functional.cross_entropy(logits, targets_K[part], reduction="none").double()
            predicted_K[part] = logits.argmax(-1)
        return losses_K, predicted_K

    def _portions(self, hidden_KD: Tensor) -> list[slice]:
        num_rows, vocabulary = len(hidden_KD), self._vocabulary
        size = max(1, PORTION_BYTES // (4 * vocabulary) // TILE) * TILE
        return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]

    @property
    def _vocabulary(self) -> int:
        weight = self._module.weight
        return max(int(side) for side in weight.shape) if isinstance(weight, Tensor) else math.inf  # type: ignore[return-value]
