"""`lorafleet jobs ...`: single trainings as the store knows them, and asking one to end.

Everything is read from the jobs' states, so it works beside any driver, and without one.
"""

import difflib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, get_args

from infra.claims import Document, claim, read_document
from infra.errors import BadInput, ClaimHeld, ClaimLost, ObjectNotFound, WorkFailed
from infra.fingerprint import is_id
from infra.records import decode_record
from infra.storage import Storage
from infra.tracking import Point
from pipelines.workspace import Workspace
from workers import layout
from workers.job import JOB_FORMAT
from workers.job_state import FRESH, STATE_FORMAT, ask_to_cancel
from workers.manifests import MIN_PREFIX_LENGTH
from workers.metrics_log import decode_points
from workers.report import JobStatus

NUM_READERS = 16
"""Jobs read at the same time: a store that is far away answers each in tens of milliseconds."""
LIVE_STATUSES = ("queued", "running", "preempted")
CANCEL_WAIT_SECONDS = 10.0
"""How long `cancel` waits for a host to end a job; hosts look every two seconds, between steps."""
POLL_SECONDS = 0.2
COLUMNS = ("job", "tenant", "task", "status", "steps", "eval/loss", "reason")


class JobRef(NamedTuple):
    """Where a job stands."""

    tenant: str
    base_id: str
    job_id: str


@dataclass(frozen=True)
class Listing:
    """The jobs there are, and a sentence for each that cannot be read."""

    jobs: list[dict[str, Any]]
    notes: list[str]


@dataclass(frozen=True)
class Cancelled:
    """What a cancellation came to."""

    job_id: str
    status: str
    """As the state says now; a live host may need until its next step."""
    sentence: str


def list_jobs(workspace: Workspace, tenant: str | None = None, status: str | None = None) -> Listing:
    """Return jobs in the words of `jobs list --json`, of one tenant and in one status if they are given."""
    _check_status(status)
    store = workspace.store
    with ThreadPoolExecutor(NUM_READERS) as readers:
        read = list(readers.map(lambda ref: _row(store, ref), _job_refs(store, tenant)))
    rows = [row for row in read if isinstance(row, dict) and status in (None, row["status"])]
    return Listing(rows, [row for row in read if isinstance(row, str)])


def _check_status(status: str | None) -> None:
    known = get_args(JobStatus)
    if status is not None and status not in known:
        close = difflib.get_close_matches(status, known, n=1)
        hint = f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(known)}."
        raise BadInput(f"jobs have no status {status[:80]!r}. {hint}")


def _job_refs(store: Storage, tenant: str | None = None) -> list[JobRef]:
    prefix = layout.tenants() if tenant is None else layout.tenant(tenant)
    parts = [layout.parts_of_job_state(info.key) for info in store.list(prefix)]
    return [JobRef(*part) for part in parts if part is not None]


def find_job(store: Storage, reference: str) -> JobRef:
    """Return the one job whose id is `reference` or begins with it. Raises BadInput on none or several."""
    if not MIN_PREFIX_LENGTH <= len(reference) <= 32 or not is_id(reference.ljust(32, "a")):
        raise BadInput(f"{reference[:80]!r} names no job; give its id, or at least the first {MIN_PREFIX_LENGTH} characters.")
    found = [ref for ref in _job_refs(store) if ref.job_id.startswith(reference)]
    if not found:
        raise BadInput(f"no job starts with '{reference}' in the store {store.uri}; 'lorafleet jobs list' shows what there is.")
    if len(found) > 1:
        listed = ", ".join(f"{ref.job_id} ({ref.tenant})" for ref in found[:8])
        raise BadInput(f"'{reference}' fits {len(found)} jobs: {listed}; give more characters.")
    return found[0]


def _row(store: Storage, ref: JobRef) -> dict[str, Any] | str:
    """Return what a list says of a job, or why its state cannot be read."""
    try:
        return _described(ref, _state(store, ref), _spec(store, ref))
    except (BadInput, WorkFailed) as error:
        return str(error)


def _state(store: Storage, ref: JobRef) -> Document:
    document = read_document(store, layout.job_state(*ref), STATE_FORMAT)
    if document is None:
        raise BadInput(f"the job {ref.job_id} is in the store {store.uri} no more.")
    return document


def _spec(store: Storage, ref: JobRef) -> dict[str, Any]:
    """Return the job as it was resolved, an empty object if that is lost."""
    key = layout.job_spec(*ref)
    try:
        return decode_record(store.get(key)[0], JOB_FORMAT, key)
    except ObjectNotFound:
        return {}


def _described(ref: JobRef, document: Document, spec: Mapping[str, Any]) -> dict[str, Any]:
    body, owner = document.body, document.owner
    return {
        "job_id": ref.job_id,
        "tenant": ref.tenant,
        "task": spec.get("spec", {}).get("task"),
        "base_id": ref.base_id,
        "status": body["status"],
        "reason": body["reason"],
        "attempt": document.epoch,
        "owner": owner and {"host": owner.host, "pid": owner.pid},
        "is_lost": owner is not None and owner.is_certainly_dead(),
        "num_steps": body["num_steps"] or (body["checkpoint"] or {}).get("step", 0),
        "best_step": body["best_step"],
        "num_tokens": body["num_tokens"],
        "seconds": body["seconds"],
        "metrics": body["metrics"],
        "adapter_id": body["adapter_id"],
    }


def row_of(job: Mapping[str, Any]) -> list[str]:
    """Return a job as a row of a table with the columns of COLUMNS."""
    loss = job["metrics"].get("eval/loss")
    return [
        job["job_id"],
        job["tenant"],
        job["task"] or "-",
        _status_text(job),
        str(job["num_steps"]),
        f"{float(loss):.4f}" if loss is not None else "-",
        job["reason"] or "",
    ]


