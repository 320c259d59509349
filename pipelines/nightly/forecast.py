"""What a night will do and cost, from decisions and history: `lorafleet plan`.

A customer's own last training tells its tokens per step and their price; where there is none, the fleet's median stands in. Rows
are estimated from the size of the files, steps follow from the job. What nobody ever trained is not guessed.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from pipelines.nightly.customers import Customer
from pipelines.nightly.planning import Decision, Look, Skip, place_in_line
from pipelines.nightly.records import Row, Signature
from workers.engine.schedule import num_steps

Action = Literal["skip", "look", "train"]
Basis = Literal["own", "fleet", "none"]


@dataclass(frozen=True)
class Planned:
    """A customer and what was decided for it."""

    customer: Customer
    decision: Decision
    last: Row | None
    signature: Signature | None
    """Of its files now."""


@dataclass(frozen=True)
class Forecast:
    """One customer's night, as far as it can be told. Figures of `look` are those of the training that may follow."""

    tenant: str
    task: str
    priority: int
    action: Action
    because: str
    sentence: str
    num_rows: int | None = None
    """Training rows; None: unknown."""
    num_steps: int | None = None
    num_tokens: int | None = None
    seconds: float | None = None
    """Of training on a host that it shares with others."""
    cost: float | None = None
    """Accelerator-hours."""
    basis: Basis = "none"
    """Whose past the figures rest on: its own, the fleet's, or nobody's."""


@dataclass(frozen=True)
class Outlook:
    """A night foretold."""

    forecasts: tuple[Forecast, ...]
    """In the order in which they are taken up; those that are skipped last."""

    @property
    def totals(self) -> dict[str, Any]:
        """Sums for programs. What is only looked at counts in full, so they are upper ends; `num_unknown` have no figures."""
        worked = [one for one in self.forecasts if one.action != "skip"]
        return {
            "num_customers": len(self.forecasts),
            "actions": dict(Counter(one.action for one in self.forecasts)),
            "because": dict(Counter(one.because for one in self.forecasts)),
            "num_unknown": sum(one.num_tokens is None for one in worked),
            "num_steps": sum(one.num_steps or 0 for one in worked),
            "num_tokens": sum(one.num_tokens or 0 for one in worked),
            "seconds": sum(one.seconds or 0.0 for one in worked),
            "accelerator_hours": sum(one.cost or 0.0 for one in worked),
        }

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"totals": self.totals, "customers": [asdict(one) for one in self.forecasts]}


@dataclass(frozen=True)
class _Rates:
    """What trainings of the past took; None where nothing tells."""

    rows_per_byte: float | None
    tokens_per_step: float | None
    seconds_per_token: float | None
    cost_per_token: float | None


def predict(planned: Sequence[Planned], history: Sequence[Row]) -> Outlook:
    """Return what a night will do and cost.

    Args:
        planned: Every customer with its decision.
        history: Rows of earlier nights, oldest first; those that trained count.
    """
    trained = [row for row in history if row.num_steps > 0 and row.num_tokens > 0]
    own = {(row.tenant, row.task): row for row in trained}
    fleet = _Rates(
        _median(trained, _rows_per_byte),
        _median(trained, lambda row: row.num_tokens / row.num_steps),
        _median(trained, lambda row: row.seconds / row.num_tokens),
        _median(trained, lambda row: row.cost / row.num_tokens),
    )
    in_line = sorted(planned, key=lambda one: place_in_line(one.customer, one.last, one.decision))
    return Outlook(tuple(_forecast(one, own.get(one.customer.key), fleet) for one in in_line))


def _forecast(one: Planned, before: Row | None, fleet: _Rates) -> Forecast:
    decision, customer = one.decision, one.customer
    action: Action = "skip" if isinstance(decision, Skip) else "look" if isinstance(decision, Look) else "train"
    told = Forecast(customer.tenant, customer.task, customer.priority, action, decision.because, decision.sentence)
    if action == "skip":
        return told
    rates = fleet if before is None else _own_rates(before)
    rows = _rows(one, rates.rows_per_byte or fleet.rows_per_byte)
    return _with_figures(told, rows, customer, rates, "fleet" if before is None else "own")


def _with_figures(told: Forecast, rows: int | None, customer: Customer, rates: _Rates, basis: Basis) -> Forecast:
    steps = None if rows is None else num_steps(customer.job.training, rows)
    tokens = None if steps is None or rates.tokens_per_step is None else round(steps * rates.tokens_per_step)
    figures = {
        "num_rows": rows,
        "num_steps": steps,
        "num_tokens": tokens,
        "seconds": _times(tokens, rates.seconds_per_token),
        "cost": _times(tokens, rates.cost_per_token),
        "basis": "none" if tokens is None else basis,
    }
    return Forecast(**{**asdict(told), **figures})


def _own_rates(row: Row) -> _Rates:
    tokens = row.num_tokens
    return _Rates(_rows_per_byte(row), tokens / row.num_steps, row.seconds / tokens, row.cost / tokens)


def _rows(one: Planned, rows_per_byte: float | None) -> int | None:
    """Estimate the training rows from the size of the files; without one, take as many as last time."""
    size = _size(one.signature)
    last = one.last
    if last is not None and last.num_rows and (before := _size(last.signature)) and size:
        return max(1, round(last.num_rows * size / before))
    if size and rows_per_byte is not None:
        return max(1, round(size * rows_per_byte))
    return last.num_rows or None if last is not None else None


def _rows_per_byte(row: Row) -> float | None:
    size = _size(row.signature)
    return row.num_rows / size if size and row.num_rows else None


def _size(signature: Signature | None) -> int:
    return 0 if signature is None else sum(size for _, size, _ in signature.files)


def _median(rows: Sequence[Row], rate: Callable[[Row], float | None]) -> float | None:
    found = [value for value in map(rate, rows) if value is not None]
    return median(found) if found else None


def _times(number: int | None, rate: float | None) -> float | None:
    return None if number is None or rate is None else number * rate
