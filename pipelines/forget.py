"""`lorafleet tenant forget`: all that is kept of a customer is removed, from the store, this machine and MLflow.

The tombstone goes first, so that nothing is made for the tenant any more; who was at work before is found by its claim, and then
nothing is removed. May be killed anywhere and repeated: what is there is looked for each time.
"""

import difflib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infra.claims import Lease, claim
from infra.crashpoints import crashpoint
from infra.errors import BadInput, ClaimHeld, ServiceUnavailable
from pipelines import forget_home, forget_store
from pipelines.adapters import refuse_bad_names
from pipelines.forget_home import TENANT_TAG
from pipelines.forget_store import Kept
from pipelines.nightly.ledger import CLAIM_FORMAT
from pipelines.workspace import Workspace
from workers import layout
from workers.forgotten import forgotten_at, put_tombstone

FLEET_TAG = "lorafleet.fleet"


@dataclass(frozen=True)
class Outcome:
    """What was, or would be, removed."""

    tenant: str
    removed: bool
    """False: it was only looked at."""
    counts: dict[str, int]
    """By what it is."""
    num_bytes: int
    """Of the objects in the store."""
    keys: tuple[str, ...]
    """In the store; of nights also what is written anew."""
    notes: tuple[str, ...] = ()
    is_complete: bool = True
    """False if MLflow was away: then the same command does the rest."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        told = {"tenant": self.tenant, "removed": self.removed, "is_complete": self.is_complete, "counts": self.counts}
        return {**told, "num_bytes": self.num_bytes, "keys": list(self.keys), "notes": list(self.notes)}

    def text(self) -> str:
        """Return the same as lines for a person."""
        lines = [f"{count:>7,} {what}" for what, count in self.counts.items()]
        if not self.removed and not lines:
            return f"nothing is left of {self.tenant}, which was forgotten"
        if not self.removed:
            return "\n".join(
                [*lines, f"would be removed ({self.num_bytes:,} bytes); do it with: lorafleet tenant forget {self.tenant} --yes"]
            )
        done = f"{self.tenant} is forgotten" if self.is_complete else f"{self.tenant} is forgotten but for MLflow"
        again = f"to take it in again some day: lorafleet tenant forget {self.tenant} --undo"
        return "\n".join([*lines, f"{done} ({self.num_bytes:,} bytes removed); {again}"])


def forget(workspace: Workspace, tenant: str, *, really: bool) -> Outcome:
    """Remove all that is kept of a tenant, or (not `really`) tell what that is and change nothing.

    Raises BadInput if nothing is kept of such a tenant, ClaimHeld while somebody works for it.
    """
    refuse_bad_names(tenant)
    kept = forget_store.kept_of(workspace.store, tenant)
    outcome = _looked(workspace, tenant, kept)
    if not outcome.counts and forgotten_at(workspace.store, tenant) is None:
        raise BadInput(_unknown(workspace, tenant))
    return _forgotten(workspace, outcome, kept) if really else outcome


def undo(workspace: Workspace, tenant: str) -> str:
    """Let a tenant that was forgotten be taken in again; return what was done. Nothing comes back.

    Raises BadInput if it is not forgotten, or something of it is left: then it was not forgotten to the end.
    """
    refuse_bad_names(tenant)
    if forgotten_at(workspace.store, tenant) is None:
        raise BadInput(f"the tenant '{tenant}' is not forgotten; there is nothing to undo.")
    left = sum(1 for _ in workspace.store.list(layout.tenant(tenant)))
    if left:
        again = f"lorafleet tenant forget {tenant} --yes"
        raise BadInput(
            f"{left} objects of the tenant '{tenant}' are left, because forgetting it was cut off; end it with: {again}"
        )
    workspace.store.delete(layout.forgotten(tenant))
    return f"{tenant} may be taken in again; what was removed does not come back."


def _looked(workspace: Workspace, tenant: str, kept: Kept) -> Outcome:
    home, notes = workspace.settings.home, list(_notes(workspace, tenant))
    counts = dict(kept.counts)
    counts["tracking logs here"] = len(forget_home.logs_of(home, tenant))
    counts["reports and pages here"] = len(forget_home.reports_of(home, tenant)) + len(forget_home.nights_of(home, tenant))
    is_complete = True
    try:
        counts |= _in_mlflow(workspace, tenant)
    except ServiceUnavailable as error:
        is_complete = False
        notes.append(str(error))
    size = sum(info.size_bytes for info in (*kept.objects, *kept.of_nights))
    told = {what: count for what, count in counts.items() if count}
    return Outcome(tenant, False, told, size, tuple(kept.keys), tuple(notes), is_complete)


def _in_mlflow(workspace: Workspace, tenant: str) -> dict[str, int]:
    purge = workspace.services.purge()
    if not purge.is_there:
        return {}
    held = purge.held(TENANT_TAG, tenant, tenant)
    return {"registered models in MLflow": len(held.models), "runs in MLflow": len(held.runs)}


def _forgotten(workspace: Workspace, outcome: Outcome, kept: Kept) -> Outcome:
    tenant, store, home = outcome.tenant, workspace.store, workspace.settings.home
    with _fleets_held(workspace, tenant, kept.fleets):
        _refuse_live(workspace, tenant, "nothing was removed")
        put_tombstone(store, tenant)
        crashpoint("tenant-tombstone-written", tenant)
        _refuse_live(workspace, tenant, "nothing more is made for it")
        forget_home.clean_logs(home, tenant)
        _clean_store(workspace, tenant)
        forget_home.clean_files(home, tenant)
        notes, is_complete = list(outcome.notes), True
        try:
            notes += _clean_mlflow(workspace, tenant)
        except ServiceUnavailable as error:
            again = f"{str(error).rstrip('.')}; all else is done, and the same command does the rest."
            notes, is_complete = [note for note in notes if note != str(error)] + [again], False
        # What somebody who had begun before the tombstone was there has put meanwhile.
        forget_store.delete_all(store, list(store.list(layout.tenant(tenant))))
    return replace(outcome, removed=True, notes=tuple(notes), is_complete=is_complete)


def _clean_store(workspace: Workspace, tenant: str) -> None:
    kept = forget_store.kept_of(workspace.store, tenant)
    for key in kept.retold:
        forget_store.retell(workspace.store, key, tenant)
    forget_store.delete_all(workspace.store, (*kept.of_nights, *kept.objects))


def _clean_mlflow(workspace: Workspace, tenant: str) -> list[str]:
    """Remove what MLflow holds; return what remains, as sentences."""
    notes = _clean_studies(workspace, tenant)
    purge = workspace.services.purge()
    if not purge.is_there:
        return notes
    with tempfile.TemporaryDirectory(prefix="lorafleet-") as folder:
        purge.rewrite_files(FLEET_TAG, TENANT_TAG, "report", lambda path: _retold(path, Path(folder), tenant))
    crashpoint("tenant-mlflow-retold", tenant)
    left = purge.remove(purge.held(TENANT_TAG, tenant, tenant))
    crashpoint("tenant-mlflow-removed", tenant)
    return [*notes, left] if left else notes


def _retold(path: Path, folder: Path, tenant: str) -> list[Path]:
    return forget_home.retell(path, folder, tenant) if path.suffix == ".json" else []


def _clean_studies(workspace: Workspace, tenant: str) -> list[str]:
    """Remove the copies of a tenant's studies, where there is a storage of them."""
    url = workspace.settings.study_storage
    if url is None:
        return []
    from sweeps.study import forget_studies  # Optuna, which nothing else here needs

    problem = forget_studies(url, f"{tenant}/")
    return [f"the study storage still holds its studies ({problem}); the same command tries again."] if problem else []


