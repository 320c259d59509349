"""A host: one process, one resident base, and the jobs it trains in one pack, pass by pass.

`admit / step / decide / evict / report` is the whole interface: whoever holds a host (the task in `host_task`, a test) decides
when. Every job is an attempt with its own claim and seat (`host_seat`); which of them share a pass, and what a failed pass
means, is `host_passes`' subject. Claims are taken, and checkpoints and adapters stored, in threads: the pack goes on meanwhile.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from infra.claims import Owner
from infra.errors import ClaimLost, LorafleetError, ServiceUnavailable
from infra.storage import Storage
from workers.attempt import Attempt
from workers.engine.bank import rank_bucket
from workers.engine.pack import Pack
from workers.engine.resident import ResidentBase
from workers.engine.training import shape_of_adapter
from workers.host_inputs import HostInputs, Inputs
from workers.host_line import Arrival, Line
from workers.host_passes import Passes
from workers.host_reasons import reason_not_begun, reason_of
from workers.host_seat import Seat, status_of
from workers.job import Job
from workers.job_state import is_asked_to_cancel
from workers.memory import Memory, bank_bytes, is_out_of_memory, shape_of
from workers.packing import CPU_TOKENS, CUDA_TOKENS
from workers.report import Checkpointed, Finished, HostEvent
from workers.residency import Residency, residency_of

log = logging.getLogger(__name__)
CANCEL_LOOK_SECONDS = 2.0
"""Time between two looks into the store for requests to cancel, at least."""
PATIENCE_SECONDS = 0.25
"""How long a `step` with nothing to train waits for a claim, or for something to be stored."""
MAX_STORING = 8
"""Jobs whose checkpoints or adapters are written at the same time."""


class Host(Protocol):
    """Trains the jobs it has admitted."""

    @property
    def num_free(self) -> int:
        """How many more jobs may be admitted now."""
        ...

    def admit(self, job: Job) -> None:
        """Take a job in; what is wrong with it is reported as its end, not raised.

        One whose base is another than the resident one, or that finds no memory beside the others, waits until they have left.
        """
        ...

    def step(self) -> bool:
        """Do the next pass and what is due after it; False if there is nothing to do (no job, or all wait for an answer).

        What is stored after a step is told by a later one; until then the job rests.

        Raises HostBroken if no job can be trained here any more.
        """
        ...

    def decide(self, job_id: str, go: bool) -> None:
        """Answer an evaluation. An answer for a job that is not here is dropped."""
        ...

    def evict(self, job_id: str, status: str) -> None:
        """End a job here: "preempted" (after a checkpoint) or "cancelled"."""
        ...

    def report(self) -> list[HostEvent]:
        """Return what happened since the last call."""
        ...

    def close(self) -> None:
        """Let go of every job, whatever it was doing; none is told an end."""
        ...


@dataclass(frozen=True)
class _Loaded:
    """The resident base, and the pack that trains on it."""

    residency: Residency
    base: ResidentBase
    pack: Pack
    memory: Memory
    passes: Passes


class EngineHost:
    """The host over the packed engine. Jobs that are seated share one base; `slots` of them at most."""

    def __init__(
        self,
        store: Storage,
        cache_dir: Path,
        *,
        lease_seconds: float,
        device: str = "cpu",
        slots: int = 16,
        name: str = "host",
        memory_limit_bytes: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """`memory_limit_bytes` bounds base, banks and passes together (None: what the device has), `max_tokens` each pass."""
        self._store, self._slots, self._name = store, slots, name
        self._device, self._memory_limit_bytes, self._max_tokens = device, memory_limit_bytes, max_tokens
        self._inputs = HostInputs(store, cache_dir, device)
        self._owner = Owner.here()
        self._line = Line(lambda job: Attempt.begin(store, job, self._owner, lease_seconds), slots)
        self._storing = ThreadPoolExecutor(min(slots, MAX_STORING), "store")
        self._loaded: _Loaded | None = None
        self._seats: list[Seat] = []
        self._tried_alone: set[str] = set()
        self._events: list[HostEvent] = []
        self._looked = time.monotonic()

    @property
    def num_free(self) -> int:
        return max(0, self._slots - len(self._seats) - len(self._line))

    def report(self) -> list[HostEvent]:
        events, self._events = self._events, []
        return events

    def admit(self, job: Job) -> None:
        self._line.add(job)

    def step(self) -> bool:
        self._wait_where_nothing_runs()
        changed = [self._look_for_cancels(), self._take_stored(), self._seat_arrivals()]
        ready = [seat for seat in self._seats if seat.may_run]
        stepped = [seat for seat in self._seats if seat.has_ended]  # a checkpoint may be that of the last step
        if ready:
            stepped += self._advance(ready)
        self._settle(stepped)
        self._tell_state()
        return any(changed) or bool(ready or stepped or self._stores() or self._line.under_way())

    def decide(self, job_id: str, go: bool) -> None:
        seat = self._seat_of(job_id)
        if seat is None:
            return
        seat.waits = False
        if not go:
            self._end(seat, lambda: seat.end("stopped"))

    def evict(self, job_id: str, status: str) -> None:
        self._line.evict(job_id, status)
        self._seat_arrivals()
        seat = self._seat_of(job_id)
        if seat is not None:
            self._end(seat, lambda: seat.leave(status))

    def close(self) -> None:
        """Let go of what is here, as a process that ends does: its claims are renewed no longer."""
        for seat in self._seats:
            seat.attempt.close()
        self._line.close()
        self._storing.shutdown(wait=False, cancel_futures=True)
        self._seats, self._loaded = [], None

    def _seat_of(self, job_id: str) -> Seat | None:
        return next((seat for seat in self._seats if seat.job.job_id == job_id), None)

    def _stores(self) -> list[Future[Checkpointed | Finished]]:
        return [seat.storing for seat in self._seats if seat.storing is not None]

    def _wait_where_nothing_runs(self) -> None:
        """Wait a moment for other threads: for all claims, since jobs that begin together stay together, or for one store."""
        if any(seat.may_run or seat.has_ended for seat in self._seats):
            return
        if claims := self._line.under_way():
            wait(claims, PATIENCE_SECONDS)
        elif stores := self._stores():
            wait(stores, PATIENCE_SECONDS, FIRST_COMPLETED)

    # Arriving.

    def _seat_arrivals(self) -> bool:
        """Seat those whose claim is there and who find room; tell whether anybody left the line."""
        before = len(self._line)
        for arrival in self._line.claimed():
            if self._receive(arrival):
                self._line.remove(arrival)
        return len(self._line) < before

    def _receive(self, arrival: Arrival) -> bool:
        """Seat a job, or tell why it will not be; False if it has to wait."""
        try:
            begun = arrival.claim.result()
        except Exception as error:  # a store that does not answer, a claim that is held, a state that cannot be read
            begun = Finished(arrival.job.job_id, "failed", reason_not_begun(error))
        if isinstance(begun, Finished):
            self._note_end(begun)
            return True
        if arrival.evicted is not None:
            status = status_of(arrival.evicted)
            return self._guarded(begun, lambda: self._note_end(begun.end(status)))
        if self._seats and (self._loaded is None or self._loaded.residency != residency_of(arrival.job)):
            return False
        return self._guarded(begun, lambda: self._take_seat(arrival.job, begun))

    def _take_seat(self, job: Job, attempt: Attempt) -> bool:
        """Seat a job that shares the resident base; False if it finds no memory beside those who are seated."""
        loaded = self._load(job)
        inputs = self._inputs.read(job, loaded.base)
        if not self._fits(job, inputs, loaded):
            if self._seats:
                return False
            raise torch.OutOfMemoryError(f"the job {job.job_id} does not fit into an empty host")
        try:
            seat = self._join(job, attempt, inputs, loaded)
        except Exception as error:
            if self._seats and is_out_of_memory(error):
                return False
            raise
        self._seats.append(seat)
        loaded.passes.change(self._seats)
        seat.resume()
        return True

    def _load(self, job: Job) -> _Loaded:
        """Return the job's base with its pack, loading it unless it is here already."""
        residency = residency_of(job)
        if self._loaded is None or self._loaded.residency != residency:
            self._loaded = None
            torch.set_num_threads(residency.num_threads)
            base = self._inputs.load_base(job)
            pack, memory = Pack(base), Memory(shape_of(base.model), base.device, self._memory_limit_bytes)
            first_tokens = CPU_TOKENS if base.device.type == "cpu" else CUDA_TOKENS
            self._loaded = _Loaded(
                residency, base, pack, memory, Passes(self._name, pack, memory, first_tokens, self._max_tokens)
            )
        return self._loaded

    def _fits(self, job: Job, inputs: Inputs, loaded: _Loaded) -> bool:
        """Tell whether banks for one more and at least its longest row have room."""
        ranks, _ = shape_of_adapter(loaded.base, job.spec.peft)
        layers = [(rank_bucket(r), loaded.base.layers[name]) for name, r in ranks.items()]
        needed = bank_bytes(sum(r * (layer.in_features + layer.out_features) for r, layer in layers))
        checkpointing = job.spec.training.gradient_checkpointing
        fits = loaded.memory.tokens_that_fit(loaded.pack.bytes_in_use(), needed, checkpointing=checkpointing)
        return fits >= inputs.longest

    def _join(self, job: Job, attempt: Attempt, inputs: Inputs, loaded: _Loaded) -> Seat:
        training = loaded.pack.join(
            job.spec.peft,
            job.spec.training,
            inputs.train,
            inputs.validation,
            init=self._inputs.initial_tensors(job, loaded.base),
            validation_bytes=inputs.renderer.target_bytes(inputs.validation),
            num_labels=len(job.labels),
        )
        alone = job.job_id in self._tried_alone
        return Seat(job, attempt, training, inputs.renderer, inputs.validation_rows, self._tell, alone)

    # Training.

    def _advance(self, ready: Sequence[Seat]) -> list[Seat]:
        """Run one pass; return those whose optimiser step it completed and who are seated still."""
        assert self._loaded is not None
        outcome = self._loaded.passes.advance(ready)
        for seat, result in outcome.done.items():
            self._guarded(seat.attempt, lambda seat=seat, result=result: seat.take_step(result))  # type: ignore[misc]
            if seat.training.has_diverged:
                self._end(seat, seat.diverge)
        self._take_failures(outcome.failed)
        return [seat for seat in outcome.done if seat in self._seats]

    def _settle(self, stepped: Sequence[Seat]) -> None:
        """Do what is due after a step: evaluations, all at once; then checkpoints and ends."""
        due = [seat for seat in stepped if seat.training.evaluation_is_due]
        evaluated: set[Seat] = set()
        if due:
            assert self._loaded is not None
            outcome = self._loaded.passes.evaluate(due)
            for seat, metrics in outcome.done.items():
                seat.take_evaluation(metrics)
            self._take_failures(outcome.failed)
            evaluated = set(outcome.done)
        for seat in stepped:
            if seat in self._seats:
                self._guarded(seat.attempt, lambda seat=seat: self._conclude(seat, seat in evaluated))  # type: ignore[misc]

    def _conclude(self, seat: Seat, evaluated: bool) -> None:
        """Have the job's end or a checkpoint stored, if one is due; the job rests while another thread does it."""
        if seat.training.is_done:
            seat.storing = self._storing.submit(seat.finishing(self._store))
            return
        if evaluated or seat.training.checkpoint_is_due:
            seat.storing = self._storing.submit(seat.saving())
        seat.waits = evaluated

    def _take_stored(self) -> bool:
        """Tell of checkpoints and ends that are stored by now; tell whether there was one."""
        stored = [seat for seat in self._seats if seat.storing is not None and seat.storing.done()]
        for seat in stored:
            self._take_result(seat)
        return bool(stored)

    def _take_result(self, seat: Seat) -> None:
        """Tell of what is being stored for a job, waiting for it if need be."""
        storing, seat.storing = seat.storing, None
        if storing is not None:
            self._guarded(seat.attempt, lambda: self._note(seat, storing.result()))

    def _note(self, seat: Seat, event: Checkpointed | Finished) -> None:
        if isinstance(event, Finished):
            self._note_end(event)
            self._clear(seat.attempt)
        else:
            self._tell(event)

    def _take_failures(self, failed: dict[Seat, Exception]) -> None:
        """End the jobs that a pass failed for; one that is poisoned is tried once more first, alone, from its last checkpoint."""
        for seat, error in failed.items():
            job_id = seat.job.job_id
            if is_out_of_memory(error) or isinstance(error, LorafleetError) or job_id in self._tried_alone:
                self._fail(seat.attempt, error)
                continue
            log.warning("job %s raised in its pack (%s) and is tried once more, alone", job_id, error)
            self._tried_alone.add(job_id)
            self._guarded(seat.attempt, lambda seat=seat: self._seat_anew(seat))  # type: ignore[misc]

    def _seat_anew(self, seat: Seat) -> None:
        seat.attempt.end("preempted", "a pass with it raised; it is tried once more, alone")
        self._clear(seat.attempt)
        self.admit(seat.job)

    def _look_for_cancels(self) -> bool:
        """Look into the store now and then for requests that people left there; tell whether there was one."""
        now = time.monotonic()
        if now - self._looked < CANCEL_LOOK_SECONDS:
            return False
        self._looked = now
        asked = [seat for seat in self._seats if self._is_asked_to_cancel(seat)]
        for seat in asked:
            self._end(seat, lambda seat=seat: seat.leave("cancelled"))  # type: ignore[misc]
        return bool(asked)

    def _is_asked_to_cancel(self, seat: Seat) -> bool:
        job = seat.job
        return is_asked_to_cancel(self._store, job.tenant, job.base.base_id, job.job_id, seat.attempt.lease.epoch)

    def _tell_state(self) -> None:
        if self._loaded is not None and (state := self._loaded.passes.state(self._seats)) is not None:
            self._events.append(state)

    def _tell(self, event: HostEvent) -> None:
        self._events.append(event)

    # Ending.

    def _end(self, seat: Seat, commit: Callable[[], Finished]) -> None:
        """Have a job end here, after what is being stored for it."""
        self._take_result(seat)
        if seat in self._seats:
            self._guarded(seat.attempt, lambda: self._note(seat, commit()))

    def _clear(self, attempt: Attempt) -> None:
        """Free the seat of an attempt that has ended, if it has one; nobody else notices."""
        for seat in [seat for seat in self._seats if seat.attempt is attempt]:
            self._seats.remove(seat)
            assert self._loaded is not None
            self._loaded.pack.leave(seat.training)
            self._loaded.passes.change(self._seats)

    def _guarded(self, attempt: Attempt, work: Callable[[], bool | None]) -> bool:
        """Do a piece of one job's work; whatever goes wrong ends that job with its reason and nothing else.

        Returns what the work does (None counts as True), and True for a job that was ended: it has nothing more to wait for.
        """
        try:
            return work() is not False
        except Exception as error:
            if not isinstance(error, LorafleetError) and not is_out_of_memory(error):
                log.exception("job %s failed", attempt.job.job_id)
            self._fail(attempt, error)
            return True

    def _fail(self, attempt: Attempt, error: Exception) -> None:
        """End a job for what went wrong.

        Store and claim failures end it here without a word in its state: the next epoch goes on from the last checkpoint.
        """
        reason = reason_of(error)
        ended = Finished(attempt.job.job_id, "failed", reason)
        if not isinstance(error, ClaimLost | ServiceUnavailable):
            try:
                ended = attempt.end("failed", reason)
            except LorafleetError as unrecorded:
                ended = Finished(attempt.job.job_id, "failed", f"{reason} (and it could not be recorded: {unrecorded})")
        attempt.close()
        self._note_end(ended)
        self._clear(attempt)

    def _note_end(self, ended: Finished) -> None:
        self._tried_alone.discard(ended.job_id)
        self._events.append(ended)
