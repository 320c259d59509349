"""A job's seat on a host: the attempt that owns it, its place in the pack, and what it tells.

Everything of one job stands here, so that what goes wrong with it stays with it; the host decides who is seated and when.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from infra.crashpoints import crashpoint
from infra.storage import Storage
from infra.tracking import Point
from workers.adapter import Adapter, build_adapter
from workers.adapter_store import manifest_body, store_adapter
from workers.attempt import Attempt
from workers.checkpoint import Checkpoint
from workers.data.render import Renderer
from workers.data.rows import Row
from workers.engine.resident import ResidentBase, has_effect
from workers.engine.training import MAX_SKIPPED_STEPS, StepResult, Training
from workers.evaluate import answer_metrics, answer_rows
from workers.job import Job
from workers.packing import Candidate
from workers.report import Checkpointed, Evaluated, Finished, HostEvent, JobStatus, Progress

log = logging.getLogger(__name__)
PROGRESS_SECONDS = 0.25


@dataclass(eq=False)
class Seat:
    """A job in training. Methods that end it return `Finished`, after which it is to be cleared."""

    job: Job
    attempt: Attempt
    training: Training
    renderer: Renderer
    validation: Sequence[Row]
    tell: Callable[[HostEvent], None]
    alone: bool = False
    """Whether it shares no pass with others."""
    waits: bool = False
    """Whether an evaluation of it awaits its answer."""
    storing: "Future[Checkpointed | Finished] | None" = None
    """What is being written for it by another thread; nothing else touches its attempt meanwhile."""
    _reported: float = field(default=0.0)
    _tokens_since_report: int = 0

    @property
    def may_run(self) -> bool:
        """Whether a micro-batch of it may run now."""
        return not self.waits and self.storing is None and not self.training.is_done

    @property
    def has_ended(self) -> bool:
        """Whether it has done all its steps, and its end is not being stored yet."""
        return self.training.is_done and self.storing is None

    @property
    def candidate(self) -> Candidate:
        """Return what the choice of the next pass needs to know."""
        return Candidate(self.job.job_id, self.training.next_tokens, self.job.spec.resources.priority, self.alone)

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one, and repeat the evaluation it ends with: its answer may be lost."""
        checkpoint = self.attempt.last_checkpoint()
        if checkpoint is None:
            return
        self.training.restore(checkpoint.vectors, checkpoint.standing)
        crashpoint("job-resumed", f"{self.job.job_id} {self.training.step}")
        standing = self.training.standing
        if standing.last_evaluated == standing.step and standing.last_metrics is not None and not self.training.is_done:
            self.tell(Evaluated(self.job.job_id, standing.step, dict(standing.last_metrics)))
            self.waits = True

    def take_step(self, result: StepResult) -> None:
        """Note an optimiser step of it."""
        crashpoint("step-done", f"{self.job.job_id} {result.step}")
        self.attempt.note(_points_of(result))
        self._tell_progress(result)

    def take_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Note what its present weights measured, and wait for the answer unless it has come to its end."""
        self.attempt.note(_points(metrics, self.training.step))
        self.tell(Evaluated(self.job.job_id, self.training.step, metrics, final=self.training.is_done))

    def saving(self) -> Callable[[], Checkpointed]:
        """Return what makes everything up to this step safe; it may run in another thread."""
        checkpoint, step = Checkpoint(*self.training.state()), self.training.step
        return lambda: self.attempt.save(checkpoint, step)

    def leave(self, status: str) -> Finished:
        """End it here before its time: "preempted" (after a checkpoint) or "cancelled"."""
        if status == "preempted" and self.training.step > 0:
            self.tell(self.saving()())
        return self.end(status_of(status))

    def end(self, status: JobStatus, reason: str = "") -> Finished:
        """Commit another end than success."""
        return self.attempt.end(status, reason, num_steps=self.training.step, num_tokens=self.training.standing.num_tokens)

    def diverge(self) -> Finished:
        """Commit that its losses are no numbers."""
        steps = f"{MAX_SKIPPED_STEPS} steps in a row"
        return self.end("failed", f"non_finite: loss or gradient was not finite in {steps}; lower learning_rate.")

    def finishing(self, store: Storage) -> Callable[[], Finished]:
        """Return what stores the kept weights as an adapter, its manifest after it, and commits the job.

        It may run in another thread: what the base is needed for has been done before.
        """
        training, job, base = self.training, self.job, self.training.base
        if not has_effect(base, training.kept_factors(), training.train[0], training.kept_head() or None):
            reason = "no_effect: the trained adapter does not change the base's logits; raise learning_rate."
            return lambda: self.end("failed", reason)
        metrics = training.kept_metrics() | self._answer_metrics(base)
        self.attempt.note(_points({f"final/{name}": value for name, value in metrics.items()}, training.step))
        name_or_path = job.spec.base_model.name_or_path
        adapter = build_adapter(job.spec.peft, base.model, training.kept_tensors(), name_or_path, job.labels)
        return lambda: self._commit(store, adapter, metrics)

    def _commit(self, store: Storage, adapter: Adapter, metrics: Mapping[str, float]) -> Finished:
        job, standing = self.job, self.training.standing
        manifest = manifest_body(job, metrics) | self._remarks()
        adapter_id = store_adapter(store, job.tenant, job.base.base_id, adapter, manifest)
        best_step = standing.best_step if self.training.keeps_best else standing.step
        steps, tokens = standing.step, standing.num_tokens
        return self.attempt.succeed(adapter_id, metrics, steps, best_step, tokens, remarks=self._remarks())

    def _remarks(self) -> dict[str, int]:
        """Return what a reader of record and manifest must know of how it was trained: smaller micro-batches than asked for."""
        rows = self.training.standing.split_rows
        return {"split_rows": rows} if rows else {}

    def _answer_metrics(self, base: ResidentBase) -> dict[str, float]:
        """Exact match and format validity of the kept weights on the first validation rows, where the job asks for them."""
        evaluation = self.job.spec.evaluation
        if not evaluation.generate or not self.validation:
            return {}
        base.switch(self.training.kept_factors())
        try:
            answers = answer_rows(base, self.renderer, self.validation[: evaluation.generate], evaluation.max_new_tokens)
        finally:
            base.switch({})
        return answer_metrics(answers, evaluation.format_pattern)

    def _tell_progress(self, result: StepResult) -> None:
        now = time.monotonic()
        self._tokens_since_report += result.num_tokens
        if now - self._reported < PROGRESS_SECONDS and not self.training.is_done:
            return
        rate = self._tokens_since_report / (now - self._reported) if self._reported else result.num_tokens / result.seconds
        self._reported, self._tokens_since_report = now, 0
        tokens = self.training.standing.num_tokens
        self.tell(Progress(self.job.job_id, result.step, self.training.num_steps, result.loss, rate, tokens))


def status_of(eviction: str) -> JobStatus:
    """Return the status of a job that is ended by this order."""
    return "preempted" if eviction == "preempted" else "cancelled"


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
