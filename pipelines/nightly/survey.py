"""Looking at a whole fleet before anything is read: who its customers are, what listings say, and what is decided for each.

`nightly run` begins with it; `plan` and `nightly why` are nothing else. Ten thousand customers that did not change cost one
listing, one object of memory and no rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from infra.errors import BadInput, LorafleetError, ServiceUnavailable
from pipelines.gates import Gates, find_gates, parse_gates
from pipelines.nightly.customers import Customer, customers_of, signatures_of
from pipelines.nightly.forecast import Planned
from pipelines.nightly.found import taken_up
from pipelines.nightly.ledger import FleetLedger, Key
from pipelines.nightly.planning import Skip, decide, place_in_line
from pipelines.nightly.records import NightSummary, Row, Signature
from pipelines.nightly.spec import Fleet
from pipelines.nightly.state_key import gates_digest, recipe_digest
from pipelines.workspace import Workspace
from workers import layout
from workers.spec import BaseModelSpec, JobSpec

if TYPE_CHECKING:
    from workers.resolve import Resolver

DEFAULT_GATES = [{"kind": "better_than_champion"}, {"kind": "effect"}]
"""What holds where neither the fleet nor the home names gates: a night promotes nothing that is not better."""


@dataclass(frozen=True)
class Survey:
    """A fleet as it is tonight."""

    planned: tuple[Planned, ...]
    """Customers that are to be looked at, in the order in which they are taken up."""
    skipped: tuple[Row, ...]
    passed_over: tuple[Planned, ...]
    """Those of `skipped`, as they were decided."""
    refused: tuple[Row, ...]
    """Entries that cannot be a customer, and customers whose files cannot be looked at."""
    memory: Mapping[Key, Row]
    """How each customer's last night ended."""
    trend: tuple[NightSummary, ...]
    bases: Mapping[BaseModelSpec, str]
    """base_id of each base that is trained on."""

    @property
    def num_customers(self) -> int:
        return len(self.planned) + len(self.skipped) + len(self.refused)

    @property
    def num_champions(self) -> int:
        """Customers who had a champion when their last night ended."""
        rows = [one.last for one in self.planned] + list(self.skipped)
        return sum(row is not None and row.champion_id is not None for row in rows)


@dataclass
class Surveyor:
    """Looks at fleets; remembers what customers share."""

    workspace: Workspace
    resolver: "Resolver"
    _gates: dict[Path | None, Gates] = field(default_factory=dict)
    _bases: dict[BaseModelSpec, str | LorafleetError] = field(default_factory=dict)
    _recipes: dict[tuple[int, ...], tuple[str, JobSpec]] = field(default_factory=dict)

    def survey(self, fleet: Fleet, now: float) -> Survey:
        """Return what is decided for every customer. Raises BadInput and ServiceUnavailable for the fleet as a whole only."""
        ledger = FleetLedger(self.workspace.store, fleet.spec.name)
        memory, trend = ledger.memory()
        open_uri = self.workspace.services.open_store
        customers, refused = customers_of(fleet, open_uri, self.workspace.store)
        forgotten = self._forgotten()
        known = [one for one in customers if one.tenant not in forgotten]
        refused += [forgotten_row(one) for one in customers if one.tenant in forgotten]
        decided = [
            self._decided(one, memory.get(one.key), signature, now)
            for one, signature in zip(known, signatures_of(known, open_uri), strict=True)
        ]
        customers_seen = [one for one in decided if isinstance(one, Planned)]
        passed_over = [one for one in customers_seen if isinstance(one.decision, Skip)]
        planned = [one for one in customers_seen if not isinstance(one.decision, Skip)]
        planned.sort(key=lambda one: place_in_line(one.customer, one.last, one.decision))
        return Survey(
            planned=tuple(planned),
            skipped=tuple(one.decision.row for one in passed_over if isinstance(one.decision, Skip)),
            passed_over=tuple(passed_over),
            refused=(*refused, *(one for one in decided if isinstance(one, Row))),
            memory=memory,
            trend=tuple(trend),
            bases={spec: found for spec, found in self._bases.items() if isinstance(found, str)},
        )

    def gates(self, customer: Customer) -> Gates:
        """Return a customer's gates: its own file's, the home's, or DEFAULT_GATES."""
        if customer.gates not in self._gates:
            found = find_gates(customer.gates, self.workspace.settings.home)
            self._gates[customer.gates] = found or parse_gates(DEFAULT_GATES, "the default gates", Path.cwd())
        return self._gates[customer.gates]

    def recipe(self, job: JobSpec) -> str:
        """Return `recipe_digest`, computed once for the jobs that share a template."""
        parts = (job.peft, job.training, job.evaluation, job.base_model, job.data.format, job.data.validation_split)
        key = tuple(map(id, parts))
        if key not in self._recipes:
            self._recipes[key] = recipe_digest(job), job  # the job is kept, so that no other object gets these ids
        return self._recipes[key][0]

    def base_id(self, job: JobSpec) -> str:
        """Return the id of a job's base, looked at once. Raises BadInput if it cannot be read."""
        if job.base_model not in self._bases:
            try:
                self._bases[job.base_model] = self.resolver.identity(job).base_id
            except LorafleetError as error:
                self._bases[job.base_model] = error
        found = self._bases[job.base_model]
        if isinstance(found, LorafleetError):
            raise type(found)(str(found))
        return found

    def _decided(self, customer: Customer, last: Row | None, signature: Signature | LorafleetError, now: float) -> Planned | Row:
        if isinstance(signature, LorafleetError) and customer.pin is None:
            return _unseen(customer, last, signature, now)
        seen = None if isinstance(signature, LorafleetError) else signature
        try:
            base_id = self.base_id(customer.job)
        except LorafleetError as error:
            return _failed(customer, last, "bad_base", error, now)
        customer, last = taken_up(customer, last, base_id)
        gates = gates_digest(self.gates(customer))
        return Planned(customer, decide(customer, last, seen, now, base_id, self.recipe(customer.job), gates), last, seen)

    def _forgotten(self) -> set[str]:
        prefix = layout.forgotten_tenants()
        return {info.key.removeprefix(prefix).removesuffix(".json") for info in self.workspace.store.list(prefix)}


