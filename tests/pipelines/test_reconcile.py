"""Reconcile tells where MLflow and hints differ from the store, mends that, and then finds nothing."""

import socket
from pathlib import Path

import pytest

from infra.claims import Lease, Owner, claim, read_document
from infra.errors import ServiceUnavailable
from infra.fingerprint import id_of_bytes
from infra.local_storage import LocalStorage
from infra.mlflow_registry import ModelRegistry
from infra.mlflow_tracking import MlflowTracker
from infra.tracking import Point, RunStart
from pipelines.journal import Candidate, Change, commit, history, register_candidate
from pipelines.projection import project
from pipelines.reconcile import Finding, reconcile
from sweeps.projection import trial_key
from tests.pipelines.adapters import put_adapter
from tests.sweeps.curves import Bench, sweep
from workers import layout
from workers.job_state import FRESH, STATE_FORMAT
from workers.manifests import AdapterRef
from workers.metrics_log import encode_points

BASE_ID = id_of_bytes(b"base")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('home')}/mlflow.db"


@pytest.fixture
def registry(uri: str) -> ModelRegistry:
    return ModelRegistry(uri)


@pytest.fixture
def tracker(uri: str) -> MlflowTracker:
    return MlflowTracker(uri)


def champion(store: LocalStorage, tenant: str, task: str, seeds: list[int]) -> list[str]:
    """Promote adapters one after the other, in the store only."""
    ids: list[str] = []
    for generation, seed in enumerate(seeds):
        adapter_id = put_adapter(store, BASE_ID, seed)
        change = Change(kind="promote", adapter_id=adapter_id, base_id=BASE_ID, actor="ann", previous=ids[-1] if ids else None)
        ids.append(commit(store, tenant, task, change, generation).adapter_id)
    return ids


def kinds(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.kind, finding.subject) for finding in findings]


def test_what_mlflow_missed_is_told_then_mended(local_store, registry, tracker) -> None:
    a, b = champion(local_store, "acme", "missed", [1, 2])
    register_candidate(local_store, "acme", "missed", Candidate(a, BASE_ID, "j" * 32, "s1", {}, 1.0))
    told = reconcile(local_store, registry, tracker, fix=False)
    assert {finding.kind for finding in told} == {"registry"}
    assert [finding.sentence for finding in told] == [
        f"the version of {a[:12]} is missing.",
        f"the version of {b[:12]} is missing.",
        f"the alias challenger is nowhere, the store says {a[:12]}.",
        f"the alias champion is nowhere, the store says {b[:12]}.",
        f"the alias previous is nowhere, the store says {a[:12]}.",
    ]
    assert not any(finding.fixed for finding in told)
    assert registry.aliases("acme.missed") == {}
    mended = reconcile(local_store, registry, tracker, fix=True)
    assert [finding.sentence for finding in mended] == [finding.sentence for finding in told]
    assert all(finding.fixed for finding in mended)
    assert reconcile(local_store, registry, tracker, fix=True) == []
    numbers = {version.key: version.version for version in registry.versions("acme.missed")}
    assert registry.aliases("acme.missed") == {"champion": numbers[b], "previous": numbers[a], "challenger": numbers[a]}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (b'{"format":"head/1","generation":1}\n', "HEAD names generation 1, the journal ends at 2."),
        (b"{", "HEAD is damaged, the journal ends at 2."),
        (None, "HEAD is missing, the journal ends at 2."),
    ],
)
def test_head_that_lags_is_mended(local_store, registry, tracker, damage, sentence) -> None:
    champion(local_store, "acme", "lags", [1, 2])
    project(local_store, registry, "acme", "lags")
    key = layout.head("acme", "lags")
    if damage is None:
        local_store.delete(key)
    else:
        local_store.put(key, damage)
    assert reconcile(local_store, registry, tracker, fix=False) == [Finding("head", "acme.lags", sentence, False)]
    assert reconcile(local_store, registry, tracker, fix=True) == [Finding("head", "acme.lags", sentence, True)]
    assert reconcile(local_store, registry, tracker, fix=True) == []


def test_what_cannot_be_mended_is_told_and_stops_no_other_model(local_store, registry, tracker) -> None:
    champion(local_store, "acme", "damaged", [1])
    [lost] = champion(local_store, "acme", "gone", [2])
    champion(local_store, "acme", "well", [3])
    local_store.put(layout.journal("acme", "damaged", 1), b"{")
    local_store.delete(layout.manifest("acme", BASE_ID, lost))
    reconcile(local_store, registry, tracker, fix=True)
    assert kinds(reconcile(local_store, registry, tracker, fix=True)) == [("journal", "acme.damaged"), ("adapter", "acme.gone")]
    assert "champion" in registry.aliases("acme.well")


