"""The report of a sweep on this machine: what its ledger says, and what audits of its adapters found."""

from pathlib import Path

from infra.storage import Storage
from pipelines.evidence import audits_of
from pipelines.workspace import Workspace
from sweeps.ledger import read_trials
from sweeps.report import write_report
from workers import layout


def report_of(workspace: Workspace, tenant: str, name: str) -> Path:
    """Write the report of a sweep, however far it is, and return its path."""
    folder = workspace.settings.home / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    audits = audits_in_sweep(workspace.store, tenant, name)
    return write_report(workspace.store, tenant, name, folder / f"{tenant}-{name}.html", audits)


def audits_in_sweep(store: Storage, tenant: str, name: str) -> dict[str, str]:
    """Return what the last audit of each adapter of a sweep found, by adapter_id."""
    made = {trial.adapter_id for trial in read_trials(store, tenant, name) if trial.adapter_id is not None}
    found = {adapter_id: audits_of(store, tenant, adapter_id) for adapter_id in made & _with_evidence(store, tenant)}
    return {adapter_id: sentences[-1] for adapter_id, sentences in found.items() if sentences}


def _with_evidence(store: Storage, tenant: str) -> set[str]:
    return {info.key.split("/")[3] for info in store.list(f"{layout.tenant(tenant)}evidence/")}
