"""AdamW with decoupled weight decay over a bank's vectors, and the gradient clip before it.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    w = w (1 - lr wd) - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

(Loshchilov & Hutter, arXiv:1711.05101; the order of operations is that of torch.optim.AdamW.) The norm that is clipped is
the adapter's own, over all its factors.
"""

import math

import torch

from workers.engine.bank import Bank
from workers.spec import TrainingSpec


@torch.no_grad()
def clip_gradient(bank: Bank, max_grad_norm: float) -> float:
    """Scale the gradient down to `max_grad_norm` (0: leave it); return the norm before. It may be infinite or NaN."""
    norm = float(torch.linalg.vector_norm(bank.gradients))
    if max_grad_norm > 0.0 and norm > max_grad_norm:
        bank.gradients.mul_(max_grad_norm / (norm + 1e-6))  # 1e-6 as in torch.nn.utils.clip_grad_norm_
    return norm


@torch.no_grad()
def adamw_step(bank: Bank, training: TrainingSpec, learning_rate: float, step: int) -> None:
    """Update the weights by the gradient. `step` counts from 1."""
    beta1, beta2 = training.adam_beta1, training.adam_beta2
    if training.weight_decay > 0.0:
        bank.weights.mul_(1.0 - learning_rate * training.weight_decay)
    bank.first_moment.lerp_(bank.gradients, 1.0 - beta1)
    bank.second_moment.mul_(beta2).addcmul_(bank.gradients, bank.gradients, value=1.0 - beta2)
    denominator = (bank.second_moment.sqrt() / math.sqrt(1.0 - beta2**step)).add_(training.adam_epsilon)
    bank.weights.addcdiv_(bank.first_moment, denominator, value=-learning_rate / (1.0 - beta1**step))
