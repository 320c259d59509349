"""Base models on this machine and in the store: finding, uploading, and fetching them to a node (no torch here).

A base is used only where its content is what was asked for: a folder that was found by its path is identified again
(from cached cache_dir) before it counts. In the store a base is a descriptor and, when it was uploaded, one set of files:
the files lie under the digest of the set, and the listing, written last with put-if-absent, says which set is whole.
"""

import contextlib
import fcntl
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from infra.crashpoints import crashpoint
from infra.errors import BadInput, ConditionFailed, ObjectNotFound, ServiceUnavailable, WrongBase
from infra.fingerprint import id_of_json, sha256_of_file
from infra.records import decode_record, encode_record
from infra.storage import Storage
from workers import layout
from workers.identity import BASE_FORMAT, COMPANION_SUFFIXES, BaseIdentity, base_id_of, describe_base, identify
from workers.spec import BaseModelSpec

FILES_FORMAT = "base-files/1"
LISTING_NAME = "files.json"
HUB_TIMEOUT_SECONDS = 10.0
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find_base(spec: BaseModelSpec, folder: Path) -> Path:
    """Return the folder of a job's base: a local path (from `folder`, then from here), else a pinned hub model, downloaded.

    Raises BadInput if it is neither; ServiceUnavailable if the hub does not answer.
    """
    tried = [Path(root, spec.name_or_path).expanduser() for root in (folder, Path.cwd())]
    for candidate in tried:
        if candidate.is_dir():
            return candidate.resolve()
    looked = " or ".join(dict.fromkeys(str(path) for path in tried))
    if HUB_NAME.fullmatch(spec.name_or_path) is None:
        raise BadInput(f"there is no base folder {looked}; correct base_model.name_or_path.")
    if spec.revision is None or re.fullmatch(r"[0-9a-f]{40}", spec.revision) is None:
        raise BadInput(
            f"base model '{spec.name_or_path}' is no folder ({looked}), and as a hub model it needs a pinned commit; "
            f"set base_model.revision to 40 hexadecimal digits (got {spec.revision!r})."
        )
    return _fetch_from_hub(spec.name_or_path, spec.revision, with_code=spec.trust_remote_code)


def _fetch_from_hub(name: str, revision: str, *, with_code: bool) -> Path:
    """Return a snapshot without pickles: as it is in the hub client's cache, else downloaded into it."""
    import httpx2
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    suffixes = (".safetensors", *COMPANION_SUFFIXES, *((".py",) if with_code else ()))
    wanted: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": [f"*{suffix}" for suffix in suffixes],
        "ignore_patterns": ["*/*"],
    }
    try:
        with _quiet_hub():
            with contextlib.suppress(LocalEntryNotFoundError):  # a commit never changes: a whole copy needs no hub
                return Path(snapshot_download(name, **wanted, local_files_only=True))
            # Asked first because it fails at once where the hub is away; the download would try for half a minute.
            HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
            return Path(snapshot_download(name, **wanted))
    except GatedRepoError:
        raise BadInput(
            f"the hub gives '{name}' only to accounts that were granted access; set HF_TOKEN to one of those."
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise BadInput(f"the hub knows no model '{name}' with the commit {revision}; correct name_or_path or revision.") from None
    except (httpx2.HTTPError, OSError) as error:
        raise ServiceUnavailable(
            f"the model hub did not answer for '{name}' ({type(error).__name__}); run again when it is reachable, "
            "or give base_model.name_or_path a local folder."
        ) from error


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the hub client's progress bars and advice off the terminal while this is open."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown, log = not are_progress_bars_disabled(), logging.getLogger("huggingface_hub")
    level = log.level
    disable_progress_bars()
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
        if shown:
            enable_progress_bars()


def add_base(store: Storage, path: Path, identity: BaseIdentity, *, upload: bool = False) -> None:
    """Make the base known to the store, with its files if `upload`; what is there already is kept. May be repeated."""
    with contextlib.suppress(ConditionFailed):
        store.put_if_absent(layout.base(identity.base_id), encode_record(BASE_FORMAT, describe_base(identity)))
    if upload and read_listing(store, identity.base_id) is None:
        _upload(store, path, identity)


def _upload(store: Storage, path: Path, identity: BaseIdentity) -> None:
    files = {name: {"sha256": sha256_of_file(path / name), "size_bytes": (path / name).stat().st_size} for name in identity.files}
    set_id = id_of_json(files)
    prefix = layout.base_files(identity.base_id)
    for name in identity.files:
        store.put(f"{prefix}{set_id}/{name}", path / name)
    crashpoint("base-files-written", identity.base_id)
    with contextlib.suppress(ConditionFailed):  # another upload of the same base was whole first
        store.put_if_absent(prefix + LISTING_NAME, encode_record(FILES_FORMAT, {"set": set_id, "files": files}))


def read_base(store: Storage, base_id: str) -> dict[str, Any] | None:
    """Return the body of a base's descriptor, None if the store does not know it."""
    key = layout.base(base_id)
    try:
        data, _ = store.get(key)
    except ObjectNotFound:
        return None
    return decode_record(data, BASE_FORMAT, key)


def read_listing(store: Storage, base_id: str) -> dict[str, Any] | None:
    """Return which files of a base are in the store ("set", "files" by name), None if it was not uploaded."""
    key = layout.base_files(base_id) + LISTING_NAME
    try:
        data, _ = store.get(key)
    except ObjectNotFound:
        return None
    return decode_record(data, FILES_FORMAT, key)


def materialise(base_id: str, hint: Path | None, store: Storage, cache_dir: Path) -> Path:
    """Return a folder on this node that holds the base: `hint`, else the node's cache, else fetched from the store.

    Raises WrongBase if the hint holds another base now, BadInput if the base is nowhere. Several processes fetch it once.
    """
    if hint is not None and (hint / "config.json").is_file():
        found = identify(hint, cache_dir)
        if found.base_id == base_id:
            return hint
        raise WrongBase(
            f"the folder {hint} now holds other weights or another architecture: base {found.base_id}, not {base_id} as when "
            "the job was made; restore the folder, or make the job again for the base that is there."
        )
    target = cache_dir / "bases" / base_id
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f"{base_id}.lock")):
        if target.is_dir() and _is(target, base_id, cache_dir):
            return target
        shutil.rmtree(target, ignore_errors=True)
        return _fetch_from_store(base_id, hint, store, target)


