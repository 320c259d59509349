"""One adapter's training: its steps, its evaluations, and the state from which it goes on bit for bit.

    step s:  g = sum over micro-batches of d(loss sum)/dw / (supervised tokens of the whole step)
             clip, AdamW, next

Nothing random is carried along: row order, dropout and initial weights are functions of (seed, step), so that weights,
moments and a few numbers are the whole state.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from workers.data.render import Example
from workers.engine.attention import sequences_of
from workers.engine.bank import Bank
from workers.engine.batches import make_stream, rows_of_step
from workers.engine.dropout import DropoutKey
from workers.engine.lora import set_dropout_key
from workers.engine.optimizer import adamw_step, clip_gradient
from workers.engine.resident import ResidentBase, measure
from workers.engine.schedule import learning_rate_at, num_steps
from workers.spec import PeftSpec, TrainingSpec
from workers.targets import check_rank, select_targets

MAX_SKIPPED_STEPS = 5
"""Steps in a row that may be skipped for a non-finite loss or gradient before the job is given up."""


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Nats per supervised token of the step's rows, before the update."""
    gradient_norm: float
    """Before the clip."""
    learning_rate: float
    num_tokens: int
    seconds: float
    skipped: bool
    """True if loss or gradient was not finite and the weights were left alone."""


@dataclass(frozen=True)
class Standing:
    """Where a training is, beside its vectors. Written into checkpoints."""

    step: int = 0
    best_step: int = 0
    best_metrics: Mapping[str, float] | None = None
    last_metrics: Mapping[str, float] | None = None
    """Of the evaluation at `last_evaluated`."""
    last_evaluated: int = 0
    evaluations_without_gain: int = 0
    skipped_in_a_row: int = 0
    num_tokens: int = 0
    stopped_early: bool = False


