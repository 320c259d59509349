"""What lies where customers' data is expected, told by listings alone: signatures, and the customers that a pattern finds.

The stamp of a local file is the time of its last writing and that of its last change of any kind, so that a file put in
another's place with the old one's time is noticed; of an object it is the etag. In a folder only files of rows count.
"""

import fnmatch
import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.errors import BadInput, ServiceUnavailable
from infra.storage import ObjectInfo, Storage
from pipelines.nightly.records import Signature
from workers.data.reading import EXTENSIONS

OpenUri = Callable[[str], Storage]
"""Opens an s3:// URI as a store."""
REMOTE = "s3://"
TENANT = "{tenant}"
"""Stands in a pattern where the names of customers are found."""
OBJECTS_PER_REQUEST = 1000
"""Of a listing; S3's own limit."""
File = tuple[str, int, str]
"""As in Signature.files."""


@dataclass(frozen=True)
class Discovered:
    """One customer that a pattern found."""

    name: str
    """As it stands in the path; nothing is known of it yet."""
    source: str
    """The pattern with the name in it."""
    signature: Signature
    """Without files if no file of rows is there."""


def signature_of_sources(sources: Mapping[str, str], folder: Path, open_uri: OpenUri) -> Signature:
    """Return the signature of a customer's sources by role; relative paths start at `folder`.

    Raises BadInput if a source is not there or holds no file of rows, ServiceUnavailable if it cannot be looked at.
    """
    files: list[File] = []
    for role, source in sources.items():
        found = _remote_files(source, open_uri) if source.startswith(REMOTE) else _local_files(source, folder)
        # Training rows keep their plain names, as discovery has them.
        files += [(name if role == "train" else f"{role}:{name}", size, stamp) for name, size, stamp in found]
    return Signature(tuple(sorted(files)))


def signatures_of_neighbours(sources: Sequence[str], open_uri: OpenUri) -> dict[str, Signature]:
    """Return signatures of those sources, folders under s3://, that one listing of the folder above them tells together.

    It is given up where there is so much beside them that asking for each would take fewer requests. Sources that are not in the
    answer have to be asked for one by one. Raises ServiceUnavailable if a bucket cannot be looked at.
    """
    families: dict[str, dict[str, str]] = {}
    for source in sources:
        if source.startswith(REMOTE) and _is_remote_folder(source):
            parent, _, name = source.rstrip("/").rpartition("/")
            families.setdefault(parent, {})[name] = source
    found: dict[str, Signature] = {}
    for parent, members in families.items():
        if len(members) > 1 and parent.startswith(REMOTE):
            found |= _listed_together(parent, members, open_uri)
    return found


def discover(pattern: str, folder: Path, open_uri: OpenUri) -> Iterator[Discovered]:
    """Yield who lies where `pattern` says, by name. Under s3:// that takes one listing of what begins as the pattern does.

    Raises BadInput if the pattern's folder is not there, ServiceUnavailable if it cannot be looked at.
    """
    return _discover_remote(pattern, open_uri) if pattern.startswith(REMOTE) else _discover_local(pattern, folder)


def _local_files(source: str, folder: Path) -> list[File]:
    path = folder / Path(source).expanduser()
    try:
        if path.is_dir():
            files = _files_in(path)
        elif path.is_file():
            files = [_file(path.name, path.stat())]
        elif glob.has_magic(source):
            names = sorted(glob.glob(str(Path(source).expanduser()), root_dir=folder, recursive=True))
            files = [_file(name, (folder / name).stat()) for name in names if (folder / name).is_file()]
        else:
            raise BadInput(f"{source} does not exist in {folder.absolute()}; put the rows there, or correct the path.")
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise BadInput(f"{source} cannot be looked at ({reason}); check the path and its permissions.") from None
    return files or _nothing(source)


def _files_in(folder: Path) -> list[File]:
    with os.scandir(folder) as entries:
        return sorted(_file(entry.name, entry.stat()) for entry in entries if _holds_rows(entry.name) and entry.is_file())


def _file(name: str, status: os.stat_result) -> File:
    # A name that is not UTF-8 comes with surrogates, which no JSON text can hold.
    told = name.encode("utf-8", "backslashreplace").decode()
    return told, status.st_size, f"{status.st_mtime_ns}-{status.st_ctime_ns}"


def _object(name: str, info: ObjectInfo) -> File:
    return name, info.size_bytes, info.etag


