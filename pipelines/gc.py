"""`lorafleet gc`: removes what nothing in the store refers to any more, after a time of grace. The only place that deletes.

What goes: objects of attempts that their job's state does not name (checkpoints, chunks of points, records of owners that were
lost), uploads of bases that were not finished, requests and probes left behind, files of adapters without a manifest, and
adapters that a job made and nothing mentions. What stays whatever its age: journals, evidence, data, bases, adapters that a
person brought (imported, merged), and all that a live claim may still write.

An adapter goes in two runs. The first moves its manifest into a tombstone: then nobody can name the adapter any more. The
second, when the tombstone is as old as the grace, removes the files; if anything mentions the adapter by then (a promotion or a
job that was under way), the manifest is put back instead. So no check has to be as fast as the deletion that follows it, and
killed anywhere, the next run goes on.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from infra.claims import read_document
from infra.crashpoints import crashpoint
from infra.errors import BadInput, ConditionFailed, ObjectNotFound, WorkFailed
from infra.records import decode_record, encode_record
from infra.storage import ObjectInfo, Storage
from pipelines.reachable import SILENT_SECONDS, JobKey, Reach, Survey, local_time, reach_of, store_time, take_survey
from sweeps.ledger import CLAIM_FORMAT
from sweeps.spec import parse_duration
from workers import layout
from workers.bases import read_listing
from workers.manifests import MANIFEST_FORMAT, AdapterRef, read_manifest

TOMBSTONE_FORMAT = "tombstone/1"
GRACE_SECONDS = 24 * 3600.0
NUM_DELETERS = 16

Kind = Literal["attempt", "upload", "request", "files", "adapter", "tombstone", "restore"]
REASONS: Mapping[Kind, str] = {
    "attempt": "the job's state does not name them",
    "upload": "an upload of a base that was not finished, or was beaten by another",
    "request": "left behind by a process that has ended",
    "files": "files of an adapter without a manifest",
    "adapter": "nothing mentions the adapter; its manifest goes now, its files with a later gc",
    "tombstone": "nothing has mentioned the adapter since its manifest went",
    "restore": "something mentions the adapter again; its manifest is put back",
}


@dataclass(frozen=True)
class Garbage:
    """Objects that belong together and go together."""

    kind: Kind
    subject: str
    """Id of the job, base or adapter, or a key."""
    objects: tuple[ObjectInfo, ...]
    """What is deleted, in this order; for "adapter" the manifest alone, for "restore" the tombstone."""
    parts: tuple[str, ...] = ()
    """(tenant, base_id, job_id or adapter_id), (base_id, set) of an upload."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the objects, 0 for a manifest that is put back."""
        return 0 if self.kind == "restore" else sum(info.size_bytes for info in self.objects)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "kind": self.kind,
            "subject": self.subject,
            "num_objects": len(self.objects),
            "num_bytes": self.num_bytes,
            "reason": REASONS[self.kind],
        }


@dataclass(frozen=True)
class Plan:
    """What may go now."""

    garbage: list[Garbage]
    notes: list[str]
    """What could not be read, and what therefore stays."""

    @property
    def num_objects(self) -> int:
        return sum(len(one.objects) for one in self.garbage if one.kind != "restore")

    @property
    def num_bytes(self) -> int:
        return sum(one.num_bytes for one in self.garbage)


def collect(store: Storage, *, older_than_seconds: float = GRACE_SECONDS, delete: bool = False) -> Plan:
    """Return what nothing refers to and is older than the grace; with `delete` remove it. May be repeated, also beside itself.

    Raises ServiceUnavailable if the store does not answer; what was removed before stays so.
    """
    if not delete:
        return plan(store, take_survey(store), older_than_seconds=older_than_seconds, now=local_time())
    found = plan(store, take_survey(store), older_than_seconds=older_than_seconds, now=store_time(store))
    done = carry_out(store, found.garbage, older_than_seconds, store_time(store))
    if any(one.kind == "adapter" for one in done):  # a job or a promotion may have been faster: look once more
        again = plan(store, take_survey(store), older_than_seconds=older_than_seconds, now=store_time(store))
        restored = [one for one in again.garbage if one.kind == "restore"]
        done += carry_out(store, restored, older_than_seconds, store_time(store))
    return Plan(done, found.notes)


