"""What is kept of a customer's night, and what a page is made of: plain frozen values, each written as JSON.

Loads nothing heavy: planning ten thousand customers that did not change reads these and nothing else.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from infra.errors import BadInput

Status = Literal["trained", "skipped", "held", "promoted", "rejected", "failed"]
STATUSES: tuple[Status, ...] = ("promoted", "trained", "rejected", "held", "failed", "skipped")
"""In the order a page tells of them. `trained` is a row whose adapter awaits its verdict."""
OPEN_REASONS = frozenset({"deadline", "budget", "promotion_limit", "canary", "host_lost", "service", "preempted"})
"""Reasons of rows that are not settled by their state key: the next night takes them up first, whether data changed or not."""


@dataclass(frozen=True)
class Signature:
    """What a listing tells of a customer's files without reading them: equal signatures mean equal content."""

    files: tuple[tuple[str, int, str], ...]
    """(name, size in bytes, etag or mtime in nanoseconds) of each file, sorted by name."""

    def to_json(self) -> list[list[Any]]:
        """Return plain JSON data."""
        return [list(one) for one in self.files]

    @staticmethod
    def from_json(body: list[list[Any]]) -> "Signature":
        """Read what `to_json` gave."""
        return Signature(tuple((str(name), int(size), str(stamp)) for name, size, stamp in body))


@dataclass(frozen=True)
class Care:
    """What was found in a customer's rows before training. Counts are of rows unless they say otherwise."""

    num_read: int = 0
    """Good rows: for training, validation and holdout together."""
    num_accepted: int = 0
    """Good rows on the last night whose rows were not held: what a collapse is measured against."""
    num_quarantined: int = 0
    num_duplicates: int = 0
    num_overlap: int = 0
    """Rows taken out of training because their prompt stands in the holdout."""
    num_new: int = 0
    num_deleted: int = 0
    mean_characters: float = 0.0
    """Of a row's text."""
    p95_characters: float = 0.0
    labels: Mapping[str, int] = field(default_factory=dict)
    """Rows by label, of a classifier's data."""
    drift: float | None = None
    """Against the rows trained on last: Jensen-Shannon distance, 0 (alike) to 1, of what is compared; None without a past."""
    quarantine: tuple[tuple[str, str], ...] = ()
    """(file:line, what is wrong) of bad rows, the first of them; `num_quarantined` counts all."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """How one customer's night ended; also what the next night compares with."""

    tenant: str
    task: str
    status: Status
    reason: str = ""
    """A word of the vocabulary (unchanged, too_few_new_rows, collapsed, non_finite, deadline, ...)."""
    sentence: str = ""
    """Why, with the numbers, for a person."""
    next_step: str = ""
    """What a person may do about it: empty if there is nothing to do."""
    priority: int = 50
    is_canary: bool = False
    state_key: str | None = None
    signature: Signature | None = None
    train_digest: str | None = None
    """Of the rows that the task's last training saw (this night's, or an earlier one's)."""
    holdout_digest: str | None = None
    num_rows: int = 0
    """Training rows."""
    care: Care = field(default_factory=Care)
    base_id: str | None = None
    num_withdrawn: int = 0
    """Rows that the champion was trained on and that the customer has taken back since, or written anew."""
    job_id: str | None = None
    adapter_id: str | None = None
    """The challenger, once trained."""
    champion_id: str | None = None
    """Champion when the row ended."""
    generation: int | None = None
    """Of the journal, when the row ended."""
    metric: str = "eval/loss"
    challenger: float | None = None
    """The metric on the holdout: challenger, champion before, plain base."""
    champion: float | None = None
    base: float | None = None
    verdicts: tuple[Mapping[str, Any], ...] = ()
    """Of the gates: {gate, passed, sentence}."""
    num_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    """Of its training on a host; those that share a pack share the host."""
    cost: float = 0.0
    """Accelerator-hours: its share, by tokens, of the hours its host was held."""
    trained_at: float | None = None
    """Seconds since the epoch of the last successful training."""
    ended_at: float = 0.0
    num_rejections: int = 0
    """In a row, this one included."""
    data_digest: str | None = None
    """Of all good rows; with the two below and `base_id`, what `state_key` was made of."""
    recipe_digest: str | None = None
    gates_digest: str | None = None
    sweep: str | None = None
    """The search that was run for it this night, "tenant/name"; None if none was."""
    recipe: Mapping[str, Any] | None = None
    """What a search of a night found and later nights train with (`nightly.found`); None: they train as the fleet says."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self) | {"signature": self.signature and self.signature.to_json()}

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> "Row":
        """Read what `to_json` gave. Raises BadInput if it is no row."""
        try:
            care = body["care"]
            made = dict(body) | {
                "signature": Signature.from_json(body["signature"]) if body["signature"] is not None else None,
                "care": Care(**care | {"quarantine": tuple(map(tuple, care["quarantine"])), "notes": tuple(care["notes"])}),
                "verdicts": tuple(body["verdicts"]),
            }
            return Row(**made)
        except (KeyError, TypeError, ValueError):
            raise BadInput("a night's row lacks what it should have; use the lorafleet version that wrote it.") from None

    @property
    def is_settled(self) -> bool:
        """Whether an equal state key means that there is nothing to do."""
        return self.status != "trained" and self.reason not in OPEN_REASONS


@dataclass(frozen=True)
class NightSummary:
    """One line of the trend over nights."""

    night: str
    started: float
    seconds: float
    counts: Mapping[str, int]
    """By status."""
    num_tokens: int
    cost: float
    mean_gain: float | None
    """Mean over the night's promoted customers of (champion before, or plain base) minus challenger; None without any."""


@dataclass(frozen=True)
class NightReport:
    """Everything the page of a night shows."""

    fleet: str
    night: str
    """Its name: the date of its deadline or of its start, in the fleet's time zone; "-2" and so on for further ones of a date."""
    timezone: str
    started: float
    ended: float | None
    """None while it runs, or was cut off."""
    is_finished: bool
    rows: tuple[Row, ...]
    remarks: tuple[str, ...] = ()
    """Of the night as a whole: the deadline came, canaries stopped it, MLflow was away, ..."""
    trend: tuple[NightSummary, ...] = ()
    """Earlier nights, oldest first."""

    @property
    def counts(self) -> dict[str, int]:
        """Rows by status; all statuses are there."""
        return {status: sum(row.status == status for row in self.rows) for status in STATUSES}

    @property
    def reasons(self) -> dict[str, dict[str, int]]:
        """Rows by status and reason."""
        found: dict[str, dict[str, int]] = {}
        for row in self.rows:
            by_reason = found.setdefault(row.status, {})
            by_reason[row.reason] = by_reason.get(row.reason, 0) + 1
        return found


ROW_FIELDS = tuple(one.name for one in fields(Row))
