"""Measuring the night's challengers, champions and plain bases in passes that customers share, so that gates find it all known.

`Judge.submit` takes one customer; what its gates will ask for is looked up in threads and goes as orders to a scorer that the
launcher runs (`workers.scoring_task`). `Judge.results` gives a jury for each customer in which everything is measured; promoting
with it computes nothing. A scorer that is lost is replaced: its orders are then sent one at a time, so that one that ends its
process is told from its neighbours.
"""

import itertools
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from infra.launch import Exit, Handle, Launcher, Resources
from pipelines.gates import BetterThanBase, Effect, Gates, Side, data_of, metrics_of
from pipelines.journal import Entry
from pipelines.judging import Case, Findings, Jury, Seat
from pipelines.workspace import Workspace
from workers.host_reasons import reason_of
from workers.manifests import AdapterRef
from workers.scores import GENERATED, RowScores, parts_of
from workers.scoring_task import Score, Scored, ScoringTask, Setting, ShareRows, StoredCase

log = logging.getLogger(__name__)
NUM_READERS = 8
"""Customers that are looked up at the same time."""
MAX_AHEAD = 128
"""Customers whose adapters and rows are in memory at the same time; others wait as names."""
MAX_LOSSES_IN_A_ROW = 4
"""Scorers that may be lost without an answer in between before everything that waits is given up."""
POLL_SECONDS = 0.05
NO_CPU = Resources(num_cpus=0.0)
"""A scorer waits for no processor: hosts may hold all of them through the night."""


@dataclass(frozen=True)
class Judged:
    """What was measured for a customer's challenger, ready for its gates."""

    challenger: AdapterRef
    task: str
    champion: Entry | None
    """The journal's head that was compared with. Should another be there when the adapter is promoted, what is missing is
    measured in the promoting process."""
    jury: Jury
    """To be given to `promote`."""
    holdout: Mapping[Side, RowScores] = field(default_factory=dict)
    """Scores on the job's own held-out rows, for the page."""
    holdout_digest: str | None = None
    problem: str = ""
    """Why something could not be measured: a word of `report.Finished.reason`, a colon, a sentence. Do not promote then: the
    promoting process would try it again."""

    def value(self, side: Side, metric: str) -> float | None:
        """Return a metric of one side on the held-out rows, None if it was not measured."""
        return parts_of(self.holdout[side], metric).value if side in self.holdout else None


@dataclass(frozen=True)
class _Question:
    """One measurement that the gates, or the page, will ask for."""

    side: Side
    data: str | None
    digest: str
    answers: bool


@dataclass(frozen=True)
class _Part:
    """What goes to the scorer in one order."""

    setting: Setting
    questions: Sequence[_Question]
    cases: tuple[StoredCase, ...]
    probed: tuple[str, ...]


@dataclass(eq=False)
class _Hearing:
    """A customer whose measurements are under way."""

    case: Case
    parts: Sequence[_Part] = ()
    shared: Sequence[ShareRows] = ()
    num_open: int = 0
    problem: str = ""
    found: dict[tuple[Side, str | None], RowScores] = field(default_factory=dict)

    def take(self, part: _Part, scored: Scored) -> None:
        """Take in what an order found."""
        self.num_open -= 1
        for question, scores in zip(part.questions, scored.scores, strict=True):
            if isinstance(scores, str):
                self.problem = self.problem or scores
                continue
            self.case.jury.known[self.case.key(question.side, question.digest, question.answers)] = scores
            self.found[question.side, question.data] = scores
        for adapter_id, effect in zip(part.probed, scored.effects, strict=True):
            if isinstance(effect, str):
                self.problem = self.problem or effect
            else:
                self.case.jury.effects[adapter_id] = effect

    def judged(self) -> Judged:
        case = self.case
        holdout = {side: scores for (side, data), scores in self.found.items() if data is None}
        digest = case.row_set(None).digest if holdout else None
        return Judged(case.challenger, case.task, case.champion, case.jury, holdout, digest, self.problem)


@dataclass(frozen=True, eq=False)
class _Sent:
    """An order that waits, or is with the scorer."""

    hearing: _Hearing
    part: _Part
    order: Score
    alone: bool = False


