"""Where audits are shown: the runs in MLflow of the jobs and trials that made an adapter, and the reports of their sweeps."""

from collections.abc import Iterator, Mapping

from infra.errors import ServiceUnavailable, WorkFailed
from infra.storage import Storage
from infra.tracking import Tracker
from pipelines.sweep_reports import report_of
from pipelines.workspace import Workspace
from sweeps.ledger import read_trials
from sweeps.projection import sweep_key, trial_key
from sweeps.trial import Trial
from workers import layout

TAG = "lorafleet.audit"


def show_audit(workspace: Workspace, tenant: str, job_id: str, sentence: str) -> str | None:
    """Write an audit on the runs of a job and of the trials that asked for it, and into the reports of their sweeps.

    Returns why MLflow does not show it, None if it does.
    """
    trials = list(_trials_of(workspace.store, tenant, job_id))
    for name in dict.fromkeys(name for name, _ in trials):
        _write_again(workspace, tenant, name)
    try:
        tracker = workspace.services.tracker()
        tracker.check()
        runs = [f"{tenant}/jobs/{job_id}", *(trial_key(tenant, name, trial.number) for name, trial in trials)]
        shown = [_is_tagged(tracker, key, {TAG: sentence}) for key in runs]
    except ServiceUnavailable as error:
        return str(error)
    return None if any(shown) else "neither the job nor a trial has a run in MLflow"


def _write_again(workspace: Workspace, tenant: str, name: str) -> None:
    path = report_of(workspace, tenant, name)
    try:
        workspace.services.tracker().log_file(sweep_key(tenant, name), path, "report")
    except (ServiceUnavailable, WorkFailed):
        return  # the report on this machine shows it; the next run of the sweep's command ships it


def _is_tagged(tracker: Tracker, key: str, tags: Mapping[str, str]) -> bool:
    try:
        tracker.set_tags(key, tags)
    except WorkFailed:
        return False
    return True


def _trials_of(store: Storage, tenant: str, job_id: str) -> Iterator[tuple[str, Trial]]:
    names = {info.key.split("/")[3] for info in store.list(layout.sweeps(tenant)) if info.key.endswith("/sweep.json")}
    for name in sorted(names):
        yield from ((name, trial) for trial in read_trials(store, tenant, name) if trial.job_id == job_id)
