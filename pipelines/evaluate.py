"""`lorafleet evaluate` and `generate`: stored adapters on their own base, beside the plain base. A wrong base is refused."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from infra.errors import BadInput, ObjectNotFound
from infra.records import decode_record
from infra.strict import parse
from pipelines.references import find_reference
from pipelines.workspace import Workspace
from workers import layout
from workers.adapter_store import StoredAdapter, load_adapter
from workers.bases import materialise, read_base
from workers.data.contract import prompt_contract
from workers.data.rows import Row
from workers.data.splits import load_splits
from workers.data.store import load_rows
from workers.evaluate import Bench
from workers.identity import identify
from workers.job import JOB_FORMAT, Job
from workers.manifests import check_base
from workers.spec import BaseModelSpec, DataSpec, EvaluationSpec

DEFAULT_MAX_LENGTH = 1024


@dataclass
class Subject:
    """One adapter that is looked at, with what is known of the job it came from (None for an imported one)."""

    workspace: Workspace
    reference: str
    expected_tenant: str | None = None
    """Whose adapter the reference must name; None looks at all tenants."""

    @cached_property
    def stored(self) -> StoredAdapter:
        """The adapter, read back and whole. Raises BadInput if it is not, or is not there."""
        found = find_reference(self.workspace.store, self.reference, self.expected_tenant)
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

    def find_base(self, named: Path | None) -> Path:
        """Return a folder with the adapter's base: the one that was named, or where the job found it, or the store's copy.

        Raises WrongBase, saying what differs, if the folder holds another base, tokenizer or chat template.
        """
        path = self._known_base() if named is None else named
        self.check(path)
        return path

    def _known_base(self) -> Path:
        manifest = self.stored.manifest
        if self.job is not None:
            hint: str | None = self.job.base.path
        else:
            hint = manifest.get("imported", manifest.get("merge", {})).get("base_path")
        services = self.workspace.services
        return materialise(self.base_id, Path(hint) if hint else None, services.store, services.cache_dir)

    def check(self, path: Path) -> None:
        """Raise WrongBase, saying what differs, unless the folder holds the adapter's base and its prompt contract."""
        identity = identify(path, self.workspace.services.cache_dir)
        trained_on = read_base(self.workspace.store, self.base_id)
        check_base(self.stored.manifest, identity, trained_on=trained_on)  # before the tokenizer, which another base may lack
        check_base(self.stored.manifest, identity, prompt_contract=prompt_contract(path))

    def setting(self, path: Path) -> tuple[BaseModelSpec, int]:
        """Return how the base in `path` is to be held, and where rows are cut: as in the job, or the jobs of what was merged."""
        if self.job is not None:
            return self.job.spec.base_model, self.job.spec.training.max_length
        merged = self.stored.manifest.get("merge")
        if merged is not None:
            return parse(BaseModelSpec, merged["base_model"], "the manifest"), int(merged["max_length"])
        return BaseModelSpec(name_or_path=str(path)), DEFAULT_MAX_LENGTH

    def bench(self, path: Path) -> Bench:
        """Load the base as the job had it."""
        return Bench(path, *self.setting(path), labels=self.stored.adapter.labels)

    def rows(self, data: str | None) -> tuple[str, list[Row]]:
        """Return what is measured on, and its name: rows of a file, or the job's test rows, or its validation rows.

        Of a merged adapter without a file: those of its parents, one after the other, where all are of its own tenant.
        """
        if data is not None:
            splits = load_splits(parse(DataSpec, {"train": data}, "--data"), Path.cwd(), self.workspace.services.open_store)
            return data, splits.test or splits.validation or splits.train
        parents = self.stored.manifest.get("merge", {}).get("parents", [])
        if parents and all(parent["tenant"] == self.tenant for parent in parents):
            found = [Subject(self.workspace, parent["adapter_id"], self.tenant).rows(None)[1] for parent in parents]
            return "the parents", [row for rows in found for row in rows]
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
    """Measure adapters of one base, and the plain base, on the same rows. Raises WrongBase before anything is computed.

    Returns `tenant`, `base_id`, `data`, `num_rows` and `measured`: one object per adapter, the plain base (whose adapter_id is
    None) first.
    """
    subjects = [Subject(workspace, reference) for reference in references]
    first = subjects[0]
    _refuse_mixtures(subjects, data)
    path = first.find_base(base)
    for subject in subjects[1:]:
        subject.check(path)
    source, rows = first.rows(data)
    evaluation, bench = first.evaluation(generate), first.bench(path)
    measured: list[dict[str, Any]] = [{"adapter_id": None, "reference": None, "metrics": bench.evaluate(None, rows, evaluation)}]
    for subject in subjects:
        metrics = bench.evaluate(subject.stored.adapter, rows, evaluation)
        measured.append({"adapter_id": subject.stored.adapter_id, "reference": subject.reference, "metrics": metrics})
    return {"tenant": first.tenant, "base_id": first.base_id, "data": source, "num_rows": len(rows), "measured": measured}


