"""Bytes under keys: the `Storage` protocol.

Keys are relative POSIX paths of parts matching `[A-Za-z0-9._@+=-]+`, none of them `.` or `..`; anything else is
refused before it reaches a file system or a bucket.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class ObjectInfo:
    """What a store knows of an object without reading it."""

    key: str
    size_bytes: int
    etag: str
    """Opaque version of the content; equal bytes may have equal etags."""
    modified: float
    """Seconds since the epoch by the store's clock."""
    sha256: str | None = None
    """Hexadecimal, where the store keeps it (a listing may not tell)."""


class Storage(Protocol):
    """Objects under keys. Implementations are picklable and safe to use from several threads.

    A put is atomic: a reader sees the whole old object or the whole new one. After it returns, the object
    survives a crash and every later read sees it. Passing failures are retried inside; what remains is raised
    as ServiceUnavailable (exit code 4), with one sentence that names the store and the way out.
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
        """Store bytes if the object still has `etag`. Raises ConditionFailed if it changed or is gone. Read-back as above."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose key starts with `prefix`, in key order."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if there is none."""
        ...
