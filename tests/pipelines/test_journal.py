"""The journal has one unbroken row of generations, whoever writes at the same time and whoever is killed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from infra.errors import BadInput, WorkFailed
from infra.fingerprint import id_of_bytes
from infra.local_storage import LocalStorage
from pipelines.journal import (
    Candidate,
    Change,
    candidates,
    commit,
    generation_of,
    history,
    models,
    previous_champion,
    read_head,
    read_hint,
    register_candidate,
    write_hint,
)
from workers import layout

BASE = id_of_bytes(b"base")
A, B, C = (id_of_bytes(name) for name in (b"a", b"b", b"c"))

PROMOTER = """
import sys, pathlib
from infra.errors import WorkFailed
from infra.fingerprint import id_of_bytes
from infra.local_storage import LocalStorage
from pipelines.journal import Change, commit, generation_of, read_head
store, actor, count = LocalStorage(pathlib.Path(sys.argv[1])), sys.argv[2], int(sys.argv[3])
done = 0
while done < count:
    head = read_head(store, "acme", "support")
    change = Change(kind="promote", adapter_id=id_of_bytes(f"{actor}{done}".encode()), base_id=id_of_bytes(b"base"),
                    actor=actor, previous=head and head.adapter_id)
    try:
        commit(store, "acme", "support", change, generation_of(head))
        done += 1
    except WorkFailed:
        continue
