"""Jobs that train beside one another, what each leaves, and what it leaves alone, for the tests of the packed engine."""

import functools
import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.workers.engine.packs import examples_of, model_of, specs_of
from workers.data.render import Example
from workers.engine.pack import Pack
from workers.engine.resident import ResidentBase
from workers.engine.training import StepResult, Training
from workers.spec import PeftSpec, TrainingSpec


@dataclass(frozen=True, eq=False)
class Job:
    """What a pack is asked to train."""

    peft: PeftSpec
    training: TrainingSpec
    train: Sequence[Example]
    validation: Sequence[Example] = ()
    init: Mapping[str, Tensor] | None = None

    def join(self, pack: Pack) -> Training:
        return pack.join(self.peft, self.training, self.train, self.validation, init=self.init)


def job_of(rows: int = 9, validation: int = 0, data: int = 0, **changes: Any) -> Job:
    """A job on `rows` ragged rows drawn by the seed `data`; `changes` are fields of PeftSpec and TrainingSpec."""
    return Job(*specs_of(**changes), examples_of(rows, data), examples_of(validation, 100 + data))


def varied_job(
    seed: int, *, targets: Sequence[Any] = ("attention", "mlp", "all-linear", ["q_proj", "v_proj"]), **changes: Any
) -> Job:
    """A short job whose every number is drawn by `seed`."""
    draw = random.Random(seed).choice
    drawn: dict[str, Any] = {
        "r": draw([1, 2, 4, 8, 12, 16]),
        "lora_alpha": draw([4, 8, 32]),
        "use_rslora": draw([False, True]),
        "target_modules": draw(list(targets)),
        "lora_dropout": draw([0.0, 0.0, 0.1, 0.5]),
        "learning_rate": draw([1e-3, 5e-3]),
        "lr_scheduler_type": draw(["constant", "linear", "cosine"]),
        "warmup_steps": draw([0, 2]),
        "per_device_train_batch_size": draw([1, 2, 4, 8]),
        "gradient_accumulation_steps": draw([1, 1, 2]),
        "weight_decay": draw([0.0, 0.1]),
        "max_grad_norm": draw([0.0, 0.2, 1.0]),
        "loraplus_lr_ratio": draw([1.0, 4.0]),
        "max_steps": draw([3, 5, 6]),
        "eval_steps": draw([None, 2]),
        "seed": seed,
    }
    return job_of(draw([9, 22]), validation=draw([0, 3]), data=seed, **(drawn | changes))


@dataclass(frozen=True)
class Outcome:
    """All that a job leaves: the SHA-256 of its kept tensors, what every step said, and its standing."""

    digest: str
    steps: tuple[str, ...]
    standing: str


def outcome_of(training: Training, results: Sequence[StepResult]) -> Outcome:
    """NaN equals NaN: numbers are compared as they are written."""
    steps = [replace(result, seconds=0.0) for result in results]
    return Outcome(digest_of(training.kept_tensors()), tuple(map(repr, steps)), repr(training.standing))


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} ".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


class Company:
    """Jobs that train beside one another in packs on one base, whoever of them is called. Those that are due are evaluated."""

    def __init__(self, base: ResidentBase, jobs: Sequence[Job], num_packs: int = 1) -> None:
        self.jobs = jobs
        self.packs = [Pack(base) for _ in range(num_packs)]
        self.live: dict[int, tuple[Pack, Training]] = {}
        self.outcomes: dict[int, Outcome] = {}
        self._left: dict[int, tuple[dict[str, Tensor], dict[str, Any]]] = {}
        self._results: dict[int, list[StepResult]] = {number: [] for number in range(len(jobs))}

    @property
    def waiting(self) -> list[int]:
        return [number for number in range(len(self.jobs)) if number not in self.live and number not in self.outcomes]

    def join(self, number: int, pack: int = 0) -> None:
        """Let a job begin, or go on from where it left."""
        training = self.jobs[number].join(self.packs[pack])
        if number in self._left:
            training.restore(*self._left.pop(number))
        self.live[number] = (self.packs[pack], training)

    def preempt(self, number: int) -> None:
        """Let a job leave with its state; a step that is not complete is lost."""
        pack, training = self.live.pop(number)
        vectors, standing = training.state()
        self._left[number] = ({name: vector.clone() for name, vector in vectors.items()}, standing)
        pack.leave(training)

    def advance(self, numbers: Iterable[int]) -> None:
        """Do one pass per pack with these of its jobs, evaluate together who is due, and let go who is done."""
        called = [number for number in numbers if number in self.live]
        for pack in self.packs:
            here = {self.live[number][1]: number for number in called if number in self.live and self.live[number][0] is pack}
            if not here:
                continue
            for training, result in pack.advance(list(here)).items():
                self._results[here[training]].append(result)
            due = [training for training in here if training.evaluation_is_due]
            if due:
                pack.evaluate(due)
            for training, number in here.items():
                if training.is_done:
                    self.outcomes[number] = outcome_of(training, self._results[number])
                    pack.leave(self.live.pop(number)[1])

    def within(self, budget: int, first: int = 0) -> list[int]:
        """Return live jobs whose next micro-batches have at most `budget` tokens together, one at least, from `first` on."""
        order = sorted(self.live, key=lambda number: (number - first) % len(self.jobs))
        chosen: list[int] = []
        for number in order:
            tokens = self.live[number][1].next_tokens
            if not chosen or tokens <= budget:
                chosen.append(number)
                budget -= tokens
        return chosen

    def finish(self, most: int = 1_000, budget: int = 1_000_000) -> list[Outcome]:
        """Train all to the end, at most so many at a time, so many tokens per pass, and return what they leave."""
        turn = 0
        while self.waiting or self.live:
            for number in self.waiting[: max(0, most - len(self.live))]:
                self.join(number)
            self.advance(self.within(budget, turn))
            turn += 1
        return [self.outcomes[number] for number in range(len(self.jobs))]


def alone_outcomes(base: ResidentBase, jobs: Sequence[Job]) -> list[Outcome]:
    """What each job leaves when it has a pack of its own."""
    return [Company(base, [job]).finish()[0] for job in jobs]


@functools.cache
def base_of(family: str) -> ResidentBase:
    """A base holds no adapter: one serves all tests."""
    return ResidentBase(model_of(family))


@functools.cache
def varied_jobs(family: str, count: int) -> tuple[list[Job], list[Outcome]]:
    """Jobs that differ in everything, and what each leaves alone."""
    targets = (
        ["attention", "mlp", "all-linear", ["c_attn"]] if family == "gpt2" else ["attention", "mlp", "all-linear", ["q_proj"]]
    )
    jobs = [varied_job(seed, targets=targets) for seed in range(count)]
    return jobs, alone_outcomes(base_of(family), jobs)


class ScarceMemory(TorchDispatchMode):
    """Refuses, as an accelerator's allocator does, every operation whose result has more than so many values."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.refused: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() > self.most and not _is_in_place_or_view(func):
            self.refused.append(str(func))
            raise torch.OutOfMemoryError(f"{func} asks for {result.numel()} values")
        return result


def _is_in_place_or_view(func: Any) -> bool:
    """Tell whether an operation's result lies in memory that there was before."""
    returned = func._schema.returns
    return bool(returned) and returned[0].alias_info is not None


PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.linear.default,
    torch.ops.aten.matmul.default,
}


def shares_memory(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
