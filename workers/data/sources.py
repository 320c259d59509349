"""Where rows lie: what people write as a source becomes a list of local files.

A source is a file, a glob, a folder with train|valid|validation|test.*, or any of these under s3://. Objects are fetched
into a folder of the caller's; relative paths start at the folder of the file that names them.
"""

import difflib
import fnmatch
import glob
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infra.errors import BadInput
from infra.storage import Storage
from workers.data.reading import EXTENSIONS
from workers.spec import DataSpec

Role = Literal["train", "validation", "test"]
OpenUri = Callable[[str], Storage]

_STEMS: dict[Role, tuple[str, ...]] = {"train": ("train",), "validation": ("validation", "valid"), "test": ("test",)}
_REMOTE = "s3://"


@dataclass(frozen=True)
class SourceFile:
    """One file of rows on this machine."""

    path: Path
    name: str
    """What people call it: the path they wrote, or the URI of the object."""


def is_folder(source: str, folder: Path) -> bool:
    """Tell whether `source` names a folder, in which further splits may lie."""
    if source.startswith(_REMOTE):
        return not source.endswith(EXTENSIONS) and not glob.has_magic(source)
    return (folder / Path(source).expanduser()).is_dir()


def find_files(source: str, role: Role, folder: Path, workspace: Path, open_uri: OpenUri) -> list[SourceFile]:
    """Return the files that `source` means for `role`; none only for a folder without that split.

    Raises BadInput, with names that come close, if there is nothing.
    """
    if source.startswith(_REMOTE):
        return _find_remote(source.rstrip("/"), role, workspace, open_uri)
    path = folder / Path(source).expanduser()
    if path.is_dir():
        names = _pick([child.name for child in path.iterdir() if child.is_file()], role, source)
        return [SourceFile(path / name, f"{source.rstrip('/')}/{name}") for name in names]
    if path.is_file():
        return [SourceFile(path, source)]
    if glob.has_magic(source):
        return _find_glob(source, folder)
    raise BadInput(f"{source} does not exist in {folder.absolute()}.{_hint(path.name, _names_in(path.parent))}")


def files_of_role(spec: DataSpec, role: Role, folder: Path, workspace: Path, open_uri: OpenUri) -> list[SourceFile]:
    """Return the files that a data spec means for `role`: those it names, else those of its folder; none if it means none.

    Raises BadInput if what it names is not there.
    """
    named = {"train": spec.train, "validation": spec.validation, "test": spec.test}[role]
    if named is None and not is_folder(spec.train, folder):
        return []
    files = find_files(named or spec.train, role, folder, workspace, open_uri)
    if not files and named:
        raise BadInput(f"data.{role}: {named} has no {role}.* file; name a file, or put one there.")
    return files


def _find_glob(pattern: str, folder: Path) -> list[SourceFile]:
    names = sorted(glob.glob(str(Path(pattern).expanduser()), root_dir=folder, recursive=True))
    files = [SourceFile(folder / name, name) for name in names if (folder / name).is_file()]
    if not files:
        raise BadInput(f"no file matches {pattern} in {folder.absolute()}.{_hint('', _names_in((folder / pattern).parent))}")
    return files


def _find_remote(uri: str, role: Role, workspace: Path, open_uri: OpenUri) -> list[SourceFile]:
    whole = is_folder(uri, workspace)
    parent, _, last = (uri, "", "") if whole else uri.rpartition("/")
    store = open_uri(parent)
    chosen = _choose_objects(store, uri, role, None if whole else last)
    target = workspace / role
    target.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        store.download(name, target / name)
    return [SourceFile(target / name, f"{parent}/{name}") for name in chosen]


def _choose_objects(store: Storage, uri: str, role: Role, name: str | None) -> list[str]:
    """Return the keys below `store` that are meant: by role where there is no `name`, else a name or a pattern."""
    if name is None:
        return _pick(_keys_in(store), role, uri)
    if not glob.has_magic(name):
        if store.head(name) is None:
            raise BadInput(f"{uri} does not exist.{_hint(name, _keys_in(store, at_most=1000))}")
        return [name]
    chosen = sorted(fnmatch.filter(_keys_in(store, prefix=re.split(r"[*?\[]", name)[0]), name))
    if not chosen:
        raise BadInput(f"no object matches {uri}.{_hint('', _keys_in(store, at_most=1000))}")
    return chosen


def _keys_in(store: Storage, prefix: str = "", at_most: int | None = None) -> list[str]:
    """Return the keys that lie directly in the store's own folder, looking at no more than `at_most` objects."""
    return [info.key for info in itertools.islice(store.list(prefix), at_most) if "/" not in info.key]


def _pick(names: Sequence[str], role: Role, where: str) -> list[str]:
    """Choose the file of a role among the names in a folder: by its stem or, for training rows, as the only one there."""
    known = sorted(name for name in names if name.lower().endswith(EXTENSIONS))
    chosen = [name for name in known if Path(name).stem in _STEMS[role]]
    if len(chosen) > 1:
        raise BadInput(f"{where} holds {' and '.join(chosen)}, expected one file of {role} rows; name the one you mean.")
    if chosen or role != "train":
        return chosen
    if len(known) == 1 and Path(known[0]).stem not in _STEMS["validation"] + _STEMS["test"]:
        return known
    raise BadInput(f"{where} has no train.jsonl, train.csv or train.parquet, nor a single data file.{_hint('', names)}")


def _names_in(folder: Path) -> list[str]:
    return [child.name for child in folder.iterdir()] if folder.is_dir() else []


def _hint(wanted: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(wanted, names, n=3)
    if close:
        return f" Did you mean {' or '.join(close)}?"
    shown = sorted(names)[:8]
    return f" There is: {', '.join(shown)}{', ...' if len(names) > 8 else ''}." if shown else " Nothing is there."
