"""What is computed from the rows of a night: its summary, gains, who was slowest, what a person should look at. Plain numbers."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from pipelines.nightly.records import NightReport, NightSummary, Row
from workers.scores import LOWER_IS_BETTER

JUDGED = frozenset({"promoted", "rejected", "held", "trained"})
"""Statuses of rows that may bear this night's losses; a skipped row may carry those of an earlier night."""


def name_of(row: Row) -> str:
    """Return the name of a customer's registered model."""
    return f"{row.tenant}.{row.task}"


def gain_of(row: Row) -> float | None:
    """Return by how much the challenger is better than the champion, or than the plain base where there was none.

    In the metric's unit, above 0 is better. None if this night measured no such pair, or one that is not finite.
    """
    other = row.base if row.champion is None else row.champion
    if row.status not in JUDGED or row.challenger is None or other is None:
        return None
    gain = other - row.challenger if row.metric in LOWER_IS_BETTER else row.challenger - other
    return gain if math.isfinite(gain) else None


def failed_gates(row: Row) -> list[str]:
    """Return the gates that did not pass."""
    return [str(verdict.get("gate", "")) for verdict in row.verdicts if not verdict.get("passed")]


def worked_on(report: NightReport) -> list[Row]:
    """Return the rows of customers that were not skipped: only those cost this night anything."""
    return [row for row in report.rows if row.status != "skipped"]


def summary_of(report: NightReport) -> NightSummary:
    """Return the night as one line of the trend. A night that has not ended has lasted 0 seconds."""
    rows = worked_on(report)
    gains = [gain for row in rows if row.status == "promoted" and (gain := gain_of(row)) is not None]
    return NightSummary(
        night=report.night,
        started=report.started,
        seconds=0.0 if report.ended is None else max(0.0, report.ended - report.started),
        counts=report.counts,
        num_tokens=sum(row.num_tokens for row in rows),
        cost=finite_sum(row.cost for row in rows),
        mean_gain=math.fsum(gains) / len(gains) if gains else None,
    )


def has_problems(report: NightReport) -> bool:
    """Tell whether a person should look: the night did not finish, a remark was made of it, or a customer failed or is held."""
    return not report.is_finished or bool(report.remarks) or any(row.status in ("failed", "held") for row in report.rows)


def with_status(report: NightReport, status: str) -> list[Row]:
    """Return the rows of one status, by reason, then by name."""
    return sorted((row for row in report.rows if row.status == status), key=lambda row: (row.reason, row.tenant, row.task))


def slowest(report: NightReport, count: int) -> list[Row]:
    """Return those that trained longest this night."""
    trained = [row for row in worked_on(report) if row.seconds > 0]
    return sorted(trained, key=lambda row: (-row.seconds, row.tenant, row.task))[:count]


def most_drifted(report: NightReport, count: int) -> list[Row]:
    """Return those whose data moved most away from what was trained on last."""
    moved = [(row.care.drift, row) for row in worked_on(report) if row.care.drift]
    return [row for _, row in sorted(moved, key=lambda one: (-one[0], one[1].tenant, one[1].task))[:count]]


def most_quarantined(report: NightReport, count: int) -> list[Row]:
    """Return those with most bad rows set aside this night."""
    bad = [row for row in worked_on(report) if row.care.num_quarantined]
    return sorted(bad, key=lambda row: (-row.care.num_quarantined, row.tenant, row.task))[:count]


def by_reason(rows: Iterable[Row]) -> list[tuple[str, int]]:
    """Return how many rows bear which reason, the most frequent first."""
    return sorted(Counter(row.reason for row in rows if row.reason).items(), key=lambda one: (-one[1], one[0]))


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below or at which `share` of the values lie: one of them, none between two. `values` is not empty."""
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1 if share > 0 else 0)]


def finite_sum(values: Iterable[float]) -> float:
    """Return the sum of those that are finite."""
    return math.fsum(value for value in values if math.isfinite(value))
