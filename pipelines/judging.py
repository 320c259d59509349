"""Running the gates on one case: challenger, champion and plain base on the same rows.

A `Jury` is made once per command. Each time it is asked it judges against the journal's head as it is then, and keeps the scores
as evidence bound to that head. An adapter's own scores on some rows do not depend on who is champion, so they are measured once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from infra.errors import BadInput, WorkFailed
from infra.storage import Storage
from infra.strict import parse
from pipelines.bootstrap import Improvement, improvement
from pipelines.evaluate import Subject
from pipelines.evidence import Binding, Evaluation, find_evaluation, keep_evaluation
from pipelines.gates import Gate, Gates, Side, Verdict, data_of, finite_parts, metrics_of
from pipelines.journal import Entry
from pipelines.workspace import Workspace
from workers.data.rows import Row, canonical_rows, digest_of
from workers.data.splits import load_splits
from workers.evaluate import Bench
from workers.manifests import AdapterRef
from workers.scores import GENERATED, PER_TOKEN, RowScores
from workers.spec import BaseModelSpec, DataSpec


@dataclass(frozen=True)
class Judgement:
    """What the gates said of one case."""

    binding: Binding
    verdicts: tuple[Verdict, ...]
    evaluations: tuple[str, ...]
    """Keys of the evidence with the scores."""
    gates: tuple[Mapping[str, Any], ...]
    """The gates as written."""

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts)


@dataclass(frozen=True)
class RowSet:
    """Rows that are compared on."""

    rows: list[Row]
    digest: str


@dataclass(frozen=True)
class Seat:
    """Where rows are measured: a base, how it is held, and how rows are rendered."""

    subject: Subject
    """An adapter of that base, with that prompt contract."""
    path: Path
    spec: BaseModelSpec
    max_length: int
    labels: tuple[str, ...]


@dataclass
class Findings:
    """What does not change while a command runs, found once for all of its juries. Threads may share it."""

    bases: dict[tuple[str, str, str], Path] = field(default_factory=dict)
    """Folders that were found to hold a base and its prompt contract, by these two and the job that led there."""
    files: dict[tuple[Path, str], RowSet] = field(default_factory=dict)
    """Rows of the files that gates name, by the folder they start from and the name."""


@dataclass
class Jury:
    """Judges adapters by the gates of a file.

    Args:
        base: A folder with the challengers' base; None looks where their jobs found it, and in the store.
        excused: Let a gate that cannot be run count as failed instead of raising, for a promotion that is forced.
        findings: Those of other juries of the command.
    """

    workspace: Workspace
    gates: Gates
    base: Path | None = None
    excused: bool = False
    last: Judgement | None = None
    """The last judgement, for whoever shows it."""
    known: dict[tuple[str, str | None, str, bool], RowScores] = field(default_factory=dict)
    """What was measured: by challenger, adapter (None: the plain base), rows, and whether answers were generated."""
    effects: dict[str, bool] = field(default_factory=dict)
    """Challengers of which it is known whether they move their base's logits."""
    findings: Findings = field(default_factory=Findings)
    held_out: dict[AdapterRef, RowSet] = field(default_factory=dict)
    """Rows of the challengers' own jobs that are compared on."""
    _subjects: dict[AdapterRef, Subject] = field(default_factory=dict)
    _bench: tuple[Any, Bench] | None = None

    def judge(self, challenger: AdapterRef, task: str, head: Entry | None) -> Judgement:
        """Run all gates against the champion that `head` names (None: the plain base), and keep the scores as evidence.

        Raises BadInput with one sentence if a gate cannot be run (a file is missing, there are no rows, a metric does not fit),
        WorkFailed if a gate of another package fails.
        """
        case = Case(self, challenger, task, head)
        if not self.excused:
            for data in data_of(self.gates.gates):  # what is missing is told before anything is computed
                case.row_set(data)
        verdicts = tuple(self._verdict(gate, case) for gate in self.gates.gates)
        self.last = Judgement(case.binding, verdicts, tuple(case.keep()), self.gates.written)
        return self.last

    def _verdict(self, gate: Gate, case: Case) -> Verdict:
        try:
            return _run(gate, case)
        except (BadInput, WorkFailed) as error:
            if not self.excused:
                raise
            return Verdict(gate.name, False, f"could not be run: {str(error).rstrip('.')}")

    def subject(self, ref: AdapterRef) -> Subject:
        """Return an adapter to look at; read once."""
        return self._subjects.setdefault(ref, Subject(self.workspace, ref.adapter_id, ref.tenant))

    def find_base(self, subject: Subject) -> Path:
        """Return a folder with an adapter's base, where nobody named one; looked for once."""
        hint = subject.job.base.path if subject.job is not None else subject.stored.adapter_id
        key = (subject.base_id, str(subject.stored.manifest.get("prompt_contract")), hint)
        if key not in self.findings.bases:
            self.findings.bases[key] = subject.find_base(None)
        return self.findings.bases[key]

    def bench(self, seat: Seat) -> Bench:
        """Load a base to measure on; the last one stays loaded."""
        key = (seat.path, seat.spec, seat.max_length, seat.labels)
        if self._bench is None or self._bench[0] != key:
            self._bench = None  # one base in memory at a time
            self._bench = (key, Bench(*key[:3], labels=seat.labels))
        return self._bench[1]


