"""What other processes may do with a sweep by its name: look at it, ask for more trials, ask it to stop.

They work on the ledger alone, whether or not a driver is alive.
"""

import time
from collections.abc import Callable
from typing import Any

from infra.claims import read_document
from infra.errors import BadInput
from infra.storage import Storage
from sweeps.ledger import CLAIM_FORMAT, Settings, adjust, put_stop, read_header, read_spec, read_trials
from sweeps.packs import read_packs
from sweeps.trial import Trial, best_of
from sweeps.view import SweepView, view_of
from workers import layout


def names(store: Storage, tenant: str) -> list[str]:
    """Return the names of a tenant's sweeps, sorted."""
    prefix = layout.sweeps(tenant)
    return [entry.key.removeprefix(prefix).split("/")[0] for entry in store.list(prefix) if entry.key.endswith("/sweep.json")]


def status(store: Storage, tenant: str, name: str) -> SweepView:
    """Return how far a sweep is, as its ledger says. Raises BadInput if there is no such sweep."""
    spec = read_spec(store, tenant, name)
    trials = read_trials(store, tenant, name)
    found = read_document(store, layout.sweep_claim(tenant, name), CLAIM_FORMAT)
    body: dict[str, Any] = found.body if found else {"seconds": 0.0, "status": "running"}
    return view_of(tenant, spec, body["status"], trials, body["seconds"], packs=read_packs(store, tenant, name))


def best(store: Storage, tenant: str, name: str) -> Trial:
    """Return the best complete trial (of several objectives: the front's best in the first).

    Raises BadInput if there is no such sweep, or none of its trials is complete.
    """
    header = read_header(store, tenant, name)
    trials = read_trials(store, tenant, name)
    found = best_of(trials, header.spec.objectives)
    if found is None:
        raise BadInput(f"None of the {len(trials)} trials of the sweep '{name}' is complete; see 'sweep status {name}' for why.")
    return found


def extend(store: Storage, tenant: str, name: str, num_trials: int) -> Settings:
    """Set a new total; a live driver takes it up within seconds. Raises BadInput if fewer trials are asked for than exist."""
    num_existing = len(read_trials(store, tenant, name))
    if num_trials < num_existing:
        raise BadInput(
            f"Sweep '{name}' has {num_existing} trials already; its total cannot be {num_trials}, give {num_existing} or more."
        )
    return adjust(store, tenant, name, lambda settings: settings.model_copy(update={"num_trials": num_trials}))


def stop(store: Storage, tenant: str, name: str, clock: Callable[[], float] = time.time) -> None:
    """Ask the driver of a sweep to checkpoint its jobs and end; the same command that started it goes on later.

    Raises BadInput if there is no such sweep. Without a driver nothing happens: the next one starts afresh.
    """
    read_header(store, tenant, name)
    put_stop(store, tenant, name, clock())