def carried(customer: Customer, last: Row | None) -> Row:
    """Return the beginning of tonight's row: what is known of the past, and nothing of tonight."""
    fresh = Row(customer.tenant, customer.task, "held", priority=customer.priority, is_canary=customer.is_canary)
    if last is None:
        return fresh
    kept = ("train_digest", "holdout_digest", "data_digest", "recipe_digest", "gates_digest", "num_rows", "care", "base_id",
            "champion_id", "num_withdrawn", "generation", "trained_at", "num_rejections", "state_key", "recipe")  # fmt: skip
    return replace(fresh, **{name: getattr(last, name) for name in kept})


def remembered(memory: Mapping[Key, Row], rows: Iterable[Row]) -> list[Row]:
    """Return what the next night compares with: tonight's rows, and those of customers that are not listed at the moment."""
    return list((dict(memory) | {(row.tenant, row.task): row for row in rows}).values())


def customers_named(planned: Sequence[Planned], rows: Iterable[Row], tenant: str) -> list[Key]:
    """Return (tenant, task) of all of a tenant's customers, planned or with a row."""
    keys = [one.customer.key for one in planned] + [(row.tenant, row.task) for row in rows]
    return sorted({key for key in keys if key[0] == tenant})


def _unseen(customer: Customer, last: Row | None, error: LorafleetError, now: float) -> Row:
    if isinstance(error, ServiceUnavailable):
        return _failed(customer, last, "service", error, now)
    if isinstance(error, BadInput):
        return _failed(customer, last, "no_data", error, now)
    return _failed(customer, last, "unreadable", error, now)


def _failed(customer: Customer, last: Row | None, reason: str, error: LorafleetError, now: float) -> Row:
    return replace(carried(customer, last), status="failed", reason=reason, sentence=str(error), ended_at=now)


def forgotten_row(customer: Customer) -> Row:
    """Return the row of a customer whose tenant was forgotten: nothing of its past, and nothing of tonight."""
    return Row(
        customer.tenant,
        customer.task,
        "skipped",
        "forgotten",
        "This tenant was forgotten: nothing of it is read or kept.",
        f"Leave it out of the fleet's file; or, to take it in again: lorafleet tenant forget {customer.tenant} --undo.",
    )
