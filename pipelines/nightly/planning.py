"""What a night does with a customer, told before its rows are read, and why: pure functions of what is known.

A listing and the last outcome decide. Equal signatures with the same base, recipe, gates and holdout mean that nothing is read.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipelines.nightly.customers import Customer
from pipelines.nightly.records import Row, Signature
from pipelines.nightly.state_key import state_key

FAILED_BEFORE, UNCHANGED, PINNED, TOO_FEW = "failed_before", "unchanged", "pinned", "too_few_new_rows"
_DAY_SECONDS = 86400.0
_OPEN = {
    "deadline": "the deadline came first",
    "budget": "the accelerator-hours were spent",
    "promotion_limit": "as many as may be were promoted before it",
    "canary": "the canaries stopped the night",
    "host_lost": "its host was lost",
    "service": "a service was away",
    "preempted": "it was preempted",
}


@dataclass(frozen=True)
class Skip:
    """Nothing is to be read or done; `row` is how the customer's night ends."""

    row: Row

    @property
    def because(self) -> str:
        """A word for why."""
        return self.row.reason

    @property
    def sentence(self) -> str:
        """Why, for a person."""
        return self.row.sentence


@dataclass(frozen=True)
class Look:
    """The rows are read; then its state key, and the care of its rows, decide whether it is trained."""

    because: str
    """A word for why: new, data, unknown, held, more_rows, or a reason that left it open before its rows were read."""
    sentence: str
    """Why, for a person."""
    resweep: bool = False
    """Whether a training would begin with a new search, because the gates kept refusing."""


@dataclass(frozen=True)
class Train:
    """The rows are read and, unless they must be held, trained on: also if few are new, or the state key is the last one."""

    because: str
    """A word for why: a reason that left its job open, trained, base, recipe, gates, holdout, max_age, resweep."""
    sentence: str
    """Why, for a person."""
    resweep: bool = False
    """As in Look."""


Decision = Skip | Look | Train


def decide(
    customer: Customer,
    last: Row | None,
    signature: Signature | None,
    now: float,
    base_id: str | None,
    recipe_digest: str,
    gates_digest: str,
) -> Decision:
    """Return what is done with a customer.

    Args:
        last: Its outcome of the last night that ended, None if there is none. Its `state_key` is that of its `data_digest`,
            `recipe_digest`, `gates_digest`, `base_id` and holdout; it has a `job_id` if a job was planned for it that night.
        signature: Of its files now; may be None for a pinned customer, whose files nobody needs to look at.
        now: Seconds since the epoch.
        base_id: Of the base that it would train on.
        recipe_digest: See `state_key.recipe_digest`.
        gates_digest: See `state_key.gates_digest`.
    """
    if customer.pin is not None:
        return Skip(_pinned(customer, last, now))
    if last is None or last.reason == PINNED:
        told = "it has no last night" if last is None else "it was pinned last night and is no more"
        return Look("new", f"Its rows are read: {told}.")
    resweep = is_resweep_due(customer, last)
    if not last.is_settled and last.job_id is not None:
        return Train(last.reason or last.status, f"It is taken up again: last night {_open_reason(last)}.", resweep)
    if last.is_settled and (signature is None or signature != last.signature):
        return Look("data", f"Its rows are read: {_moved_files(last.signature, signature)}.", resweep)
    if last.recipe_digest is None:
        return Look("unknown", "Its rows are read: its last night ended before it was known what it would train on.", resweep)
    moved = _moved(customer, last, base_id, recipe_digest, gates_digest)
    if moved:
        return Train(moved[0], f"It is trained: its {' and '.join(moved)} changed since last time.", resweep)
    if not last.is_settled:
        return Look(last.reason, f"Its rows are read: last night {_open_reason(last)}, before they were.", resweep)
    return _decide_unmoved(customer, last, now, resweep)


