"""Who the customers of a fleet are tonight: listed, discovered and from tables, each with its job and settings.

What is said in several places is laid over one another: defaults, then discovery, then a table, then a customer's own entry. What
cannot be a customer (a hostile name in a bucket, a bad cell of a table) becomes a failed row, so that the others have their
night; a mistake in fleet.yaml itself is an error.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from infra.errors import BadInput, LorafleetError
from infra.storage import Storage
from pipelines.nightly.entries import DISCOVERED, LISTED, Entry, entries_of
from pipelines.nightly.job_template import JobMaker, Variant, data_named
from pipelines.nightly.recipes import recipe_of
from pipelines.nightly.records import Row, Signature
from pipelines.nightly.signatures import REMOTE, OpenUri, signature_of_sources, signatures_of_neighbours
from pipelines.nightly.spec import CustomerSettings, Fleet
from workers.spec import JobSpec, check_name

NUM_READERS = 16
"""Listings at the same time; a store in the network takes some 20 ms for each."""
_LONGEST_NAME = 80
Key = tuple[str, str]


@dataclass(frozen=True)
class Resweep:
    """A sweep for a customer whose challengers keep being rejected."""

    after_rejections: int
    """In a row."""
    sweep: Path
    """Its file."""


@dataclass(frozen=True)
class Customer:
    """One customer of a night: (tenant, task), where its rows are, and how it is trained and judged. Settings as in the spec."""

    tenant: str
    task: str
    source: str
    """Training rows, as written: a path, a glob, a folder or s3://."""
    folder: Path
    """Where a relative source starts."""
    job: JobSpec
    """As it will train, but for the initial adapter. Paths of data start at `folder`; a local base has its whole path."""
    priority: int
    min_new_rows: int
    max_age_days: float | None
    warm_start: str
    gates: Path | None
    """None: gates.yaml in the home, if there is one."""
    pin: str | None
    recipe: str | None
    holdout: float
    is_canary: bool
    min_rows: int
    max_drop: float
    max_quarantined: float
    resweep: Resweep | None
    signature: Signature | None
    """Where discovery has told it already."""
    template: str | None = None
    """Digest of the settings that a found recipe (`nightly.found`) stands in place of; None: it trains as the fleet says."""

    @property
    def key(self) -> Key:
        """(tenant, task)."""
        return self.tenant, self.task

    @property
    def name(self) -> str:
        """As the registered model is called."""
        return f"{self.tenant}.{self.task}"


def customers_of(fleet: Fleet, open_store: OpenUri, store: Storage) -> tuple[list[Customer], list[Row]]:
    """Return the customers of a fleet by (tenant, task), and a failed row for whatever cannot be one.

    Rows of hostile names bear the name made printable: they have no key in the store.

    Args:
        open_store: Opens an s3:// URI as a store; called once per bucket.
        store: Where the sweeps are that recipes name.

    Raises:
        BadInput: a folder of a pattern or a table of fleet.yaml is not there or not what it should be, or the recipe of its
            defaults cannot be read.
        ServiceUnavailable: a store, or a folder, cannot be looked at.
    """
    maker = _Maker(fleet, JobMaker(fleet.template, partial(recipe_of, store)), _settings_of(fleet.spec.defaults))
    if fleet.spec.defaults.recipe is not None:
        maker.jobs.recipe(fleet.spec.defaults.recipe)
    customers: list[Customer] = []
    rows: list[Row] = []
    for key, said in sorted(_by_customer(entries_of(fleet, cache(open_store))).items()):
        made = maker.customer(key, said)
        (customers if isinstance(made, Customer) else rows).append(made)  # type: ignore[arg-type]
    return customers, rows + _missing_canaries(fleet, customers)


def signature_of(customer: Customer, open_store: OpenUri) -> Signature:
    """Return what a listing tells of a customer's files, as discovery did, or by looking now.

    Raises BadInput if there is no file of rows, ServiceUnavailable if it cannot be looked at.
    """
    if customer.signature is not None:
        return customer.signature
    return signature_of_sources(data_named(customer.job.data), customer.folder, open_store)


def signatures_of(customers: Sequence[Customer], open_store: OpenUri) -> list[Signature | LorafleetError]:
    """Return the signature of each customer, or why it has none. Buckets are opened once and asked for several at a time."""
    opened = cache(open_store)
    alone = [one.source for one in customers if _is_remote(one) and len(data_named(one.job.data)) == 1]
    try:
        together = signatures_of_neighbours(alone, opened)
    except LorafleetError:
        together = {}  # who may not list a folder may list what is in it: each tells its own error

    def look(customer: Customer) -> Signature | LorafleetError:
        if customer.source in together and len(data_named(customer.job.data)) == 1:
            return together[customer.source]
        try:
            return signature_of(customer, opened)
        except LorafleetError as error:
            return error

    with ThreadPoolExecutor(NUM_READERS, "signatures") as pool:
        # Looking at a local folder takes less than handing it to a thread.
        waiting = {index: pool.submit(look, one) for index, one in enumerate(customers) if _is_remote(one)}
        return [waiting[index].result() if index in waiting else look(one) for index, one in enumerate(customers)]


