"""The journal of a registered model: who was champion when, and why. It is the truth about promotions; MLflow shows a copy.

Below `tenants/<tenant>/models/<task>/`: `journal/<generation>.json`, written once each and without a gap, so that putting
the next number if it is absent is the commit and at most one of several promoters makes it; `HEAD`, a hint at the last
generation which may lag behind; `candidates/<adapter_id>.json`, the adapters offered.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from infra.crashpoints import crashpoint
from infra.errors import BadInput, ConditionFailed, ObjectNotFound, WorkFailed
from infra.records import decode_record, encode_record
from infra.storage import Storage
from workers import layout

JOURNAL_FORMAT = "journal/1"
HEAD_FORMAT = "head/1"
CANDIDATE_FORMAT = "candidate/1"
NUM_READERS = 16
"""Objects read at the same time: a store that is far away answers each in tens of milliseconds."""

Found = TypeVar("Found")
Kind = Literal["promote", "rollback", "freeze", "unfreeze"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """An entry before it has a place in the journal."""

    kind: Kind
    adapter_id: str
    """The champion from this entry on."""
    base_id: str
    """The base that adapter belongs to, and with it the task."""
    evidence: tuple[str, ...] = ()
    """Keys of the evidence objects it rests on."""
    actor: str
    reason: str = ""
    previous: str | None
    """The champion before; None for the first entry. Freezing leaves the champion as it was."""
    forced: bool = False
    """Whether a promotion was asked for whatever the gates say; its evidence tells what they said."""
    at: float = field(default_factory=time.time)
    """Seconds since the epoch, by the clock of whoever made it."""
    nonce: str = field(default_factory=lambda: secrets.token_hex(8))
    """Tells one's own entry from a rival's with the same content."""


@dataclass(frozen=True, kw_only=True)
class Entry(Change):
    """One entry of the journal."""

    generation: int
    """1, 2, 3, ... without a gap."""


class Overtaken(WorkFailed):
    """Somebody else wrote the next entry of a journal."""


@dataclass(frozen=True)
class Candidate:
    """An adapter offered to a task."""

    adapter_id: str
    base_id: str
    job_id: str | None
    sweep: str | None
    """Name of the sweep it won; None if no sweep offered it."""
    metrics: Mapping[str, float]
    registered: float
    """Seconds since the epoch."""
    alias: str = "challenger"
    """Points at the latest candidate that was offered under it."""


def generation_of(head: Entry | None) -> int:
    """Return the generation of a head; 0 for a journal that has not begun."""
    return 0 if head is None else head.generation


def read_head(store: Storage, tenant: str, task: str) -> Entry | None:
    """Return the last entry, None if the journal has not begun.

    HEAD is taken as a hint and the journal followed from there; a damaged one, or one that names an absent generation,
    costs a listing. Raises BadInput if an entry is damaged.
    """
    hint = read_hint(store, tenant, task)
    entry = _read(store, tenant, task, hint) if hint else None
    if entry is None and hint != 0:
        entry = _last_listed(store, tenant, task)
    while following := _read(store, tenant, task, generation_of(entry) + 1):
        entry = following
    return entry


def read_hint(store: Storage, tenant: str, task: str) -> int | None:
    """Return the generation that HEAD names, 0 if there is no HEAD, None if it is damaged."""
    return _read_hint(store, layout.head(tenant, task))[0]


def history(store: Storage, tenant: str, task: str) -> list[Entry]:
    """Return all entries, oldest first. Raises BadInput if one is damaged."""
    return sorted(_all_below(store, _journal_prefix(tenant, task), _decoded), key=lambda entry: entry.generation)


def commit(store: Storage, tenant: str, task: str, change: Change, expected_generation: int) -> Entry:
    """Write `change` as the generation after `expected_generation` (the head it was decided on; 0: none), then HEAD.

    Raises Overtaken, naming who was faster, if that generation exists already.
    """
    before = _read(store, tenant, task, expected_generation)
    assert before or expected_generation == 0, "a journal has no gaps"
    entry = Entry(**asdict(change), generation=expected_generation + 1)
    key = layout.journal(tenant, task, entry.generation)
    try:
        store.put_if_absent(key, encode_record(JOURNAL_FORMAT, asdict(entry)))
    except ConditionFailed:
        winner = _decoded(store.get(key)[0], key)
        if winner.nonce != entry.nonce:
            raise Overtaken(_overtaken(winner, tenant, task)) from None
    crashpoint("journal-written", f"{tenant}.{task}")
    write_hint(store, tenant, task, entry.generation)
    crashpoint("head-written", f"{tenant}.{task}")
    return entry


def write_hint(store: Storage, tenant: str, task: str, generation: int) -> None:
    """Let HEAD name `generation`, unless it names a later one already."""
    key = layout.head(tenant, task)
    data = encode_record(HEAD_FORMAT, {"generation": generation})
    while True:
        hint, etag = _read_hint(store, key)
        if (hint or 0) >= generation:
            return
        try:
            if etag is None:
                store.put_if_absent(key, data)
            else:
                store.compare_and_put(key, data, etag)
        except ConditionFailed:
            continue  # Another promoter wrote it in between; theirs may be the later generation.


def register_candidate(store: Storage, tenant: str, task: str, candidate: Candidate) -> Candidate:
    """Offer an adapter to a task. Offered before, it stays as it was; what stands there is returned."""
    key = layout.candidate(tenant, task, candidate.adapter_id)
    try:
        store.put_if_absent(key, encode_record(CANDIDATE_FORMAT, asdict(candidate)))
    except ConditionFailed:
        return _candidate(store.get(key)[0], key)
    crashpoint("candidate-written", f"{tenant}.{task}")
    return candidate


def candidates(store: Storage, tenant: str, task: str) -> list[Candidate]:
    """Return the adapters offered to a task, in the order they were."""
    found = _all_below(store, f"{layout.model(tenant, task)}candidates/", _candidate)
    return sorted(found, key=lambda candidate: (candidate.registered, candidate.adapter_id))


def models(store: Storage, tenant: str | None = None) -> list[tuple[str, str]]:
    """Return (tenant, task) of all models that have a journal or candidates, of one tenant or of all."""
    prefix = f"{layout.tenant(tenant)}models/" if tenant else "tenants/"
    return sorted(set(_models_in(info.key for info in store.list(prefix))))


def _models_in(keys: Iterator[str]) -> Iterator[tuple[str, str]]:
    for key in keys:
        parts = key.split("/")
        if len(parts) == 6 and parts[2] == "models" and parts[4] in ("journal", "candidates"):
            yield parts[1], parts[3]


def changes_of_champion(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries by which somebody became champion: promotions and rollbacks."""
    return [entry for entry in entries if entry.kind in ("promote", "rollback")]


