"""Who takes part in the next pass, and how large it may be: the packs' policies, pure functions over plain values.

Shares. Deficit round-robin on tokens (Shreedhar & Varghese 1995, "Efficient fair queueing using deficit round robin"): a job is a
queue whose head is its next micro-batch. Every round credits each job the same quantum, or its micro-batch if that is less; a
job whose credit covers its micro-batch may take part, and pays for it. Unlike a queue of packets, a job has one micro-batch per
pass; and a pass that has room left runs further rounds at once, so that no room is wasted. A job that was passed over
`MAX_WAIT_PASSES` times goes before everything else, whatever its priority and its length.

Budget. A pass grows while tokens per second rise: beyond the knee a larger pass only makes everybody wait longer.

Neither can alter a result: they decide when a micro-batch runs, never what it computes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

MAX_WAIT_PASSES = 32
"""Passes that a job is passed over at most before it comes first."""
MAX_OWED_ROUNDS = 16
"""Rounds of credit that a job may hoard. Micro-batches seldom fill a pass, so that all are owed ever more: what is owed to
everybody is forgotten."""
CPU_TOKENS, CUDA_TOKENS = 2048, 8192
"""Where the search for the knee begins: below it a pass of a small base is mostly overhead."""
MIN_GAIN = 1.05
"""Tokens per second must rise by this factor when a pass doubles, or the smaller pass is as good."""
SAMPLES = 4
"""Passes measured at each size; the fastest counts, since a busy machine only ever makes a pass slower."""
FILLED = 0.7
"""A pass below this share of the budget says nothing of the budget's size."""
REGROWTH = 1.02
"""After memory ran out, each pass that filled what was left of the budget raises it by this factor."""


@dataclass(frozen=True)
class Candidate:
    """A job that may run now."""

    job_id: str
    tokens: int
    """Of its next micro-batch."""
    priority: int = 0
    alone: bool = False
    """Whether it shares a pass with nobody."""


@dataclass(frozen=True)
class Share:
    """What a job is owed."""

    deficit: int = 0
    """Tokens credited and not used."""
    waited: int = 0
    """Passes since it last took part, while it could have."""
    skipped: int = 0
    """Passes it was left out of in all."""


@dataclass(frozen=True)
class Choice:
    """Who takes part in a pass, and what all are owed after it."""

    job_ids: tuple[str, ...]
    shares: Mapping[str, Share]
    left_out: bool
    """Whether the budget kept a job out that could have run."""


