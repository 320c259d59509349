"""What MLflow shows, and what killed processes left, compared with the store's truth; on request made equal to it.

The store wins: an alias that somebody moved in MLflow goes back to where the journal says. Journals, candidates and evidence are
never changed. What cannot be mended (a damaged journal, a champion whose files are gone) is told with the way out. Everything may
be repeated, also beside live sweeps: claims of the living are left alone, and files are touched only after `gc`'s time of grace.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from infra.claims import Document, read_document
from infra.errors import BadInput, ServiceUnavailable, WorkFailed
from infra.storage import Storage
from infra.tracking import Tracker
from infra.tracking_log import Shipper, TrackingLog
from pipelines.gc import GRACE_SECONDS
from pipelines.journal import Entry, history, models, read_hint, write_hint
from pipelines.leftovers import Finding, check_job_runs, check_jobs, check_leftovers, let_go
from pipelines.nightly.leftovers import check_night_runs
from pipelines.projection import differences, project
from pipelines.reachable import local_time, store_time, take_survey
from sweeps.ledger import CLAIM_FORMAT, Header, read_header, read_trials
from sweeps.projection import Projection, sweep_key, trial_key
from sweeps.trial import Trial
from workers import layout
from workers.job import BaseRef, DataRef, Job, pin
from workers.metrics_log import decode_points

if TYPE_CHECKING:  # as in pipelines.projection
    from infra.mlflow_registry import ModelRegistry

SHIP_TIMEOUT_SECONDS = 60.0


def reconcile(
    store: Storage, registry: ModelRegistry, tracker: Tracker, *, fix: bool, grace_seconds: float = GRACE_SECONDS
) -> list[Finding]:
    """Return what differs, over all models, jobs, sweeps and adapters in the store; with `fix` mend what can be mended.

    Files that nothing refers to count once they are older than `grace_seconds`.

    Raises ServiceUnavailable if the store or MLflow does not answer; what was mended before stays so.
    """
    found: list[Finding] = []
    for tenant, task in models(store):
        found += _check_model(store, registry, tenant, task, fix)
    now = store_time(store) if fix else local_time()
    surveyed = take_survey(store)
    found += check_jobs(store, surveyed, now, fix)
    open_runs = tracker.open_statuses()
    found += check_job_runs(store, tracker, surveyed, open_runs, now, fix)
    for tenant, name in surveyed.sweeps:
        found += _check_sweep(store, tracker, tenant, name, open_runs, fix)
    found += check_night_runs(store, tracker, open_runs, fix)
    champions = " ".join(finding.sentence for finding in found if finding.kind == "adapter")
    left = check_leftovers(store, surveyed, grace_seconds, now, fix)
    return found + [one for one in left if one.kind != "adapter" or one.subject.rpartition("/")[2] not in champions]


def _check_model(store: Storage, registry: ModelRegistry, tenant: str, task: str, fix: bool) -> Iterator[Finding]:
    model = f"{tenant}.{task}"
    try:
        entries = history(store, tenant, task)
    except (BadInput, WorkFailed) as error:
        yield Finding("journal", model, str(error), False)
        return
    yield from _check_journal(model, entries)
    yield from _check_head(store, tenant, task, entries, fix)
    yield from _check_champion(store, tenant, model, entries)
    try:
        told = (project if fix else differences)(store, registry, tenant, task)
    except WorkFailed as error:
        yield Finding("registry", model, str(error), False)
        return
    yield from (Finding("registry", model, f"{sentence}.", fix) for sentence in told)


def _check_journal(model: str, entries: list[Entry]) -> Iterator[Finding]:
    missing = sorted(set(range(1, len(entries) + 1)) - {entry.generation for entry in entries})
    if missing:
        yield Finding("journal", model, f"generation {missing[0]} is missing; restore it from a copy of the store.", False)


def _check_head(store: Storage, tenant: str, task: str, entries: list[Entry], fix: bool) -> Iterator[Finding]:
    model, hint = f"{tenant}.{task}", read_hint(store, tenant, task)
    last = entries[-1].generation if entries else 0
    if hint == last:
        return
    if hint is not None and hint > last:
        sentence = f"HEAD names generation {hint}, the journal ends at {last}; entries are lost, restore them from a copy."
        yield Finding("head", model, sentence, False)
        return
    if fix and last:
        write_hint(store, tenant, task, last)
    what = "is damaged" if hint is None else f"names generation {hint}" if hint else "is missing"
    yield Finding("head", model, f"HEAD {what}, the journal ends at {last}.", fix and last > 0)


def _check_champion(store: Storage, tenant: str, model: str, entries: list[Entry]) -> Iterator[Finding]:
    if not entries:
        return
    champion = entries[-1]
    if store.head(layout.manifest(tenant, champion.base_id, champion.adapter_id)) is None:
        sentence = f"the champion {champion.adapter_id} is in the store no more; roll back, or restore it from a copy."
        yield Finding("adapter", model, sentence, False)


def _check_sweep(
    store: Storage, tracker: Tracker, tenant: str, name: str, open_runs: Mapping[str, str], fix: bool
) -> Iterator[Finding]:
    subject = sweep_key(tenant, name)
    open_keys = [key for key in open_runs if key == subject or key.startswith(f"{subject}/")]
    if not open_keys:
        return
    try:
        header, trials = read_header(store, tenant, name), read_trials(store, tenant, name)
        claimed = read_document(store, layout.sweep_claim(tenant, name), CLAIM_FORMAT)
    except (BadInput, WorkFailed) as error:
        yield Finding("sweep", subject, str(error), False)
        return
    yield from _check_trials(store, tracker, header, trials, open_keys, fix)
    if subject in open_keys and claimed is not None:
        live = [trial_key(tenant, name, trial.number) for trial in trials if trial.is_live]
        driven = [key for key in (subject, *live) if open_runs.get(key) == "running"]
        yield from _check_driver(store, tracker, subject, claimed, driven, fix)


def _check_trials(
    store: Storage, tracker: Tracker, header: Header, trials: list[Trial], open_keys: list[str], fix: bool
) -> Iterator[Finding]:
    """Trials that have ended, and whose run is open."""
    subject = sweep_key(header.tenant, header.spec.name)
    wrong = [trial for trial in trials if not trial.is_live and f"{subject}/{trial.number}" in open_keys]
    for trial in wrong:
        if fix:
            _tell_again(store, tracker, header, trial)
        yield Finding("sweep", subject, f"trial {trial.number} ended as {trial.status}, its run is open.", fix)


def _check_driver(
    store: Storage, tracker: Tracker, subject: str, claimed: Document, running: Sequence[str], fix: bool
) -> Iterator[Finding]:
    """The sweep's own run is open: rightly while it is driven, or was asked to stop and will go on."""
    owner, status = claimed.owner, str(claimed.body["status"])
    if status == "preempted" and not running:
        return
    if owner is None and status not in ("running", "preempted"):
        if fix:
            tracker.end_run(subject, status)
        yield Finding("sweep", subject, f"the sweep ended as {status}, its run is open.", fix)
    elif owner is None or owner.is_certainly_dead():
        is_let_go = fix and _let_go_of_sweep(store, subject)
        if is_let_go:
            for key in running:
                tracker.end_run(key, "preempted")
        sentence = "its driver was killed; run the same command again (or 'lorafleet sweep resume') and it goes on."
        yield Finding("sweep", subject, sentence, is_let_go)


