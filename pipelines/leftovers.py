"""What processes that were killed left in the store: jobs without an owner, runs that nobody feeds, files that belong to nothing.

The part of `reconcile` that goes by claims and files, and not by journals. Claims of the living are never touched: whoever takes
a dead owner's claim takes the next epoch, as the next attempt would.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from infra.claims import Owner, claim
from infra.errors import ClaimHeld, ClaimLost, ObjectNotFound, WorkFailed
from infra.storage import ObjectInfo, Storage
from infra.tracking import OPEN_STATUSES, Tracker
from pipelines.gc import Garbage, carry_out, plan
from pipelines.reachable import JobKey, Survey
from workers import layout
from workers.adapter_files import FILE_NAMES
from workers.job_state import FRESH, STATE_FORMAT
from workers.manifests import AdapterRef
from workers.metrics_log import decode_points

LEASE_SECONDS = 15.0
"""How long a claim's nonce must stand still before it is taken from an owner whose end nobody saw."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as the store says, or that the store itself has wrong."""

    kind: Literal["journal", "head", "adapter", "registry", "sweep", "night", "job", "record"]
    subject: str
    """Registered model (acme.support), sweep (acme/first), night (prod/2026-11-23), job or adapter (acme/<id>); or a key."""
    sentence: str
    fixed: bool


def check_jobs(store: Storage, surveyed: Survey, now: float, fix: bool) -> Iterator[Finding]:
    """Jobs that are held by an owner that is gone; mended, they wait for their next attempt as after a preemption."""
    for job, state in surveyed.reach.states.items():
        subject = _subject(job[0], job[2])
        if state is None:
            yield Finding("job", subject, f"its state cannot be read; restore {layout.job_state(*job)} from a copy.", False)
        elif state.document.owner is not None and not state.is_owned(now):
            status = state.document.body["status"]
            is_fixed = fix and let_go(store, layout.job_state(*job), STATE_FORMAT)
            sentence = f"it is {status}, and its host is gone; the command that made it goes on from its last checkpoint."
            yield Finding("job", subject, sentence, is_fixed)


def let_go(store: Storage, key: str, format: str) -> bool:
    """Take a claim whose owner is gone and release it as preempted; False if somebody alive has it after all.

    What had ended before its owner went, or by the hand of another meanwhile, stays ended.
    """
    try:
        lease = claim(store, key, format, FRESH, owner=Owner.here(), lease_seconds=LEASE_SECONDS)
        lease.release({"status": "preempted"} if lease.body["status"] in OPEN_STATUSES else {})
    except (ClaimHeld, ClaimLost):
        return False
    return True


def check_job_runs(
    store: Storage, tracker: Tracker, surveyed: Survey, open_runs: Mapping[str, str], now: float, fix: bool
) -> Iterator[Finding]:
    """Runs of single jobs that the tracker shows as going on although the job has ended, or as trained although nobody does."""
    for job, state in surveyed.reach.states.items():
        key = f"{job[0]}/jobs/{job[2]}"
        if state is None or key not in open_runs or state.is_owned(now):
            continue
        body = state.document.body
        if body["status"] not in OPEN_STATUSES:
            if fix:
                _tell_end(store, tracker, key, body, state.document.epoch)
            yield Finding("job", _subject(job[0], job[2]), f"the job has {_ENDED[body['status']]}, its run is open.", fix)
        elif open_runs[key] == "running":
            if fix:
                tracker.end_run(key, "preempted")
            yield Finding("job", _subject(job[0], job[2]), "its run is shown as running, and nobody trains it.", fix)


_ENDED = {"succeeded": "succeeded", "stopped": "been stopped", "cancelled": "been cancelled", "failed": "failed"}


def _tell_end(store: Storage, tracker: Tracker, key: str, body: Mapping[str, Any], epoch: int) -> None:
    """Tell the tracker of a job's points and end; points that it has are not added again."""
    for chunk in body["chunks"]:
        try:
            tracker.log_points(key, decode_points(store.get(chunk)[0]))
        except (ObjectNotFound, WorkFailed):
            continue  # lost or damaged: `verify` tells, and the run is to end all the same
    ids = {"lorafleet.adapter_id": body["adapter_id"]} if body["adapter_id"] is not None else {}
    tracker.set_tags(key, ids | {"lorafleet.attempt": str(epoch)})
    tracker.end_run(key, f"{body['status']}({body['reason']})" if body["reason"] else body["status"])