class Judge:
    """Has adapters measured; used by one thread.

    `resources` are the scorer's: with `num_gpus` it computes on a GPU, which hosts must leave to it.
    """

    def __init__(
        self, workspace: Workspace, launcher: Launcher, *, resources: Resources = NO_CPU, max_tokens: int | None = None
    ) -> None:
        self._workspace, self._launcher, self._resources = workspace, launcher, resources
        self._task = ScoringTask(workspace.services, "cuda" if resources.num_gpus else "cpu", max_tokens)
        self._findings = Findings()
        self._readers = ThreadPoolExecutor(NUM_READERS, "judge")
        self._submitted: deque[_Hearing] = deque()
        self._preparing: dict[Future[_Hearing], _Hearing] = {}
        self._queue: deque[_Sent] = deque()
        self._sent: dict[int, _Sent] = {}
        self._told: list[_Hearing] = []
        self._numbers = itertools.count(1)
        self._names = itertools.count(1)
        self._scorer: Handle | None = None
        self._shared: set[str] = set()
        self._losses = 0

    @property
    def num_open(self) -> int:
        """Customers that were submitted and are not in any result yet."""
        return len(self._submitted) + self._num_ahead

    @property
    def _num_ahead(self) -> int:
        """Customers whose adapters and rows are in memory."""
        waiting = {id(one.hearing) for one in (*self._queue, *self._sent.values())}
        return len(self._preparing) + len(waiting | {id(one) for one in self._told})

    def submit(self, challenger: AdapterRef, task: str, champion: Entry | None, gates: Gates) -> None:
        """Have a challenger measured beside the champion (the journal's head, None before the first) and the plain base."""
        jury = Jury(self._workspace, gates, findings=self._findings)
        self._submitted.append(_Hearing(Case(jury, challenger, task, champion)))
        self._look_up()

    def results(self, timeout_seconds: float) -> list[Judged]:
        """Return customers that are measured, or wait for the first; an empty list after the time-out, or if none is open."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            self._look_up()
            self._take_prepared()
            self._send()
            self._receive(0.0)
            left = deadline - time.monotonic()
            if self._told or left <= 0 or not (self._preparing or self._sent or self._queue):
                told, self._told = self._told, []
                return [hearing.judged() for hearing in told]
            self._wait(left)

    def close(self) -> None:
        """End the scorer; what is open is told no more."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self._scorer is not None:
            self._scorer.kill()
        self._scorer = None

    def _wait(self, left: float) -> None:
        if self._sent:
            self._receive(min(left, POLL_SECONDS))
        elif self._preparing:
            wait(self._preparing, left, FIRST_COMPLETED)

    def _look_up(self) -> None:
        for _ in range(min(len(self._submitted), MAX_AHEAD - self._num_ahead)):
            hearing = self._submitted.popleft()
            self._preparing[self._readers.submit(_prepared, hearing)] = hearing

    def _take_prepared(self) -> None:
        for future in [one for one in self._preparing if one.done()]:
            hearing = self._preparing.pop(future)
            error = future.exception()
            if error is not None:
                hearing.problem = reason_of(error)
            for part in hearing.parts if error is None else ():
                number, tenant = next(self._numbers), hearing.case.challenger.tenant
                order = Score(number, tenant, part.setting, part.cases, part.probed)
                self._queue.append(_Sent(hearing, part, order))
                hearing.num_open += 1
            if not hearing.num_open:
                self._told.append(hearing)

    def _send(self) -> None:
        """Send what waits; an order that is to be alone is sent when nothing else is with the scorer, and nothing follows it."""
        while self._queue and not any(sent.alone for sent in self._sent.values()):
            if self._queue[0].alone and self._sent:
                return
            sent = self._queue.popleft()
            self._sent[sent.order.number] = sent
            channel = self._running().channel
            for shared in sent.hearing.shared:
                if shared.digest not in self._shared:
                    self._shared.add(shared.digest)
                    channel.send(shared)
            channel.send(sent.order)

    def _running(self) -> Handle:
        if self._scorer is None:
            self._shared.clear()
            self._scorer = self._launcher.launch(self._task, f"scorer-{next(self._names)}", self._resources)
        return self._scorer

    def _receive(self, timeout_seconds: float) -> None:
        if self._scorer is None:
            return
        ended = self._scorer.poll()  # before the last look: what had been sent by then is in the channel
        for scored in self._scorer.channel.receive(timeout_seconds):
            self._losses = 0
            self._take(scored)
        if ended is not None:
            self._scorer = None
            self._lose(ended)

    def _take(self, scored: Scored) -> None:
        sent = self._sent.pop(scored.number, None)
        if sent is None:
            return
        sent.hearing.take(sent.part, scored)
        if not sent.hearing.num_open:
            self._told.append(sent.hearing)

    def _lose(self, ended: Exit) -> None:
        """Decide about orders whose scorer is gone: each is tried alone; one that was alone is to blame."""
        self._losses += bool(self._sent)
        lost = list(self._sent.values())
        self._sent.clear()
        log.warning("a scorer was lost with %d orders (%s)", len(lost), ended.reason)
        if self._losses >= MAX_LOSSES_IN_A_ROW:
            lost += self._queue
            self._queue.clear()
        again = [sent for sent in lost if not sent.alone and self._losses < MAX_LOSSES_IN_A_ROW]
        self._queue.extendleft(_Sent(sent.hearing, sent.part, sent.order, alone=True) for sent in reversed(again))
        for sent in lost:
            if sent not in again:
                self._sent[sent.order.number] = sent
                self._take(_blamed(sent, f"host_lost: the scorer was lost while it measured this adapter; {ended.reason}"))