def plan(store: Storage, survey: Survey, *, older_than_seconds: float, now: float) -> Plan:
    """Return what may be removed at the store's time `now`; nothing is changed."""
    reach = survey.reach
    garbage = [
        *_attempts(survey, older_than_seconds, now),
        *_uploads(store, survey, max(older_than_seconds, SILENT_SECONDS), now),
        *_requests(store, survey, older_than_seconds, now),
    ]
    notes = [f"{why} Nothing that it may refer to is removed." for why in reach.unreadable.values()]
    if reach.unreadable:
        return Plan([one for one in garbage if one.kind != "attempt" or _is_sure(reach, one)], notes)
    return Plan([*garbage, *_adapters(store, survey, older_than_seconds, now)], notes)


def _is_sure(reach: Reach, one: Garbage) -> bool:
    """A damaged trial or state may name chunks and checkpoints of its own tenant only."""
    return not any(key.startswith(layout.tenant(one.parts[0])) for key in reach.unreadable)


def _is_old(infos: Sequence[ObjectInfo], older_than_seconds: float, now: float) -> bool:
    return all(now - info.modified >= older_than_seconds for info in infos)


def _attempts(survey: Survey, older_than_seconds: float, now: float) -> Iterator[Garbage]:
    """Objects of attempts that no record names, of epochs that nobody writes under any more."""
    by_job: dict[JobKey, list[ObjectInfo]] = defaultdict(list)
    for (tenant, base_id, job_id, epoch), infos in survey.attempts.items():
        if _is_over(survey.reach, (tenant, base_id, job_id), epoch, now):
            by_job[tenant, base_id, job_id] += [
                info for info in infos if not survey.reach.refers_to(info.key) and _is_old([info], older_than_seconds, now)
            ]
    for job, infos in by_job.items():
        if infos:
            yield Garbage("attempt", job[2], tuple(infos), job)


def _is_over(reach: Reach, job: JobKey, epoch: int, now: float) -> bool:
    """Tell whether nothing that is written under `epoch` from now on can count. False where the state cannot be read."""
    state = reach.states.get(job)
    if state is None or epoch > state.document.epoch:
        return False
    return epoch < state.document.epoch or not state.is_owned(now)


def _uploads(store: Storage, survey: Survey, older_than_seconds: float, now: float) -> Iterator[Garbage]:
    for (base_id, set_id), infos in survey.uploads.items():
        try:
            listed = read_listing(store, base_id)
        except (BadInput, WorkFailed):
            continue  # which set counts is not known
        if (listed is None or listed["set"] != set_id) and _is_old(infos, older_than_seconds, now):
            yield Garbage("upload", base_id, tuple(infos), (base_id, set_id))


def _requests(store: Storage, survey: Survey, older_than_seconds: float, now: float) -> Iterator[Garbage]:
    for info in survey.requests:
        if _is_old([info], older_than_seconds, now) and _is_left_behind(store, info.key, survey.reach, now):
            yield Garbage("request", info.key, (info,))


def _is_left_behind(store: Storage, key: str, reach: Reach, now: float) -> bool:
    match key.split("/"):
        case ["tenants", tenant, base_id, "jobs", job_id, _]:
            state = reach.states.get((tenant, base_id, job_id))
            return state is not None and not state.is_owned(now)
        case ["tenants", tenant, "sweeps", name, _]:
            return _is_undriven(store, tenant, name)
        case _:
            return True


def _is_undriven(store: Storage, tenant: str, name: str) -> bool:
    try:
        found = read_document(store, layout.sweep_claim(tenant, name), CLAIM_FORMAT)
    except (BadInput, WorkFailed):
        return False
    return found is None or found.owner is None or found.owner.is_certainly_dead()