def test_lost_entries_are_told_and_not_hidden(local_store, registry, tracker) -> None:
    champion(local_store, "acme", "lost", [1, 2])
    local_store.delete(layout.journal("acme", "lost", 2))
    told = reconcile(local_store, registry, tracker, fix=True)
    assert ("head", "acme.lost") in kinds(told)
    assert [finding.fixed for finding in told if finding.kind == "head"] == [False]


def test_runs_left_open_by_an_ended_sweep_are_ended(tmp_path, registry, tracker) -> None:
    bench = Bench(tmp_path)
    bench.tracker = tracker
    assert bench.drive(sweep(name="left-open", num_trials=2)).status == "complete"
    assert reconcile(bench.store, registry, tracker, fix=True) == []
    tracker.end_run("acme/left-open", "running")
    tracker.end_run(trial_key("acme", "left-open", 1), "running")
    tracker.ensure_run(RunStart("globex/left-open", "globex", "left-open", tags={"lorafleet.sweep": "left-open"}))
    told = reconcile(bench.store, registry, tracker, fix=False)
    assert kinds(told) == [("sweep", "acme/left-open")] * 2
    assert "its run is open" in told[0].sentence
    assert "the sweep ended as complete" in told[1].sentence
    assert tracker.open_runs("left-open") == ["acme/left-open", "acme/left-open/1", "globex/left-open"]
    assert all(finding.fixed for finding in reconcile(bench.store, registry, tracker, fix=True))
    assert tracker.open_runs("left-open") == ["globex/left-open"]
    assert reconcile(bench.store, registry, tracker, fix=True) == []


def test_sweep_whose_driver_was_killed_is_told_with_the_way_out(tmp_path, registry, tracker) -> None:
    bench = Bench(tmp_path)
    bench.tracker = tracker
    bench.drive(sweep(name="killed", num_trials=1))
    key = layout.sweep_claim("acme", "killed")
    here = Owner.here()
    gone = f'{{"boot":"{here.boot}","host":"{here.host}","pid":{here.pid},"started":1}}'
    text = bench.store.get(key)[0].decode().replace('"owner":null', f'"owner":{gone}').replace("complete", "running")
    bench.store.put(key, text.encode())
    tracker.end_run("acme/killed", "running")
    [told] = reconcile(bench.store, registry, tracker, fix=False)
    assert (told.kind, told.fixed) == ("sweep", False)
    assert "run the same command again" in told.sentence
    assert [finding.fixed for finding in reconcile(bench.store, registry, tracker, fix=True)] == [True]
    assert tracker.open_statuses()["acme/killed"] == "preempted"
    assert reconcile(bench.store, registry, tracker, fix=True) == []


def test_mlflow_that_does_not_answer_is_said(local_store) -> None:
    champion(local_store, "acme", "down", [1])
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(ServiceUnavailable, match="does not answer"):
        reconcile(local_store, ModelRegistry(uri), MlflowTracker(uri), fix=True)


def test_empty_store_has_nothing_to_reconcile(tmp_path: Path, registry, tracker) -> None:
    assert reconcile(LocalStorage(tmp_path / "none"), registry, tracker, fix=True) == []


def test_alias_that_somebody_moved_goes_back_to_where_the_journal_says(local_store, registry, tracker) -> None:
    a, b = champion(local_store, "acme", "moved", [1, 2])
    project(local_store, registry, "acme", "moved")
    numbers = {version.key: version.version for version in registry.versions("acme.moved")}
    registry.set_alias("acme.moved", "champion", numbers[a])
    registry.set_alias("acme.moved", "keep-an-eye-on", numbers[a])
    [told] = reconcile(local_store, registry, tracker, fix=False)
    assert told.sentence == f"the alias champion is {a[:12]}, the store says {b[:12]}."
    assert registry.aliases("acme.moved")["champion"] == numbers[a]
    assert [finding.fixed for finding in reconcile(local_store, registry, tracker, fix=True)] == [True]
    assert registry.aliases("acme.moved")["champion"] == numbers[b]
    assert registry.aliases("acme.moved")["keep-an-eye-on"] == numbers[a], "people's own aliases are theirs"
    assert history_of(local_store, "moved") == [a, b]


def history_of(store: LocalStorage, task: str) -> list[str]:
    return [entry.adapter_id for entry in history(store, "acme", task)]


JOB_ID = "k" * 32
RUN = RunStart(f"acme/jobs/{JOB_ID}", "acme", "job", tags={"lorafleet.job_id": JOB_ID})


def job_of(store: LocalStorage, owner: Owner, **body: object) -> Lease:
    """Claim a job as `owner`."""
    return claim(store, layout.job_state("acme", BASE_ID, JOB_ID), STATE_FORMAT, FRESH | body, owner=owner, lease_seconds=5)


def dead() -> Owner:
    here = Owner.here()
    return Owner(here.host, here.pid, started=1, boot=here.boot)


