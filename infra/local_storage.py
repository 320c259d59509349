"""A directory as a store: one plain file per object, so that people and other programs can read what is in it.

What is ours alone lies in `.~lorafleet/`, a name no key can have:
- `tmp/` holds contents being written. They appear under their key by one rename or link, so nothing is ever half there.
- `locks/` holds a fixed number of lock files. A writer holds the one its key falls on (`flock`) while it compares,
  notes the digest and renames; contents are written and flushed before, outside the lock.
- `sha256/<key>` notes "etag digest" for the last contents of a key, a line each, newest last. The line is on disk
  before the content appears, so a crash between the two leaves the old content with its own, older line.

The etag is the file's modification time in nanoseconds, inode and size. Writers make the time grow with every
content of a key, so an etag never comes back, even where equal bytes do.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from infra.errors import BadInput, ConditionFailed, ObjectNotFound, ServiceUnavailable, WorkFailed
from infra.storage import ObjectInfo, check_key, check_prefix

HIDDEN = ".~lorafleet"
NUM_LOCKS = 256
LOCK_TIMEOUT_SECONDS = 30.0
"""A lock is held for milliseconds; this long only by a process that was stopped while it held one."""
NUM_NOTED_DIGESTS = 8
MAX_NOTES_BYTES = 8192
STALE_SECONDS = 24 * 3600.0
PIECE_BYTES = 1 << 20

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)

T = TypeVar("T")
Condition = Callable[[os.stat_result | None], bool]


@dataclass(frozen=True)
class LocalStorage:
    """Objects as files below `root`; several processes may use it at once, also over a mount that shares `flock`."""

    root: Path

    @property
    def uri(self) -> str:
        """The absolute path of the directory."""
        return str(self.root.absolute())

    def head(self, key: str) -> ObjectInfo | None:
        """Return what is known of `key`; its digest is the noted one, None for a file that was not put by a store."""
        path = self._path(key)
        with self._translated(key, "read"):
            status = _stat(path)
            if status is None or stat.S_ISDIR(status.st_mode):
                return None
            return _info(key, status, self._notes(key).get(_etag(status)))

    def get(self, key: str) -> tuple[bytes, ObjectInfo]:
        """Return the content, checked against the noted digest. Raises ObjectNotFound."""
        return self._read_twice(key, self._get)

    def download(self, key: str, path: Path) -> None:
        """Write the content to the local file `path`, whole or not at all. Raises ObjectNotFound."""
        self._read_twice(key, lambda key: self._download(key, path))

    def put(self, key: str, data: bytes | Path) -> ObjectInfo:
        """Store bytes, or a local file's content, whatever stood there."""
        return self._write(key, data, lambda status: True, os.replace)

    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo:
        """Store bytes if the key is free. Raises ConditionFailed if it is not."""
        return self._write(key, data, lambda status: status is None, _link)

    def compare_and_put(self, key: str, data: bytes, etag: str) -> ObjectInfo:
        """Store bytes if the object still has `etag`. Raises ConditionFailed if it changed or is gone."""
        return self._write(key, data, lambda status: status is not None and _etag(status) == etag, os.replace)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose key starts with `prefix`, in key order."""
        folder, _, beginning = check_prefix(prefix).rpartition("/")
        with self._translated(prefix):
            for key, entry in self._walk(folder, beginning):
                with contextlib.suppress(FileNotFoundError):  # deleted since the folder was read
                    yield _info(key, entry.stat(), None)

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if there is none. Folders that are empty then go too."""
        path = self._path(key)
        with self._translated(key), self._locked(key):
            self._notes_path(key).unlink(missing_ok=True)  # first: a kill in between leaves what a listing shows
            if _stat(path) is not None:
                path.unlink()
                with contextlib.suppress(FileNotFoundError):  # somebody deleted the last neighbour, and the folder with it
                    _sync_folder(path.parent)
            _remove_empty_folders(path.parent, self.root)
            _remove_empty_folders(self._notes_path(key).parent, self.root / HIDDEN)

    def remove_stale_temporaries(self) -> None:
        """Remove what processes that were killed while writing left behind more than a day ago."""
        with self._translated(HIDDEN), contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self.root / HIDDEN / "tmp"):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - entry.stat().st_mtime > STALE_SECONDS:
                        os.unlink(entry.path)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _notes_path(self, key: str) -> Path:
        return self.root / HIDDEN / "sha256" / f"{key}~"  # never the name of a folder, which is part of a key

    def _open(self, key: str) -> BinaryIO:
        try:
            return self._path(key).open("rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise ObjectNotFound(f"there is no object {key} in the store {self.uri}") from None

    def _walk(self, folder: str, beginning: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Yield files below `folder` whose name there starts with `beginning`, in key order."""
        try:
            entries = [entry for entry in os.scandir(self.root / folder) if entry.name.startswith(beginning)]
        except (FileNotFoundError, NotADirectoryError):
            return
        # A folder sorts with its slash, which is how its keys compare with those of files beside it.
        for name, entry in sorted((entry.name + "/" * entry.is_dir(), entry) for entry in entries if entry.name != HIDDEN):
            key = f"{folder}/{name}" if folder else name
            if name.endswith("/"):
                yield from self._walk(key[:-1], "")
            else:
                yield key, entry

    def _checked(self, key: str, status: os.stat_result, digest: str) -> ObjectInfo:
        """Return the info of a content that was read; raise WorkFailed if it is not what was stored.

        A store copied with its notes has other etags: then the content must be one of those noted for the key.
        """
        notes = self._notes(key)
        expected = {notes[_etag(status)]} if _etag(status) in notes else set(notes.values())
        if expected and digest not in expected:
            raise WorkFailed(
                f"the object {key} in the store {self.uri} is damaged: its SHA-256 is {digest[:12]}…, "
                "not the one it was stored with; restore it from a copy, or delete it and run what makes it again."
            )
        return _info(key, status, digest)

    def _read_twice(self, key: str, read: Callable[[str], T]) -> T:
        """Read; what seems damaged once more with writers kept out: several may have overtaken a slow reader's notes."""
        with self._translated(key, "read"):
            try:
                return read(key)
            except WorkFailed:
                with self._locked(key):
                    return read(key)

    def _get(self, key: str) -> tuple[bytes, ObjectInfo]:
        with self._open(key) as file:
            data = file.read()
            return data, self._checked(key, os.fstat(file.fileno()), hashlib.sha256(data).hexdigest())

    def _download(self, key: str, path: Path) -> None:
        with self._open(key) as source, whole_file(path) as target:
            digest = _copy(source, target)
            self._checked(key, os.fstat(source.fileno()), digest)

    def _write(self, key: str, data: bytes | Path, condition: Condition, place: Callable[[Path, Path], None]) -> ObjectInfo:
        path = self._path(key)
        with self._translated(key), self._temporary() as temporary:
            digest = _fill(temporary, data)
            with self._locked(key):
                old = _stat(path)
                if not condition(old):
                    raise ConditionFailed(f"the object {key} in the store {self.uri} {_stands(old)}.")
                status = _stamp(temporary, old)
                self._publish(key, temporary, f"{_etag(status)} {digest}\n", place)
        return _info(key, status, digest)

    def _publish(self, key: str, temporary: Path, line: str, place: Callable[[Path, Path], None]) -> None:
        path = self._path(key)
        for retries_left in (3, 2, 1, 0):
            try:
                self._note(key, line)
                _make_folders(path.parent)
                place(temporary, path)
                break
            except FileNotFoundError:  # somebody deleted the last neighbour, and the empty folder with it
                if not retries_left:
                    raise
        _sync_folder(path.parent)

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        folder = self.root / HIDDEN / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / uuid.uuid4().hex
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        path = self.root / HIDDEN / "locks" / f"{zlib.crc32(key.encode()) % NUM_LOCKS:02x}"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._acquire(lock)
            yield
        finally:
            os.close(lock)

    def _acquire(self, lock: int) -> None:
        deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ServiceUnavailable(
                        f"a process that does not go on has locked the store {self.uri} for {LOCK_TIMEOUT_SECONDS:.0f} s; "
                        "continue or end that process (it may be stopped), then run the same command again."
                    ) from None
            time.sleep(0.001)

    def _notes(self, key: str) -> dict[str, str]:
        """Digests by etag, oldest first; a torn line is left out."""
        try:
            lines = self._notes_path(key).read_text("ascii", "replace").splitlines()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return {}
        pairs = [line.split(" ") for line in lines]
        return {pair[0]: pair[1] for pair in pairs if len(pair) == 2 and len(pair[1]) == 64}

    def _note(self, key: str, line: str) -> None:
        """Append a line, and flush it; now and then write the last lines anew, so that the file stays small."""
        path = self._notes_path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        status = _stat(path)
        if status is not None and status.st_size > MAX_NOTES_BYTES:
            last = list(self._notes(key).items())[-NUM_NOTED_DIGESTS:]
            with self._temporary() as temporary:
                _fill(temporary, ("".join(f"{etag} {digest}\n" for etag, digest in last) + line).encode())
                return os.replace(temporary, path)
        with path.open("ab") as file:
            file.write(b"\n" * (status is not None) + line.encode())  # ends a line that a crash has torn
            file.flush()
            return os.fdatasync(file.fileno())

    @contextlib.contextmanager
    def _translated(self, key: str, verb: str = "write") -> Iterator[None]:
        """Turn an operating system's error into the sentence a person needs."""
        try:
            yield
        except ServiceUnavailable:  # which is an OSError too
            raise
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise BadInput(
                f"{key} cannot be an object in the store {self.uri}: it lies below an object or has some below it."
            ) from None
        except OSError as error:
            raise _unavailable(f"store {self.uri}", f"{verb} {error.filename or key}", error) from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` when the block ends well, flushed to disk, and not at all otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name[:200]}.{uuid.uuid4().hex}.part"
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in FULL or error.errno in FORBIDDEN:  # nothing that is read fails so: it is our file
            raise _unavailable(f"folder {path.parent.absolute()}", f"write {path}", error) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _fill(path: Path, data: bytes | Path) -> str:
    """Write a new file, flush it to disk and return its SHA-256 in hexadecimal."""
    with path.open("xb") as file:
        if isinstance(data, Path):
            with _source(data) as source:
                digest = _copy(source, file)
        else:
            file.write(data)
            digest = hashlib.sha256(data).hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return digest


def _source(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except (FileNotFoundError, IsADirectoryError):
        raise BadInput(f"there is no file {path} to be stored.") from None


def _copy(source: BinaryIO, target: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := source.read(PIECE_BYTES):
        digest.update(piece)
        target.write(piece)
    return digest.hexdigest()


def _stamp(temporary: Path, old: os.stat_result | None) -> os.stat_result:
    """Give a content about to appear a modification time later than that of the old one, and return its status."""
    now = max(time.time_ns(), old.st_mtime_ns + 1 if old else 0)
    os.utime(temporary, ns=(now, now))
    status = os.stat(temporary)
    if old is not None and status.st_mtime_ns <= old.st_mtime_ns:  # a file system with whole (or even) seconds
        later = old.st_mtime_ns + 2 * 10**9
        os.utime(temporary, ns=(later, later))
        status = os.stat(temporary)
    return status


def _link(temporary: Path, path: Path) -> None:
    """Let a content appear where no file stands: a free key has one winner even where locks are not shared."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise ConditionFailed(f"the object {path} exists already.") from None


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _etag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_ino:x}-{status.st_size:x}"


def _info(key: str, status: os.stat_result, sha256: str | None) -> ObjectInfo:
    return ObjectInfo(key, status.st_size, _etag(status), status.st_mtime, sha256)


def _stands(old: os.stat_result | None) -> str:
    return "is gone" if old is None else "exists already or has changed"


def _make_folders(folder: Path) -> None:
    """Make missing folders and flush their names to disk."""
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_empty_folders(folder: Path, top: Path) -> None:
    """Remove `folder` and those above it while they are empty, up to but without `top`."""
    with contextlib.suppress(OSError):  # not empty, or gone already
        while folder != top:
            folder.rmdir()
            folder = folder.parent


def _unavailable(place: str, what: str, error: OSError) -> ServiceUnavailable:
    again = "and run the same command again."
    if error.errno in FULL:
        return ServiceUnavailable(f"the disk of {place} is full; free space {again}")
    if error.errno == errno.EFBIG:
        return ServiceUnavailable(f"a file in {place} may not grow so large; raise the file size limit (ulimit -f) {again}")
    if error.errno in FORBIDDEN:
        return ServiceUnavailable(f"no permission to {what} in {place}; grant it, or name another place.")
    return ServiceUnavailable(f"{place} failed to {what} ({error.strerror or error}); check its disk {again}")