def _holds_rows(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _remote_files(source: str, open_uri: OpenUri) -> list[File]:
    bucket, _, key = source.removeprefix(REMOTE).partition("/")
    store = open_uri(f"{REMOTE}{bucket}")  # by bucket, so that customers share one connection
    if _is_remote_folder(source):
        prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
        files = [_object(info.key.removeprefix(prefix), info) for info in store.list(prefix)]
        files = [file for file in files if "/" not in file[0] and _holds_rows(file[0])]
    elif glob.has_magic(key):
        parent = key.rpartition("/")[0]
        listed = store.list(re.split(r"[*?\[]", key)[0])
        matching = (info for info in listed if fnmatch.fnmatchcase(info.key, key) and info.key.rpartition("/")[0] == parent)
        files = [_object(info.key.rpartition("/")[2], info) for info in matching]
    else:
        info = store.head(key)
        files = [] if info is None else [_object(key.rpartition("/")[2], info)]
    return sorted(files) or _nothing(source)


def _listed_together(parent: str, members: Mapping[str, str], open_uri: OpenUri) -> dict[str, Signature]:
    bucket, _, path = parent.removeprefix(REMOTE).partition("/")
    prefix = f"{path}/" if path else ""
    files: dict[str, list[File]] = {}
    for number, info in enumerate(open_uri(f"{REMOTE}{bucket}").list(prefix)):
        if number == OBJECTS_PER_REQUEST * len(members):
            return {}
        name, slash, file = info.key.removeprefix(prefix).partition("/")
        if name in members and slash and "/" not in file and _holds_rows(file):
            files.setdefault(members[name], []).append(_object(file, info))
    return {source: Signature(tuple(sorted(found))) for source, found in files.items()}


def _is_remote_folder(source: str) -> bool:
    return not _holds_rows(source) and not glob.has_magic(source)


def _nothing(source: str) -> list[File]:
    kinds = ", ".join(EXTENSIONS[:-1])
    raise BadInput(f"{source} holds no file of rows; put a {kinds} or {EXTENSIONS[-1]} file there, or correct the path.")


def _discover_local(pattern: str, folder: Path) -> Iterator[Discovered]:
    before, _, after = pattern.partition(TENANT)
    parent, _, beginning = before.rpartition("/")
    ending, slash, below = after.partition("/")
    # "/{tenant}" has the root as its parent, "{tenant}" the folder itself.
    root = folder / Path(parent or ("/" if before.startswith("/") else ".")).expanduser()
    for name in sorted(_names_in(root, pattern)):
        if name.startswith(beginning) and name.endswith(ending) and len(name) > len(beginning) + len(ending):
            path = root / name / below if slash else root / name
            files = _files_of_discovered(path, is_folder=not _holds_rows(pattern))
            tenant = name[len(beginning) : len(name) - len(ending)]
            if files is not None:
                yield Discovered(tenant, pattern.replace(TENANT, tenant), Signature(tuple(files)))


def _names_in(folder: Path, pattern: str) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{pattern}: there is no folder {folder.absolute()}; correct the pattern, or make the folder.") from None
    except OSError as error:
        reason = f"{folder.absolute()} cannot be listed ({error.strerror}); grant access to it"
        raise ServiceUnavailable(f"{pattern}: {reason}.") from None


def _files_of_discovered(path: Path, *, is_folder: bool) -> list[File] | None:
    """Return the files of rows there; None if it is not what the pattern means: a folder, or else a file."""
    try:
        if is_folder:
            return _files_in(path)
        return [_file(path.name, path.stat())] if path.is_file() else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return []  # one that may not be read, which its row then says


def _discover_remote(pattern: str, open_uri: OpenUri) -> Iterator[Discovered]:
    bucket, _, rest = pattern.removeprefix(REMOTE).partition("/")
    before, _, after = rest.partition(TENANT)
    tail = "" if _holds_rows(pattern) else "/(.*)"
    match_key = re.compile(f"{re.escape(before)}([^/]+?){re.escape(after.rstrip('/'))}{tail}", re.DOTALL).fullmatch
    found: dict[str, list[File]] = {}
    for info in open_uri(f"{REMOTE}{bucket}").list(before):
        match = match_key(info.key)
        if match is not None:
            name = match[2] if tail else info.key.rpartition("/")[2]
            files = found.setdefault(match[1], [])
            if "/" not in name and _holds_rows(name):
                files.append(_object(name, info))
    for tenant, files in sorted(found.items()):
        yield Discovered(tenant, pattern.replace(TENANT, tenant), Signature(tuple(sorted(files))))