def _is_remote(customer: Customer) -> bool:
    return customer.signature is None and customer.source.startswith(REMOTE)


@dataclass
class _Maker:
    """Makes customers from what was said of them."""

    fleet: Fleet
    jobs: JobMaker
    defaults: Mapping[str, Any]

    def customer(self, key: Key, said: Sequence[Entry]) -> Customer | Row:
        """Return a customer from its entries, lowest layer first, or a failed row."""
        where = said[-1].where
        try:
            _check(key, said)
            found = _over(said)
            if found is None:
                return _refusal(*key, "no_data", f"{where}: no file of rows is there.", "Put the rows there, or leave it out.")
            return self._customer(key, found)
        except BadInput as error:
            return _refusal(*key, "bad_customer", f"{where}: {error}", _way_out(said[-1]))

    def _customer(self, key: Key, found: "_Found") -> Customer:
        settings = {**self.defaults, **found.given}
        job = self.jobs.job(*key, found.source, settings["priority"], Variant(settings["recipe"], found.overrides, found.folder))
        named = data_named(job.data)
        return Customer(
            tenant=key[0],
            task=key[1],
            source=found.source,
            folder=found.folder,
            job=job,
            gates=self._path(settings.pop("gates")),
            is_canary=key[0] in self.fleet.spec.limits.canary,
            resweep=self._resweep(settings.pop("resweep")),
            signature=found.signature if len(named) == 1 else None,
            **settings,
        )

    def _path(self, gates: str | None) -> Path | None:
        return None if gates is None else self.fleet.folder / gates

    def _resweep(self, spec: Any) -> Resweep | None:
        return None if spec is None else Resweep(spec.after_rejections, self.fleet.folder / spec.sweep)


@dataclass(frozen=True)
class _Found:
    """The layers of one customer as one."""

    source: str
    folder: Path
    signature: Signature | None
    given: Mapping[str, Any]
    overrides: Mapping[str, Any]


def _over(said: Sequence[Entry]) -> _Found | None:
    """Lay entries over one another, lowest first; None if none of them says where the rows are."""
    placed = [entry for entry in said if entry.source is not None]
    if not placed:
        return None
    given: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    for entry in said:
        given |= entry.given
        overrides |= entry.overrides
    last = placed[-1]
    assert last.source is not None
    return _Found(last.source, last.folder, last.signature, given, overrides)


def _by_customer(entries: Iterable[Entry]) -> dict[Key, list[Entry]]:
    found: dict[Key, list[Entry]] = {}
    for entry in entries:
        found.setdefault((entry.tenant, entry.task), []).append(entry)
    for said in found.values():
        said.sort(key=lambda entry: entry.layer)
    return found


def _settings_of(defaults: CustomerSettings) -> dict[str, Any]:
    return {name: getattr(defaults, name) for name in CustomerSettings.model_fields}


def _way_out(last: Entry) -> str:
    """Return what to do about a customer that is wrong where it was said last."""
    if last.layer == DISCOVERED:
        return "Rename where its rows lie, or name it under exclude."
    return "Correct it there, or leave it out."


def _check(key: Key, said: Sequence[Entry]) -> None:
    """Raise BadInput if nothing can be made of what is said, or if it is no name that may become part of a key."""
    problem = next((entry.problem for entry in said if entry.problem is not None), None)
    if problem is not None:
        raise BadInput(problem)
    for name in key:
        try:
            check_name(name)
        except ValueError as error:
            raise BadInput(f"{error}.") from None
    _check_said_once(key, said)


def _check_said_once(key: Key, said: Sequence[Entry]) -> None:
    """Raise BadInput if two entries of one layer speak of the same customer: which is right cannot be told."""
    for first, second in zip(said, said[1:], strict=False):
        if first.layer == second.layer and first.layer != LISTED:
            raise BadInput(f"{'.'.join(key)} stands in {first.where} as well; keep one, or give them different tasks.")


def _missing_canaries(fleet: Fleet, customers: Sequence[Customer]) -> list[Row]:
    there = {customer.tenant for customer in customers}
    sentence = "limits.canary names this tenant, which is no customer of the fleet tonight: nobody goes first in its place."
    task = fleet.spec.defaults.task or fleet.template.task
    return [
        _refusal(name, task, "unknown_canary", sentence, f"Correct limits.canary in {fleet.path.name}.")
        for name in dict.fromkeys(fleet.spec.limits.canary)
        if name not in there
    ]


def _refusal(tenant: str, task: str, reason: str, sentence: str, next_step: str) -> Row:
    return Row(printable(tenant), printable(task), "failed", reason, printable(sentence, 500), next_step)


def printable(text: str, at_most: int = _LONGEST_NAME) -> str:
    """Return foreign text as a page or terminal may show it: what does not print is escaped, what is long is cut."""
    told = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text[:at_most])
    return told if len(text) <= at_most else f"{told}…"