def _is(folder: Path, base_id: str, cache_dir: Path) -> bool:
    """Tell whether a cached folder still is the base; a damaged one is not."""
    try:
        return identify(folder, cache_dir).base_id == base_id
    except BadInput:
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes of this node; it ends with its process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_from_store(base_id: str, hint: Path | None, store: Storage, target: Path) -> Path:
    listing = read_listing(store, base_id)
    if listing is None:
        where = f"neither in {hint} nor" if hint is not None else "not"
        raise BadInput(
            f"the base {base_id} is {where} in the store {store.uri}; run 'lorafleet base add --upload' where its folder is."
        )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{base_id}.") as temporary:
        folder = Path(temporary) / "base"
        _download(store, base_id, listing, folder)
        found = identify(folder)
        if found.base_id != base_id:
            raise WrongBase(
                f"the files of base {base_id} in the store {store.uri} are those of {found.base_id}; upload the base again."
            )
        folder.rename(target)
        crashpoint("base-fetched", base_id)
    return target


def _download(store: Storage, base_id: str, listing: Mapping[str, Any], folder: Path) -> None:
    folder.mkdir()
    for name, known in sorted(listing["files"].items()):
        key = f"{layout.base_files(base_id)}{listing['set']}/{name}"
        if name != Path(name).name:
            raise BadInput(
                f"the listing of base {base_id} names {name[:80]!r}, which is no plain file name; upload the base again."
            )
        try:
            store.download(key, folder / name)
        except ObjectNotFound:
            raise BadInput(f"the store {store.uri} has lost {key}; upload the base {base_id} again.") from None
        if sha256_of_file(folder / name) != known["sha256"]:
            raise BadInput(
                f"{key} in the store {store.uri} is damaged (other SHA-256 than when uploaded); upload the base again."
            )


def verify_base(store: Storage, base_id: str) -> dict[str, Any]:
    """Check a base in the store down to the bytes; return its descriptor with `uploaded` (bool). Raises BadInput or WrongBase."""
    described = read_base(store, base_id)
    if described is None:
        raise BadInput(f"the store {store.uri} knows no base {base_id}; run 'lorafleet base add' with its folder.")
    if base_id_of(described["weights_root"], described["architecture"]) != base_id:
        raise WrongBase(f"{layout.base(base_id)} in the store {store.uri} describes another base; add the base again.")
    listing = read_listing(store, base_id)
    if listing is not None:
        with tempfile.TemporaryDirectory() as temporary:
            _fetch_from_store(base_id, None, store, Path(temporary) / base_id)
    return described | {"uploaded": listing is not None}