def _decide_unmoved(customer: Customer, last: Row, now: float, resweep: bool) -> Decision:
    """Decide where files, base, recipe, gates and holdout are as they were."""
    if last.status == "held":
        return Look("held", f"Its rows are read again: it is held ({last.reason}), and the limits may have changed.", resweep)
    if last.reason == TOO_FEW:
        return _decide_on_new_rows(customer, last, now, resweep)
    if resweep and last.status == "rejected" and last.sweep is None:  # a second search of this state would find the same
        return Train("resweep", f"It is searched anew: {last.num_rejections} challengers in a row were rejected.", True)
    if last.status == "failed" or last.reason == FAILED_BEFORE:
        return Skip(_skipped(customer, last, now, FAILED_BEFORE, _failed_sentence(customer, last)))
    since = "" if last.trained_at is None else f" It was trained {_days(now - last.trained_at)} ago."
    told = f"Its files, base, recipe and gates are as they were.{since}"
    row = _skipped(customer, last, now, UNCHANGED, told)
    return Skip(replace(row, care=replace(row.care, num_new=0, num_deleted=0)))


def _decide_on_new_rows(customer: Customer, last: Row, now: float, resweep: bool) -> Decision:
    num_new = last.care.num_new
    if num_new >= customer.min_new_rows:
        return Look("more_rows", f"Its {num_new} new rows are now enough (min_new_rows is {customer.min_new_rows}).", resweep)
    if num_new and is_old(customer, last, now):
        assert last.trained_at is not None
        age = _days(now - last.trained_at)
        sentence = f"Its {num_new} new rows are few, but it was trained {age} ago (max_age_days is {customer.max_age_days:g})."
        return Train("max_age", sentence, resweep)
    return Skip(_skipped(customer, last, now, TOO_FEW, last.sentence))


def place_in_line(customer: Customer, last: Row | None, decision: Decision) -> tuple[bool, bool, bool, int, float, str, str]:
    """Return what customers are queued by, least first.

    Canaries, then what an earlier night left open, then by priority, then who was trained longest ago. Who is skipped is last.
    """
    is_open = last is not None and not last.is_settled
    trained_at = 0.0 if last is None or last.trained_at is None else last.trained_at
    standing = (isinstance(decision, Skip), not customer.is_canary, not is_open)
    return (*standing, -customer.priority, trained_at, customer.tenant, customer.task)


def is_old(customer: Customer, last: Row, now: float) -> bool:
    """Tell whether the last training is longer ago than the customer's max_age_days."""
    if customer.max_age_days is None or last.trained_at is None:
        return False
    return now - last.trained_at >= customer.max_age_days * _DAY_SECONDS


def is_resweep_due(customer: Customer, last: Row) -> bool:
    """Tell whether the next training begins with a search: after each so many rejections in a row."""
    return (
        customer.resweep is not None and last.num_rejections > 0 and last.num_rejections % customer.resweep.after_rejections == 0
    )


def why(customer: Customer, last: Row | None, decision: Decision) -> list[str]:
    """Return sentences that say who a customer is, how its last night ended, and what is done with it and why."""
    sentences = [_who(customer)]
    if last is not None:
        sentences += [*_past(last), *_champion(last)]
    sentences.append(f"Tonight: {_action(decision)}. {decision.sentence}")
    if decision.__class__ is not Skip and decision.resweep:  # type: ignore[union-attr]
        sentences.append("A new search for hyper-parameters comes first, because its challengers kept being rejected.")
    step = decision.row.next_step if isinstance(decision, Skip) else ""
    return [*sentences, step] if step else sentences


def _action(decision: Decision) -> str:
    match decision:
        case Skip():
            return f"skipped ({decision.because})"
        case Look():
            return "its rows are read, which decides whether it is trained"
        case Train():
            return "trained"


def _who(customer: Customer) -> str:
    start = "from its champion" if customer.warm_start == "champion" else "from fresh weights"
    recipe = f", with the recipe {customer.recipe}" if customer.recipe is not None else ""
    canary = ", as a canary" if customer.is_canary else ""
    priority = f"with priority {customer.priority}{canary}"
    return f"{customer.name} has its rows in {customer.source} and trains {start}{recipe}, {priority}."


