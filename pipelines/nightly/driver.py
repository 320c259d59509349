"""Driving a night: customers are prepared, trained in packs, measured together, and settled, all at the same time.

One thread drives; another prepares customers a little ahead of what hosts take, so that memory does not grow with the number of
customers. Whatever goes wrong with a customer ends its own row and nothing else. Every row is kept when it ends.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from infra.claims import Lease
from infra.errors import ClaimLost
from pipelines.nightly.forecast import Planned
from pipelines.nightly.judge import Judge, Judged
from pipelines.nightly.ledger import FleetLedger, Key
from pipelines.nightly.limits import Canaries, Hours
from pipelines.nightly.preparing import Preparer, Ready
from pipelines.nightly.records import Row
from pipelines.nightly.settling import Settler, challenger_of, held_rows
from pipelines.nightly.shown import Shown
from pipelines.nightly.survey import carried
from workers.fleet import HostFleet
from workers.report import Checkpointed, Evaluated, Finished, HostEvent

log = logging.getLogger(__name__)
WAIT_SECONDS = 0.05
AHEAD = 2
"""Customers that are prepared or waiting for a place, for each place on a host."""
MAX_JUDGING_SECONDS = 600.0
"""For which measurements are awaited once nothing else is under way."""


@dataclass(frozen=True)
class Progress:
    """How far a night is, for a person who watches."""

    num_planned: int
    num_ended: int
    num_training: int
    num_judging: int
    counts: dict[str, int]
    """Rows that ended, by status."""


@dataclass
class Driver:
    """Takes planned customers to their rows."""

    ledger: FleetLedger
    night: str
    lease: Lease
    fleet: HostFleet
    judge: Judge
    preparer: Preparer
    settler: Settler
    shown: Shown
    canaries: Canaries
    hours: Hours
    deadline: float | None
    on_progress: Callable[[Progress], None] = lambda progress: None
    now: Callable[[], float] = time.time
    """Seconds since the epoch: what the deadline is compared with."""
    resweeps: list[tuple[Ready, Row]] = field(default_factory=list)
    """Customers for whom a search is due: run when the others are done."""
    remarks: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    _todo: deque[Planned] = field(default_factory=deque)
    _preparing: dict[Future[Ready | Row], Planned] = field(default_factory=dict)
    _training: dict[str, list[Ready]] = field(default_factory=dict)
    """By job_id: two tasks of a tenant may ask for the same job."""
    _judging: dict[Key, tuple[Ready, Row]] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)
    """Rows by status."""
    _num_planned: int = 0
    _num_tokens: int = 0
    _started: float = field(default_factory=time.monotonic)

    def run(self, planned: Sequence[Planned]) -> list[Row]:
        """Take all customers to their rows and return these. Interrupted, it leaves the rest to whoever goes on."""
        self._todo, self._num_planned = deque(planned), len(planned)
        try:
            with ThreadPoolExecutor(1, "prepare") as pool:
                while self._todo or self._preparing or self._training or self._judging:
                    self.check_claim()
                    if self._must_stop():
                        self._stop()
                        break
                    self._turn(pool)
        except BaseException:
            if not self.lease.is_lost:  # whoever took over shows them
                under_way = [ready for some in self._training.values() for ready in some]
                self.shown.left_open([*under_way, *(ready for ready, _ in self._judging.values())])
            raise
        return self.rows

    def _turn(self, pool: ThreadPoolExecutor) -> None:
        self._feed(pool)
        self._take_prepared()
        for event in self.fleet.events(WAIT_SECONDS):
            self._take(event)
        self._settle(0.0)
        self._tell()

    # Feeding the hosts.

    def _feed(self, pool: ThreadPoolExecutor) -> None:
        most = AHEAD * self.fleet.num_places
        while self._todo and len(self._preparing) + len(self._training) < most:
            if self._wait_for_canaries():
                return
            one = self._todo.popleft()
            self._preparing[pool.submit(self.preparer.prepare, one)] = one

    def _wait_for_canaries(self) -> bool:
        """Tell whether the next customer must wait for the verdicts of canaries; they come first in line."""
        return self.canaries.is_open and not self._todo[0].customer.is_canary

    def _take_prepared(self) -> None:
        for future in [one for one in self._preparing if one.done()]:
            del self._preparing[future]
            found = future.result()
            if isinstance(found, Row):
                self._end(found)
            else:
                self._train(found)

    def _train(self, ready: Ready) -> None:
        waiting = self._training.setdefault(ready.job.job_id, [])
        waiting.append(ready)
        self.shown.begin(ready)
        if len(waiting) == 1:
            self.fleet.submit(ready.job)

    # What hosts and the scorer tell.

    def _take(self, event: HostEvent) -> None:
        match event:
            case Evaluated(final=False):
                self.fleet.decide(event.job_id, True)
            case Checkpointed(job_id=job_id, chunk=chunk):
                for ready in self._training.get(job_id, ()):
                    self.shown.points(ready, (chunk,))
            case Finished():
                self._finish(event)

    def _finish(self, finished: Finished) -> None:
        self._num_tokens += 0 if finished.reused else finished.num_tokens
        for ready in self._training.pop(finished.job_id, ()):
            row = self.settler.trained(ready, finished, self._cost_of(finished))
            self.shown.trained(ready, finished)
            if row.status == "trained":
                self._judge(ready, row)
            else:
                self._end(row, ready)

    def _judge(self, ready: Ready, row: Row) -> None:
        self._judging[ready.key] = ready, row
        self.judge.submit(challenger_of(row), row.task, self.settler.champion_before(row), ready.gates)

    def _settle(self, timeout_seconds: float) -> None:
        for judged in self.judge.results(timeout_seconds):
            self._settle_one(judged)

    def _settle_one(self, judged: Judged) -> None:
        ready, row = self._judging.pop((judged.challenger.tenant, judged.task))
        row = self.settler.judged(row, judged)
        if ready.resweep and row.status == "rejected":
            self.resweeps.append((ready, row))
        self._end(row, ready)

    def _end(self, row: Row, ready: Ready | None = None) -> None:
        """Keep a row that has ended; one whose search is due is kept when that is over (`resweeping`)."""
        if ready is not None:
            self.shown.end(ready, row)  # first: who continues after a kill passes over rows that are kept
        self.canaries.end(row)
        if any(one is ready for one, _ in self.resweeps):
            return
        row = self.ledger.record(self.night, row)
        self.rows.append(row)
        self._counts[row.status] += 1

    # Limits.

    def _must_stop(self) -> str | None:
        if self.deadline is not None and self.now() >= self.deadline:
            return "deadline"
        self.hours.held = self._held_hours()
        if self.hours.are_over:
            return "budget"
        return "canary" if self.canaries.has_failed else None

    def _stop(self) -> None:
        """Checkpoint what trains, await what is measured, and hold everybody else for the next night."""
        reason = self._must_stop()
        sentences = {
            "deadline": "The deadline came before its turn, or before it was trained; what was trained is checkpointed.",
            "budget": f"The night's {self.hours.most:g} accelerator-hours were used up." if self.hours.most else "",
            "canary": f"Too many canaries failed or were rejected: {', '.join(self.canaries.bad[:5])}.",
        }
        sentence = sentences[str(reason)]
        self.remarks.append(_REMARKS[str(reason)].format(canaries=", ".join(self.canaries.bad[:5])))
        steps = {"canary": "Look at the canaries; the next night tries again."}
        step = steps.get(str(reason), "It is first in line next night.")
        self._await_measured()
        under_way = {ready.key: ready for some in self._training.values() for ready in some}
        left = [ready.row for ready in under_way.values()] + self._unprepared()
        for row in held_rows(left, str(reason), sentence, step, self.now()):
            self._end(row, under_way.get((row.tenant, row.task)))

    def _unprepared(self) -> list[Row]:
        """Take no further customer up; return the rows, so far, of those who have none yet."""
        left = []
        for future, one in self._preparing.items():
            found = carried(one.customer, one.last) if future.cancel() else future.result()
            if isinstance(found, Ready):
                left.append(found.row)
            elif future.cancelled():
                left.append(found)
            else:
                self._end(found)
        left += [carried(one.customer, one.last) for one in self._todo]
        self._preparing.clear()
        self._todo.clear()
        return left

    def _await_measured(self) -> None:
        until = time.monotonic() + MAX_JUDGING_SECONDS
        while self._judging and time.monotonic() < until:
            self._settle(1.0)
        for ready, row in self._judging.values():
            self._end(replace(row, sentence="It was trained, and awaits its verdict."), ready)
        self._judging.clear()

    def _cost_of(self, finished: Finished) -> float:
        """Return a job's share of the hours that hosts were held so far, by tokens."""
        if finished.reused or not self._num_tokens:
            return 0.0
        return self._held_hours() * finished.num_tokens / self._num_tokens

    def _held_hours(self) -> float:
        return self.fleet.num_hosts * (time.monotonic() - self._started) / 3600

    def check_claim(self) -> None:
        """Raise ClaimLost if another process took the night over."""
        if self.lease.is_lost:
            raise ClaimLost(
                f"The night {self.night} of {self.ledger.fleet} was taken over by another process, since this one had not been "
                "heard of; nothing is lost, and the other finishes it."
            )

    def _tell(self) -> None:
        training = sum(map(len, self._training.values()))
        self.on_progress(Progress(self._num_planned, len(self.rows), training, len(self._judging), dict(self._counts)))


_REMARKS = {
    "deadline": "The deadline came before everybody was done: the rest is first in line next night.",
    "budget": "The accelerator-hours of this night were used up: the rest is first in line next night.",
    "canary": "The canaries stopped the night ({canaries}): nobody else was trained.",
}
