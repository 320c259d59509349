"""Claims between real processes: one owner at a time, and nothing a lost owner writes can be reached."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.claims import Lease, Owner, claim, read_document
from infra.errors import BadInput, ClaimHeld, ClaimLost, ServiceUnavailable
from infra.local_storage import LocalStorage
from infra.s3 import S3Storage
from infra.storage import ObjectInfo, Storage
from tests.contracts.storage_servers import S3Server
from tests.faulty_proxy import FaultyProxy

KEY, FORMAT = "jobs/a/state.json", "job-state/1"
LEASE_SECONDS = 0.6
HERE = Owner.here()
ELSEWHERE = replace(HERE, host="another-host", boot="another boot")

CHILD = """
import sys
from infra.claims import Owner, claim
from infra.errors import ClaimHeld, ClaimLost
from infra.stores import open_store

store, lease_seconds = open_store(sys.argv[1]), float(sys.argv[2])
try:
    lease = claim(store, "jobs/a/state.json", "job-state/1", {"pointer": None}, owner=Owner.here(), lease_seconds=lease_seconds)
except ClaimHeld as error:
    print(f"held: {error}", flush=True)
    sys.exit()
print(f"owner of epoch {lease.epoch}", flush=True)
for line in sys.stdin:
    key = f"attempts/{lease.epoch}/{line.strip()}"
    store.put(key, b"result")
    try:
        lease.update({"pointer": key})
        print("updated", flush=True)
    except ClaimLost as error:
        print(f"lost: {error}", flush=True)
"""


class Child:
    """Another process that claims, and then updates the pointer for each line it is sent."""

    def __init__(self, store: Storage, lease_seconds: float) -> None:
        command = [sys.executable, "-c", CHILD, store.uri, str(lease_seconds)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


@pytest.fixture
def new_child(local_store: LocalStorage) -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(lease_seconds: float = LEASE_SECONDS) -> Child:
        children.append(Child(local_store, lease_seconds))
        return children[-1]

    yield start
    for child in children:
        child.process.kill()
        child.process.communicate()


def claim_it(store: Storage, owner: Owner = HERE, **options: Any) -> Lease:
    return claim(store, KEY, FORMAT, {"pointer": None}, owner=owner, **{"lease_seconds": LEASE_SECONDS, **options})


def test_a_claim_is_a_document_that_readers_follow(local_store: LocalStorage) -> None:
    assert read_document(local_store, KEY, FORMAT) is None
    lease = claim_it(local_store)
    lease.update({"pointer": "there"})
    assert read_document(local_store, KEY, FORMAT) == (1, HERE, {"pointer": "there"})
    body = lease.body
    body["pointer"] = "changed by the caller alone"
    assert lease.body == {"pointer": "there"}
    stored = json.loads(local_store.get(KEY)[0])
    assert sorted(stored) == ["body", "epoch", "format", "nonce", "owner"]
    assert sorted(stored["owner"]) == ["boot", "host", "pid", "started"]


def test_a_released_claim_is_taken_at_once_with_the_body_as_it_was_left(local_store: LocalStorage) -> None:
    lease = claim_it(local_store, ELSEWHERE)
    lease.release({"pointer": "done"})
    assert read_document(local_store, KEY, FORMAT) == (1, None, {"pointer": "done"})
    with pytest.raises(ClaimLost, match="released"):
        lease.update({"pointer": "late"})
    assert claim_it(local_store, wait_seconds=0).body == {"pointer": "done"}
    assert read_document(local_store, KEY, FORMAT) == (2, HERE, {"pointer": "done"})


def test_a_living_owner_is_named_to_those_who_come_later(local_store: LocalStorage) -> None:
    with claim_it(local_store, ELSEWHERE).keep_alive() as lease:
        with pytest.raises(ClaimHeld, match=f"process {HERE.pid} on another-host, which is alive .epoch 1."):
            claim_it(local_store)
        with pytest.raises(ClaimHeld):
            claim_it(local_store, wait_seconds=0)
        lease.update({"pointer": "still mine"})
    assert read_document(local_store, KEY, FORMAT) == (1, ELSEWHERE, {"pointer": "still mine"})


def test_one_who_waits_gets_the_claim_when_it_is_released(local_store: LocalStorage) -> None:
    held = claim_it(local_store, ELSEWHERE)
    with held.keep_alive():
        threading.Timer(0.5, held.release).start()
        assert claim_it(local_store, wait_seconds=60).epoch == 2


def test_an_owner_elsewhere_counts_as_lost_when_its_nonce_stands_still(local_store: LocalStorage) -> None:
    """By the claimant's own clock, which here is one that only the test moves."""
    lost = claim_it(local_store, ELSEWHERE)
    now, pauses = [100.0], []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    taken = claim_it(local_store, lease_seconds=15.0, clock=lambda: now[0], sleep=sleep)
    assert taken.epoch == 2
    assert 15.0 < sum(pauses) < 17.0
    with pytest.raises(ClaimLost, match=f"taken over by process {HERE.pid} .*epoch 2"):
        lost.update({"pointer": "late"})
    with pytest.raises(ClaimLost):
        lost.renew()
    assert lost.is_lost


def test_of_two_processes_that_race_exactly_one_owns(local_store: LocalStorage, new_child: Callable[..., Child]) -> None:
    children = [new_child(lease_seconds=30.0) for _ in range(2)]
    first_words: list[str | None] = [None, None]

    def listen(number: int) -> None:
        first_words[number] = children[number].hear()

    listeners = [threading.Thread(target=listen, args=(number,)) for number in range(2)]
    for listener in listeners:
        listener.start()
    while not any(first_words):
        listeners[0].join(0.05)
    winner = next(number for number in range(2) if first_words[number])
    assert first_words == [["owner of epoch 1", None], [None, "owner of epoch 1"]][winner]
    while listeners[1 - winner].is_alive():
        children[winner].send("again")  # the nonce moves, and the other one learns that the owner lives
        listeners[1 - winner].join(0.2)
    assert str(first_words[1 - winner]).startswith(f"held: {KEY} is held by process {children[winner].process.pid} on")


