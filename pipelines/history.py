"""`lorafleet history`: the journal of a registered model as people read it."""

import difflib
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from infra.errors import BadInput
from pipelines.journal import history, models
from pipelines.references import parse_model
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pipelines.promote import PromotionOutcome

COLUMNS = ("generation", "when", "kind", "adapter", "before", "by", "reason")


def entries_of(workspace: Workspace, model: str) -> list[dict[str, Any]]:
    """Return the journal of <tenant>.<task>, oldest first, as JSON data. Raises BadInput for a model there is not."""
    tenant, task = parse_model(model)
    entries = history(workspace.store, tenant, task)
    if not entries:
        _refuse_unknown(workspace, tenant, task)
    return [{"tenant": tenant, "task": task, **asdict(entry)} for entry in entries]


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
        entry["kind"],
        entry["adapter_id"],
        (entry["previous"] or "-")[:12],
        entry["actor"],
        entry["reason"],
    ]


def promotion_json(outcome: "PromotionOutcome") -> dict[str, Any]:
    """Return what a promotion or rollback came to as JSON data."""
    entry = {"tenant": outcome.tenant, "task": outcome.task, **asdict(outcome.entry)}
    return entry | {"changed": outcome.changed, "note": outcome.note}
