"""The brakes of a night: how many champions it may replace, how long its hosts may be held, and what canaries say."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from pipelines.nightly.records import Row


@dataclass
class PromotionQuota:
    """How many champions a night may still replace.

    A customer's first champion replaces none, so it does not count: otherwise a fleet's first night could not do its work.
    """

    share: float | None
    """Of the customers who have a champion; None: no limit."""
    num_champions: int
    """Customers who had one when the night began."""
    num_replaced: int = 0

    @property
    def most(self) -> int | None:
        """Champions that may be replaced in all; at least one, so that a small fleet is not frozen. None: no limit."""
        return None if self.share is None else max(1, math.floor(self.share * self.num_champions))

    def allows(self, replaces: bool) -> bool:
        """Tell whether one more promotion is within the limit."""
        return not replaces or self.most is None or self.num_replaced < self.most

    def count(self, replaces: bool) -> None:
        """Note a promotion."""
        self.num_replaced += replaces


@dataclass
class Canaries:
    """Customers who go first; if too many of them fail or are rejected, nobody else is trained that night."""

    waiting: set[tuple[str, str]]
    most_failures: float
    """Share of the canaries that were trained or failed, above which the night stops."""
    num_ended: int = 0
    num_bad: int = 0
    bad: list[str] = field(default_factory=list)

    @staticmethod
    def of(waiting: Iterable[tuple[str, str]], ended: Iterable[Row], most_failures: float) -> "Canaries":
        """Return the canaries of a night in which some of them had ended before it was continued."""
        before = [row for row in ended if row.is_canary]
        canaries = Canaries({*waiting, *((row.tenant, row.task) for row in before)}, most_failures)
        for row in before:
            canaries.end(row)
        return canaries

    def end(self, row: Row) -> None:
        """Note how a canary's row ended; other customers are passed over."""
        key = (row.tenant, row.task)
        if key not in self.waiting:
            return
        self.waiting.remove(key)
        is_bad = row.status in ("failed", "rejected")
        self.num_ended += is_bad or row.adapter_id is not None
        if is_bad:
            self.num_bad += 1
            self.bad.append(".".join(key))

    @property
    def is_open(self) -> bool:
        """Whether verdicts of canaries are awaited."""
        return bool(self.waiting)

    @property
    def has_failed(self) -> bool:
        """Whether the others must not follow."""
        return not self.is_open and self.num_ended > 0 and self.num_bad / self.num_ended > self.most_failures


@dataclass
class Hours:
    """Accelerator-hours of a night: hosts that are held count, whether they train or wait."""

    most: float | None
    before: float = 0.0
    """Used before the night was continued."""
    held: float = 0.0
    """Since then."""

    @property
    def are_over(self) -> bool:
        return self.most is not None and self.before + self.held >= self.most
