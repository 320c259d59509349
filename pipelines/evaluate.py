"""`lorafleet evaluate` and `generate`: stored adapters on their own base, beside the plain base. A wrong base is refused."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from infra.errors import BadInput, ObjectNotFound
from infra.records import decode_record
from pipelines.references import find_reference
from pipelines.workspace import Workspace
from workers import layout
from workers.adapter_store import StoredAdapter, load_adapter
from workers.bases import materialise, read_base
from workers.data.contract import prompt_contract
from workers.data.rows import Row
from workers.data.splits import load_splits
from workers.data.store import load_rows
from workers.evaluate import Answer, Bench
from workers.identity import identify
from workers.job import JOB_FORMAT, Job
from workers.manifests import check_base
from workers.spec import BaseModelSpec, DataSpec, EvaluationSpec

DEFAULT_MAX_LENGTH = 1024


@dataclass
class Trial:
    """One adapter, checked, with what is known of the job it came from (None for an imported one)."""

    workspace: Workspace
    reference: str
    base: Path | None
    """Folder of the base to try it on; None: where the job found it, or the store's copy."""

    @cached_property
    def stored(self) -> StoredAdapter:
        found = find_reference(self.workspace.store, self.reference)
        return load_adapter(self.workspace.store, found.tenant, found.base_id, found.adapter_id)

    @property
    def tenant(self) -> str:
        return str(self.stored.manifest["tenant"])

    @property
    def base_id(self) -> str:
        return str(self.stored.manifest["base_id"])

    @cached_property
    def job(self) -> Job | None:
        job_id = self.stored.manifest.get("job_id")
        if job_id is None:
            return None
        key = layout.job_spec(self.tenant, self.base_id, job_id)
        try:
            return Job.from_json(decode_record(self.workspace.store.get(key)[0], JOB_FORMAT, key))
        except ObjectNotFound:
            return None

    @cached_property
    def base_path(self) -> Path:
        """The folder of the right base. Raises WrongBase, saying what differs, if the one that was named is another."""
        store, cache_dir = self.workspace.store, self.workspace.services.cache_dir
        if self.base is None:
            hint = Path(self.job.base.path) if self.job is not None else None
            return materialise(self.base_id, hint, store, cache_dir)
        identity = identify(self.base, cache_dir)
        trained_on = read_base(store, self.base_id)
        check_base(self.stored.manifest, identity, prompt_contract=prompt_contract(self.base), trained_on=trained_on)
        return self.base

    @cached_property
    def bench(self) -> Bench:
        spec = self.job.spec.base_model if self.job is not None else BaseModelSpec(name_or_path=str(self.base_path))
        max_length = self.job.spec.training.max_length if self.job is not None else DEFAULT_MAX_LENGTH
        return Bench(self.base_path, spec, max_length)

    def rows(self, data: str | None, format: str = "auto") -> tuple[str, list[Row]]:
        """Return what is measured on, and its name: a file, or the job's test rows, or its validation rows."""
        if data is not None:
            return data, load_splits(DataSpec.model_validate({"train": data, "format": format}), Path.cwd()).train
        known = self.stored.manifest.get("data", {})
        for split in ("test", "validation"):
            if known.get(split):
                return split, load_rows(self.workspace.store, self.tenant, known[split])
        raise BadInput(
            f"the adapter {self.stored.adapter_id} was trained without test or validation rows; name some with --data."
        )

    def evaluation(self, generate: int | None) -> EvaluationSpec:
        """Return what to measure: as the job asked, with another number of answers if one is given."""
        asked = self.job.spec.evaluation if self.job is not None else EvaluationSpec()
        return asked if generate is None else asked.model_copy(update={"generate": generate})


def evaluate(
    workspace: Workspace,
    references: Sequence[str],
    *,
    base: Path | None = None,
    data: str | None = None,
    generate: int | None = None,
) -> dict[str, Any]:
    """Measure adapters of one base, and the plain base, on the same rows. Raises WrongBase before anything is computed."""
    trials = [Trial(workspace, reference, base) for reference in references]
    for trial in trials:
        if trial.base_id != trials[0].base_id:
            raise BadInput("these adapters belong to different bases; evaluate them in commands of their own.")
    first = trials[0]
    source, rows = first.rows(data)
    evaluation = first.evaluation(generate)
    measured = [{"adapter_id": None, "metrics": first.bench.evaluate(None, rows, evaluation)}]
    for trial in trials:
        metrics = first.bench.evaluate(trial.stored.adapter, rows, evaluation)
        measured.append({"adapter_id": trial.stored.adapter_id, "reference": trial.reference, "metrics": metrics})
    return {"tenant": first.tenant, "base_id": first.base_id, "data": source, "num_rows": len(rows), "measured": measured}


def evaluation_text(result: dict[str, Any]) -> str:
    """Return an evaluation as a small table in plain text."""
    names = list(result["measured"][0]["metrics"])
    head = f"{'':<34}" + "".join(f"{name.removeprefix('eval/'):>17}" for name in names)
    lines = [f"{result['num_rows']} rows of {result['data']}, base {result['base_id']}", head]
    for row in result["measured"]:
        label = "plain base" if row["adapter_id"] is None else row["adapter_id"]
        lines.append(f"{label:<34}" + "".join(f"{row['metrics'][name]:>17.4f}" for name in names))
    return "\n".join(lines)


def generate(
    workspace: Workspace,
    reference: str,
    *,
    prompt: str | None,
    data: str | None,
    limit: int,
    base: Path | None = None,
    max_new_tokens: int | None = None,
) -> list[Answer]:
    """Generate answers of one adapter, to a prompt or to the first rows of a file (or of the job's own held-out rows)."""
    trial = Trial(workspace, reference, base)
    tokens = max_new_tokens or trial.evaluation(None).max_new_tokens
    if prompt is None:
        return trial.bench.answers(trial.stored.adapter, trial.rows(data)[1][:limit], tokens)
    return trial.bench.answers(trial.stored.adapter, [_row_of(trial, prompt)], tokens)


def _row_of(trial: Trial, prompt: str) -> Row:
    """Put a prompt into the form of the rows the adapter was trained on."""
    known = trial.stored.manifest.get("data", {})
    kind = load_rows(trial.workspace.store, trial.tenant, known["train"])[0].kind if known.get("train") else "messages"
    if kind == "messages":
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "-"}]
        return Row({"messages": messages}, "the prompt")
    return Row({"prompt": prompt, "completion": "-"}, "the prompt")
