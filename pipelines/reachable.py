"""What the records of a store refer to: adapters by id, objects by key, and which jobs somebody may still be writing for.

Whatever a record mentions counts as referred to, whichever key of it does so: journals, candidates, trials, evidence, the parents
and the initial adapter in manifests, the states and specs of jobs, rows of nights, and records that later versions add. So
nothing is missed because a list of such places was not kept up. A record that cannot be read may refer to anything, and is told.
"""

import re
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from infra.claims import Document, read_document
from infra.errors import BadInput, ObjectNotFound, WorkFailed
from infra.storage import ObjectInfo, Storage
from workers import layout
from workers.job_state import STATE_FORMAT
from workers.manifests import AdapterRef

NUM_READERS = 16
SILENT_SECONDS = 3600.0
"""An owner on another machine renews its claim every few seconds; one that has not for so long counts as gone."""
_ID = re.compile(rb"(?<![a-z0-9])[a-z2-7]{32}(?![a-z0-9])")
_KEY = re.compile(rb'"(tenants/[^"\\]+)"')

JobKey = tuple[str, str, str]
"""(tenant, base_id, job_id)."""


@dataclass
class Reach:
    """What is referred to."""

    ids: set[str] = field(default_factory=set)
    """Ids in records, and adapters that have evidence."""
    keys: set[str] = field(default_factory=set)
    """Keys in records, and prefixes, which end in a slash."""
    states: dict[JobKey, "ClaimState | None"] = field(default_factory=dict)
    """The jobs of the store; None for a state that cannot be read."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Why a record could not be read, by key."""

    def refers_to(self, key: str) -> bool:
        """Tell whether a record names `key`, or a prefix (of whole parts) that it lies below."""
        return key in self.keys or f"{key.rpartition('/')[0]}/" in self.keys


@dataclass(frozen=True)
class ClaimState:
    """A claim (a job's state, a sweep's) as it was read."""

    document: Document
    modified: float

    def is_owned(self, now: float, silent_seconds: float = SILENT_SECONDS) -> bool:
        """Tell whether its owner may be alive; `now` is the store's time."""
        owner = self.document.owner
        return owner is not None and not owner.is_certainly_dead() and now - self.modified <= silent_seconds


@dataclass
class Survey:
    """The objects of a store by what they belong to, and what its records refer to."""

    objects: list[ObjectInfo] = field(default_factory=list)
    attempts: dict[tuple[str, str, str, int], list[ObjectInfo]] = field(default_factory=lambda: defaultdict(list))
    """By tenant, base, job and epoch."""
    files: dict[AdapterRef, list[ObjectInfo]] = field(default_factory=lambda: defaultdict(list))
    manifests: dict[AdapterRef, ObjectInfo] = field(default_factory=dict)
    tombstones: dict[AdapterRef, ObjectInfo] = field(default_factory=dict)
    uploads: dict[tuple[str, str], list[ObjectInfo]] = field(default_factory=lambda: defaultdict(list))
    """By base and set."""
    requests: list[ObjectInfo] = field(default_factory=list)
    """What is put for a moment: wishes to cancel, views of packs, probes."""
    sweeps: list[tuple[str, str]] = field(default_factory=list)
    """(tenant, name)."""
    reach: Reach = field(default_factory=Reach)


def take_survey(store: Storage) -> Survey:
    """List a store, then read its records: what was referred to meanwhile is seen. Raises ServiceUnavailable."""
    found = Survey()
    for info in store.list(""):
        found.objects.append(info)
        _place(found, info)
    found.reach = reach_of(store, found.objects)
    return found


def _place(found: Survey, info: ObjectInfo) -> None:
    match info.key.split("/"):
        case ["tenants", tenant, base_id, "jobs", job_id, "attempts", epoch, *_] if epoch.isdecimal():
            found.attempts[tenant, base_id, job_id, int(epoch)].append(info)
        case ["tenants", tenant, base_id, "adapters", adapter_id, _]:
            found.files[AdapterRef(tenant, base_id, adapter_id)].append(info)
        case ["tenants", _, _, "manifests", _] if (parts := layout.parts_of_manifest(info.key)) is not None:
            found.manifests[AdapterRef(*parts)] = info
        case ["tenants", tenant, base_id, "tombstones", name]:
            found.tombstones[AdapterRef(tenant, base_id, name.removesuffix(".json"))] = info
        case ["tenants", tenant, "sweeps", name, "sweep.json"]:
            found.sweeps.append((tenant, name))
        case ["bases", base_id, "files", set_id, _]:
            found.uploads[base_id, set_id].append(info)
        case ["tenants", _, _, "jobs", _, "cancel.json"] | ["tenants", _, "sweeps", _, "packs.json"] | ["probes", _]:
            found.requests.append(info)


def store_time(store: Storage) -> float:
    """Return the store's time, seconds since the epoch: a clock on this machine may be hours off. Writes a small object."""
    key = f"probes/{uuid.uuid4().hex}"
    try:
        return store.put(key, b"what time is it").modified
    finally:
        store.delete(key)


def local_time() -> float:
    """Return this machine's time, for whoever may not write."""
    return time.time()


def reach_of(store: Storage, infos: Iterable[ObjectInfo]) -> Reach:
    """Read the records among `infos` and return what they refer to. Raises ServiceUnavailable."""
    reach = Reach()
    records = [info for info in infos if _may_refer(info.key)]
    with ThreadPoolExecutor(NUM_READERS, "reachable") as readers:
        read = readers.map(lambda info: _read(store, info), records)
        for info, data in zip(records, read, strict=True):
            _note(reach, info, data)
        jobs = [(parts, info) for info in records if (parts := layout.parts_of_job_state(info.key)) is not None]
        states = readers.map(lambda job: _state(store, job[1]), jobs)
        for (parts, _), state in zip(jobs, states, strict=True):
            reach.states[parts] = state
    return reach


def _may_refer(key: str) -> bool:
    """Records do, but what attempts write counts only as far as their job's state names it, and rows are rows."""
    parts = key.split("/")
    below_attempt = len(parts) > 6 and parts[3] == "jobs"
    is_file = len(parts) == 6 and parts[3] == "adapters"
    is_tombstone = len(parts) == 5 and parts[3] == "tombstones"
    is_data = len(parts) == 5 and parts[2] == "data"
    return parts[0] != "bases" and key.endswith(".json") and not (below_attempt or is_file or is_tombstone or is_data)


def _read(store: Storage, info: ObjectInfo) -> bytes | str:
    """Return a record's bytes, or why it cannot be read. One that is gone refers to nothing."""
    try:
        return store.get(info.key)[0]
    except ObjectNotFound:
        return b""
    except (WorkFailed, BadInput) as error:
        return str(error)


def _note(reach: Reach, info: ObjectInfo, data: bytes | str) -> None:
    if isinstance(data, str):
        reach.unreadable[info.key] = data
        return
    manifest = layout.parts_of_manifest(info.key)
    own = manifest[2] if manifest is not None else ""
    reach.ids |= {id_ for id_ in _ids_in(data) if id_ != own}
    reach.keys |= {match.decode() for match in _KEY.findall(data)}
    parts = info.key.split("/")
    if len(parts) == 5 and parts[2] == "evidence":
        reach.ids.add(parts[3])


def _ids_in(data: bytes) -> Iterator[str]:
    return (match.decode() for match in _ID.findall(data))


def _state(store: Storage, info: ObjectInfo) -> ClaimState | None:
    try:
        document = read_document(store, info.key, STATE_FORMAT)
    except (WorkFailed, BadInput):
        return None
    return ClaimState(document, info.modified) if document is not None else None
