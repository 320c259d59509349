"""How many steps a job has, and its learning rate at each: pure functions of the spec. Formulas are transformers' schedules."""

import math

from workers.spec import TrainingSpec


def rows_per_step(training: TrainingSpec) -> int:
    """Rows of one optimiser step."""
    return training.per_device_train_batch_size * training.gradient_accumulation_steps


def num_steps(training: TrainingSpec, num_rows: int) -> int:
    """Optimiser steps of the whole job, at least 1."""
    if training.max_steps is not None:
        return training.max_steps
    return max(1, math.ceil(training.num_train_epochs * math.ceil(num_rows / rows_per_step(training))))


def learning_rate_at(training: TrainingSpec, step: int, total: int) -> float:
    """Learning rate of optimiser step `step` (from 0) of `total`."""
    warmup = training.warmup_steps
    num_warmup = math.ceil(warmup * total) if warmup < 1 else int(warmup)
    peak = training.learning_rate
    if training.lr_scheduler_type == "constant":
        return peak
    if step < num_warmup:
        return peak * step / max(1, num_warmup)
    done = (step - num_warmup) / max(1, total - num_warmup)
    match training.lr_scheduler_type:
        case "linear":
            return peak * max(0.0, 1.0 - done)
        case "cosine":
            return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
        case _:
            return peak