def _adapters(store: Storage, survey: Survey, older_than_seconds: float, now: float) -> Iterator[Garbage]:
    reach = survey.reach
    busy = {(tenant, base_id) for (tenant, base_id, _), state in reach.states.items() if state is None or state.is_owned(now)}
    for ref, info in survey.manifests.items():
        if (
            ref.adapter_id not in reach.ids
            and _is_old([info], older_than_seconds, now)
            and _is_made_by_ended_job(store, ref, reach, now)
        ):
            yield Garbage("adapter", ref.adapter_id, (info,), ref)
    for ref, info in survey.tombstones.items():
        yield from _of_tombstone(survey, ref, info, older_than_seconds, now)
    for ref, infos in survey.files.items():
        wait = max(older_than_seconds, SILENT_SECONDS) if ref[:2] in busy else older_than_seconds
        is_stray = ref not in survey.manifests and ref not in survey.tombstones and ref.adapter_id not in reach.ids
        if is_stray and _is_old(infos, wait, now):
            yield Garbage("files", ref.adapter_id, tuple(infos), ref)


def _is_made_by_ended_job(store: Storage, ref: AdapterRef, reach: Reach, now: float) -> bool:
    """Tell whether a job made the adapter that nobody trains now: what a person brought without a job is theirs to remove."""
    try:
        job_id = read_manifest(store, ref).get("job_id")
    except (BadInput, WorkFailed):
        return False
    state = reach.states.get((ref.tenant, ref.base_id, str(job_id)))
    return job_id is not None and (state is None or not state.is_owned(now))


def _of_tombstone(survey: Survey, ref: AdapterRef, info: ObjectInfo, older_than_seconds: float, now: float) -> Iterator[Garbage]:
    if (
        ref in survey.manifests
    ):  # it was made again; or a gc was killed here, or is at it, and then the adapter is no longer named
        if ref.adapter_id in survey.reach.ids and _is_old([info], max(older_than_seconds, SILENT_SECONDS), now):
            yield Garbage("request", info.key, (info,))
    elif ref.adapter_id in survey.reach.ids:
        yield Garbage("restore", ref.adapter_id, (info,), ref)
    elif _is_old([info], older_than_seconds, now):
        yield Garbage("tombstone", ref.adapter_id, (*survey.files.get(ref, []), info), ref)


def carry_out(store: Storage, garbage: Sequence[Garbage], older_than_seconds: float, now: float) -> list[Garbage]:
    """Remove what was planned, each after another look at it; return what was removed (or put back)."""
    actions: Mapping[Kind, Callable[[Garbage], bool]] = {
        "attempt": lambda one: _remove_attempt(store, one, now),
        "upload": lambda one: _remove_upload(store, one, max(older_than_seconds, SILENT_SECONDS), now),
        "request": lambda one: _delete(store, one.objects),
        "files": lambda one: _remove_files(store, AdapterRef(*one.parts), one.objects),
        "adapter": lambda one: _bury(store, AdapterRef(*one.parts), one.objects[0]),
        "tombstone": lambda one: _remove_files(store, AdapterRef(*one.parts), one.objects),
        "restore": lambda one: _dig_out(store, AdapterRef(*one.parts), one.objects[0]),
    }
    return [one for one in garbage if actions[one.kind](one)]


def _remove_attempt(store: Storage, one: Garbage, now: float) -> bool:
    """A state that was taken over meanwhile names other things, but nothing old of ended epochs that it did not name before."""
    tenant, base_id, job_id = one.parts
    key = layout.job_state(tenant, base_id, job_id)
    info = store.head(key)
    if info is None:
        return False
    fresh = reach_of(store, [info])
    state = fresh.states.get((tenant, base_id, job_id))
    if state is None:
        return False
    kept = [info for info in one.objects if _is_over(fresh, (tenant, base_id, job_id), _epoch_of(info.key), now)]
    return len(kept) == len(one.objects) and not any(map(fresh.refers_to, (info.key for info in kept))) and _delete(store, kept)


def _epoch_of(key: str) -> int:
    return int(key.split("/")[6])


def _remove_upload(store: Storage, one: Garbage, older_than_seconds: float, now: float) -> bool:
    """Another upload of the same files may have begun: then one of them is young again."""
    base_id, set_id = one.parts
    listed = read_listing(store, base_id)
    found = list(store.list(f"{layout.base_files(base_id)}{set_id}/"))
    if (listed is not None and listed["set"] == set_id) or not _is_old(found, older_than_seconds, now):
        return False
    return _delete(store, found)


