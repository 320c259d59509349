"""Bytes under keys: the `Storage` protocol.

Keys are relative POSIX paths of parts matching `[A-Za-z0-9._@+=-]+`, none of them `.` or `..`; anything else is
refused before it reaches a file system or a bucket.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from infra.errors import BadInput

PART_PATTERN = re.compile(r"[A-Za-z0-9._@+=-]{1,200}")
"""A part is a file's name in a local store: 255 bytes with what is added for temporary names."""
MAX_KEY_LENGTH = 900
"""S3 keys end at 1024 bytes, and a store's own prefix comes before ours."""


def check_key(key: str) -> str:
    """Return `key`; raise BadInput if it is no key."""
    parts = key.split("/")
    if len(key) > MAX_KEY_LENGTH or not all(PART_PATTERN.fullmatch(part) and part not in (".", "..") for part in parts):
        raise BadInput(
            f"{key[:80]!r} is not a key: expected parts of A-Z a-z 0-9 . _ @ + = - joined by '/', none of them '.' or '..', "
            f"each at most 200 characters and {MAX_KEY_LENGTH} in all."
        )
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix`, the beginning of a key (empty for all keys); raise BadInput if no key can begin so."""
    check_key(prefix + "x")  # the parts before the last '/' are whole, the last may be any beginning of one
    return prefix


@dataclass(frozen=True)
class ObjectInfo:
    """What a store knows of an object without reading it."""

    key: str
    size_bytes: int
    etag: str
    """Opaque version of the content, the same from head, get, put and list; equal bytes may have equal etags."""
    modified: float
    """Seconds since the epoch by the store's clock."""
    sha256: str | None = None
    """Hexadecimal, where the store keeps it (a listing may not tell)."""


class Storage(Protocol):
    """Objects under keys. Implementations are picklable and safe to use from several threads.

    A put is atomic: a reader sees the whole old object or the whole new one. After it returns, the object
    survives a crash and every later read sees it. Passing failures are retried inside; what remains is raised
    as ServiceUnavailable (exit code 4), with one sentence that names the store and the way out. An object whose
    content no longer has the SHA-256 it was stored with is never returned: WorkFailed says that it is damaged.
    A key is either an object or the beginning of others ("a" and "a/b" exclude each other), as in a file system.
    """

    @property
    def uri(self) -> str:
        """Where this store is, as one may write it into the settings (no credentials)."""
        ...

    def head(self, key: str) -> ObjectInfo | None:
        """Return what is known of `key`, None if there is no such object."""
        ...

    def get(self, key: str) -> tuple[bytes, ObjectInfo]:
        """Return the content, checked against its SHA-256. Raises ObjectNotFound."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Write the content to the local file `path`, whole or not at all. Raises ObjectNotFound."""
        ...

    def put(self, key: str, data: bytes | Path) -> ObjectInfo:
        """Store bytes, or a local file's content, whatever stood there."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo:
        """Store bytes if the key is free. Raises ConditionFailed if it is not.

        An answer that was lost is read back: if the stored bytes equal `data`, this put won. Writers whose bytes could be
        equal although they are rivals must therefore put a nonce into the body.
        """
        ...

    def compare_and_put(self, key: str, data: bytes, etag: str) -> ObjectInfo:
        """Store bytes if the object still has `etag`. Raises ConditionFailed if it changed or is gone. Read-back as above.

        A put whose answer was lost, and which a rival overwrote before the read-back, counts as refused although it once
        stood there. Where that matters (counting, say) the body must tell who has been at it.
        """
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose key starts with `prefix`, in key order."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if there is none."""
        ...
