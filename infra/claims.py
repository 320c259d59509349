"""Claims: who may change a thing, and a fence against owners that were believed dead.

A claim is one mutable JSON document under a key: `epoch` (grows by one with every owner), `owner` (null when free), `nonce`
(new with every write) and `body` (what the claim is about). It changes by compare-and-put only. Owners renew the nonce;
others count an owner lost when its nonce has not moved for `lease_seconds` of their own monotonic clock, or at once if
it ran on this machine and its process is gone. Whoever takes over writes the next epoch, after which every
compare-and-put of the old owner fails. All who claim a key use the same `lease_seconds`.
"""

import contextlib
import copy
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from infra.crashpoints import crashpoint
from infra.errors import BadInput, ClaimHeld, ClaimLost, ConditionFailed, ObjectNotFound, ServiceUnavailable
from infra.records import decode_record, encode_record
from infra.storage import Storage

LEASE_SECONDS = 15.0
RENEWALS_PER_LEASE = 3
POLLS_PER_LEASE = 15
MAX_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Owner:
    """A process, told from all others that ever ran."""

    host: str
    pid: int
    started: int
    """When the process started, in clock ticks (Linux) or milliseconds, by a clock that is only compared with itself."""
    boot: str
    """Identifies the machine's start and the table of processes the pid belongs to (a container has its own)."""

    @classmethod
    def here(cls) -> "Owner":
        """Return this process."""
        return cls(socket.gethostname(), os.getpid(), _started(os.getpid()) or 0, _boot())

    def is_certainly_dead(self) -> bool:
        """Tell whether this owner ran here, since the last boot, and runs no more. False means not known."""
        is_ours = self.host == socket.gethostname() and self.boot == _boot()
        return is_ours and _started(self.pid) != self.started


class Document(NamedTuple):
    """What a reader sees of a claim."""

    epoch: int
    owner: Owner | None
    body: dict[str, Any]


class _Seen(NamedTuple):
    document: Document
    nonce: str
    etag: str


def read_document(store: Storage, key: str, format: str) -> Document | None:
    """Return the claim under `key`, None if there is none. Raises BadInput if something else is stored there."""
    seen = _read(store, key, format)
    return seen and seen.document