def check_leftovers(store: Storage, surveyed: Survey, grace_seconds: float, now: float, fix: bool) -> Iterator[Finding]:
    """Files without a manifest, manifests without files, manifests in tombstones that are missed, checkpoints of ended jobs."""
    garbage = plan(store, surveyed, older_than_seconds=grace_seconds, now=now).garbage
    mended = _Mender(store, grace_seconds, now, fix)
    for key, why in surveyed.reach.unreadable.items():
        if "/models/" not in key and layout.parts_of_job_state(key) is None:  # those are told with their model or job
            yield Finding("record", key, why, False)
    yield from _without_manifest(store, surveyed)
    yield from _without_files(store, surveyed, garbage, mended)
    for one in garbage:
        subject = _subject(one.parts[0], one.subject) if one.parts else one.subject
        if one.kind == "files":
            sentence = "its files have no manifest: what stored them was killed before the adapter counted."
            yield Finding("adapter", subject, sentence, mended(one))
        elif one.kind == "restore":
            yield Finding("adapter", subject, "gc had put it away, and something mentions it.", mended(one))
        elif one.kind == "attempt":
            yield from _of_ended_job(surveyed, one, mended)


@dataclass(frozen=True)
class _Mender:
    store: Storage
    grace_seconds: float
    now: float
    fix: bool

    def __call__(self, one: Garbage) -> bool:
        return self.fix and bool(carry_out(self.store, [one], self.grace_seconds, self.now))


def _without_manifest(store: Storage, surveyed: Survey) -> Iterator[Finding]:
    """Adapters that something mentions and whose manifest is gone."""
    for ref in surveyed.files:
        is_known = ref in surveyed.manifests or ref in surveyed.tombstones
        if not is_known and ref.adapter_id in surveyed.reach.ids and store.head(layout.manifest(*ref)) is None:
            sentence = "its manifest is lost, and something mentions it; restore it from a copy of the store."
            yield Finding("adapter", _subject(ref.tenant, ref.adapter_id), sentence, False)


def _without_files(store: Storage, surveyed: Survey, garbage: Sequence[Garbage], mended: _Mender) -> Iterator[Finding]:
    unmentioned = {one.parts: one for one in garbage if one.kind == "adapter"}
    for ref in surveyed.manifests:
        there = {info.key.rpartition("/")[2] for info in surveyed.files.get(ref, [])}
        lost = [name for name in FILE_NAMES if name not in there and _is_lost(store, ref, name)]
        if lost:
            sentence = f"its manifest stands, and {' and '.join(lost)} is lost; restore it from a copy, or train it again."
            one = unmentioned.get(tuple(ref))
            yield Finding("adapter", _subject(ref.tenant, ref.adapter_id), sentence, one is not None and mended(one))


def _is_lost(store: Storage, ref: AdapterRef, name: str) -> bool:
    """Look again: both may have been removed, or the files put, since the listing."""
    return store.head(layout.adapter(*ref) + name) is None and store.head(layout.manifest(*ref)) is not None


def _of_ended_job(surveyed: Survey, one: Garbage, mended: _Mender) -> Iterator[Finding]:
    job: JobKey = (one.parts[0], one.parts[1], one.parts[2])
    state = surveyed.reach.states[job]
    left: dict[str, list[ObjectInfo]] = defaultdict(list)
    for info in one.objects:
        if "/checkpoints/" in info.key:
            left[info.key.rpartition("/")[0]].append(info)
    if state is not None and state.document.body["status"] not in OPEN_STATUSES and left:
        objects = tuple(info for infos in left.values() for info in infos)
        size = sum(info.size_bytes for info in objects)
        sentence = f"it has {_ENDED[state.document.body['status']]}, and {len(left)} checkpoints are left ({size:,} bytes)."
        yield Finding("job", _subject(job[0], job[2]), sentence, mended(replace(one, objects=objects)))


def _subject(tenant: str, id_: str) -> str:
    return f"{tenant}/{id_}"
