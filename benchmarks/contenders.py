"""What the engine's benchmarks share: rows of random tokens, the same adapters in our pack and in PEFT, and how they are timed.

Every adapter has rows of its own, the same in all contenders, in the same order. An epoch has `STEPS` steps, and whole epochs are
timed, so that all contenders are timed on the same tokens. The lengths of rows differ by up to a quarter of their mean.
"""

import copy
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from workers.data.render import Example
from workers.engine.dropout import generator_of
from workers.engine.lora import initial_a
from workers.engine.pack import Pack
from workers.engine.resident import ResidentBase
from workers.engine.training import Training
from workers.spec import PeftSpec, TrainingSpec

STEPS = 4
"""Steps of an epoch."""
SMALL_BATCH, LARGE_BATCH, SMALL_STEP = 4, 8, 512
"""Rows of a step with fewer tokens than SMALL_STEP, and of a larger one."""
LEARNING_RATE = 1e-3
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""The latter leaves out the time for which others had the core, and is of use for one thread on a CPU only."""


class Contender(Protocol):
    """Something that is timed."""

    adapter_steps: int
    """Adapter-steps of an epoch."""

    def sample(self, num_epochs: int) -> float:
        """Run so many epochs; return the seconds of one adapter-step."""


def measure(contenders: Mapping[Any, Contender], num_rounds: int, seconds: float) -> dict[Any, list[float]]:
    """Time all contenders in turn, round after round, each for about `seconds`; return each round's seconds per adapter-step.

    In turn, since a machine that others use is slower at some times than at others.
    """
    warm = {key: one.sample(1) for key, one in contenders.items()}
    epochs = {key: max(1, round(seconds / (warm[key] * one.adapter_steps))) for key, one in contenders.items()}
    samples: dict[Any, list[float]] = {key: [] for key in contenders}
    for _ in range(num_rounds):
        for key, one in contenders.items():
            samples[key].append(one.sample(epochs[key]))
    return samples


def mean_of_medians(samples: Mapping[int, Sequence[float]], ranks: Sequence[int]) -> float:
    """Return the median of the rounds, averaged over adapters of these ranks."""
    return statistics.mean(statistics.median(samples[rank]) for rank in ranks)


def batch_size(tokens: int) -> int:
    """Return the rows of a step of about so many tokens."""
    return SMALL_BATCH if tokens < SMALL_STEP else LARGE_BATCH


def random_rows(tokens: int, vocabulary: int, seed: int) -> list[Example]:
    """Return the rows of an epoch: `STEPS` steps of about `tokens` tokens. Every token is supervised but the first."""
    rng = random.Random(f"rows/{seed}")
    batch = batch_size(tokens)
    mean = tokens // batch
    lengths: list[int] = []
    for _ in range(STEPS * batch // 2):
        difference = rng.randint(0, mean // 4)
        lengths += [mean - difference, mean + difference]
    rng.shuffle(lengths)
    return [
        Example([rng.randrange(vocabulary) for _ in range(length)], [False] + [True] * (length - 1), f"random row {number}")
        for number, length in enumerate(lengths)
    ]


def training_spec(tokens: int, *, checkpointing: bool = False) -> TrainingSpec:
    """Return how all train: AdamW with a constant rate, clipped to norm 1, without end."""
    return TrainingSpec(
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=10**6,
        per_device_train_batch_size=batch_size(tokens),
        gradient_checkpointing=checkpointing,
    )


def join(pack: Pack, r: int, tokens: int, rows: Sequence[Example], *, checkpointing: bool = False) -> Training:
    """Let an adapter of rank `r` on all linears into a pack; its validation rows are those it trains on."""
    return pack.join(PeftSpec(r=r, lora_alpha=2 * r), training_spec(tokens, checkpointing=checkpointing), rows, rows)


def peft_model(model: PreTrainedModel, r: int) -> PeftModel:
    """Wrap a twin of `model` with PEFT's adapter of the same form and the same initial weights."""
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(twin(model), config)
    assert isinstance(wrapped, PeftModel)
    with torch.no_grad():
        for name, module in wrapped.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                fresh = initial_a(r, module.in_features, generator_of("init", training_spec(1).seed, name))
                module.lora_A["default"].weight.copy_(fresh)
    return wrapped


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model that shares its parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def padded(rows: Sequence[Example]) -> dict[str, Tensor]:
    """Collate rows as a causal language model takes them: padded on the right to the longest, with an attention mask."""
    width = max(len(row.input_ids) for row in rows)
    shape = (len(rows), width)
    input_ids, mask, labels = (
        torch.zeros(shape, dtype=torch.long),
        torch.zeros(shape, dtype=torch.long),
        torch.full(shape, -100),
    )
    for number, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[number, :length] = labels[number, :length] = torch.tensor(row.input_ids)
        mask[number, :length] = 1
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Packed:
    """Our engine with several adapters, all of which take every step."""

    def __init__(
        self,
        base: ResidentBase,
        ranks: Sequence[int],
        tokens: int,
        rows: Sequence[Sequence[Example]],
        *,
        tokens_per_pass: int | None = None,
        checkpointing: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """A pass takes all adapters, or as many as `tokens_per_pass` has room for."""
        self._clock = clock
        self.pack = Pack(base)
        self.adapter_steps = STEPS * len(ranks)
        trainings = [join(self.pack, r, tokens, own, checkpointing=checkpointing) for r, own in zip(ranks, rows, strict=True)]
        size = len(trainings) if tokens_per_pass is None else max(1, tokens_per_pass // tokens)
        self.passes = [trainings[start : start + size] for start in range(0, len(trainings), size)]

    def sample(self, num_epochs: int) -> float:
        synchronise(self.pack.base.device)
        started = self._clock()
        for _ in range(num_epochs * STEPS):
            for trainings in self.passes:
                self.pack.advance(trainings)
        synchronise(self.pack.base.device)
        return (self._clock() - started) / (num_epochs * self.adapter_steps)
