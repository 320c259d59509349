"""`lorafleet evaluate ADAPTER --forms`: one adapter in every form in which it may be served, on its own base and rows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infra.errors import BadInput
from pipelines.evaluate import Subject
from pipelines.workspace import Workspace
from workers.served import serve_forms


def evaluate_forms(
    workspace: Workspace, references: Sequence[str], *, base: Path | None = None, data: str | None = None
) -> dict[str, Any]:
    """Measure one adapter separate, hot-swapped, merged, and merged and quantised. Raises WrongBase before anything is computed.

    Returns `adapter_id`, `tenant`, `base_id`, `data`, `num_rows`, `num_rows_compared`, `base_checksum`, `advice` and `forms`: of
    each its `name`, `metrics`, `largest_logit_difference` to the separate form, and whether it `is_identical` to it.
    """
    if len(references) != 1:
        raise BadInput(f"--forms looks at one adapter at a time, and {len(references)} were named; give one of them.")
    subject = Subject(workspace, references[0])
    path = subject.find_base(base)
    source, rows = subject.rows(data)
    spec, max_length = subject.setting(path)
    served = serve_forms(path, spec, subject.stored.adapter, rows, max_length)
    return {
        "adapter_id": subject.stored.adapter_id,
        "tenant": subject.tenant,
        "base_id": subject.base_id,
        "data": source,
        **asdict(served),
    }


def forms_text(result: Mapping[str, Any]) -> str:
    """Return the forms as a table, and what follows from them."""
    width = max(len(form["name"]) for form in result["forms"]) + 2
    lines = [
        f"adapter {result['adapter_id']} on {result['num_rows']} rows of {result['data']}, base {result['base_id']}",
        f"{'form':<{width}}{'eval/loss':>12}{'largest logit difference':>28}",
    ]
    for form in result["forms"]:
        difference = "none, bit for bit" if form["is_identical"] else f"{form['largest_logit_difference']:.3g}"
        lines.append(f"{form['name']:<{width}}{form['metrics']['eval/loss']:>12.4f}{difference:>28}")
    if result["num_rows_compared"] < result["num_rows"]:
        lines.append(f"logits were compared on the first {result['num_rows_compared']} rows.")
    lines.append(f"the base's weights were the same before and after (sha256 {result['base_checksum'][:12]}…)")
    return "\n".join([*lines, *result["advice"]])