def _blamed(sent: _Sent, reason: str) -> Scored:
    return Scored(sent.order.number, (reason,) * len(sent.part.cases), (reason,) * len(sent.part.probed))


def _prepared(hearing: _Hearing) -> _Hearing:
    """Look up what has to be measured for a customer, and how."""
    case = hearing.case
    questions = list(_questions(case))
    stored = set(case.manifest.get("data", {}).values())
    row_sets = {question.data: case.row_set(question.data) for question in questions}
    hearing.shared = [ShareRows(one.digest, tuple(one.rows)) for one in row_sets.values() if one.digest not in stored]
    hearing.parts = _parts(case, questions)
    return hearing


def _questions(case: Case) -> Iterator[_Question]:
    """Yield what the gates compare on each set of rows, and all three sides of the job's own held-out rows, if there are any."""
    gates = case.jury.gates.gates
    named = data_of(gates)
    has_holdout = any(case.manifest.get("data", {}).get(split) for split in ("test", "validation"))
    for data in named if None in named or not has_holdout else [None, *named]:
        against_base = any(isinstance(gate, BetterThanBase) and gate.data == data for gate in gates)
        sides: list[Side] = ["challenger"]
        if case.champion is not None:
            sides.append("champion")
        if data is None or case.champion is None or against_base:
            sides.append("base")
        answers = bool(GENERATED & metrics_of(gates, data))
        for side in sides:
            yield _Question(side, data, case.row_set(data).digest, answers)


def _parts(case: Case, questions: Sequence[_Question]) -> list[_Part]:
    """Put what is measured on one base, in one way, into one order; the effect test goes with the challenger."""
    probes = any(isinstance(gate, Effect) for gate in case.jury.gates.gates)
    settings: list[Setting] = []
    groups: list[list[_Question]] = []
    own = _setting(case.seat("challenger"))
    for question in questions:
        setting = _setting(case.seat(question.side))
        if setting not in settings:
            settings.append(setting)
            groups.append([])
        groups[settings.index(setting)].append(question)
    if probes and own not in settings:
        settings.append(own)
        groups.append([])
    return [
        _Part(setting, group, tuple(_case(case, one) for one in group), _probed(case, probes and setting == own))
        for setting, group in zip(settings, groups, strict=True)
    ]


def _probed(case: Case, probes: bool) -> tuple[str, ...]:
    return (case.challenger.adapter_id,) if probes else ()


def _case(case: Case, question: _Question) -> StoredCase:
    _, adapter_id, digest, answers = case.key(question.side, question.digest, question.answers)
    return StoredCase(adapter_id, digest, case.subject.evaluation(None), answers)


def _setting(seat: Seat) -> Setting:
    contract = str(seat.subject.stored.manifest["prompt_contract"])
    return Setting(seat.subject.base_id, str(seat.path), contract, seat.spec, seat.max_length, seat.labels)
