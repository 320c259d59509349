"""From a customer whose rows are to be looked at to a pinned job, or to the row that says why there is none.

What is found is kept as a plan before anything is trained: whoever goes on with the night after a kill trains exactly that, also
if rows, champion or settings have moved since.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from infra.errors import BadInput, LorafleetError, ObjectNotFound, ServiceUnavailable, WorkFailed, WrongBase
from infra.records import decode_record
from infra.storage import Storage
from pipelines.gates import Gates
from pipelines.journal import Entry, read_head
from pipelines.nightly.care import Cared, look_after, save_quarantine
from pipelines.nightly.customers import Customer
from pipelines.nightly.forecast import Planned
from pipelines.nightly.holding import Reason
from pipelines.nightly.ledger import FleetLedger, Plan
from pipelines.nightly.planning import UNCHANGED, Look, Skip
from pipelines.nightly.records import Row
from pipelines.nightly.state_key import gates_digest, state_key
from pipelines.nightly.survey import Surveyor, carried, forgotten_row
from workers import layout
from workers.data.rows import Row as DataRow
from workers.data.store import load_rows
from workers.forgotten import TenantForgotten
from workers.job import JOB_FORMAT, Job
from workers.manifests import AdapterRef, read_manifest
from workers.spec import JobSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ready:
    """A customer whose job is pinned."""

    customer: Customer
    job: Job
    row: Row
    """As far as it is known before training."""
    gates: Gates
    resweep: bool = False
    """Whether a search for hyper-parameters is due first."""

    @property
    def key(self) -> tuple[str, str]:
        """(tenant, task)."""
        return self.customer.key


@dataclass
class Preparer:
    """Prepares customers of one night, one after the other."""

    surveyor: Surveyor
    ledger: FleetLedger
    night: str
    planned_before: set[tuple[str, str]] = field(default_factory=set)
    """Customers whose plan stands there since before this process began."""
    now: Callable[[], float] = time.time
    """Seconds since the epoch."""

    def prepare(self, one: Planned) -> Ready | Row:
        """Return a customer's pinned job, or how its night ends without one. Whatever goes wrong is its row."""
        try:
            return self._ready_as_planned(one) or self._look(one)
        except TenantForgotten:  # since the night looked at its customers
            return forgotten_row(one.customer)
        except ServiceUnavailable as error:
            return self._ended(one, "failed", "service", str(error))
        except LorafleetError as error:
            return self._with_settings(one, self._ended(one, "failed", "bad_job", str(error)))
        except Exception as error:  # a customer's data must not end the night, whatever it does to a library
            log.exception("customer %s could not be prepared", one.customer.name)
            return self._with_settings(one, self._ended(one, "failed", "error", f"{type(error).__name__}: {str(error)[:300]}"))

    def _ready_as_planned(self, one: Planned) -> Ready | None:
        if one.customer.key not in self.planned_before:
            return None
        plan = self.ledger.plan(self.night, *one.customer.key)
        if plan is None:
            return None
        return self._ready(one, Job.from_json(plan.job), plan.row)

    def _look(self, one: Planned) -> Ready | Row:
        customer, last, resolver = one.customer, one.last, self.surveyor.resolver
        head = read_head(self.store, *customer.key)
        if head is not None and head.kind == "freeze":
            step = f"To let it be trained again: lorafleet unfreeze {customer.name}."
            return self._ended(one, "held", "frozen", f"{head.actor} froze it ({head.reason or 'no reason given'}).", step)
        last_rows = partial(self._last_rows, customer, last)
        cared = look_after(customer, resolver.renderer, last, last_rows, resolver.open_uri, self.now())
        row = self._row(one, cared, head)
        if cared.hold is not None:
            save_quarantine(self.store, customer.tenant, cared)
            return self._with_past(replace(row, status="held", **_words(cared.hold)), last)
        skipped = self._skipped(one, cared, row)
        if skipped is not None:
            return skipped
        save_quarantine(self.store, customer.tenant, cared)
        return self._planned(one, cared, row, head)

    def _row(self, one: Planned, cared: Cared, head: Entry | None) -> Row:
        customer = one.customer
        recipe, base_id = self.surveyor.recipe(customer.job), self.surveyor.base_id(customer.job)
        gates = gates_digest(self.surveyor.gates(customer))
        return replace(
            carried(customer, one.last),
            signature=one.signature,
            care=cared.care,
            num_rows=len(cared.train),
            data_digest=cared.digest,
            recipe_digest=recipe,
            gates_digest=gates,
            base_id=base_id,
            state_key=state_key(*customer.key, base_id, recipe, cared.digest, customer.holdout, gates),
            champion_id=head.adapter_id if head else None,
            generation=head.generation if head else None,
            ended_at=self.now(),
        )

    def _with_past(self, row: Row, last: Row | None) -> Row:
        """Let a row that trains nothing keep the state of the last training: the next night compares with that."""
        kept = ("state_key", "data_digest", "recipe_digest", "gates_digest", "base_id", "num_rows")
        past: dict[str, Any] = {name: getattr(last, name) if last is not None else None for name in kept}
        return replace(row, **past | {"num_rows": past["num_rows"] or 0})

    def _skipped(self, one: Planned, cared: Cared, row: Row) -> Row | None:
        """Return the row of a customer whose rows give no reason to train; the state is then that of the last training."""
        decision, last = one.decision, one.last
        if not isinstance(decision, Look) or last is None or decision.resweep:
            return None
        if row.state_key == last.state_key and last.is_settled and last.trained_at is not None:
            said = "Its files were touched, and its rows are those it was trained on."
            return replace(self._with_past(row, last), status="skipped", reason=UNCHANGED, sentence=said)
        if cared.skip is not None and self._differs_in_data_alone(row, last):
            return replace(self._with_past(row, last), status="skipped", **_words(cared.skip))
        return None

    def _differs_in_data_alone(self, row: Row, last: Row) -> bool:
        same = ("base_id", "recipe_digest", "gates_digest")
        return all(getattr(row, name) == getattr(last, name) for name in same)

    def _planned(self, one: Planned, cared: Cared, row: Row, head: Entry | None) -> Ready:
        ref = None if head is None else AdapterRef(one.customer.tenant, head.base_id, head.adapter_id)
        trained = None if ref is None else self._training_of(ref)
        num_withdrawn = self._num_withdrawn(one.customer, trained, cared)
        spec = self._started_from(one.customer, ref, trained, num_withdrawn, cared)
        try:
            job = self.surveyor.resolver.resolve_rows(spec, cared.splits, is_rendered=True)
        except (WrongBase, BadInput):
            if spec.peft.init_adapter is None:
                raise
            job = self.surveyor.resolver.resolve_rows(one.customer.job, cared.splits, is_rendered=True)
        digest = None if job.test is None else job.test.digest
        row = replace(row, holdout_digest=digest, job_id=job.job_id, num_withdrawn=num_withdrawn or 0)
        self.ledger.keep_plan(self.night, Plan(str(row.state_key), job.to_json(), row))
        return self._ready(one, job, row)

    def _ready(self, one: Planned, job: Job, row: Row) -> Ready:
        decision = one.decision
        resweep = not isinstance(decision, Skip) and decision.resweep
        return Ready(one.customer, job, row, self.surveyor.gates(one.customer), resweep)

    def _started_from(
        self, customer: Customer, champion: AdapterRef | None, trained: Job | None, num_withdrawn: int | None, cared: Cared
    ) -> JobSpec:
        """Return the job with the champion as its start, where training may continue from it.

        Not if rows that it was trained on were withdrawn, or if that is not known: it would keep what was taken back.
        """
        spec = customer.job
        if customer.warm_start != "champion" or champion is None or trained is None:
            return spec
        if champion.base_id != self.surveyor.base_id(spec):
            return spec
        if num_withdrawn != 0 or not _is_alike(trained.spec, spec) or trained.labels != cared.labels:
            return spec
        return spec.model_copy(update={"peft": spec.peft.model_copy(update={"init_adapter": champion.adapter_id})})

    def _num_withdrawn(self, customer: Customer, trained: Job | None, cared: Cared) -> int | None:
        """Count the rows that the champion was trained on and that are not trained on any more; None if it is not known."""
        if trained is None:
            return None
        try:
            return cared.num_gone(load_rows(self.store, customer.tenant, trained.train.digest))
        except (ObjectNotFound, WorkFailed):
            return None

    def _training_of(self, ref: AdapterRef) -> Job | None:
        """Return the job an adapter came from; None if it was imported, merged, or its job is gone."""
        try:
            job_id: Any = read_manifest(self.store, ref).get("job_id")
            if job_id is None:
                return None
            key = layout.job_spec(ref.tenant, ref.base_id, job_id)
            return Job.from_json(decode_record(self.store.get(key)[0], JOB_FORMAT, key))
        except (BadInput, ObjectNotFound, WorkFailed):
            return None

    def _last_rows(self, customer: Customer, last: Row | None) -> list[DataRow]:
        assert last is not None
        assert last.train_digest is not None
        return load_rows(self.store, customer.tenant, last.train_digest)

    def _ended(self, one: Planned, status: Any, reason: str, sentence: str, step: str = "") -> Row:
        row = carried(one.customer, one.last)
        return replace(
            row, status=status, reason=reason, sentence=sentence, next_step=step, signature=one.signature, ended_at=self.now()
        )

    def _with_settings(self, one: Planned, row: Row) -> Row:
        """Let a failure that would come again be known by what it came of, so that it is not tried until that moves."""
        gates, recipe = gates_digest(self.surveyor.gates(one.customer)), self.surveyor.recipe(one.customer.job)
        base_id = self.surveyor.base_id(one.customer.job)
        return replace(row, base_id=base_id, recipe_digest=recipe, gates_digest=gates, data_digest=None, state_key=None)

    @property
    def store(self) -> Storage:
        return self.ledger.store


def _words(reason: Reason) -> dict[str, Any]:
    return {"reason": reason.reason, "sentence": reason.sentence, "next_step": reason.next_step}


def _is_alike(trained: JobSpec, spec: JobSpec) -> bool:
    """Tell whether an adapter of one job has the form that another job trains."""
    form = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}
    return trained.task_type == spec.task_type and trained.peft.model_dump(include=form) == spec.peft.model_dump(include=form)