def claim(
    store: Storage,
    key: str,
    format: str,
    initial: Mapping[str, Any],
    *,
    owner: Owner,
    lease_seconds: float = LEASE_SECONDS,
    wait_seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> "Lease":
    """Become the owner of `key`: create it with the body `initial`, or take the next epoch and find the body as it was left.

    Args:
        format: The record's name and version, "job-state/1".
        lease_seconds: How long a nonce may stand still before its owner counts as lost.
        wait_seconds: How long to wait for a living owner to let go. None waits only until its nonce has been seen moving.

    Raises:
        ClaimHeld: the owner lives; the sentence names it.
    """
    watch = _Watch(clock, lease_seconds, wait_seconds)
    while True:
        seen = _read(store, key, format)
        if seen is None or seen.document.owner is None or seen.document.owner.is_certainly_dead() or watch.is_expired(seen.nonce):
            lease = _take(store, key, format, initial, owner, lease_seconds, seen)
            if lease is not None:
                return lease
        elif watch.is_over():
            holder = seen.document.owner
            raise ClaimHeld(
                f"{key} is held by process {holder.pid} on {holder.host}, which is alive (epoch {seen.document.epoch}); "
                "wait until it ends, or stop it, then run the same command again."
            )
        else:
            sleep(min(lease_seconds / POLLS_PER_LEASE, MAX_POLL_SECONDS))


class _Watch:
    """Whether a nonce has stood still for a lease, and whether to go on watching."""

    def __init__(self, clock: Callable[[], float], lease_seconds: float, wait_seconds: float | None) -> None:
        self._clock, self._lease_seconds, self._wait_seconds = clock, lease_seconds, wait_seconds
        self._began = clock()
        self._nonce: str | None = None
        self._since = self._began
        self._has_moved = False

    def is_expired(self, nonce: str) -> bool:
        """Note the nonce just read; tell whether it has been the same for longer than a lease."""
        if nonce != self._nonce:
            self._has_moved = self._nonce is not None
            self._nonce, self._since = nonce, self._clock()
        return self._clock() - self._since > self._lease_seconds

    def is_over(self) -> bool:
        """Tell whether waiting has been long enough."""
        if self._wait_seconds is None:
            return self._has_moved
        return self._clock() - self._began >= self._wait_seconds


def _read(store: Storage, key: str, format: str) -> _Seen | None:
    try:
        data, info = store.get(key)
    except ObjectNotFound:
        return None
    where = f"{key} in the store {store.uri}"
    record = decode_record(data, format, where)
    try:
        owner = record["owner"] and Owner(**record["owner"])
        return _Seen(Document(record["epoch"], owner, record["body"]), record["nonce"], info.etag)
    except (KeyError, TypeError):
        raise BadInput(f"{where} is no claim, although its format says {format!r}; the object is damaged.") from None


def _encode(format: str, document: Document, nonce: str) -> bytes:
    owner = document.owner and asdict(document.owner)
    return encode_record(format, {"epoch": document.epoch, "owner": owner, "nonce": nonce, "body": document.body})


def _take(
    store: Storage, key: str, format: str, initial: Mapping[str, Any], owner: Owner, lease_seconds: float, seen: _Seen | None
) -> "Lease | None":
    """Write the next epoch; None if somebody else was faster."""
    document = Document(seen.document.epoch + 1, owner, seen.document.body) if seen else Document(1, owner, dict(initial))
    nonce = uuid.uuid4().hex
    data = _encode(format, document, nonce)
    try:
        etag = (store.compare_and_put(key, data, seen.etag) if seen else store.put_if_absent(key, data)).etag
    except ConditionFailed:
        # Something between the store and us may have sent it twice: whose nonce stands there has won.
        winner = _read(store, key, format)
        if winner is None or winner.nonce != nonce:
            return None
        etag = winner.etag
    crashpoint("claim-taken", key)
    return Lease(store, key, format, lease_seconds, _Seen(document, nonce, etag))


@dataclass(eq=False, repr=False)
class Lease:
    """An epoch that is ours until somebody takes the next one. Safe to use from several threads."""

    _store: Storage
    _key: str
    _format: str
    _lease_seconds: float
    _seen: _Seen
    _sent_nonces: set[str] = field(default_factory=set)
    """Of writes without an answer, which may stand in the store."""
    _loss: str | None = None
    _lock: Any = field(default_factory=threading.RLock)

    @property
    def epoch(self) -> int:
        """The number under which everything of this attempt is written."""
        return self._seen.document.epoch

    @property
    def body(self) -> dict[str, Any]:
        """A copy of the body as it was last written by this lease."""
        return copy.deepcopy(self._seen.document.body)

    @property
    def is_lost(self) -> bool:
        """Whether this lease is known to have ended. False does not promise that the next update succeeds."""
        return self._loss is not None

    def renew(self) -> None:
        """Move the nonce. Raises ClaimLost, or ServiceUnavailable while the store does not answer."""
        with self._lock:
            self._write(self._seen.document)

    def update(self, changes: Mapping[str, Any]) -> None:
        """Replace top-level keys of the body. Raises ClaimLost if somebody took over, and then nothing is changed.

        After ServiceUnavailable it is not known whether the change was made; make it again.
        """
        with self._lock:
            owner = self._seen.document.owner
            self._write(Document(self.epoch, owner, {**self.body, **changes}))
        crashpoint("claim-updated", self._key)

    def release(self, changes: Mapping[str, Any] | None = None) -> None:
        """Change the body for the last time and let go: the next to claim need not wait. Raises as `update`."""
        with self._lock:
            self._write(Document(self.epoch, None, {**self.body, **(changes or {})}))
            self._loss = f"{self._key} was released by this process (epoch {self.epoch}) and is not its own any more."
        crashpoint("claim-updated", self._key)

    @contextlib.contextmanager
    def keep_alive(self) -> Iterator["Lease"]:
        """Renew in a thread while the block runs. A loss does not interrupt the block: the next update raises ClaimLost."""
        done = threading.Event()
        thread = threading.Thread(target=self._renew_until, args=(done,), name=f"keep-alive {self._key}", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            done.set()
            thread.join()

    def _renew_until(self, done: threading.Event) -> None:
        while not done.wait(self._lease_seconds / RENEWALS_PER_LEASE):
            try:
                self.renew()
            except ClaimLost:
                return
            except ServiceUnavailable:
                continue  # others see the nonce stand still; whether the claim is lost, the next answer tells

    def _write(self, document: Document) -> None:
        if self._loss is not None:
            raise ClaimLost(self._loss)
        nonce = uuid.uuid4().hex
        data = _encode(self._format, document, nonce)
        self._sent_nonces.add(nonce)
        while True:
            try:
                etag = self._store.compare_and_put(self._key, data, self._seen.etag).etag
                break
            except ConditionFailed:
                etag = self._etag_if_ours()
                if self._seen.nonce == nonce:
                    break
        self._seen = _Seen(document, nonce, etag)
        self._sent_nonces.clear()

    def _etag_if_ours(self) -> str:
        """Read back after a refusal: what stands there may be an earlier write of ours that was never answered."""
        found = _read(self._store, self._key, self._format)
        if found is None or found.nonce not in self._sent_nonces | {self._seen.nonce}:
            self._loss = self._sentence_of_loss(found)
            raise ClaimLost(self._loss)
        self._seen = _Seen(self._seen.document, found.nonce, found.etag)
        return found.etag

    def _sentence_of_loss(self, found: _Seen | None) -> str:
        if found is None:
            return f"{self._key} was deleted while this process owned it (epoch {self.epoch}); run the same command again."
        taker = found.document.owner
        name = f"process {taker.pid} on {taker.host}" if taker else "another process, which has finished"
        return (
            f"{self._key} was taken over by {name} (epoch {found.document.epoch}) because this process (epoch {self.epoch}) "
            "had not been heard of; nothing it writes now is used."
        )


def _started(pid: int) -> int | None:
    """When the process started; None if there is no such process, or only what is left until its parent asks."""
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        return _start_ticks(pid) or round(process.create_time() * 1000)
    except psutil.NoSuchProcess:
        return None


def _start_ticks(pid: int) -> int | None:
    """Ticks between boot and the process's start, where /proc tells; unlike a date they do not move when a clock is set."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None


def _boot() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except FileNotFoundError:
        return str(psutil.boot_time())
