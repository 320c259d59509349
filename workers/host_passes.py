"""The passes of a host's pack: who takes part, and what happens when one fails.

Memory ran out: the pass is halved, down to one job, and the budget with it; then that job's micro-batch is halved, down to one
row; then the job has failed. Anything else that a shared pass raises: its jobs go on one at a time, and the one that raises
again alone has failed. A pass that raised leaves every step in it as not begun, so whoever is innocent loses nothing but time.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from infra.errors import WorkFailed
from workers.engine.pack import Pack
from workers.engine.training import StepResult, Training
from workers.host_seat import Seat
from workers.memory import Memory, give_back_cache, is_out_of_memory
from workers.packing import Share, TokenBudget, choose
from workers.report import PackState

log = logging.getLogger(__name__)
MEASURE_PASSES = 32
"""Passes between two looks at what the device has free; joining and leaving looks anew."""
TELL_SECONDS = 2.0
Result = TypeVar("Result")


class HostBroken(WorkFailed):
    """Every job of a pass raised alone too: it is the host, not the jobs."""


class PassTooLarge(MemoryError):
    """The memory model refuses a pass before the device does."""


@dataclass
class Outcome(Generic[Result]):
    """What a pass gave each job, and why some have none."""

    done: dict[Seat, Result] = field(default_factory=dict)
    failed: dict[Seat, Exception] = field(default_factory=dict)

    def merged(self, other: "Outcome[Result]") -> "Outcome[Result]":
        return Outcome({**self.done, **other.done}, {**self.failed, **other.failed})


def in_parts(
    seats: Sequence[Seat],
    work: Callable[[Sequence[Seat]], Mapping[Seat, Result]],
    is_relieved: Callable[[Sequence[Seat]], bool],
) -> Outcome[Result]:
    """Do `work` for all seats at once, or in smaller parts where that fails.

    `is_relieved` is told of every part for which memory ran out; its answer says whether to try a part of one again.
    Raises HostBroken if several were tried and every one failed alone without memory being the reason.
    """
    try:
        return Outcome(dict(work(seats)))
    except Exception as error:
        lacked_memory = is_out_of_memory(error)
        if not lacked_memory:
            log.exception("a pass of %d jobs raised", len(seats))
        failure = error.with_traceback(None)  # its frames hold the activations
    if lacked_memory:
        return _halved(seats, work, is_relieved, failure)
    if len(seats) == 1:
        return Outcome(failed={seats[0]: failure})
    return _one_by_one(seats, work, is_relieved)


def _halved(
    seats: Sequence[Seat],
    work: Callable[[Sequence[Seat]], Mapping[Seat, Result]],
    is_relieved: Callable[[Sequence[Seat]], bool],
    failure: Exception,
) -> Outcome[Result]:
    again = is_relieved(seats)
    if len(seats) > 1:
        middle = (len(seats) + 1) // 2
        return in_parts(seats[:middle], work, is_relieved).merged(in_parts(seats[middle:], work, is_relieved))
    return in_parts(seats, work, is_relieved) if again else Outcome(failed={seats[0]: failure})


def _one_by_one(
    seats: Sequence[Seat],
    work: Callable[[Sequence[Seat]], Mapping[Seat, Result]],
    is_relieved: Callable[[Sequence[Seat]], bool],
) -> Outcome[Result]:
    outcome: Outcome[Result] = Outcome()
    for seat in seats:
        outcome = outcome.merged(in_parts([seat], work, is_relieved))
    if len(outcome.failed) == len(seats) and not any(map(is_out_of_memory, outcome.failed.values())):
        raise HostBroken(f"every job of a pass failed alone as well, the last with {next(reversed(outcome.failed.values()))!r}.")
    return outcome


class Passes:
    """Runs the pack of a host. Used by one thread."""

    def __init__(self, name: str, pack: Pack, memory: Memory, first_tokens: int, max_tokens: int | None = None) -> None:
        """`first_tokens` is where the search for the budget begins, `max_tokens` what it never exceeds."""
        self._name, self._pack, self._memory, self._max_tokens = name, pack, memory, max_tokens
        self._budget = TokenBudget(first_tokens)
        self._shares: dict[str, Share] = {}
        self._limit: int | None = None
        self._measured_at = -MEASURE_PASSES
        self._num_passes = self._pass_tokens = self._tokens_since_told = 0
        self._busy_seconds = 0.0
        self._told = time.monotonic()

    @property
    def num_passes(self) -> int:
        """Passes since the base was loaded."""
        return self._num_passes

    def change(self, seats: Sequence[Seat]) -> None:
        """Take note that jobs joined or left."""
        present = {seat.job.job_id for seat in seats}
        self._shares = {job_id: share for job_id, share in self._shares.items() if job_id in present}
        self._measured_at = -MEASURE_PASSES

    def advance(self, seats: Sequence[Seat]) -> Outcome[StepResult]:
        """Do the next micro-batch of those whose turn it is; tells of those whose step was completed by it, and of failures."""
        limit = self._token_limit(seats)
        choice = choose([seat.candidate for seat in seats], self._shares, self._budget.in_force(limit))
        self._shares = dict(choice.shares)
        by_id = {seat.job.job_id: seat for seat in seats}
        chosen = [by_id[job_id] for job_id in choice.job_ids]
        tokens, started = sum(seat.training.next_tokens for seat in chosen), time.perf_counter()
        ceiling = self._budget.ceiling
        outcome = in_parts(chosen, self._advance, self._relieve)
        seconds = time.perf_counter() - started
        self._busy_seconds += seconds
        if self._budget.ceiling == ceiling:  # otherwise the pass was no pass of so many tokens
            self._budget = self._budget.after_pass(tokens, seconds, left_out=choice.left_out, limit=limit)
        self._num_passes += 1
        self._pass_tokens = tokens
        self._tokens_since_told += tokens
        return outcome

    def evaluate(self, seats: Sequence[Seat]) -> Outcome[dict[str, float]]:
        """Measure all these jobs on their validation rows, in the same passes."""
        started = time.perf_counter()
        outcome = in_parts(seats, self._evaluate, lambda part: False)
        self._busy_seconds += time.perf_counter() - started
        return outcome

    def state(self, seats: Sequence[Seat], *, at_once: bool = False) -> PackState | None:
        """Return what there is to tell of the pack, None if that was told a moment ago."""
        now = time.monotonic()
        if not at_once and now - self._told < TELL_SECONDS:
            return None
        rate = self._tokens_since_told / max(now - self._told, 1e-9)
        self._told, self._tokens_since_told = now, 0
        job_ids = tuple(seat.job.job_id for seat in seats)
        budget = self._budget.in_force(self._limit)
        passes = self._num_passes
        return PackState(self._name, job_ids, budget, self._pass_tokens, rate, passes, time.time(), self._busy_seconds)

    def _advance(self, seats: Sequence[Seat]) -> dict[Seat, StepResult]:
        if len(seats) == 1:
            self._refuse_too_large(seats[0])
        return _by_seat(seats, self._pack.advance([seat.training for seat in seats]))

    def _evaluate(self, seats: Sequence[Seat]) -> dict[Seat, dict[str, float]]:
        return _by_seat(seats, self._pack.evaluate([seat.training for seat in seats]))

    def _refuse_too_large(self, seat: Seat) -> None:
        training = seat.training
        checkpointing = training.training.gradient_checkpointing
        if self._memory.refuses(self._pack.bytes_in_use(), training.next_tokens, checkpointing=checkpointing):
            raise PassTooLarge(f"a micro-batch of {training.next_tokens} tokens does not fit")

    def _relieve(self, seats: Sequence[Seat]) -> bool:
        """Memory ran out for these: lower the budget; of a job that was alone, halve the micro-batch if it has several rows."""
        tokens = sum(seat.training.next_tokens for seat in seats)
        give_back_cache(self._memory.device)
        self._budget = self._budget.after_out_of_memory(tokens)
        log.warning("memory ran out for %d jobs with %d tokens; a pass now has %d", len(seats), tokens, self._budget.in_force())
        if len(seats) > 1:
            return False
        (seat,) = seats
        rows = seat.training.rows_per_pass
        if rows > 1:
            log.warning("job %s goes on with %d rows of a micro-batch instead of %d", seat.job.job_id, rows // 2, rows)
            seat.training.split_rows(rows // 2)
        return rows > 1

    def _token_limit(self, seats: Sequence[Seat]) -> int | None:
        """Return what the memory model and the host's own bound allow."""
        if self._num_passes - self._measured_at >= MEASURE_PASSES:
            self._measured_at = self._num_passes
            checkpointing = all(seat.training.training.gradient_checkpointing for seat in seats)
            fits = self._memory.tokens_that_fit(self._pack.bytes_in_use(), checkpointing=checkpointing)
            self._limit = fits if self._max_tokens is None else min(fits, self._max_tokens)
        return self._limit


def _by_seat(seats: Sequence[Seat], results: Mapping[Training, Result]) -> dict[Seat, Result]:
    return {seat: results[seat.training] for seat in seats if seat.training in results}
