"""`lorafleet history`: the journal of a registered model as people read it."""

import difflib
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from infra.errors import BadInput
from pipelines.journal import changes_of_champion, entry_at, history, models
from pipelines.references import parse_model
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pipelines.judging import Judgement
    from pipelines.promote import PromotionOutcome

VERDICT_COLUMNS = ("gate", "verdict", "why")
COLUMNS = ("generation", "when", "kind", "adapter", "before", "by", "reason")


def entries_of(workspace: Workspace, model: str) -> list[dict[str, Any]]:
    """Return the journal of <tenant>.<task>, oldest first, as JSON data. Raises BadInput for a model there is not."""
    tenant, task = parse_model(model)
    entries = history(workspace.store, tenant, task)
    if not entries:
        _refuse_unknown(workspace, tenant, task)
    return [{"tenant": tenant, "task": task, **asdict(entry)} for entry in entries]


def served_at(workspace: Workspace, model: str, at: str) -> dict[str, Any]:
    """Return who served <tenant>.<task> at a time, from its journal alone.

    The result has `adapter_id`, `base_id`, `generation` and `since` (when it became champion; seconds since the epoch), all None
    before the first promotion; `at`, and whether the model was `frozen`. Raises BadInput for a model there is not, or a time that
    is not understood or has not come.
    """
    moment = parse_time(at)
    tenant, task = parse_model(model)
    entries = history(workspace.store, tenant, task)
    if not entries:
        _refuse_unknown(workspace, tenant, task)
    last = entry_at(entries, moment)
    found = {"tenant": tenant, "task": task, "at": moment, "frozen": last is not None and last.kind == "freeze"}
    if last is None:
        return found | dict.fromkeys(("adapter_id", "base_id", "generation", "since"))
    became = changes_of_champion(entries[: entries.index(last) + 1])[-1]
    ids = {"adapter_id": became.adapter_id, "base_id": became.base_id}
    return found | ids | {"generation": became.generation, "since": became.at}


def parse_time(text: str) -> float:
    """Return a time of ISO 8601 as seconds since the epoch; one without a zone is UTC. Raises BadInput, also for the future."""
    try:
        read = datetime.fromisoformat(text)
        moment = (read if read.tzinfo is not None else read.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise BadInput(
            f"{text[:80]!r} is not a time; write it as ISO 8601, such as 2026-11-23T09:30:00+01:00 (without a zone it is UTC)."
        ) from None
    if moment > time.time():
        raise BadInput(f"{text[:80]!r} has not come yet; ask for a time up to now, {_utc(time.time())}.")
    return moment


def served_text(served: Mapping[str, Any]) -> str:
    """Return who served a model at a time as one sentence."""
    model, at = f"{served['tenant']}.{served['task']}", _utc(served["at"])
    if served["adapter_id"] is None:
        return f"{model} had no champion yet at {at}."
    frozen = "; it was frozen" if served["frozen"] else ""
    since = f"(generation {served['generation']}, champion since {_utc(served['since'])}{frozen})"
    return f"{served['adapter_id']} served {model} at {at} {since}."


def _utc(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _refuse_unknown(workspace: Workspace, tenant: str, task: str) -> None:
    known = models(workspace.store)
    if (tenant, task) in known:
        return
    names = [".".join(pair) for pair in known]
    close = difflib.get_close_matches(f"{tenant}.{task}", names, n=1)
    hint = f"Did you mean '{close[0]}'?" if close else f"There is: {', '.join(names[:10]) or 'none yet'}."
    raise BadInput(f"there is no registered model {tenant}.{task} in the store {workspace.store.uri}. {hint}")


def row_of(entry: Mapping[str, Any]) -> list[str]:
    """Return an entry as a row of a table with the columns of COLUMNS."""
    return [
        str(entry["generation"]),
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["at"])),
        f"{entry['kind']} (forced)" if entry["forced"] else entry["kind"],
        entry["adapter_id"],
        (entry["previous"] or "-")[:12],
        entry["actor"],
        entry["reason"],
    ]


def promotion_json(outcome: "PromotionOutcome", judgement: "Judgement | None" = None) -> dict[str, Any]:
    """Return what a promotion or rollback came to as JSON data; `verdicts` is None where no gates were asked."""
    entry = {"tenant": outcome.tenant, "task": outcome.task, **asdict(outcome.entry)}
    return entry | {"changed": outcome.changed, "note": outcome.note, "verdicts": _verdicts_json(judgement)}


def rejection_json(judgement: "Judgement") -> dict[str, Any]:
    """Return what a promotion that a gate refused came to as JSON data."""
    binding = judgement.binding
    return {"tenant": binding.adapter.tenant, **binding.body, "changed": False, "verdicts": _verdicts_json(judgement)}


def rows_of_verdicts(judgement: "Judgement") -> list[list[str]]:
    """Return verdicts as rows of a table with the columns of VERDICT_COLUMNS."""
    return [[one.gate, "passed" if one.passed else "refused", one.sentence] for one in judgement.verdicts]


def _verdicts_json(judgement: "Judgement | None") -> list[dict[str, Any]] | None:
    return None if judgement is None else [verdict.to_json() for verdict in judgement.verdicts]