def _past(last: Row) -> list[str]:
    on = f" on {_date(last.ended_at)}" if last.ended_at else ""
    reason = f" ({last.reason})" if last.reason else ""
    failed = [verdict for verdict in last.verdicts if not verdict.get("passed")]
    verdicts = [f"The gate {verdict['gate']} refused: {verdict['sentence']}." for verdict in failed]
    told = [f"Last time{on}: {last.status}{reason}. {last.sentence}".rstrip(), *verdicts]
    if last.num_rejections > 1:
        told.append(f"{last.num_rejections} of its challengers in a row were rejected.")
    return told


def _champion(last: Row) -> list[str]:
    if last.champion_id is None:
        return ["It has no champion yet."]
    trained = "" if last.trained_at is None else f"; it was last trained on {_date(last.trained_at)}"
    return [f"Its champion was {last.champion_id[:12]}, generation {last.generation}{trained}."]


def _skipped(customer: Customer, last: Row, now: float, reason: str, sentence: str) -> Row:
    """Return tonight's row of a customer for whom nothing was done: what is known of it, without work or verdicts."""
    step = last.next_step if reason == FAILED_BEFORE else ""
    return replace(
        last,
        status="skipped",
        reason=reason,
        sentence=sentence,
        next_step=step,
        priority=customer.priority,
        is_canary=customer.is_canary,
        job_id=None,
        challenger=None,
        champion=None,
        base=None,
        verdicts=(),
        num_steps=0,
        num_tokens=0,
        seconds=0.0,
        cost=0.0,
        ended_at=now,
    )


def _pinned(customer: Customer, last: Row | None, now: float) -> Row:
    sentence = f"It is pinned to {customer.pin}: nothing is trained or promoted."
    return _skipped(customer, last or Row(customer.tenant, customer.task, "skipped"), now, PINNED, sentence)


def _failed_sentence(customer: Customer, last: Row) -> str:
    if last.reason == FAILED_BEFORE:
        return last.sentence
    told = f"{last.reason}: {last.sentence}" if last.sentence else last.reason
    return f"It failed on {_date(last.ended_at)}, and nothing changed since ({told})"


def _open_reason(last: Row) -> str:
    if last.reason in _OPEN:
        return _OPEN[last.reason]
    return "it was trained and awaited its verdict"


def _moved(customer: Customer, last: Row, base_id: str | None, recipe_digest: str, gates_digest: str) -> list[str]:
    """Name the parts of the state, beside the data, that are not those of the last outcome."""
    parts = {
        "base": (last.base_id, base_id),
        "recipe": (last.recipe_digest, recipe_digest),
        "gates": (last.gates_digest, gates_digest),
    }
    moved = [name for name, (before, after) in parts.items() if before != after]
    if moved or last.data_digest is None or base_id is None:
        return moved
    data, holdout = last.data_digest, customer.holdout
    key = state_key(customer.tenant, customer.task, base_id, recipe_digest, data, holdout, gates_digest)
    return [] if key == last.state_key else ["holdout"]


def _moved_files(before: Signature | None, now: Signature | None) -> str:
    if before is None or now is None:
        return "its files were never looked at"
    old, new = ({name: rest for name, *rest in one.files} for one in (before, now))
    told = {
        "new": [name for name in new if name not in old],
        "gone": [name for name in old if name not in new],
        "changed": [name for name in new if name in old and new[name] != old[name]],
    }
    return ", ".join(f"{_names(names)} {'is' if len(names) == 1 else 'are'} {word}" for word, names in told.items() if names)


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _days(seconds: float) -> str:
    days = seconds / _DAY_SECONDS
    return f"{days:.0f} days" if days >= 1.5 else "a day" if days >= 0.9 else f"{seconds / 3600:.0f} hours"


def _date(epoch_seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(epoch_seconds))
