"""What a store keeps of a tenant: found, and removed. Everything may be repeated, and killed anywhere.

A night's outcomes, report and page are written anew without the tenant, while the fleet's claim is held; all else is deleted.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from infra.claims import Owner, claim, read_document
from infra.crashpoints import crashpoint
from infra.errors import ClaimHeld, ClaimLost, ObjectNotFound, WorkFailed
from infra.fingerprint import is_id
from infra.records import decode_record, encode_record
from infra.storage import ObjectInfo, Storage
from pipelines.nightly.ledger import OUTCOMES_FORMAT, REPORT_FORMAT
from pipelines.nightly.retold import may_name, outcomes_without, report_without
from sweeps.ledger import CLAIM_FORMAT as SWEEP_CLAIM_FORMAT
from workers import layout
from workers.job_state import FRESH, STATE_FORMAT
from workers.manifests import AdapterRef

NUM_WORKERS = 16


@dataclass(frozen=True)
class Kept:
    """What a store keeps of a tenant."""

    objects: tuple[ObjectInfo, ...]
    """Below the tenant's own prefix."""
    of_nights: tuple[ObjectInfo, ...]
    """Its plans and rows."""
    retold: tuple[str, ...]
    """Keys of outcomes and reports of nights that name it."""
    fleets: tuple[str, ...]
    """Those in whose nights it stands."""

    @property
    def counts(self) -> dict[str, int]:
        """Objects by what they are."""
        kinds = Counter(_kind_of(info.key) for info in self.objects)
        nights = {"plans and rows of nights": len(self.of_nights), "reports of nights": len(self.retold)}
        return {kind: count for kind, count in (dict(sorted(kinds.items())) | nights).items() if count}

    @property
    def keys(self) -> list[str]:
        return [*(info.key for info in (*self.objects, *self.of_nights)), *self.retold]


def kept_of(store: Storage, tenant: str) -> Kept:
    """Return what a store keeps of a tenant. Reads the outcomes and the report of every night."""
    nights = list(store.list(layout.fleets()))
    own = tuple(info for info in nights if _is_of_night(info.key, tenant))
    told = [info.key for info in nights if info.key.rpartition("/")[2] in ("outcomes.json", "report.json")]
    with ThreadPoolExecutor(NUM_WORKERS, "forget") as readers:
        named = list(readers.map(lambda key: _names(store, key, tenant), told))
    retold = tuple(key for key, is_named in zip(told, named, strict=True) if is_named)
    fleets = sorted({key.split("/")[1] for key in [*(info.key for info in own), *retold]})
    return Kept(tuple(store.list(layout.tenant(tenant))), own, retold, tuple(fleets))


def known_tenants(store: Storage) -> list[str]:
    """Return the tenants of whom the store keeps something."""
    return sorted({info.key.split("/")[1] for info in store.list(layout.tenants())})


def live_claim(store: Storage, tenant: str, owner: Owner, lease_seconds: float) -> str | None:
    """Return whose living process works for the tenant, as a noun, None if nobody does.

    Claims of processes that are gone are taken over and let go, which fences off what they may still write.
    """
    for info in store.list(layout.tenant(tenant)):
        job = layout.parts_of_job_state(info.key)
        if job is not None and _is_live(store, info.key, STATE_FORMAT, owner, lease_seconds):
            return f"its job {job[2][:12]}"
        match info.key.split("/"):
            case [_, _, "sweeps", name, "claim.json"] if _is_live(store, info.key, SWEEP_CLAIM_FORMAT, owner, lease_seconds):
                return f"its sweep {name}"
    return None


def delete_all(store: Storage, objects: Sequence[ObjectInfo]) -> None:
    """Delete objects, several at a time."""

    def remove(info: ObjectInfo) -> None:
        store.delete(info.key)
        crashpoint("tenant-object-deleted", info.key)

    with ThreadPoolExecutor(NUM_WORKERS, "forget") as deleters:
        list(deleters.map(remove, objects))


def retell(store: Storage, key: str, tenant: str) -> None:
    """Write a night's outcomes, or its page and then its report, anew without a tenant."""
    data, _ = store.get(key)
    if key.endswith("outcomes.json"):
        body = outcomes_without(decode_record(data, OUTCOMES_FORMAT, key), tenant)
        store.put(key, encode_record(OUTCOMES_FORMAT, body))
    else:
        body, page = report_without(decode_record(data, REPORT_FORMAT, key), tenant)
        store.put(key.replace("report.json", "page.html"), page.encode())
        crashpoint("tenant-page-retold", key)
        store.put(key, encode_record(REPORT_FORMAT, body))
    crashpoint("tenant-night-retold", key)


def merged_from(store: Storage, tenant: str) -> Iterator[AdapterRef]:
    """Yield adapters of other tenants that were merged from adapters of this one."""
    parts = [layout.parts_of_manifest(info.key) for info in store.list(layout.tenants())]
    refs = [AdapterRef(*one) for one in parts if one is not None and one[0] != tenant]
    with ThreadPoolExecutor(NUM_WORKERS, "forget") as readers:
        for ref, is_named in zip(refs, readers.map(lambda ref: _is_merged(store, ref, tenant), refs), strict=True):
            if is_named:
                yield ref


def _is_merged(store: Storage, ref: AdapterRef, tenant: str) -> bool:
    try:
        body = json.loads(store.get(layout.manifest(*ref))[0])
    except (ObjectNotFound, WorkFailed, ValueError):
        return False
    return any(check.get("tenant") == tenant for check in body.get("merge", {}).get("checks", ()))


def _is_live(store: Storage, key: str, format: str, owner: Owner, lease_seconds: float) -> bool:
    document = read_document(store, key, format)
    if document is None or document.owner is None:
        return False
    try:
        lease = claim(store, key, format, FRESH, owner=owner, lease_seconds=lease_seconds)
        lease.release({"status": "preempted"} if lease.body.get("status") == "running" else {})
    except (ClaimHeld, ClaimLost):
        return True
    return False


def _is_of_night(key: str, tenant: str) -> bool:
    match key.split("/"):
        case ["fleets", _, "nights", _, "plans" | "rows", file]:
            return file.startswith(f"{tenant}.")
        case _:
            return False


def _names(store: Storage, key: str, tenant: str) -> bool:
    try:
        return may_name(store.get(key)[0], tenant)
    except ObjectNotFound:
        return False


def _kind_of(key: str) -> str:
    parts = key.split("/")
    kind = parts[3] if is_id(parts[2]) and len(parts) > 4 else parts[2]
    return {"models": "journals and candidates", "tombstones": "manifests"}.get(kind, kind)