"""


def change_to(adapter_id: str, previous: str | None, actor: str = "ann") -> Change:
    return Change(kind="promote", adapter_id=adapter_id, base_id=BASE, actor=actor, previous=previous, reason="better")


def promoter(store: LocalStorage, actor: str, count: int, **env: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROMOTER, str(store.root), actor, str(count)]
    return subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True)


def assert_unbroken(store: LocalStorage, length: int) -> None:
    entries = history(store, "acme", "support")
    assert [entry.generation for entry in entries] == list(range(1, length + 1))
    assert [entry.previous for entry in entries] == [None, *(entry.adapter_id for entry in entries[:-1])]
    assert len({entry.nonce for entry in entries}) == length
    assert read_head(store, "acme", "support") == entries[-1]


@pytest.fixture
def store(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "store")


def test_journal_that_has_not_begun_has_no_head(store: LocalStorage) -> None:
    assert read_head(store, "acme", "support") is None
    assert history(store, "acme", "support") == []
    assert read_hint(store, "acme", "support") == 0
    assert previous_champion([]) is None


def test_committed_entry_is_read_back_whole(store: LocalStorage) -> None:
    change = replace(change_to(A, None), evidence=("tenants/acme/evidence/x.json",), at=1762000000.5)
    entry = commit(store, "acme", "support", change, 0)
    assert (entry.generation, entry.nonce) == (1, change.nonce)
    assert read_head(store, "acme", "support") == entry
    assert history(store, "acme", "support") == [entry]
    stored = json.loads(store.get(layout.journal("acme", "support", 1))[0])
    assert (stored["format"], stored["kind"], stored["adapter_id"], stored["reason"]) == ("journal/1", "promote", A, "better")


def test_second_promoter_learns_who_was_faster(store: LocalStorage) -> None:
    commit(store, "acme", "support", change_to(A, None), 0)
    commit(store, "acme", "support", change_to(B, A, "ann"), 1)
    with pytest.raises(WorkFailed) as raised:
        commit(store, "acme", "support", change_to(C, A, "bob"), 1)
    assert str(raised.value) == (
        f"ann promoted {B[:12]} meanwhile (generation 2); look at 'lorafleet history acme.support' and try again."
    )
    assert [entry.adapter_id for entry in history(store, "acme", "support")] == [A, B]


def test_generation_cannot_be_skipped(store: LocalStorage) -> None:
    with pytest.raises(AssertionError, match="no gaps"):
        commit(store, "acme", "support", change_to(A, None), 4)
    assert history(store, "acme", "support") == []


def test_journals_of_tasks_and_tenants_are_apart(store: LocalStorage) -> None:
    commit(store, "acme", "support", change_to(A, None), 0)
    commit(store, "acme", "sales", change_to(B, None), 0)
    commit(store, "globex", "support", change_to(C, None), 0)
    heads = [read_head(store, *model) for model in models(store)]
    assert models(store) == [("acme", "sales"), ("acme", "support"), ("globex", "support")]
    assert models(store, "acme") == [("acme", "sales"), ("acme", "support")]
    assert [head and head.adapter_id for head in heads] == [B, A, C]


@pytest.mark.parametrize("hint", [b"", b"{}", b'{"format":"head/1"}', b'{"format":"head/1","generation":"x"}'])
def test_damaged_head_costs_a_listing_and_is_mended(store: LocalStorage, hint: bytes) -> None:
    for generation, adapter_id in enumerate([A, B, C]):
        commit(store, "acme", "support", change_to(adapter_id, None), generation)
    store.put(layout.head("acme", "support"), hint)
    assert read_hint(store, "acme", "support") is None
    assert generation_of(read_head(store, "acme", "support")) == 3
    write_hint(store, "acme", "support", 3)
    assert read_hint(store, "acme", "support") == 3


def test_head_whose_bytes_were_altered_is_not_believed(store: LocalStorage) -> None:
    commit(store, "acme", "support", change_to(A, None), 0)
    path = store.root / layout.head("acme", "support")
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"1}", b"7}"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert generation_of(read_head(store, "acme", "support")) == 1
    commit(store, "acme", "support", change_to(B, A), 1)
    assert read_hint(store, "acme", "support") == 2


def test_head_ahead_of_the_journal_is_not_believed(store: LocalStorage) -> None:
    commit(store, "acme", "support", change_to(A, None), 0)
    write_hint(store, "acme", "support", 9)
    assert generation_of(read_head(store, "acme", "support")) == 1


def test_lagging_head_is_rolled_forward_and_never_goes_back(store: LocalStorage) -> None:
    for generation, adapter_id in enumerate([A, B, C]):
        commit(store, "acme", "support", change_to(adapter_id, None), generation)
    write_hint(store, "acme", "support", 1)
    assert read_hint(store, "acme", "support") == 3
    store.put(layout.head("acme", "support"), b'{"format":"head/1","generation":1}\n')
    assert generation_of(read_head(store, "acme", "support")) == 3


def test_damaged_entry_is_named(store: LocalStorage) -> None:
    commit(store, "acme", "support", change_to(A, None), 0)
    key = layout.journal("acme", "support", 1)
    for damaged in (b"{", b'{"format":"journal/1","kind":"promote"}'):
        store.put(key, damaged)
        with pytest.raises(BadInput, match=key):
            read_head(store, "acme", "support")


def test_previous_champion_is_the_one_before_the_present_took_over(store: LocalStorage) -> None:
    entries = [commit(store, "acme", "support", change_to(id_, None), n) for n, id_ in enumerate([A, B, B, A, A])]
    assert [previous_champion(entries[:length]) for length in range(1, 6)] == [None, A, A, B, B]


def test_candidate_stays_as_it_was_first_offered(store: LocalStorage) -> None:
    first = Candidate(A, BASE, "j" * 32, "acme-support", {"eval/loss": 1.5}, 10.0)
    assert register_candidate(store, "acme", "support", first) == first
    assert register_candidate(store, "acme", "support", replace(first, registered=20.0, sweep=None)) == first
    second = Candidate(B, BASE, None, None, {}, 5.0)
    register_candidate(store, "acme", "support", second)
    assert candidates(store, "acme", "support") == [second, first]
    assert models(store) == [("acme", "support")]


def test_eight_promoters_at_once_make_one_unbroken_journal(store: LocalStorage) -> None:
    promoters = [promoter(store, f"actor{number}", 10) for number in range(8)]
    for process in promoters:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert_unbroken(store, 80)
    assert read_hint(store, "acme", "support") == 80
    actors = [entry.actor for entry in history(store, "acme", "support")]
    assert {actor: actors.count(actor) for actor in set(actors)} == {f"actor{number}": 10 for number in range(8)}


@pytest.mark.parametrize("point", ["journal-written", "head-written"])
def test_promoter_killed_at_a_crash_point_leaves_an_unbroken_journal(store: LocalStorage, point: str) -> None:
    killed = promoter(store, "ann", 5, LORAFLEET_CRASHPOINT=f"{point}:3")
    _, errors = killed.communicate()
    assert killed.returncode == -9, errors
    assert_unbroken(store, 3)
    assert read_hint(store, "acme", "support") == (2 if point == "journal-written" else 3)
    _, errors = (again := promoter(store, "bob", 2)).communicate()
    assert again.returncode == 0, errors
    assert_unbroken(store, 5)
    assert read_hint(store, "acme", "support") == 5