def _let_go_of_sweep(store: Storage, subject: str) -> bool:
    """Take the claim of a driver that is dead and let it go, as one that was asked to stop does; False if another was faster."""
    tenant, name = subject.split("/")
    return let_go(store, layout.sweep_claim(tenant, name), CLAIM_FORMAT)


def _tell_again(store: Storage, tracker: Tracker, header: Header, trial: Trial) -> None:
    """Tell the tracker of an ended trial from the beginning, as its driver would have."""
    with tempfile.TemporaryDirectory() as folder:
        log = TrackingLog(Path(folder) / "log", clock=lambda: trial.ended or trial.started)
        shipper = Shipper(log, tracker)
        try:
            Projection(log, header, _job_of(header), lambda key: decode_points(store.get(key)[0])).repeat([trial])
            left = shipper.close(SHIP_TIMEOUT_SECONDS)
        finally:
            log.close()
    if left:
        raise ServiceUnavailable(shipper.trouble or f"{tracker.uri} did not take all of trial {trial.number}; try again later.")


def _job_of(header: Header) -> Job:
    """Return the sweep's base job as far as a projection looks at it: its base and the digest of its data."""
    content = header.content
    base = BaseRef(content["base model"], content["training view"], content["prompt contract"], path="")
    return pin(header.spec.base_job, base, DataRef(content["data (train)"], num_rows=0), None, None, content["initial adapter"])