def _refuse_live(workspace: Workspace, tenant: str, so: str) -> None:
    busy = forget_store.live_claim(workspace.store, tenant, workspace.owner, workspace.settings.lease_seconds)
    if busy is not None:
        raise ClaimHeld(f"a living process works on {busy}, and {so}; end it or wait for it, then run the same command again.")


@contextmanager
def _fleets_held(workspace: Workspace, tenant: str, fleets: Sequence[str]) -> Iterator[None]:
    """Hold the claims of fleets in whose nights a tenant stands: no night of theirs runs meanwhile."""
    with ExitStack() as leases:
        for fleet in fleets:
            lease = _claimed(workspace, tenant, fleet)
            leases.callback(_let_go, lease)
            leases.enter_context(lease.keep_alive())
        yield


def _claimed(workspace: Workspace, tenant: str, fleet: str) -> Lease:
    seconds = workspace.settings.lease_seconds
    try:
        return claim(workspace.store, layout.fleet_claim(fleet), CLAIM_FORMAT, {}, owner=workspace.owner, lease_seconds=seconds)
    except ClaimHeld as error:
        raise ClaimHeld(
            f"a night of the fleet {fleet} is being run, and '{tenant}' stands in it; run the same command again when it has "
            "ended."
        ) from error


def _let_go(lease: Lease) -> None:
    if not lease.is_lost:
        lease.release()


def _notes(workspace: Workspace, tenant: str) -> Iterator[str]:
    for ref in forget_store.merged_from(workspace.store, tenant):
        yield (
            f"the adapter {ref.adapter_id[:12]} of {ref.tenant} was merged from adapters of {tenant} and keeps what they "
            "learned; replace it if it must not."
        )
    if forget_home.is_logged(workspace.settings.home, tenant):
        yield f"log files in {workspace.settings.home / 'logs'} name {tenant}; they go when newer ones have replaced them."


def _unknown(workspace: Workspace, tenant: str) -> str:
    known = forget_store.known_tenants(workspace.store)
    close = difflib.get_close_matches(tenant, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"known are: {', '.join(known[:10]) or 'none yet'}."
    return f"nothing is kept of a tenant '{tenant}'; {hint}"