def _refuse_mixtures(subjects: Sequence[Subject], data: str | None) -> None:
    """One base is loaded; and nobody's adapter meets another tenant's rows unless a person names the rows."""
    if len({subject.base_id for subject in subjects}) > 1:
        raise BadInput("these adapters belong to different bases; evaluate them in commands of their own.")
    tenants = sorted({subject.tenant for subject in subjects})
    if len(tenants) > 1 and data is None:
        raise BadInput(f"these adapters belong to different tenants ({', '.join(tenants)}); name the rows with --data.")


def evaluation_text(result: Mapping[str, Any]) -> str:
    """Return an evaluation as a small table in plain text."""
    names = list(dict.fromkeys(name for row in result["measured"] for name in row["metrics"]))
    head = f"{'':<34}" + "".join(f"{name.removeprefix('eval/'):>17}" for name in names)
    lines = [f"{result['num_rows']} rows of {result['data']}, base {result['base_id']}", head]
    for row in result["measured"]:
        label = "plain base" if row["adapter_id"] is None else row["adapter_id"]
        lines.append(f"{label:<34}" + "".join(f"{row['metrics'].get(name, math.nan):>17.4f}" for name in names))
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
) -> list[dict[str, Any]]:
    """Let an adapter answer a prompt, or the first rows of a file (or of the job's own held-out rows).

    Returns objects with `where`, `generated` and `reference`: the answer that stands in the row, None for a prompt.
    """
    if prompt is not None and data is not None:
        raise BadInput("--prompt and --data ask for two things; give one of them.")
    subject = Subject(workspace, reference)
    path = subject.find_base(base)
    rows = subject.rows(data)[1][:limit] if prompt is None else [_row_of(subject, prompt)]
    answers = subject.bench(path).answers(subject.stored.adapter, rows, max_new_tokens or subject.evaluation(None).max_new_tokens)
    return [asdict(answer) | ({"reference": None} if prompt is not None else {}) for answer in answers]


def answers_text(answers: Sequence[Mapping[str, Any]]) -> str:
    """Return answers as lines: an answer alone for a prompt, beside what the row says otherwise."""
    if all(answer["reference"] is None for answer in answers):
        return "\n".join(answer["generated"] for answer in answers)
    return "\n".join(
        f"{answer['where']}\n  generated  {answer['generated']}\n  expected   {answer['reference']}" for answer in answers
    )


def _row_of(subject: Subject, prompt: str) -> Row:
    """Put a prompt into the form of the rows the adapter was trained on."""
    known = subject.stored.manifest.get("data", {})
    kind = load_rows(subject.workspace.store, subject.tenant, known["train"])[0].kind if known.get("train") else "messages"
    if kind == "messages":
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "-"}]
        return Row({"messages": messages}, "the prompt")
    return Row({"prompt": prompt, "completion": "-"}, "the prompt")