def entry_at(entries: Sequence[Entry], at: float) -> Entry | None:
    """Return the journal's last entry at a time (seconds since the epoch), None if it had not begun.

    Times are those of the clocks of whoever made the entries; where these disagree the order of the journal holds.
    """
    return next((entry for entry in reversed(entries) if entry.at <= at), None)


def previous_champion(entries: Sequence[Entry]) -> str | None:
    """Return the adapter that was champion before the present one took over, None if there was none."""
    champion = entries[-1].adapter_id if entries else None
    return next((entry.adapter_id for entry in reversed(entries) if entry.adapter_id != champion), None)


def _all_below(store: Storage, prefix: str, decoded: Callable[[bytes, str], Found]) -> list[Found]:
    """Read all objects below a prefix; a model that is trained every night has hundreds."""
    keys = [info.key for info in store.list(prefix)]
    if len(keys) < 2:  # for which threads are not worth their start
        return [decoded(store.get(key)[0], key) for key in keys]
    with ThreadPoolExecutor(min(NUM_READERS, len(keys))) as readers:
        return list(readers.map(lambda key: decoded(store.get(key)[0], key), keys))


def _candidate(data: bytes, key: str) -> Candidate:
    return Candidate(**decode_record(data, CANDIDATE_FORMAT, key))


def _journal_prefix(tenant: str, task: str) -> str:
    return layout.journal(tenant, task, 0).rpartition("/")[0] + "/"


def _last_listed(store: Storage, tenant: str, task: str) -> Entry | None:
    generations = [_generation_in(info.key) for info in store.list(_journal_prefix(tenant, task))]
    return _read(store, tenant, task, max(generations)) if generations else None


def _generation_in(key: str) -> int:
    return int(key.rpartition("/")[2].removesuffix(".json"))


def _read_hint(store: Storage, key: str) -> tuple[int | None, str | None]:
    """Return the generation in HEAD (0: there is no HEAD, None: it is damaged) and its etag (None: there is no HEAD)."""
    try:
        data, info = store.get(key)
    except ObjectNotFound:
        return 0, None
    except WorkFailed:  # its bytes are not those that were stored
        damaged = store.head(key)
        return None, damaged.etag if damaged else None
    try:
        generation = decode_record(data, HEAD_FORMAT, key).get("generation")
    except BadInput:
        return None, info.etag
    return generation if isinstance(generation, int) and generation > 0 else None, info.etag


def _read(store: Storage, tenant: str, task: str, generation: int) -> Entry | None:
    key = layout.journal(tenant, task, generation)
    try:
        return _decoded(store.get(key)[0], key)
    except ObjectNotFound:
        return None


def _decoded(data: bytes, key: str) -> Entry:
    body: dict[str, Any] = decode_record(data, JOURNAL_FORMAT, key)
    try:
        return Entry(**{**body, "evidence": tuple(body["evidence"])})
    except (KeyError, TypeError):
        raise BadInput(f"{key} lacks what an entry of a journal has; restore it from a copy of the store.") from None


def _overtaken(winner: Entry, tenant: str, task: str) -> str:
    did = {"promote": "promoted", "rollback": "rolled back to", "freeze": "froze", "unfreeze": "unfroze"}[winner.kind]
    return (
        f"{winner.actor} {did} {winner.adapter_id[:12]} meanwhile (generation {winner.generation}); "
        f"look at 'lorafleet history {tenant}.{task}' and try again."
    )
