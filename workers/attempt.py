"""One try at one job: owns the job's state for an epoch, checkpoints under it, and commits how it ended.

The job's `state.json` is a claim (infra.claims) whose body points at what counts: the last checkpoint, the chunks of metric
points, the adapter. Everything else an attempt writes is reachable only through it, so that a lost owner changes nothing.
"""

import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from infra.claims import Lease, Owner, claim, read_document
from infra.crashpoints import crashpoint
from infra.errors import BadInput, ObjectNotFound, WorkFailed
from infra.records import encode_record
from infra.storage import Storage
from infra.tracking import Point
from workers import layout
from workers.checkpoint import Checkpoint, delete_checkpoint, load_checkpoint, save_checkpoint
from workers.forgotten import forgotten_at
from workers.job import JOB_FORMAT, Job
from workers.job_state import FRESH, STATE_FORMAT
from workers.metrics_log import decode_number, encode_number, encode_points
from workers.report import Checkpointed, Finished, JobStatus

RECORD_FORMAT = "record/1"
DETERMINISTIC_FAILURES = ("non_finite", "bad_input", "no_effect")
"""Failures that would come again: the job's id covers all that alters its result."""


@dataclass
class Attempt:
    """An owned job. Methods raise ClaimLost once another owner took the next epoch."""

    store: Storage
    job: Job
    lease: Lease
    _renewal: ExitStack = field(default_factory=ExitStack)
    _points: list[Point] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)

    @staticmethod
    def begin(store: Storage, job: Job, owner: Owner, lease_seconds: float) -> "Attempt | Finished":
        """Claim the job, or return how it ended if it needs no other try. Raises ClaimHeld while another owner lives."""
        tenant, base_id = job.tenant, job.base.base_id
        ended = recorded_end(store, job)
        if ended is not None:
            return ended
        store.put(layout.job_spec(tenant, base_id, job.job_id), encode_record(JOB_FORMAT, job.to_json()))
        key = layout.job_state(tenant, base_id, job.job_id)
        lease = claim(store, key, STATE_FORMAT, FRESH, owner=owner, lease_seconds=lease_seconds)
        if (
            forgotten_at(store, tenant) is not None
        ):  # only now: who forgets a tenant looks for claims after its tombstone is there
            return _withdrawn(store, job, lease)
        if _is_final(lease.body):  # the owner that was waited for has finished it
            lease.release()
            return _finished(job.job_id, lease.body, reused=True)
        lease.update({"status": "running", "reason": "", "attempt": lease.epoch})
        crashpoint("job-claimed", job.job_id)
        attempt = Attempt(store, job, lease)
        attempt._renewal.enter_context(lease.keep_alive())
        return attempt

    def close(self) -> None:
        """Stop renewing the claim, whether it was released or is left to whoever comes next."""
        self._renewal.close()

    @property
    def prefix(self) -> str:
        """Where this attempt writes; nobody else does."""
        return layout.attempt(self.job.tenant, self.job.base.base_id, self.job.job_id, self.lease.epoch)

    def last_checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint the state points at, and let go of points measured after it: they will be measured again.

        A damaged one counts as none: the job then starts anew, to the same end.
        """
        pointer, chunks = self.lease.body["checkpoint"], self.lease.body["chunks"]
        checkpoint = self._load(pointer["prefix"]) if pointer is not None else None
        num_chunks = pointer["num_chunks"] if checkpoint is not None else 0
        if len(chunks) != num_chunks or (checkpoint is None and pointer is not None):
            self.lease.update({"checkpoint": pointer if checkpoint is not None else None, "chunks": chunks[:num_chunks]})
        return checkpoint

    def _load(self, prefix: str) -> Checkpoint | None:
        try:
            return load_checkpoint(self.store, prefix)
        except (ObjectNotFound, BadInput, WorkFailed):
            return None

    def note(self, points: Sequence[Point]) -> None:
        """Keep metric points for the next chunk."""
        self._points += points

    def save(self, checkpoint: Checkpoint, step: int) -> Checkpointed:
        """Make everything up to `step` safe, then let go of the checkpoint before."""
        before = self.lease.body["checkpoint"]
        prefix = f"{self.prefix}checkpoints/{step:08d}/"
        save_checkpoint(self.store, prefix, checkpoint)
        crashpoint("checkpoint-written", self.job.job_id)
        chunk, chunks = self._write_chunk()
        self.lease.update(
            {"checkpoint": {"prefix": prefix, "step": step, "num_chunks": len(chunks)}, "chunks": chunks, **self._effort()}
        )
        crashpoint("checkpoint-committed", self.job.job_id)
        if before is not None and before["prefix"] != prefix:
            delete_checkpoint(self.store, before["prefix"])
        return Checkpointed(self.job.job_id, step, self.lease.epoch, chunk)

    def succeed(
        self,
        adapter_id: str,
        metrics: Mapping[str, float],
        num_steps: int,
        best_step: int,
        num_tokens: int,
        remarks: Mapping[str, Any] | None = None,
    ) -> Finished:
        """Commit the adapter as the job's result. The adapter and its manifest must be stored already.

        `remarks` go into the record: what a reader must know of how it was trained.
        """
        before = self.lease.body["checkpoint"]
        _, chunks = self._write_chunk()
        body: dict[str, Any] = {
            "status": "succeeded",
            "adapter_id": adapter_id,
            "metrics": _encode(metrics),
            "num_steps": num_steps,
            "best_step": best_step,
            "num_tokens": num_tokens,
            **self._effort(),
        }
        record = f"{self.prefix}record.json"
        self.store.put(record, encode_record(RECORD_FORMAT, self._record() | dict(remarks or {}) | body | {"chunks": chunks}))
        crashpoint("record-written", self.job.job_id)
        self.lease.release({**body, "record": record, "chunks": chunks, "checkpoint": None})
        self.close()
        crashpoint("job-committed", self.job.job_id)
        if before is not None:
            delete_checkpoint(self.store, before["prefix"])
        return _finished(self.job.job_id, self.lease.body)

    def end(self, status: JobStatus, reason: str = "", *, num_steps: int = 0, num_tokens: int = 0) -> Finished:
        """Commit another end than success, after so many steps; the last checkpoint stays for a later try."""
        _, chunks = self._write_chunk() if status != "preempted" else ("", self.lease.body["chunks"])
        body = {"status": status, "reason": reason, "chunks": chunks, "num_steps": num_steps, "num_tokens": num_tokens}
        self.lease.release({**body, **self._effort()})
        self.close()
        crashpoint("job-ended", self.job.job_id)
        return _finished(self.job.job_id, self.lease.body)

    def _write_chunk(self) -> tuple[str, list[str]]:
        """Write the points noted since the last chunk; return its key ("" if there are none) and the list with it."""
        chunks: list[str] = list(self.lease.body["chunks"])
        if not self._points:
            return "", chunks
        key = f"{self.prefix}metrics-{len(chunks):06d}.jsonl"
        self.store.put(key, encode_points(self._points))
        self._points = []
        return key, [*chunks, key]

    def _effort(self) -> dict[str, float]:
        """Return training seconds of all attempts up to now; resets the clock."""
        now = time.monotonic()
        spent, self._started = now - self._started, now
        return {"seconds": self.lease.body["seconds"] + spent}

    def _record(self) -> dict[str, Any]:
        return {
            "job": self.job.to_json(),
            "attempt": self.lease.epoch,
            "node": platform.node(),
            "versions": {name: version(name) for name in ("lorafleet", "torch", "transformers", "peft")},
            "python": platform.python_version(),
            "ended": time.time(),
        }


def recorded_end(store: Storage, job: Job) -> Finished | None:
    """Return how the job ended if that is final: success, or a failure that would come again. None: it may be tried."""
    found = read_document(store, layout.job_state(job.tenant, job.base.base_id, job.job_id), STATE_FORMAT)
    if found is None:
        return None
    return _finished(job.job_id, found.body, reused=True) if _is_final(found.body) else None


def _withdrawn(store: Storage, job: Job, lease: Lease) -> Finished:
    """Leave nothing of a job whose tenant was forgotten meanwhile."""
    place = (job.tenant, job.base.base_id, job.job_id)
    lease.release()
    store.delete(layout.job_spec(*place))
    store.delete(layout.job_state(*place))
    return Finished(job.job_id, "failed", f"forgotten: the tenant '{job.tenant}' was forgotten")


def _is_final(body: Mapping[str, Any]) -> bool:
    word = body["reason"].partition(":")[0]
    return body["status"] == "succeeded" or (body["status"] == "failed" and word in DETERMINISTIC_FAILURES)


def _finished(job_id: str, body: Mapping[str, Any], *, reused: bool = False) -> Finished:
    return Finished(
        job_id=job_id,
        status=body["status"],
        reason=body["reason"],
        adapter_id=body["adapter_id"],
        metrics={name: decode_number(value) for name, value in body["metrics"].items()},
        num_steps=body["num_steps"],
        best_step=body["best_step"],
        seconds=body["seconds"],
        num_tokens=body["num_tokens"],
        reused=reused,
        chunks=tuple(body["chunks"]),
        attempt=body["attempt"],
    )


def _encode(metrics: Mapping[str, float]) -> dict[str, float | str]:
    return {name: encode_number(value) for name, value in metrics.items()}