def _status_text(job: Mapping[str, Any]) -> str:
    return f"{job['status']} (its host is gone)" if job["is_lost"] else str(job["status"])


def show_job(workspace: Workspace, reference: str) -> dict[str, Any]:
    """Return what lists say of a job, what was asked for, and where it keeps its state."""
    store = workspace.store
    ref = find_job(store, reference)
    document, resolved = _state(store, ref), _spec(store, ref)
    more = {"checkpoint": document.body["checkpoint"], "record": document.body["record"]}
    pinned = {key: value for key, value in resolved.items() if key != "job_id"}
    return _described(ref, document, resolved) | more | {"job": pinned, "uri": f"{store.uri}/{layout.job(*ref)}".rstrip("/")}


def job_text(job: Mapping[str, Any]) -> str:
    """Return a job as lines for a person."""
    spec = job["job"].get("spec", {})
    owner = job["owner"]
    lines = [
        f"job      {job['job_id']}",
        f"tenant   {job['tenant']}, task {job['task'] or '-'}",
        f"base     {job['base_id']}",
        f"status   {_status_text(job)}{': ' + job['reason'] if job['reason'] else ''}",
        f"attempt  {job['attempt']}{', held by process {} on {}'.format(owner['pid'], owner['host']) if owner else ''}",
        f"steps    {job['num_steps']}, {job['num_tokens']:,} tokens, {job['seconds']:.0f}s",
        *(f"{name:<8} {_settings_text(spec[name])}" for name in ("data", "peft", "training") if name in spec),
        f"metrics  {', '.join(f'{name} {float(value):.4f}' for name, value in job['metrics'].items()) or '-'}",
        f"adapter  {job['adapter_id'] or '-'}",
        f"uri      {job['uri']}",
    ]
    return "\n".join(lines)


def _settings_text(section: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in section.items() if value is not None)


def logs(workspace: Workspace, reference: str) -> dict[str, Any]:
    """Return a job's metric points, those that are safe so far, by step: `steps` as [{"step", "metrics"}], and how it stands."""
    ref = find_job(workspace.store, reference)
    document = _state(workspace.store, ref)
    by_step: dict[int, dict[str, float]] = {}
    for point in _points(workspace.store, document.body["chunks"]):
        by_step.setdefault(point.step, {})[point.metric] = point.value
    steps = [{"step": step, "metrics": by_step[step]} for step in sorted(by_step)]
    return {"job_id": ref.job_id, "status": document.body["status"], "reason": document.body["reason"], "steps": steps}


def _points(store: Storage, chunks: Sequence[str]) -> list[Point]:
    points: list[Point] = []
    for chunk in chunks:
        try:
            points += decode_points(store.get(chunk)[0])
        except ObjectNotFound:
            raise WorkFailed(f"the store {store.uri} has lost {chunk}; restore it from a copy.") from None
    return points


def logs_text(found: Mapping[str, Any]) -> str:
    """Return a line for each step and one with the status."""
    lines = [
        f"step {row['step']}  " + "  ".join(f"{name} {value:.6g}" for name, value in row["metrics"].items())
        for row in found["steps"]
    ]
    return "\n".join([*lines, f"{found['status']}{': ' + found['reason'] if found['reason'] else ''}"])


def cancel(workspace: Workspace, reference: str, wait_seconds: float = CANCEL_WAIT_SECONDS) -> Cancelled:
    """End a job: at once if no host has it, else by asking its host, and waiting a little until it has. May be repeated."""
    store = workspace.store
    ref = find_job(store, reference)
    until = time.monotonic() + wait_seconds
    asked: int | None = None
    while True:
        document = _state(store, ref)
        if document.body["status"] not in LIVE_STATUSES:
            if asked is not None:
                store.delete(layout.job_cancel(*ref))
            return _ended(ref, document, asked)
        if asked == document.epoch and document.owner is not None and not document.owner.is_certainly_dead():
            if time.monotonic() >= until:
                return Cancelled(ref.job_id, document.body["status"], f"the host of {ref.job_id} was asked to end it.")
            time.sleep(POLL_SECONDS)
        elif _settle(workspace, ref):
            asked = None
        else:
            asked = _state(store, ref).epoch
            ask_to_cancel(store, *ref, epoch=asked, actor=workspace.actor)


def _settle(workspace: Workspace, ref: JobRef) -> bool:
    """Take over a job that nobody holds and let it go as cancelled; False if somebody alive holds it."""
    lease_seconds = workspace.settings.lease_seconds
    try:
        lease = claim(
            workspace.store, layout.job_state(*ref), STATE_FORMAT, FRESH, owner=workspace.owner, lease_seconds=lease_seconds
        )
        ended = lease.body["status"] not in LIVE_STATUSES
        lease.release({} if ended else {"status": "cancelled", "reason": ""})
    except (ClaimHeld, ClaimLost):
        return False
    return True


def _ended(ref: JobRef, document: Document, asked: int | None) -> Cancelled:
    status = document.body["status"]
    if status == "cancelled":
        return Cancelled(ref.job_id, status, f"job {ref.job_id} is cancelled; the command that made it trains it again.")
    before = "before the request reached it" if asked is not None else "already"
    return Cancelled(ref.job_id, status, f"job {ref.job_id} has {_ENDS[status]} {before}; there is nothing to cancel.")


_ENDS = {"succeeded": "succeeded", "stopped": "been stopped by its sweep", "failed": "failed"}


def cancelled_json(outcome: Cancelled) -> dict[str, Any]:
    """Return a cancellation as JSON data."""
    return {key: value for key, value in asdict(outcome).items() if key != "sentence"}
