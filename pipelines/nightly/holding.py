"""Whether a customer's rows may be trained on tonight: pure decisions on what care found, with the numbers in a sentence.

A customer is held where its data cannot be what was meant, which a person should look at, and skipped where too little came.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from infra.errors import BadInput
from pipelines.nightly.records import Care, Row
from workers.data.classification import refuse_unlabelled
from workers.data.formats import is_trained
from workers.data.rows import Row as DataRow
from workers.data.rows import refuse_untrainable
from workers.data.sifting import printable
from workers.scores import MIN_ROWS_COMPARED
from workers.spec import JobSpec

_SECONDS_OF_A_DAY = 86400.0


class Customer(Protocol):
    """What care needs to know of a customer; shares are 0 to 1."""

    @property
    def folder(self) -> Path:
        """Where relative paths of the job's data start."""

    @property
    def job(self) -> JobSpec:
        """As it will train; `job.data` names the source."""

    @property
    def holdout(self) -> float:
        """Share of rows that is never trained on."""

    @property
    def min_rows(self) -> int:
        """Good rows below which the customer is held."""

    @property
    def max_drop(self) -> float:
        """Share of the rows before; the customer is held if as many are missing."""

    @property
    def max_quarantined(self) -> float:
        """Share of bad rows above which the customer is held."""

    @property
    def min_new_rows(self) -> int:
        """New training rows below which no training starts, unless rows were deleted."""

    @property
    def max_age_days(self) -> float | None:
        """Days after the last training from when on one new row is enough; None: never."""


@dataclass(frozen=True)
class Reason:
    """Why a customer is not trained tonight, in the words of its row."""

    reason: str
    sentence: str
    next_step: str = ""


def unusable(job: JobSpec, rows: Sequence[DataRow], unread: Sequence[str]) -> Reason | None:
    """Tell what makes a source unfit to be looked into any further: files that are `unread`, training rows of a wrong kind."""
    if unread:
        more = f" ({len(unread) - 1} more files likewise.)" if len(unread) > 1 else ""
        return Reason("unreadable", f"{unread[0]}{more}", "Put the file right; the customer is tried again once it changes.")
    try:
        if rows:
            (refuse_unlabelled if job.task_type == "SEQ_CLS" else refuse_untrainable)(rows)
    except BadInput as error:
        return Reason(
            "wrong_kind", printable(str(error)), "Send rows of the kind that the job trains on, or change its task_type."
        )
    return None


def hold(customer: Customer, care: Care, rows: Sequence[DataRow], num_holdout: int) -> Reason | None:
    """Tell why rows that can be read should all the same not be trained on; the most telling reason first.

    `rows` are those for training; `care.num_accepted` is still that of the nights before.
    """
    return (
        _too_many_bad(customer, care)
        or _collapsed(customer, care)
        or _too_few(customer, care, len(rows), num_holdout)
        or _one_of_all(customer.job, rows)
    )


def skip(customer: Customer, care: Care, last: Row | None, now: float) -> Reason | None:
    """Tell whether too little came since the last training. A row that was taken back is always reason enough to train."""
    if care.num_deleted:
        return None
    trained_at = None if last is None else last.trained_at
    age_days = 0.0 if trained_at is None else (now - trained_at) / _SECONDS_OF_A_DAY
    is_old = customer.max_age_days is not None and age_days >= customer.max_age_days
    wanted = 1 if is_old else customer.min_new_rows
    if care.num_new >= wanted:
        return None
    asked = f"at least {wanted} {'is' if wanted == 1 else 'are'} asked for"
    return Reason(
        "too_few_new_rows", f"{care.num_new} new training rows since the last training where {asked}, and none deleted."
    )


def _too_many_bad(customer: Customer, care: Care) -> Reason | None:
    num_given = care.num_read + care.num_quarantined
    if care.num_quarantined <= customer.max_quarantined * num_given:
        return None
    where, problem = care.quarantine[0]
    return Reason(
        "too_many_bad_rows",
        f"{care.num_quarantined} of {num_given} rows are bad, at most {customer.max_quarantined:.0%} may be; "
        f"the first: {where} {problem}.",
        "Correct the rows (see the list), or raise max_quarantined.",
    )


def _collapsed(customer: Customer, care: Care) -> Reason | None:
    # Rounded, since (1 - 0.9) * 1000 is a little less than 100.
    if care.num_read > round((1 - customer.max_drop) * care.num_accepted, 6) or not care.num_accepted:
        return None
    return Reason(
        "collapsed",
        f"{care.num_read} good rows are left of {care.num_accepted} before; a drop of {customer.max_drop:.0%} or more is not "
        "taken for what was meant.",
        "Restore the rows; if they were deleted on purpose, raise max_drop to 1 for this customer.",
    )


def _too_few(customer: Customer, care: Care, num_train: int, num_holdout: int) -> Reason | None:
    if care.num_read < customer.min_rows or not num_train:
        found = f"{care.num_read} good rows ({num_train} for training) where at least {customer.min_rows} are asked for."
        return Reason("too_few_rows", found, "Wait for more rows, or lower min_rows.")
    if num_holdout < MIN_ROWS_COMPARED and customer.holdout > 0:
        held_out = f"{num_holdout or 'none'} of {care.num_read} good rows is in the holdout ({customer.holdout:.0%})"
        found = f"{held_out}; adapters are compared on {MIN_ROWS_COMPARED} at least."
        return Reason("too_few_rows", found, "Wait for more rows, raise holdout, or add a test file.")
    return None


def _one_of_all(job: JobSpec, rows: Sequence[DataRow]) -> Reason | None:
    if job.task_type == "SEQ_CLS":
        labels = {str(row.body["label"]) for row in rows}
        if len(labels) > 1:
            return None
        label = printable(labels.pop())[:60]
        return Reason(
            "one_label", f"all {len(rows)} training rows have the label '{label}'.", "Send rows of at least two labels."
        )
    if len(rows) > 1 and rows[0].kind != "text" and len(set(map(_answer, rows))) == 1:
        return Reason("one_answer", f"all {len(rows)} training rows have the same answer.", "Look at what exports these rows.")
    return None


def _answer(row: DataRow) -> str:
    if row.kind == "messages":
        return str([message["content"] for message in row.body["messages"] if is_trained(message)][-1])
    return str(row.body["completion"])