def choose(candidates: Sequence[Candidate], shares: Mapping[str, Share], budget: int) -> Choice:
    """Return who takes part in a pass of `budget` tokens; at least one, also if its micro-batch alone is larger.

    Higher priority goes first, then who can pay soonest, then who waited longest. Jobs that are not candidates (they wait
    for a decision) keep what they are owed and earn nothing.
    """
    if not candidates:
        return Choice((), dict(shares), False)
    before = {one.job_id: shares.get(one.job_id, Share()) for one in candidates}
    quantum = _quantum([one.tokens for one in candidates], budget)
    credits = {one.job_id: min(one.tokens, quantum) for one in candidates}
    rounds = {one.job_id: _rounds(one, before[one.job_id], credits[one.job_id]) for one in candidates}
    ranked = sorted(candidates, key=lambda one: _rank(one, before[one.job_id], credits[one.job_id]))
    chosen = _fill(ranked, budget)
    num_rounds = max(1, *(rounds[one.job_id] for one in chosen))
    taken = {one.job_id for one in chosen}
    owed_to_all = min(before[one.job_id].deficit // credits[one.job_id] for one in candidates)
    after = {
        one.job_id: _settle(one, before[one.job_id], credits[one.job_id], num_rounds - owed_to_all, one.job_id in taken)
        for one in candidates
    }
    return Choice(tuple(one.job_id for one in chosen), {**shares, **after}, len(chosen) < len(candidates))


def _quantum(tokens: Sequence[int], budget: int) -> int:
    """Return the equal share of a pass, where what short jobs cannot use goes to the long ones (max-min fairness)."""
    room = budget
    for index, need in enumerate(sorted(tokens)):
        share = room // (len(tokens) - index)
        if need > share:
            return max(1, share)
        room -= need
    return max(tokens)


def _rounds(one: Candidate, share: Share, credit: int) -> int:
    """Return after how many more rounds the job can pay for its micro-batch."""
    return max(0, math.ceil((one.tokens - share.deficit) / credit))


def _rank(one: Candidate, share: Share, credit: int) -> tuple[bool, int, float, int, int, str]:
    is_overdue = share.waited >= MAX_WAIT_PASSES
    first = -share.waited if is_overdue else -one.priority
    owed = (share.deficit - one.tokens) / credit
    return (not is_overdue, first, -owed, -share.waited, -share.skipped, one.job_id)


def _fill(ranked: Sequence[Candidate], budget: int) -> list[Candidate]:
    first, *others = ranked
    room = budget - first.tokens
    chosen = [first]
    for one in others:
        if not first.alone and not one.alone and one.tokens <= room:
            chosen.append(one)
            room -= one.tokens
    return chosen


def _settle(one: Candidate, share: Share, credit: int, num_rounds: int, took_part: bool) -> Share:
    """Credit a job and have it pay. What it is owed beyond its micro-batch is kept for `MAX_OWED_ROUNDS` only."""
    deficit = min(max(0, share.deficit + num_rounds * credit), one.tokens + MAX_OWED_ROUNDS * credit)
    if took_part:
        return Share(max(0, deficit - one.tokens), 0, share.skipped)
    return Share(deficit, share.waited + 1, share.skipped + 1)


@dataclass(frozen=True)
class TokenBudget:
    """How many tokens a pass may have, and what was measured to say so. Each change returns a new one."""

    tokens: int
    """Size under trial, or the knee once that is found."""
    is_settled: bool = False
    rate_before: float = 0.0
    """Tokens per second at the size before, 0 at the first."""
    rates: tuple[float, ...] = field(default=())
    """Tokens per second of the passes measured at this size."""
    ceiling: int | None = None
    """What memory was seen to hold, None while it never ran out."""

    def in_force(self, limit: int | None = None) -> int:
        """Return the tokens of the next pass, within `limit` (the memory model's), one at least."""
        bounds = [bound for bound in (self.tokens, self.ceiling, limit) if bound is not None]
        return max(1, min(bounds))

    def after_pass(self, tokens: int, seconds: float, *, left_out: bool, limit: int | None = None) -> "TokenBudget":
        """Learn from a pass. Only one that was filled while somebody was left out says whether a larger one would pay."""
        grown = self._regrown(tokens)
        is_telling = left_out and tokens >= FILLED * self.tokens and seconds > 0.0
        if self.is_settled or not is_telling or grown.in_force(limit) < self.tokens:
            return grown
        rates = (*self.rates, tokens / seconds)
        return grown._stepped(max(rates)) if len(rates) >= SAMPLES else replace(grown, rates=rates)

    def _stepped(self, rate: float) -> "TokenBudget":
        """Go to the double size if this one paid, back to the half and stay there if it did not."""
        if rate >= MIN_GAIN * self.rate_before:
            return replace(self, tokens=2 * self.tokens, rate_before=rate, rates=())
        return replace(self, tokens=max(1, self.tokens // 2), rates=(), is_settled=True)

    def _regrown(self, tokens: int) -> "TokenBudget":
        if self.ceiling is None or tokens < FILLED * self.ceiling:
            return self
        return replace(self, ceiling=math.ceil(self.ceiling * REGROWTH) + 1)

    def after_out_of_memory(self, tokens: int) -> "TokenBudget":
        """Memory ran out in a pass of so many tokens: half of them is what it is believed to hold."""
        return replace(self, ceiling=max(1, min(tokens, self.ceiling or tokens) // 2))
