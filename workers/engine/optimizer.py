"""AdamW with decoupled weight decay over the rows of a bank, each adapter with its own numbers, and the clip before it.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    w = w (1 - lr wd) - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

(Loshchilov & Hutter, arXiv:1711.05101; the order of operations is that of torch.optim.AdamW.) The factors B may have a learning
rate of their own (LoRA+, arXiv:2402.12354). Rows that are not given are untouched: weights, moments and decay too.

Every operation is elementwise with one number per row, so that an adapter's bits do not depend on its neighbours. The norm of a
gradient is summed in two stages that do not depend on them either: ALIGNED values at a time, then, from first to last, in
float64; blocks of layers that only others have are zero and add nothing, exactly.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engine.bank import ALIGNED, FIRST_MOMENT, GRADIENTS, SECOND_MOMENT, WEIGHTS, Bank, Row
from workers.spec import TrainingSpec


@dataclass(frozen=True)
class Update:
    """One adapter's optimiser step."""

    rows: Mapping[Bank, Row]
    training: TrainingSpec
    learning_rate: float
    step: int
    """Counts from 1."""
    clip: float
    """What the gradient is multiplied by: 1 if its norm is within bounds."""


@torch.no_grad()
def gradient_norms(banks: Sequence[Bank], adapters: Sequence[Mapping[Bank, Row]]) -> list[float]:
    """Return the norm of each adapter's gradient over all its values; infinite or NaN if a value is."""
    squares = {bank: _row_squares(bank) for bank in banks if bank.rows}
    return [sum(squares[bank][rows[bank].index] for bank in in_order(rows)) ** 0.5 for rows in adapters]


def in_order(banks: Iterable[Bank]) -> list[Bank]:
    """Return banks in the order of their own, which is no matter of who came first."""
    return sorted(banks, key=lambda bank: bank.order)


def _row_squares(bank: Bank) -> list[float]:
    """Return the squared norm of each row's gradient, of a fixed order of sums."""
    parts = []
    for which in ("a", "b"):
        gradients = bank.region(GRADIENTS, which)
        if not gradients.numel():
            continue
        chunks = gradients.reshape(gradients.shape[0], -1, ALIGNED).square().sum(2)
        parts.append(chunks.double().cumsum(1)[:, -1])
    total: list[float] = torch.stack(parts).sum(0).tolist()
    return total


def clip_of(norm: float, max_grad_norm: float) -> float:
    """Return the factor that brings a gradient of this norm within `max_grad_norm` (0: does not clip)."""
    if max_grad_norm > 0.0 and norm > max_grad_norm:
        return max_grad_norm / (norm + 1e-6)  # 1e-6 as in torch.nn.utils.clip_grad_norm_
    return 1.0


@torch.no_grad()
def adamw_step(banks: Sequence[Bank], updates: Sequence[Update]) -> None:
    """Update the weights of the adapters named, by their gradients, which are used up: what is left of them has no meaning.

    All memory is taken before anything is written. If it is lacking (torch.OutOfMemoryError), nothing has changed.
    """
    parts = []
    for bank in banks:
        own = sorted((update for update in updates if bank in update.rows), key=lambda update: update.rows[bank].index)
        rows = [update.rows[bank].index for update in own]
        for which in ("a", "b") if own else ():
            if not bank.region(WEIGHTS, which).numel():
                continue
            ratios = [update.training.loraplus_lr_ratio if which == "b" else 1.0 for update in own]
            parts.append(_part_of([bank.region(kind, which) for kind in range(4)], rows, _numbers(own, ratios, bank)))
    for part in parts:
        part.update()


@dataclass(frozen=True)
class _Numbers:
    """One number per row, [rows, 1]."""

    clip: Tensor
    keep: Tensor
    gain1: Tensor
    beta2: Tensor
    gain2: Tensor
    root: Tensor
    epsilon: Tensor
    size: Tensor


def _numbers(updates: Sequence[Update], ratios: Sequence[float], bank: Bank) -> _Numbers:
    rows = []
    for update, ratio in zip(updates, ratios, strict=True):
        spec, rate = update.training, update.learning_rate * ratio
        bias1, bias2 = 1.0 - spec.adam_beta1**update.step, 1.0 - spec.adam_beta2**update.step
        rows.append(
            (
                update.clip,
                1.0 - rate * spec.weight_decay,
                1.0 - spec.adam_beta1,
                spec.adam_beta2,
                1.0 - spec.adam_beta2,
                bias2**0.5,
                spec.adam_epsilon,
                rate / bias1,
            )
        )
    table = torch.tensor(rows, dtype=torch.float64).to(bank.device, bank.dtype)
    return _Numbers(*table.t()[:, :, None].unbind(0))


@dataclass(frozen=True)
class _Part:
    """The rows of a region that are updated: a slice of it, or copies that go back to where they came from."""

    region: Sequence[Tensor]
    rows: Sequence[Tensor]
    where: Tensor | None
    """Places of copied rows."""
    numbers: _Numbers

    def update(self) -> None:
        """Takes no memory."""
        _adamw(self.rows[WEIGHTS], self.rows[GRADIENTS], self.rows[FIRST_MOMENT], self.rows[SECOND_MOMENT], self.numbers)
        if self.where is not None:
            for kind in (WEIGHTS, FIRST_MOMENT, SECOND_MOMENT):
                self.region[kind].index_copy_(0, self.where, self.rows[kind])


def _part_of(region: Sequence[Tensor], rows: Sequence[int], numbers: _Numbers) -> _Part:
    if rows[-1] + 1 - rows[0] == len(rows):
        return _Part(region, [kind[rows[0] : rows[-1] + 1] for kind in region], None, numbers)
    where = torch.tensor(rows, device=region[0].device)
    return _Part(region, [kind.index_select(0, where) for kind in region], where, numbers)


def _adamw(w: Tensor, g: Tensor, m: Tensor, v: Tensor, numbers: _Numbers) -> None:
    """Update w, m and v in place; g serves as scratch."""
    g.mul_(numbers.clip)
    w.mul_(numbers.keep)
    m.lerp_(g, numbers.gain1)
    v.mul_(numbers.beta2).add_(g.mul_(g).mul_(numbers.gain2))
    denominator = torch.sqrt(v, out=g).div_(numbers.root).add_(numbers.epsilon)
    w.sub_(torch.div(m, denominator, out=denominator).mul_(numbers.size))