def test_an_owner_paused_past_its_time_cannot_make_anything_reachable(
    local_store: LocalStorage, new_child: Callable[..., Child]
) -> None:
    child = new_child()
    assert child.hear() == "owner of epoch 1"
    child.send("before")
    assert child.hear() == "updated"
    os.kill(child.process.pid, signal.SIGSTOP)
    lease = claim_it(local_store)
    assert (lease.epoch, lease.body) == (2, {"pointer": "attempts/1/before"})
    child.send("after")
    os.kill(child.process.pid, signal.SIGCONT)
    assert child.hear().startswith(f"lost: {KEY} was taken over by process {os.getpid()} on {HERE.host} (epoch 2)")
    assert local_store.head("attempts/1/after") is not None, "it did write, under its own epoch"
    assert read_document(local_store, KEY, FORMAT) == (2, HERE, {"pointer": "attempts/1/before"})


def test_an_owner_killed_on_this_machine_is_replaced_at_once(local_store: LocalStorage, new_child: Callable[..., Child]) -> None:
    child = new_child(lease_seconds=3600.0)
    assert child.hear() == "owner of epoch 1"
    document = read_document(local_store, KEY, FORMAT)
    assert document is not None
    assert document.owner is not None
    assert document.owner.pid == child.process.pid
    assert not document.owner.is_certainly_dead()
    child.process.kill()
    os.waitid(os.P_PID, child.process.pid, os.WEXITED | os.WNOWAIT)
    assert document.owner.is_certainly_dead(), "although its parent has not asked for its end yet"
    assert claim_it(local_store, lease_seconds=3600.0, wait_seconds=0).epoch == 2


def test_only_a_process_of_this_machine_and_boot_is_known_to_be_dead() -> None:
    assert not HERE.is_certainly_dead()
    other = replace(HERE, started=HERE.started - 1)  # the pid was given to this process later
    assert other.is_certainly_dead()
    assert not replace(other, host="another-host").is_certainly_dead()
    assert not replace(other, boot="another boot").is_certainly_dead()


def test_a_block_that_is_kept_alive_outlives_many_leases_and_hears_of_its_loss(local_store: LocalStorage) -> None:
    lease = claim_it(local_store, ELSEWHERE)
    with lease.keep_alive():
        nonces: set[str] = set()
        while len(nonces) < 6:  # two leases long
            nonces.add(json.loads(local_store.get(KEY)[0])["nonce"])
        usurp(local_store)
        while not lease.is_lost:
            threading.Event().wait(0.05)
        with pytest.raises(ClaimLost, match="epoch 7"):
            lease.update({"pointer": "late"})
    document = read_document(local_store, KEY, FORMAT)
    assert document is not None
    assert (document.epoch, document.body) == (7, {"pointer": "usurped"})


def usurp(store: Storage) -> None:
    """Take the claim without waiting, as one whose clock ran ahead would."""
    state = json.loads(store.get(KEY)[0])
    store.put(KEY, json.dumps({**state, "epoch": 7, "nonce": "usurper", "body": {"pointer": "usurped"}}).encode())


class Interrupted(LocalStorage):
    """A store whose conditional puts are carried out and then fail, as long as `remaining` says."""

    remaining = 0

    def compare_and_put(self, key: str, data: bytes, etag: str) -> ObjectInfo:
        info = super().compare_and_put(key, data, etag)
        if Interrupted.remaining:
            Interrupted.remaining -= 1
            raise ServiceUnavailable("the answer was lost.")
        return info


def test_a_store_that_fails_for_a_while_does_not_cost_the_claim(tmp_path: Path) -> None:
    store = Interrupted(tmp_path / "store")
    lease = claim_it(store)
    Interrupted.remaining = 2
    for _ in range(2):
        with pytest.raises(ServiceUnavailable):
            lease.update({"pointer": "first try"})
    lease.update({"pointer": "second try"})
    assert read_document(store, KEY, FORMAT) == (1, HERE, {"pointer": "second try"})
    Interrupted.remaining = 3
    with lease.keep_alive():
        while Interrupted.remaining:
            threading.Event().wait(0.05)
    lease.release()
    assert read_document(store, KEY, FORMAT) == (1, None, {"pointer": "second try"})


def test_answers_lost_on_the_way_never_make_two_owners_or_none(moto: S3Server) -> None:
    uri = f"s3://{moto.new_bucket()}"
    with FaultyProxy("127.0.0.1", moto.port, seed=3) as proxy:
        store = S3Storage(uri, endpoint_url=proxy.url)
        proxy.lose_next(1)
        first = claim_it(store, ELSEWHERE)
        proxy.lose_next(1)
        first.update({"pointer": 1})
        proxy.lose_next(1)
        first.release({"pointer": 2})
        second = claim_it(store)
        proxy.lose_next(1)
        second.update({"pointer": 3})
    assert (first.epoch, second.epoch, proxy.num_faults["drop"]) == (1, 2, 4)
    assert read_document(S3Storage(uri, endpoint_url=moto.url), KEY, FORMAT) == (2, HERE, {"pointer": 3})


def test_what_is_no_claim_is_left_alone(local_store: LocalStorage) -> None:
    for content in (b"{", b'{"format": "other/1"}', b'{"format": "job-state/1", "epoch": 1}'):
        local_store.put(KEY, content)
        with pytest.raises(BadInput, match="state.json"):
            claim_it(local_store)
        assert local_store.get(KEY)[0] == content
