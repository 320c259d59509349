"""A host: one process, one resident base, and the jobs it trains, one step at a time.

`admit / step / evict / report` is the whole interface: whoever holds a host (the task in `host_task`, a test) decides when.
Every job is an attempt with its own claim; nothing of one job reaches another.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from infra.claims import Owner
from infra.crashpoints import crashpoint
from infra.errors import BadInput, ClaimHeld, ClaimLost, LorafleetError, ServiceUnavailable, WrongBase
from infra.storage import Storage
from infra.tracking import Point
from workers.adapter import build_adapter
from workers.adapter_store import load_adapter, manifest_body, store_adapter
from workers.attempt import Attempt
from workers.bases import materialise
from workers.checkpoint import Checkpoint
from workers.data.contract import prompt_contract
from workers.data.render import Renderer
from workers.data.rows import Row
from workers.data.store import load_rows
from workers.data.tokenizer import load_tokenizer
from workers.engine.lora import scale_of
from workers.engine.resident import ResidentBase, has_effect
from workers.engine.training import StepResult, Training
from workers.evaluate import answer_metrics, answer_rows
from workers.job import Job
from workers.job_state import is_asked_to_cancel
from workers.loading import load_model
from workers.report import Evaluated, Finished, JobEvent, JobStatus, Progress

log = logging.getLogger(__name__)
PROGRESS_SECONDS = 0.25
CANCEL_LOOK_SECONDS = 2.0
"""Time between two looks into the store for a request to cancel, at least."""


class Host(Protocol):
    """Trains the jobs it has admitted."""

    @property
    def num_free(self) -> int:
        """How many more jobs may be admitted now."""
        ...

    def admit(self, job: Job) -> None:
        """Take a job in; what is wrong with it is reported as its end, not raised."""
        ...

    def step(self) -> bool:
        """Do the next piece of work; False if there is none (no job, or all wait for an answer)."""
        ...

    def decide(self, job_id: str, go: bool) -> None:
        """Answer an evaluation. An answer for a job that is not here is dropped."""
        ...

    def evict(self, job_id: str, status: str) -> None:
        """End a job here: "preempted" (after a checkpoint) or "cancelled"."""
        ...

    def report(self) -> list[JobEvent]:
        """Return what happened since the last call."""
        ...

    def close(self) -> None:
        """Let go of every job, whatever it was doing; none is told an end."""
        ...


@dataclass
class _Seat:
    """A job in training and what belongs to it."""

    job: Job
    attempt: Attempt
    training: Training
    renderer: Renderer
    validation: list[Row]
    waits: bool = False
    reported: float = field(default=0.0)
    tokens_since_report: int = 0


class EngineHost:
    """The host over the engine: one seat, filled by one job at a time."""

    def __init__(self, store: Storage, cache_dir: Path, *, lease_seconds: float, device: str = "cpu") -> None:
        self._store, self._cache_dir, self._lease_seconds, self._device = store, cache_dir, lease_seconds, device
        self._owner = Owner.here()
        self._base: ResidentBase | None = None
        self._residency: tuple[str, str, str] | None = None
        self._path = Path()
        self._seat: _Seat | None = None
        self._events: list[JobEvent] = []
        self._looked = time.monotonic()

    @property
    def num_free(self) -> int:
        return 0 if self._seat else 1

    def report(self) -> list[JobEvent]:
        events, self._events = self._events, []
        return events

    def admit(self, job: Job) -> None:
        try:
            begun = Attempt.begin(self._store, job, self._owner, self._lease_seconds)
        except LorafleetError as error:
            self._events.append(Finished(job.job_id, "failed", f"{_word_of(error)}: {error}"))
            return
        if isinstance(begun, Finished):
            self._events.append(begun)
            return
        self._guarded(begun, lambda: self._take_seat(job, begun))

    def _take_seat(self, job: Job, attempt: Attempt) -> None:
        torch.set_num_threads(job.spec.resources.num_threads)
        base = self._resident(job)
        seat = self._prepare(job, attempt, base)
        checkpoint = attempt.last_checkpoint()
        self._seat = seat
        if checkpoint is not None:
            seat.training.restore(checkpoint.vectors, checkpoint.standing)
            crashpoint("job-resumed", f"{job.job_id} {seat.training.step}")
            self._tell_again(seat)

    def _resident(self, job: Job) -> ResidentBase:
        """Return the job's base, loading it unless it is here already."""
        residency = (job.base.base_id, job.base.training_view, job.base.prompt_contract)
        if self._base is None or self._residency != residency:
            self._base, self._residency = None, None
            self._path = materialise(job.base.base_id, Path(job.base.path), self._store, self._cache_dir)
            self._check_prompt_contract(job)
            self._base = ResidentBase(load_model(self._path, job.spec.base_model, device=self._device))
            self._residency = residency
        return self._base

    def _check_prompt_contract(self, job: Job) -> None:
        """The base's id does not cover its tokenizer: refuse a folder that renders rows otherwise than they were resolved."""
        present = prompt_contract(self._path)
        if present != job.base.prompt_contract:
            raise WrongBase(
                f"the tokenizer or chat template in {self._path} is not the one the job was resolved with "
                f"({present[:12]}, not {job.base.prompt_contract[:12]}); restore the folder, or ask for the job anew."
            )

    def _prepare(self, job: Job, attempt: Attempt, base: ResidentBase) -> _Seat:
        renderer = Renderer(load_tokenizer(self._path), job.spec.training.max_length, context_length=base.context_length)
        train = renderer.render_all(load_rows(self._store, job.tenant, job.train.digest))
        rows = load_rows(self._store, job.tenant, job.validation.digest) if job.validation else []
        validation = renderer.render_all(rows) if rows else []
        init = None
        if job.init_adapter_id is not None:
            init = self._initial_tensors(job)
        training = Training(
            base,
            job.spec.peft,
            job.spec.training,
            train,
            validation,
            init=init,
            validation_bytes=renderer.target_bytes(validation),
        )
        return _Seat(job, attempt, training, renderer, rows)

    def _initial_tensors(self, job: Job) -> dict[str, Tensor]:
        """Return the weights a job continues from. Raises BadInput if they would be scaled otherwise: the adapter would jump."""
        assert job.init_adapter_id is not None
        peft = job.spec.peft
        adapter = load_adapter(self._store, job.tenant, job.base.base_id, job.init_adapter_id).adapter
        wanted = scale_of(peft.lora_alpha, peft.r, peft.use_rslora)
        for module in adapter.modules:
            if not math.isclose(adapter.scale(module), wanted, rel_tol=1e-6):
                raise BadInput(
                    f"the initial adapter scales its update by {adapter.scale(module):g}, and peft asks for {wanted:g}; "
                    "give peft.r, lora_alpha and use_rslora what that adapter has."
                )
        return adapter.tensors

    def _tell_again(self, seat: _Seat) -> None:
        """Repeat the evaluation that the checkpoint ends with: its answer may have been lost with the attempt before."""
        standing = seat.training.standing
        if standing.last_evaluated == standing.step and standing.last_metrics is not None and not seat.training.is_done:
            self._events.append(Evaluated(seat.job.job_id, standing.step, dict(standing.last_metrics)))
            seat.waits = True

    def close(self) -> None:
        """Let go of what is still seated, as a process that ends does: its claim is renewed no longer."""
        if self._seat is not None:
            self._seat.attempt.close()
            self._seat = None

    def step(self) -> bool:
        seat = self._seat
        if seat is not None and self._is_asked_to_cancel(seat):
            self._guarded(seat.attempt, lambda: self._evict(seat, "cancelled"))
            return True
        if seat is None or seat.waits:
            return False
        self._guarded(seat.attempt, lambda: self._advance(seat))
        return True

    def _is_asked_to_cancel(self, seat: _Seat) -> bool:
        """Look into the store now and then for a request that a person left there."""
        now = time.monotonic()
        if now - self._looked < CANCEL_LOOK_SECONDS:
            return False
        self._looked = now
        job = seat.job
        return is_asked_to_cancel(self._store, job.tenant, job.base.base_id, job.job_id, seat.attempt.lease.epoch)

    def _advance(self, seat: _Seat) -> None:
        """One optimiser step and what is due after it: evaluation, checkpoint, the end."""
        training = seat.training
        if not training.is_done:
            result = training.train_step()
            crashpoint("step-done", f"{seat.job.job_id} {result.step}")
            seat.attempt.note(_points_of(result))
            self._tell_progress(seat, result)
            if training.has_diverged:
                self._end(seat, "failed", "non_finite: loss or gradient was not finite in 5 steps in a row; lower learning_rate.")
                return
        evaluated = training.evaluation_is_due
        if evaluated:
            self._evaluate(seat)
        if training.is_done:
            self._finish(seat)
            return
        if evaluated or training.checkpoint_is_due:
            self._events.append(seat.attempt.save(Checkpoint(*training.state()), training.step))
        seat.waits = evaluated

    def _evaluate(self, seat: _Seat) -> None:
        metrics = seat.training.evaluate()
        seat.attempt.note(_points(metrics, seat.training.step))
        self._events.append(Evaluated(seat.job.job_id, seat.training.step, metrics, final=seat.training.is_done))

    def _finish(self, seat: _Seat) -> None:
        """Store the kept weights as an adapter, its manifest after it, and commit the job."""
        training, job = seat.training, seat.job
        tensors, metrics = training.kept_tensors(), training.kept_metrics()
        training.bank.load(tensors)
        if not has_effect(training.base, training.bank.factors, training.train[0]):
            self._end(seat, "failed", "no_effect: the trained adapter does not change the base's logits; raise learning_rate.")
            return
        metrics |= self._answer_metrics(seat)
        seat.attempt.note(_points({f"final/{name}": value for name, value in metrics.items()}, training.step))
        adapter = build_adapter(job.spec.peft, training.base.model, tensors, job.spec.base_model.name_or_path)
        adapter_id = store_adapter(self._store, job.tenant, job.base.base_id, adapter, manifest_body(job, metrics))
        standing = training.standing
        best_step = standing.best_step if training.keeps_best else standing.step
        self._events.append(seat.attempt.succeed(adapter_id, metrics, standing.step, best_step, standing.num_tokens))
        self._seat = None

    def _answer_metrics(self, seat: _Seat) -> dict[str, float]:
        """Exact match and format validity of the kept weights on the first validation rows, where the job asks for them."""
        evaluation = seat.job.spec.evaluation
        if not evaluation.generate or not seat.validation:
            return {}
        base = seat.training.base
        base.switch(seat.training.bank.factors)
        rows = seat.validation[: evaluation.generate]
        answers = answer_rows(base, seat.renderer, rows, evaluation.max_new_tokens)
        base.switch({})
        return answer_metrics(answers, evaluation.format_pattern)

    def decide(self, job_id: str, go: bool) -> None:
        seat = self._seat
        if seat is None or seat.job.job_id != job_id:
            return
        seat.waits = False
        if not go:
            self._guarded(seat.attempt, lambda: self._end(seat, "stopped", ""))

    def evict(self, job_id: str, status: str) -> None:
        seat = self._seat
        if seat is None or seat.job.job_id != job_id:
            return
        self._guarded(seat.attempt, lambda: self._evict(seat, status))

    def _evict(self, seat: _Seat, status: str) -> None:
        if status == "preempted" and seat.training.step > 0:
            self._events.append(seat.attempt.save(Checkpoint(*seat.training.state()), seat.training.step))
        self._end(seat, "preempted" if status == "preempted" else "cancelled", "")

    def _end(self, seat: _Seat, status: JobStatus, reason: str) -> None:
        steps, tokens = seat.training.step, seat.training.standing.num_tokens
        self._events.append(seat.attempt.end(status, reason, num_steps=steps, num_tokens=tokens))
        self._seat = None

    def _tell_progress(self, seat: _Seat, result: StepResult) -> None:
        now = time.monotonic()
        seat.tokens_since_report += result.num_tokens
        if now - seat.reported < PROGRESS_SECONDS and not seat.training.is_done:
            return
        rate = seat.tokens_since_report / (now - seat.reported) if seat.reported else result.num_tokens / result.seconds
        seat.reported, seat.tokens_since_report = now, 0
        tokens = seat.training.standing.num_tokens
        self._events.append(Progress(seat.job.job_id, result.step, seat.training.num_steps, result.loss, rate, tokens))

    def _guarded(self, attempt: Attempt, work: Callable[[], None]) -> None:
        """Do a piece of one job's work; whatever goes wrong ends that job with its reason and nothing else.

        Store and claim failures end it here without a word in the state: the next epoch goes on from the last checkpoint.
        """
        try:
            work()
        except ClaimLost as lost:
            self._drop(attempt, f"claim_lost: {lost}")
        except BadInput as error:
            self._fail(attempt, f"bad_input: {error}")
        except torch.OutOfMemoryError:
            self._fail(attempt, "out_of_memory: the job does not fit; lower per_device_train_batch_size, max_length or r.")
        except ServiceUnavailable as error:
            self._drop(attempt, f"store: {error}")
        except Exception as error:  # a defect of ours or of a library must not take the host's other jobs with it
            log.exception("job %s failed", attempt.job.job_id)
            self._fail(attempt, f"error: {type(error).__name__}: {error}")

    def _fail(self, attempt: Attempt, reason: str) -> None:
        try:
            self._events.append(attempt.end("failed", reason))
        except LorafleetError as error:
            self._drop(attempt, f"{reason} (and it could not be recorded: {error})")
        self._seat = None

    def _drop(self, attempt: Attempt, reason: str) -> None:
        attempt.close()
        self._events.append(Finished(attempt.job.job_id, "failed", reason))
        self._seat = None


def _word_of(error: LorafleetError) -> str:
    """Why a job was not begun, as the first word of its reason (see `fleet.after_failure`)."""
    match error:
        case ClaimHeld():
            return "held"
        case ClaimLost():
            return "claim_lost"
        case ServiceUnavailable():
            return "store"
        case _:
            return "error"


def _points(metrics: Mapping[str, float], step: int) -> list[Point]:
    now = int(time.time() * 1000)
    return [Point(name, value, step, now) for name, value in metrics.items()]


def _points_of(result: StepResult) -> list[Point]:
    return _points(
        {
            "train/loss": result.loss,
            "train/gradient_norm": result.gradient_norm,
            "train/learning_rate": result.learning_rate,
            "train/skipped": float(result.skipped),
        },
        result.step,
    )
