"""Tombstones of tenants that were forgotten: who would make something for one of them is refused.

Whoever forgets a tenant writes the tombstone first and looks for claims then; whoever claims something looks for a tombstone
after it has the claim. So one of the two sees the other.
"""

import contextlib
import time
from datetime import UTC, datetime

from infra.errors import BadInput, ConditionFailed, ObjectNotFound
from infra.records import decode_record, encode_record
from infra.storage import Storage
from workers import layout

FORGOTTEN_FORMAT = "forgotten/1"


class TenantForgotten(BadInput):
    """Something was to be made for a tenant that was forgotten."""


def forgotten_at(store: Storage, tenant: str) -> float | None:
    """Return when a tenant was forgotten, seconds since the epoch; None if it was not."""
    key = layout.forgotten(tenant)
    if store.head(key) is None:
        return None
    try:
        return float(decode_record(store.get(key)[0], FORGOTTEN_FORMAT, key)["at"])
    except ObjectNotFound:
        return None


def put_tombstone(store: Storage, tenant: str) -> None:
    """Mark a tenant as forgotten, unless it is. The mark names the tenant and the time, and nothing of what was there."""
    with contextlib.suppress(ConditionFailed):
        body = {"tenant": tenant, "at": time.time()}
        store.put_if_absent(layout.forgotten(tenant), encode_record(FORGOTTEN_FORMAT, body))


def refuse_forgotten(store: Storage, tenant: str) -> None:
    """Raise TenantForgotten, with the way out, if a tenant was forgotten. Asks the store once."""
    at = forgotten_at(store, tenant)
    if at is not None:
        day = datetime.fromtimestamp(at, UTC).date().isoformat()
        raise TenantForgotten(
            f"the tenant '{tenant}' was forgotten on {day}, and nothing is kept of it; to take it in again: "
            f"lorafleet tenant forget {tenant} --undo"
        )
