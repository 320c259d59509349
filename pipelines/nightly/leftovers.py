"""What a night that was killed left open in MLflow: the part of `reconcile` that goes by the nights of fleets."""

from collections.abc import Iterator, Mapping

from infra.claims import read_document
from infra.storage import Storage
from infra.tracking import Tracker
from pipelines.leftovers import Finding
from pipelines.nightly.ledger import CLAIM_FORMAT, FleetLedger
from workers import layout
from workers.spec import check_name

_Night = tuple[str, str]
"""(fleet, night)."""


def check_night_runs(store: Storage, tracker: Tracker, open_runs: Mapping[str, str], fix: bool) -> Iterator[Finding]:
    """Runs of nights that are over, or that nobody drives, and which the tracker shows as going on.

    Mended, those of a night that is over have ended as it did; those of one that was killed wait for the same command.
    """
    for (fleet, night), keys in _by_night(open_runs).items():
        ledger = FleetLedger(store, fleet)
        running = [key for key in keys if open_runs[key] == "running"]
        if ledger.is_finished(night):
            yield from _ended(ledger, night, tracker, keys, fix)
        elif running and not _is_driven(store, fleet):
            for key in running if fix else ():
                tracker.end_run(key, "preempted")
            sentence = "its driver was killed; run the same command again and it goes on."
            yield Finding("night", f"{fleet}/{night}", sentence, fix)


def _by_night(keys: Mapping[str, str]) -> dict[_Night, list[str]]:
    found: dict[_Night, list[str]] = {}
    for key in keys:
        parts = key.split("/")
        if parts[0] == "fleets" and len(parts) in (3, 4) and _are_names(parts[1:3]):
            found.setdefault((parts[1], parts[2]), []).append(key)
    return found


def _are_names(words: list[str]) -> bool:
    """Tell whether these can be parts of a key; tags of runs may hold anything."""
    try:
        return all(check_name(word) for word in words)
    except ValueError:
        return False


def _ended(ledger: FleetLedger, night: str, tracker: Tracker, keys: list[str], fix: bool) -> Iterator[Finding]:
    trained = {f"{row.tenant}.{row.task}" for row in ledger.outcomes(night).values() if row.adapter_id is not None}
    counts, is_finished = ledger.report(night)["counts"], ledger.report(night)["is_finished"]
    for key in keys:
        customer = key.split("/")[3:]
        if customer:
            status = "succeeded" if customer[0] in trained else "cancelled"
        else:
            status = "cancelled" if not is_finished else "failed" if counts["failed"] else "succeeded"
        if fix:
            tracker.end_run(key, status)
        what = f"the run of {customer[0]}" if customer else "its run"
        yield Finding("night", f"{ledger.fleet}/{night}", f"the night is over, {what} is open.", fix)


def _is_driven(store: Storage, fleet: str) -> bool:
    claimed = read_document(store, layout.fleet_claim(fleet), CLAIM_FORMAT)
    return claimed is not None and claimed.owner is not None and not claimed.owner.is_certainly_dead()