class Training:
    """Trains one adapter on a resident base, step by step; several may take turns on one base."""

    def __init__(
        self,
        base: ResidentBase,
        peft: PeftSpec,
        training: TrainingSpec,
        train: Sequence[Example],
        validation: Sequence[Example],
        *,
        init: Mapping[str, Tensor] | None = None,
        validation_bytes: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Prepare fresh weights, or those of `init` (PEFT names). Raises BadInput if targets or rank do not fit the base."""
        targets = select_targets(peft.target_modules, list(base.layers))
        check_rank(peft.r, targets, {name: (layer.out_features, layer.in_features) for name, layer in base.layers.items()})
        self.base, self.peft, self.training = base, peft, training
        self.train, self.validation, self.validation_bytes = train, validation, validation_bytes
        self.num_steps = num_steps(training, len(train))
        self.bank = Bank(base.layers, targets, peft, base.device, dtype)
        self.bank.load(init) if init is not None else self.bank.initialise(training.seed)
        self.best_weights = self.bank.weights.detach().clone()
        self.standing = Standing()

    @property
    def step(self) -> int:
        return self.standing.step

    @property
    def is_done(self) -> bool:
        return self.step >= self.num_steps or self.standing.stopped_early

    @property
    def has_diverged(self) -> bool:
        return self.standing.skipped_in_a_row >= MAX_SKIPPED_STEPS

    @property
    def evaluation_is_due(self) -> bool:
        """True once at each multiple of eval_steps and at the end, if there are validation rows."""
        every = self.training.eval_steps
        at_a_mark = self.is_done or (every is not None and self.step % every == 0)
        return bool(self.validation) and at_a_mark and self.standing.last_evaluated != self.step

    @property
    def checkpoint_is_due(self) -> bool:
        every = self.training.checkpoint_steps or self.training.eval_steps
        return every is not None and self.step % every == 0 and not self.is_done

    def train_step(self) -> StepResult:
        """Do one optimiser step."""
        started = time.perf_counter()
        learning_rate = learning_rate_at(self.training, self.step, self.num_steps)
        loss, num_tokens = self._accumulate_gradient()
        norm = clip_gradient(self.bank, self.training.max_grad_norm)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if not skipped:
            adamw_step(self.bank, self.training, learning_rate, self.step + 1)
        self.standing = replace(
            self.standing,
            step=self.step + 1,
            skipped_in_a_row=self.standing.skipped_in_a_row + 1 if skipped else 0,
            num_tokens=self.standing.num_tokens + num_tokens,
        )
        seconds = time.perf_counter() - started
        return StepResult(self.step, loss, norm, learning_rate, num_tokens, seconds, skipped)

    def _accumulate_gradient(self) -> tuple[float, int]:
        """Fill the bank's gradient for the step that comes; return its loss per supervised token and its tokens."""
        streams = [
            make_stream([self.train[row] for row in rows], self.base.device)
            for rows in rows_of_step(self.training, len(self.train), self.step)
        ]
        denominator = max(1, sum(stream.num_targets for stream in streams))
        self.bank.gradients.zero_()
        self.base.switch(self.bank.factors)
        loss_sum = 0.0
        for index, stream in enumerate(streams):
            set_dropout_key(self.base.layers, DropoutKey(self.training.seed, self.step, index))
            with sequences_of(stream.lengths), self.base.recomputing(self.training.gradient_checkpointing):
                loss = self.base.loss_sum(stream)
                (loss / denominator).backward()
            loss_sum += float(loss.detach())
        set_dropout_key(self.base.layers, None)
        self.base.switch({})
        return loss_sum / denominator, sum(stream.num_tokens for stream in streams)

    def evaluate(self) -> dict[str, float]:
        """Measure the present weights on the validation rows, keep them if they are the best, and count towards early stop."""
        self.base.switch(self.bank.factors)
        losses = measure(self.base, self.validation, self.training.per_device_train_batch_size)
        self.base.switch({})
        metrics = losses.metrics(self.validation_bytes)
        best = self.standing.best_metrics
        improved = best is None or metrics["eval/loss"] < best["eval/loss"] or math.isnan(best["eval/loss"])
        if improved:
            self.best_weights.copy_(self.bank.weights.detach())
        without_gain = 0 if improved else self.standing.evaluations_without_gain + 1
        patience = self.training.early_stopping_patience
        self.standing = replace(
            self.standing,
            best_step=self.step if improved else self.standing.best_step,
            best_metrics=metrics if improved else best,
            last_metrics=metrics,
            last_evaluated=self.step,
            evaluations_without_gain=without_gain,
            stopped_early=self.standing.stopped_early or (patience is not None and without_gain >= patience),
        )
        return metrics

    @property
    def keeps_best(self) -> bool:
        return self.training.keep == "best" and self.standing.best_metrics is not None

    def kept_tensors(self) -> dict[str, Tensor]:
        """Return the adapter's tensors in PEFT's names: the best by validation loss or the last, as `training.keep` asks."""
        return self.bank.tensors(self.best_weights if self.keeps_best else None)

    def kept_metrics(self) -> dict[str, float]:
        """Return the validation metrics of the weights that `kept_tensors` gives."""
        metrics = self.standing.best_metrics if self.keeps_best else self.standing.last_metrics
        return dict(metrics or {})

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the vectors and the standing from which `restore` goes on bit for bit."""
        vectors = {
            "weights": self.bank.weights,
            "first_moment": self.bank.first_moment,
            "second_moment": self.bank.second_moment,
            "best_weights": self.best_weights,
        }
        return {name: vector.detach().cpu() for name, vector in vectors.items()}, dict(vars(self.standing))

    def restore(self, vectors: Mapping[str, Tensor], standing: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        with torch.no_grad():
            self.bank.weights.copy_(vectors["weights"])
            self.bank.first_moment.copy_(vectors["first_moment"])
            self.bank.second_moment.copy_(vectors["second_moment"])
            self.best_weights.copy_(vectors["best_weights"])
        self.standing = Standing(**standing)
