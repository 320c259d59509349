"""What the hosts of a sweep train at the moment, for people who look from another terminal: one small object beside the ledger.

Its driver writes it now and then and removes it when it ends. Nobody decides by it; an old one tells that the driver is gone.
"""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from infra.errors import BadInput, ObjectNotFound, ServiceUnavailable
from infra.records import decode_record, encode_record
from infra.storage import Storage
from workers import layout
from workers.report import PackState

PACKS_FORMAT = "packs/1"


@dataclass(frozen=True)
class PackView:
    """A host and its pack, as it told last."""

    host: str
    trials: tuple[int, ...]
    """Numbers of the trials it trains."""
    budget_tokens: int
    """Tokens that a pass may have."""
    pass_tokens: int
    """Tokens of its last pass."""
    tokens_per_second: float
    num_passes: int
    told: float
    """When, in seconds since the epoch."""


def packs_of(states: Iterable[PackState], numbers: Mapping[str, int]) -> tuple[PackView, ...]:
    """Return the packs that train trials of ours, by host; `numbers` are the live trials' by job."""
    views = [_pack_of(state, numbers) for state in states]
    return tuple(sorted((view for view in views if view.trials), key=lambda view: (len(view.host), view.host)))


def _pack_of(state: PackState, numbers: Mapping[str, int]) -> PackView:
    trials = sorted(numbers[job_id] for job_id in state.job_ids if job_id in numbers)
    rate, passes = state.tokens_per_second, state.num_passes
    return PackView(state.host, tuple(trials), state.budget_tokens, state.pass_tokens, rate, passes, state.told)


def write_packs(store: Storage, tenant: str, name: str, packs: Iterable[PackView]) -> None:
    """Show these packs to whoever asks. A store that does not answer now is no reason to stop."""
    body = {"packs": [asdict(pack) for pack in packs]}
    with contextlib.suppress(ServiceUnavailable):
        store.put(layout.sweep_packs(tenant, name), encode_record(PACKS_FORMAT, body))


def forget_packs(store: Storage, tenant: str, name: str) -> None:
    """Show none any more."""
    with contextlib.suppress(ServiceUnavailable):
        store.delete(layout.sweep_packs(tenant, name))


def read_packs(store: Storage, tenant: str, name: str) -> tuple[PackView, ...]:
    """Return what a driver showed last, nothing if none does."""
    key = layout.sweep_packs(tenant, name)
    try:
        body = decode_record(store.get(key)[0], PACKS_FORMAT, key)
        return tuple(PackView(**{**pack, "trials": tuple(pack["trials"])}) for pack in body["packs"])
    except (ObjectNotFound, BadInput):
        return ()
