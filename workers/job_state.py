"""What a job's state looks like, and how anybody asks its host to end it. Light: whoever only looks loads no torch.

The state is a claim that its owner alone changes (`attempt`). A request to cancel is an object beside it, which names the epoch
it is meant for: one that comes too late does not end the next try.
"""

import time
from typing import Any

from infra.errors import BadInput, ObjectNotFound, ServiceUnavailable, WorkFailed
from infra.records import decode_record, encode_record
from infra.storage import Storage
from workers import layout

STATE_FORMAT = "state/1"
CANCEL_FORMAT = "cancel/1"
FRESH: dict[str, Any] = {
    "status": "queued",
    "reason": "",
    "attempt": 0,
    "checkpoint": None,
    "chunks": [],
    "adapter_id": None,
    "record": None,
    "metrics": {},
    "num_steps": 0,
    "best_step": 0,
    "seconds": 0.0,
    "num_tokens": 0,
}


def ask_to_cancel(store: Storage, tenant: str, base_id: str, job_id: str, *, epoch: int, actor: str) -> None:
    """Ask the owner of `epoch` to end the job with the status "cancelled". May be repeated."""
    body = {"epoch": epoch, "actor": actor, "at": time.time()}
    store.put(layout.job_cancel(tenant, base_id, job_id), encode_record(CANCEL_FORMAT, body))


def is_asked_to_cancel(store: Storage, tenant: str, base_id: str, job_id: str, epoch: int) -> bool:
    """Tell whether `epoch` was asked to end. False where the store does not tell: whoever trains asks again soon."""
    key = layout.job_cancel(tenant, base_id, job_id)
    try:
        if store.head(key) is None:
            return False
        return bool(decode_record(store.get(key)[0], CANCEL_FORMAT, key).get("epoch") == epoch)
    except (ServiceUnavailable, ObjectNotFound, WorkFailed, BadInput):
        return False