def _run(gate: Gate, case: Case) -> Verdict:
    """Ask a gate. One that another package brings may fail in any way: then the promotion fails, with the gate's name."""
    try:
        verdict = gate.evaluate(case)
    except (BadInput, WorkFailed):
        raise
    except Exception as error:
        raise WorkFailed(
            f"the gate '{gate.name}' failed ({type(error).__name__}: {error}); correct it, or leave it out."
        ) from error
    if not isinstance(verdict, Verdict):
        raise WorkFailed(f"the gate '{gate.name}' returned {type(verdict).__name__}, expected a Verdict; correct it.")
    return verdict


@dataclass
class Case:
    """One adapter that is to become champion of a task: the `GateContext` of its gates."""

    jury: Jury
    challenger: AdapterRef
    task: str
    champion: Entry | None
    _sets: dict[str | None, RowSet] = field(default_factory=dict)
    _stored: dict[str, Mapping[str, RowScores]] = field(default_factory=dict)
    _scores: dict[str, dict[str, RowScores]] = field(default_factory=dict)
    """By rows and side: what the gates have asked for."""

    @property
    def store(self) -> Storage:
        return self.jury.workspace.store

    @property
    def folder(self) -> Path:
        return self.jury.gates.folder

    @property
    def subject(self) -> Subject:
        return self.jury.subject(self.challenger)

    @property
    def manifest(self) -> Mapping[str, Any]:
        return self.subject.stored.manifest

    @property
    def binding(self) -> Binding:
        return Binding(self.challenger, self.task, self.champion, self.jury.gates.digest)

    @cached_property
    def champion_subject(self) -> Subject:
        """The champion as an adapter to look at; there is one."""
        assert self.champion is not None
        return self.jury.subject(AdapterRef(self.challenger.tenant, self.champion.base_id, self.champion.adapter_id))

    @cached_property
    def path(self) -> Path:
        """A folder with the challenger's base."""
        if self.jury.base is not None:
            return self.subject.find_base(self.jury.base)
        return self.jury.find_base(self.subject)

    @cached_property
    def setting(self) -> tuple[BaseModelSpec, int]:
        """How the challenger's base is held, and where everybody's rows are cut."""
        return self.subject.setting(self.path)

    @cached_property
    def described_setting(self) -> dict[str, Any]:
        """All that scores depend on beside adapters and rows, as JSON data."""
        spec, max_length = self.setting
        held = spec.model_dump(mode="json", include={"dtype", "quantization"})
        asked = self.subject.evaluation(None).model_dump(mode="json", include={"max_new_tokens", "format_pattern"})
        return {**held, **asked, "max_length": max_length}

    def row_set(self, data: str | None) -> RowSet:
        """Read the rows that a gate names, once. Raises BadInput if there are none."""
        if data not in self._sets:
            self._sets[data] = self._held_out() if data is None else self._file(data)
        return self._sets[data]

    def _held_out(self) -> RowSet:
        found = self.jury.held_out
        if self.challenger not in found:
            found[self.challenger] = _row_set(self._rows_of_job())
        return found[self.challenger]

    def _file(self, data: str) -> RowSet:
        found, key = self.jury.findings.files, (self.folder, data)
        if key not in found:
            found[key] = _row_set(self._rows_of_file(data))
        return found[key]

    def _rows_of_file(self, data: str) -> list[Row]:
        open_uri = self.jury.workspace.services.open_store
        splits = load_splits(parse(DataSpec, {"train": data}, "a gate's data"), self.folder, open_uri)
        return splits.test or splits.validation or splits.train

    def _rows_of_job(self) -> list[Row]:
        known = self.manifest.get("data", {})
        if not any(known.get(split) for split in ("test", "validation")) and "merge" not in self.manifest:
            raise BadInput(
                f"there are no rows to compare on: the adapter {self.challenger.adapter_id[:12]} was trained without test or "
                "validation rows; name a file in the gates, as 'data: held-out.jsonl'."
            )
        return self.subject.rows(None)[1]

    def scores(self, side: Side, data: str | None, metric: str) -> RowScores:
        """See `GateContext`."""
        rows = self.row_set(data)
        answers = bool(GENERATED & {metric, *metrics_of(self.jury.gates.gates, data)})
        found = self._scores.setdefault(rows.digest, {})
        if side not in found or (answers and found[side].exact_match is None):
            found[side] = self._before(side, rows, answers) or self._measure(side, rows, answers)
        return found[side]

    def compare(self, against: Side, data: str | None, metric: str, confidence: float, seed: int) -> Improvement:
        """See `GateContext`."""
        if against == "champion" and metric in PER_TOKEN and not self._shares_tokens():
            raise BadInput(
                f"{metric} is counted in tokens, and the champion's base or tokenizer is another; compare eval/bits_per_byte or "
                "eval/exact_match, or give --force and a reason."
            )
        mine, other = (finite_parts(self, side, data, metric) for side in ("challenger", against))
        return improvement(mine, other, metric, confidence, seed)

    def has_effect(self) -> bool:
        """See `GateContext`."""
        known, adapter_id = self.jury.effects, self.challenger.adapter_id
        if adapter_id not in known:
            known[adapter_id] = self.jury.bench(self.seat("challenger")).moves_logits(self.subject.stored.adapter)
        return known[adapter_id]

    def keep(self) -> Iterator[str]:
        """Keep the scores of each data set as evidence and yield the keys."""
        for digest, scores in self._scores.items():
            num_rows = next(iter(scores.values())).num_rows
            yield keep_evaluation(self.store, self.binding, Evaluation(digest, num_rows, self.described_setting, scores))

    def _before(self, side: Side, rows: RowSet, answers: bool) -> RowScores | None:
        """Return what this command, or an earlier one that asked the very same question, has measured of a side."""
        for with_answers in {answers, True}:
            known = self.jury.known.get(self.key(side, rows.digest, with_answers))
            if known is not None:
                return known
        if rows.digest not in self._stored:
            self._stored[rows.digest] = find_evaluation(self.store, self.binding, rows.digest, self.described_setting)
        stored = self._stored[rows.digest].get(side)
        return stored if stored is not None and (stored.exact_match is not None or not answers) else None

    def _measure(self, side: Side, rows: RowSet, answers: bool) -> RowScores:
        worn = self.champion_subject if side == "champion" else self.subject
        adapter = None if side == "base" else worn.stored.adapter
        found = self.jury.bench(self.seat(side)).scores(adapter, rows.rows, self.subject.evaluation(None), answers=answers)
        self.jury.known[self.key(side, rows.digest, answers)] = found
        return found

    def key(self, side: Side, digest: str, answers: bool) -> tuple[str, str | None, str, bool]:
        """Return the key of a measurement in `Jury.known`."""
        return self.challenger.adapter_id, self._identity(side), digest, answers

    def _identity(self, side: Side) -> str | None:
        if side == "champion":
            return self.champion_subject.stored.adapter_id
        return self.challenger.adapter_id if side == "challenger" else None

    def seat(self, side: Side) -> Seat:
        """Return where a side is measured.

        The champion is on its own base as it was trained on, rows cut where the challenger's are.
        """
        own, max_length = self.setting
        if side != "champion":
            return Seat(self.subject, self.path, own, max_length, self.subject.stored.adapter.labels)
        champion = self.champion_subject
        path = self.path if self._shares_tokens() else self.jury.find_base(champion)
        spec, _ = champion.setting(path)
        alike = path == self.path and _held(spec) == _held(own)
        return Seat(champion, path, own if alike else spec, max_length, champion.stored.adapter.labels)

    def _shares_tokens(self) -> bool:
        """Whether champion and challenger have one base, tokenizer and chat template."""
        mine, other = self.manifest, self.champion_subject.stored.manifest
        return all(mine.get(key) == other.get(key) for key in ("base_id", "prompt_contract"))


def _row_set(rows: list[Row]) -> RowSet:
    return RowSet(rows, digest_of(canonical_rows(rows)))


def _held(spec: BaseModelSpec) -> tuple[Any, ...]:
    return spec.dtype, spec.quantization, spec.trust_remote_code