def test_job_whose_owner_is_gone_waits_for_its_next_attempt(local_store, registry, tracker) -> None:
    checkpoint = {"prefix": "tenants/acme/x/", "step": 2, "num_chunks": 0}
    job_of(local_store, dead(), status="running", checkpoint=checkpoint)
    tracker.ensure_run(RUN)
    tracker.end_run(RUN.key, "running")
    before = {info.key: info.etag for info in local_store.list("")}
    told = reconcile(local_store, registry, tracker, fix=False)
    assert [(finding.subject, finding.fixed) for finding in told] == [(f"acme/{JOB_ID}", False)] * 2
    assert "its host is gone" in told[0].sentence
    assert "nobody trains it" in told[1].sentence
    assert {info.key: info.etag for info in local_store.list("")} == before
    assert all(finding.fixed for finding in reconcile(local_store, registry, tracker, fix=True))
    document = read_document(local_store, layout.job_state("acme", BASE_ID, JOB_ID), STATE_FORMAT)
    assert document is not None
    assert (document.owner, document.body["status"], document.body["checkpoint"]) == (None, "preempted", checkpoint)
    assert tracker.open_statuses()[RUN.key] == "preempted"
    assert reconcile(local_store, registry, tracker, fix=True) == []


def test_job_that_somebody_trains_is_left_alone(local_store, registry, tracker) -> None:
    lease = job_of(local_store, Owner.here(), status="running")
    tracker.ensure_run(RUN)
    tracker.end_run(RUN.key, "running")
    assert reconcile(local_store, registry, tracker, fix=True, grace_seconds=0.0) == []
    lease.renew()
    assert tracker.open_statuses()[RUN.key] == "running"


def test_run_of_a_job_that_has_ended_gets_its_points_and_its_end(local_store, registry, tracker) -> None:
    chunk = f"{layout.attempt('acme', BASE_ID, JOB_ID, 1)}metrics-000000.jsonl"
    local_store.put(chunk, encode_points([Point("train/loss", 0.5, 1, 1000)]))
    job_of(local_store, Owner.here(), status="failed", reason="non_finite", chunks=[chunk]).release()
    tracker.ensure_run(RUN)
    tracker.end_run(RUN.key, "running")
    [told] = reconcile(local_store, registry, tracker, fix=True)
    assert (told.sentence, told.fixed) == ("the job has failed, its run is open.", True)
    assert RUN.key not in tracker.open_statuses()
    assert reconcile(local_store, registry, tracker, fix=True) == []


def test_checkpoints_of_a_job_that_succeeded_are_removed(local_store, registry, tracker) -> None:
    job_of(local_store, Owner.here(), status="succeeded").release()
    prefix = f"{layout.attempt('acme', BASE_ID, JOB_ID, 1)}checkpoints/00000002/"
    local_store.put(f"{prefix}state.safetensors", b"x" * 1000)
    assert reconcile(local_store, registry, tracker, fix=True) == [], "it is young: its host may be at it"
    [told] = reconcile(local_store, registry, tracker, fix=False, grace_seconds=0.0)
    assert told.sentence == "it has succeeded, and 1 checkpoints are left (1,000 bytes)."
    assert [one.fixed for one in reconcile(local_store, registry, tracker, fix=True, grace_seconds=0.0)] == [True]
    assert list(local_store.list(prefix)) == []


def test_halves_of_adapters_are_told_and_those_that_nothing_mentions_removed(local_store, registry, tracker) -> None:
    ids = [put_adapter(local_store, BASE_ID, seed) for seed in range(4)]
    mentioned, stray, hollow, hollow_stray = (AdapterRef("acme", BASE_ID, one) for one in ids)
    for ref in (mentioned, hollow):
        register_candidate(local_store, "acme", "halves", Candidate(ref.adapter_id, BASE_ID, None, None, {}, 1.0))
    for ref in (mentioned, stray):
        local_store.delete(layout.manifest(*ref))
    for ref in (hollow, hollow_stray):
        local_store.delete(f"{layout.adapter(*ref)}adapter_model.safetensors")
    told = reconcile(local_store, registry, tracker, fix=True, grace_seconds=0.0)
    found = {finding.subject: (finding.fixed, finding.sentence) for finding in told if finding.kind == "adapter"}
    assert {subject: fixed for subject, (fixed, _) in found.items()} == {
        f"acme/{mentioned.adapter_id}": False,
        f"acme/{stray.adapter_id}": True,
        f"acme/{hollow.adapter_id}": False,
        f"acme/{hollow_stray.adapter_id}": True,
    }
    assert "its manifest is lost" in found[f"acme/{mentioned.adapter_id}"][1]
    assert "adapter_model.safetensors is lost" in found[f"acme/{hollow.adapter_id}"][1]
    again = reconcile(local_store, registry, tracker, fix=False, grace_seconds=0.0)
    assert {finding.subject for finding in again} == {f"acme/{ref.adapter_id}" for ref in (mentioned, hollow)}