def _bury(store: Storage, ref: AdapterRef, listed: ObjectInfo) -> bool:
    """Move a manifest into a tombstone, unless it was written anew."""
    found = store.head(layout.manifest(*ref))
    if found is None or found.etag != listed.etag or any(store.list(layout.evidence_of(ref.tenant, ref.adapter_id))):
        return False
    manifest = read_manifest(store, ref)
    store.put(layout.tombstone(*ref), encode_record(TOMBSTONE_FORMAT, {"manifest": manifest}))
    crashpoint("gc-tombstone-written", ref.adapter_id)
    return _delete(store, [found])


def _dig_out(store: Storage, ref: AdapterRef, tombstone: ObjectInfo) -> bool:
    """Put a manifest back, then drop the tombstone."""
    try:
        body = decode_record(store.get(tombstone.key)[0], TOMBSTONE_FORMAT, tombstone.key)
    except ObjectNotFound:
        return False
    with contextlib.suppress(ConditionFailed):  # a job has made the adapter again
        store.put_if_absent(layout.manifest(*ref), encode_record(MANIFEST_FORMAT, body["manifest"]))
    crashpoint("gc-manifest-restored", ref.adapter_id)
    return _delete(store, [tombstone])


def _remove_files(store: Storage, ref: AdapterRef, objects: Sequence[ObjectInfo]) -> bool:
    """Remove files that no manifest names, and their tombstone after them.

    A job that makes the adapter again at this very moment finds the files there and writes the manifest only: then they are
    put back.
    """
    key = layout.manifest(*ref)
    if store.head(key) is not None:
        return False
    files = [info for info in objects if info.key.startswith(layout.adapter(*ref))]
    contents = {info.key: _content(store, info.key) for info in files}
    _delete(store, files)
    if store.head(key) is None:
        return _delete(store, [info for info in objects if info not in files])
    for name, data in contents.items():
        if data is not None:
            with contextlib.suppress(ConditionFailed):
                store.put_if_absent(name, data)
    return False


def _content(store: Storage, key: str) -> bytes | None:
    """Return an object's content, None if it is damaged or gone: nobody could read it either."""
    try:
        return store.get(key)[0]
    except (ObjectNotFound, WorkFailed):
        return None


def _delete(store: Storage, objects: Sequence[ObjectInfo]) -> bool:
    def remove(info: ObjectInfo) -> None:
        store.delete(info.key)
        crashpoint("gc-deleted", info.key)

    with ThreadPoolExecutor(NUM_DELETERS, "gc") as deleters:
        list(deleters.map(remove, objects))
    return True


def parse_age(text: str) -> float:
    """Return the seconds of "24h" or "7d". Raises BadInput with the way to write it."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise BadInput(f"--older-than: {error}.") from None


def collected_json(found: Plan, *, deleted: bool, older_than_seconds: float) -> dict[str, Any]:
    """Return a plan, or what came of it, as JSON data."""
    return {
        "deleted": deleted,
        "older_than_seconds": older_than_seconds,
        "num_objects": found.num_objects,
        "num_bytes": found.num_bytes,
        "garbage": [one.to_json() for one in found.garbage],
    }


def collected_text(found: Plan, *, deleted: bool) -> str:
    """Return a line for each kind of garbage, one for each thing of it, and the totals."""
    lines = []
    for kind, reason in REASONS.items():
        ones = [one for one in found.garbage if one.kind == kind]
        if ones:
            lines.append(f"{kind}: {reason}")
            lines += [f"  {one.subject}  {len(one.objects)} objects, {one.num_bytes:,} bytes" for one in ones]
    total = f"{found.num_objects} objects, {found.num_bytes:,} bytes"
    if not found.garbage:
        return "nothing to remove: all that is old enough is referred to."
    return "\n".join([*lines, f"removed {total}." if deleted else f"{total} may go; remove them with: lorafleet gc --delete"])
