"""Gc removes what nothing refers to and is old, and nothing else: beside training, on S3, and killed at any point."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.claims import Owner, claim
from infra.errors import BadInput
from infra.fingerprint import id_of_bytes
from infra.local_storage import LocalStorage
from infra.records import encode_record
from infra.s3 import S3Storage
from infra.storage import Storage
from pipelines.gc import Plan, collect
from pipelines.journal import Candidate, Change, commit, register_candidate
from pipelines.verify import verify_all
from tests.pipelines.adapters import put_adapter
from tests.pipelines.command_line import CommandLine
from tests.pipelines.conftest import Trained
from tests.workers.jobs import Ground
from tests.workers.tiny_adapters import random_adapter
from workers import layout
from workers.adapter_store import store_adapter
from workers.job_state import FRESH, STATE_FORMAT
from workers.manifests import AdapterRef, read_manifest
from workers.report import Evaluated, Finished

BASE_ID = id_of_bytes(b"base")
JOB_ID = "j" * 32
DAY = 24 * 3600.0


def age(store: LocalStorage, seconds: float = 2 * DAY) -> None:
    """Let everything in a store have been written earlier."""
    then = time.time() - seconds
    for info in list(store.list("")):
        os.utime(store.root / info.key, (then, then))


def kinds(plan: Plan) -> list[tuple[str, str]]:
    return sorted((one.kind, one.subject) for one in plan.garbage)


def keys(store: Storage) -> set[str]:
    return {info.key for info in store.list("")}


def leave_behind(store: Storage, trained: Trained) -> dict[str, bytes]:
    """Put what killed processes leave into the store of a job that succeeded; return it by key."""
    attempts = layout.attempt("acme", trained.base_id, trained.job_id, 1)
    lost = layout.attempt("acme", trained.base_id, trained.job_id, 0)
    left = {
        f"{attempts}checkpoints/00000002/state.safetensors": b"x" * 1000,
        f"{attempts}checkpoints/00000002/standing.json": encode_record("checkpoint/1", {"sha256": "", "standing": {}}),
        f"{attempts}metrics-000077.jsonl": b"",
        f"{lost}record.json": encode_record("record/1", {"adapter_id": id_of_bytes(b"lost")}),
        f"{layout.base_files(trained.base_id)}{id_of_bytes(b'set')}/model.safetensors": b"y" * 500,
        f"{layout.adapter('acme', trained.base_id, id_of_bytes(b'stray'))}adapter_config.json": b"{}",
        f"{layout.job('acme', trained.base_id, trained.job_id)}cancel.json": encode_record("cancel/1", {"epoch": 1}),
        "probes/0123": b"first",
    }
    for key, data in left.items():
        store.put(key, data)
    return left


@pytest.fixture
def copied(trained: Trained, cli: CommandLine) -> CommandLine:
    """The command line on a copy of a store in which a job has succeeded."""
    shutil.copytree(trained.folder / ".lorafleet", cli.home, dirs_exist_ok=True)
    return cli


def test_what_was_trained_stays_however_old_it_is(copied: CommandLine) -> None:
    age(copied.store, 1000 * DAY)
    before = copied.listing()
    ended = copied("gc", "--delete")
    assert (ended.code, ended.out) == (0, "nothing to remove: all that is old enough is referred to.\n")
    assert copied.listing() == before


def test_leftovers_are_told_first_and_removed_on_request(copied: CommandLine, trained: Trained) -> None:
    kept = keys(copied.store)
    left = leave_behind(copied.store, trained)
    assert copied("gc", "--json").json["garbage"] == [], "all of it is young"
    age(copied.store)
    before = copied.listing()
    told = copied("gc", "--json").json
    assert copied.listing() == before
    assert (told["deleted"], told["num_objects"]) == (False, len(left))
    assert told["num_bytes"] == sum(map(len, left.values()))
    assert {one["kind"] for one in told["garbage"]} == {"attempt", "upload", "files", "request"}
    assert copied("gc", "--older-than", "7d", "--json").json["garbage"] == []
    assert f"removed {len(left)} objects" in copied("gc", "--delete").out
    assert keys(copied.store) == kept
    assert copied("adapters", "verify", "--all", "--read-data").code == 0
    assert copied("gc", "--delete", "--json").json["garbage"] == []


def test_age_that_is_no_duration_is_refused(cli: CommandLine) -> None:
    ended = cli("gc", "--older-than", "soon")
    assert ended.code == 2
    assert "such as 90s or 6h" in ended.sentence


def test_adapter_that_nothing_mentions_goes_in_two_runs(local_store: LocalStorage) -> None:
    adapter_id = put_adapter(local_store, BASE_ID, 1)
    ref = AdapterRef("acme", BASE_ID, adapter_id)
    age(local_store)
    assert kinds(collect(local_store, delete=True)) == [("adapter", adapter_id)]
    with pytest.raises(BadInput, match="has no adapter"):
        read_manifest(local_store, ref)
    assert kinds(collect(local_store, delete=True)) == [], "the tombstone is young"
    age(local_store)
    assert kinds(collect(local_store, delete=True)) == [("tombstone", adapter_id)]
    assert keys(local_store) == set()


def test_adapter_that_is_mentioned_meanwhile_is_put_back_as_it_was(local_store: LocalStorage) -> None:
    adapter_id = put_adapter(local_store, BASE_ID, 1)
    ref = AdapterRef("acme", BASE_ID, adapter_id)
    manifest = local_store.get(layout.manifest(*ref))[0]
    age(local_store)
    collect(local_store, delete=True)
    promote(local_store, adapter_id)
    assert kinds(collect(local_store, delete=True)) == [("restore", adapter_id)]
    assert local_store.get(layout.manifest(*ref))[0] == manifest
    assert local_store.head(layout.tombstone(*ref)) is None


def test_adapter_that_is_made_again_stays(local_store: LocalStorage) -> None:
    adapter_id = put_adapter(local_store, BASE_ID, 1)
    age(local_store)
    collect(local_store, delete=True)
    assert put_adapter(local_store, BASE_ID, 1) == adapter_id
    state(local_store, {"status": "succeeded", "adapter_id": adapter_id}).release()
    age(local_store)
    collect(local_store, delete=True)
    ref = AdapterRef("acme", BASE_ID, adapter_id)
    assert local_store.head(layout.tombstone(*ref)) is None
    assert read_manifest(local_store, ref)["adapter_id"] == adapter_id
    assert local_store.get(f"{layout.adapter(*ref)}adapter_model.safetensors")[0]


def promote(store: Storage, adapter_id: str) -> None:
    commit(
        store, "acme", "support", Change(kind="promote", adapter_id=adapter_id, base_id=BASE_ID, actor="ann", previous=None), 0
    )


def offer(store: Storage, adapter_id: str) -> None:
    register_candidate(store, "acme", "support", Candidate(adapter_id, BASE_ID, None, None, {}, 1.0))


def try_out(store: Storage, adapter_id: str) -> None:
    store.put(layout.trial("acme", "first", 0), encode_record("trial/1", {"status": "complete", "adapter_id": adapter_id}))


def measure(store: Storage, adapter_id: str) -> None:
    store.put(layout.evidence("acme", adapter_id, "e" * 32), encode_record("evidence/1", {"kind": "evaluation"}))


def merge(store: Storage, adapter_id: str) -> None:
    store_adapter(store, "globex", BASE_ID, random_adapter(), {"job_id": None, "parents": [adapter_id]})


def succeed(store: Storage, adapter_id: str) -> None:
    state(store, {"status": "succeeded", "adapter_id": adapter_id}).release()


def row_of_night(store: Storage, adapter_id: str) -> None:
    store.put("fleets/prod/nights/2026-11-23/rows/acme.json", encode_record("night-row/1", {"candidate": adapter_id}))


def state(store: Storage, body: dict[str, object], owner: Owner | None = None):
    """Claim the job that made-up adapters come from."""
    key = layout.job_state("acme", BASE_ID, JOB_ID)
    return claim(store, key, STATE_FORMAT, FRESH | body, owner=owner or Owner.here(), lease_seconds=5)


@pytest.mark.parametrize("mention", [promote, offer, try_out, measure, merge, succeed, row_of_night])
def test_adapter_that_something_mentions_stays(local_store: LocalStorage, mention: Callable[[Storage, str], None]) -> None:
    adapter_id, other = put_adapter(local_store, BASE_ID, 1), put_adapter(local_store, BASE_ID, 2)
    mention(local_store, adapter_id)
    age(local_store)
    assert kinds(collect(local_store)) == [("adapter", other)]


def test_adapter_that_a_person_brought_stays(local_store: LocalStorage) -> None:
    store_adapter(local_store, "acme", BASE_ID, random_adapter(), {"job_id": None, "imported": {}})
    age(local_store)
    assert kinds(collect(local_store)) == []


def test_what_a_living_owner_may_write_stays_and_goes_when_it_is_dead(local_store: LocalStorage) -> None:
    put_adapter(local_store, BASE_ID, 1)
    lease = state(local_store, {"status": "running"})
    chunk = f"{layout.attempt('acme', BASE_ID, JOB_ID, lease.epoch)}metrics-000000.jsonl"
    local_store.put(chunk, b"")
    local_store.put(f"{layout.adapter('acme', BASE_ID, 's' * 32)}adapter_config.json", b"{}")
    assert kinds(collect(local_store, older_than_seconds=0.0, delete=True)) == []
    gone = Owner.here()
    lease.release()
    dead = Owner(gone.host, gone.pid, started=1, boot=gone.boot)
    state(local_store, {}, owner=dead)
    assert {kind for kind, _ in kinds(collect(local_store, older_than_seconds=0.0))} == {"adapter", "attempt", "files"}


def test_record_that_cannot_be_read_keeps_all_it_may_mention(local_store: LocalStorage) -> None:
    put_adapter(local_store, BASE_ID, 1)
    local_store.put(layout.trial("acme", "first", 0), b'{"format":"trial/1"}')
    path = local_store.root / layout.trial("acme", "first", 0)
    path.write_bytes(b'{"format":"trial/2"}')
    local_store.put("probes/1", b"first")
    age(local_store)
    found = collect(local_store)
    assert kinds(found) == [("request", "probes/1")]
    assert "is damaged" in found.notes[0]


def test_training_beside_gc_ends_with_the_same_adapter(tmp_path: Path, test_data: Path) -> None:
    ended = []
    for name, is_collected in (("alone", False), ("beside", True)):
        ground = Ground(tmp_path / name, test_data)
        host = ground.host()
        host.admit(ground.job())
        finished = None
        while finished is None:
            for event in host.report():
                if isinstance(event, Evaluated) and not event.final:
                    host.decide(event.job_id, True)
                finished = event if isinstance(event, Finished) else finished
            if is_collected:
                collect(ground.store, older_than_seconds=0.0, delete=True)
            host.step()
        host.close()
        ended.append((finished.status, finished.adapter_id, len(finished.chunks)))
        assert all(ground.store.head(chunk) for chunk in finished.chunks)
        assert verify_all(ground.store, read_data=True).ok
    assert ended[0] == ended[1]


GC = """
import sys
from pathlib import Path
from infra.local_storage import LocalStorage
from pipelines.gc import collect
collect(LocalStorage(Path(sys.argv[1])), older_than_seconds=0.0, delete=True)
"""


@pytest.mark.parametrize("point", ["gc-deleted:1", "gc-deleted:4", "gc-tombstone-written:1", "gc-manifest-restored:1"])
def test_killed_gc_goes_on_and_loses_nothing(copied: CommandLine, trained: Trained, tmp_path: Path, point: str) -> None:
    store = copied.store
    kept = keys(store)
    unmentioned, hidden = (put_adapter(store, trained.base_id, seed) for seed in (1, 2))
    ref = AdapterRef("acme", trained.base_id, hidden)
    age(store)
    collect(store, delete=True)
    offer(store, hidden)  # was hidden, and is mentioned again
    put_adapter(store, trained.base_id, 3)
    leave_behind(store, trained)
    age(store)
    environment = os.environ | {"LORAFLEET_CRASHPOINT": point}
    ended = subprocess.run([sys.executable, "-c", GC, store.root], env=environment, capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr
    for _ in range(3):
        age(store)
        collect(store, older_than_seconds=0.0, delete=True)
    assert read_manifest(store, ref)["adapter_id"] == hidden
    assert {key for key in keys(store) - kept if hidden not in key} == set()
    assert unmentioned not in " ".join(keys(store))
    assert verify_all(store, read_data=True).ok


def test_gc_on_s3_goes_by_the_time_of_the_store(s3_bucket: str) -> None:
    store = S3Storage(s3_bucket)
    adapter_id = put_adapter(store, BASE_ID, 1)
    assert kinds(collect(store, older_than_seconds=60.0, delete=True)) == []
    assert kinds(collect(store, older_than_seconds=0.0, delete=True)) == [("adapter", adapter_id)]
    time.sleep(1.1)  # this server's times are whole seconds
    assert kinds(collect(store, older_than_seconds=0.0, delete=True)) == [("tombstone", adapter_id)]
    assert keys(store) == set()
