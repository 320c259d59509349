"""`lorafleet base ...`: base models by content, as folders and in the store."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.errors import BadInput, ObjectNotFound, WorkFailed
from infra.fingerprint import is_id
from infra.storage import Storage
from pipelines.workspace import Workspace
from workers import layout
from workers.bases import add_base, read_base, read_listing, verify_base
from workers.identity import BaseIdentity, describe_base, identify
from workers.manifests import MIN_PREFIX_LENGTH, adapter_refs

COLUMNS = ("base", "model", "parameters", "uploaded", "adapters")


def add(workspace: Workspace, folder: Path, upload: bool) -> dict[str, Any]:
    """Make a base folder known to the store, with its files if `upload`. May be repeated."""
    identity = identify(folder, workspace.services.cache_dir)
    add_base(workspace.store, folder, identity, upload=upload)
    return _described(workspace.store, describe_base(identity), identity)


def list_bases(workspace: Workspace) -> list[dict[str, Any]]:
    """Return the bases the store knows, with the number of adapters on each."""
    adapters = Counter(ref.base_id for ref in adapter_refs(workspace.store))
    found = []
    for base_id in _known_ids(workspace.store):
        described = read_base(workspace.store, base_id)
        assert described is not None, "it was listed, and descriptors are never deleted"
        found.append(_described(workspace.store, described) | {"num_adapters": adapters[base_id]})
    return found


def show(workspace: Workspace, reference: str) -> dict[str, Any]:
    """Return what a folder holds, or what the store knows of a base by its id or a unique prefix of it."""
    folder = _folder(reference)
    if folder is not None:
        identity = _identity(workspace, folder)
        described = _described(workspace.store, describe_base(identity), identity)
    else:
        body = read_base(workspace.store, find_base_id(workspace.store, reference))
        assert body is not None, "it was found in a listing"
        described = _described(workspace.store, body)
    adapters = Counter(ref.tenant for ref in adapter_refs(workspace.store) if ref.base_id == described["base_id"])
    return described | {"adapters": dict(adapters)}


def verify(workspace: Workspace, reference: str) -> dict[str, Any]:
    """Read a base in full, from its folder or from the store: `base_id`, `ok`, `problem`, and whether the store knows it."""
    folder = _folder(reference)
    if folder is not None:
        identity = identify(folder)  # every byte, whatever is cached
        known = workspace.store.head(layout.base(identity.base_id)) is not None
        return {"base_id": identity.base_id, "ok": True, "problem": None, "known": known, "uploaded": None}
    base_id = find_base_id(workspace.store, reference)
    result: dict[str, Any] = {"base_id": base_id, "ok": True, "problem": None, "known": True}
    try:
        return result | {"uploaded": verify_base(workspace.store, base_id)["uploaded"]}
    except (BadInput, WorkFailed, ObjectNotFound) as error:
        return result | {"ok": False, "problem": str(error), "uploaded": None}


def find_base_id(store: Storage, reference: str) -> str:
    """Return the one known base whose id is or begins with `reference`. Raises BadInput on none or several."""
    is_prefix = MIN_PREFIX_LENGTH <= len(reference) <= 32 and is_id(reference.ljust(32, "a"))
    if not is_prefix:
        raise BadInput(f"{reference[:80]!r} is neither a folder nor a base's id; give a folder, an id, or the beginning of one.")
    found = [base_id for base_id in _known_ids(store) if base_id.startswith(reference)]
    if not found:
        raise BadInput(f"the store {store.uri} knows no base {reference}; 'lorafleet base list' shows what there is.")
    if len(found) > 1:
        raise BadInput(f"'{reference}' fits {len(found)} bases: {', '.join(found[:8])}; give more characters.")
    return found[0]


def _known_ids(store: Storage) -> list[str]:
    parts = [info.key.split("/") for info in store.list(layout.bases())]
    return [part[1] for part in parts if len(part) == 3 and part[2] == "base.json"]


def _folder(reference: str) -> Path | None:
    """Return the folder that is meant; None if it can only be an id."""
    path = Path(reference).expanduser()
    looks_like_path = path.is_dir() or "/" in reference or reference.startswith(".")
    return path if looks_like_path else None


def _identity(workspace: Workspace, folder: Path) -> BaseIdentity:
    """Identify a folder; digests are cached only where a home is already, since looking makes none."""
    return identify(folder, workspace.services.cache_dir if workspace.settings.home.is_dir() else None)


def _described(store: Storage, described: Mapping[str, Any], identity: BaseIdentity | None = None) -> dict[str, Any]:
    base_id = described["base_id"]
    known = store.head(layout.base(base_id)) is not None
    listing = read_listing(store, base_id) if known else None
    here = {"size_bytes": identity.size_bytes, "files": list(identity.files)} if identity else {}
    files = {} if listing is None or identity else {"files": sorted(listing["files"])}
    return {**described, "known": known, "uploaded": listing is not None, **files, **here}


def row_of(base: Mapping[str, Any]) -> list[str]:
    """Return a base as a row of a table with the columns of COLUMNS."""
    return [
        base["base_id"],
        str(base["architecture"].get("model_type", "-")),
        f"{base['num_parameters']:,}",
        "yes" if base["uploaded"] else "no",
        str(base["num_adapters"]),
    ]


def base_text(base: Mapping[str, Any]) -> str:
    """Return a base as lines for a person."""
    architecture = base["architecture"]
    if not base["known"]:
        where = "not known there; add it with: lorafleet base add DIR"
    else:
        where = "known there, with its files" if base["uploaded"] else "known there, without its files (base add --upload)"
    lines = [
        f"base     {base['base_id']}",
        f"model    {architecture.get('model_type', '-')}, {base['num_parameters']:,} parameters in {base['num_tensors']} tensors",
        f"weights  {base['weights_root']}",
        f"store    {where}",
    ]
    if base.get("files"):
        lines.append(f"files    {', '.join(base['files'])}")
    if "adapters" in base:
        counts = ", ".join(f"{count} of {tenant}" for tenant, count in sorted(base["adapters"].items()))
        lines.append(f"adapters {counts or 'none'}")
    return "\n".join(lines)


def verification_text(result: Mapping[str, Any]) -> str:
    """Return the end of a verification in one line."""
    if not result["ok"]:
        return f"base {result['base_id']} is DAMAGED: {result['problem']}"
    if result["uploaded"] is None:
        knows = "knows" if result["known"] else "does not know"
        return f"base {result['base_id']}: the folder is readable in full; the store {knows} it."
    return f"base {result['base_id']} is whole in the store, {'with' if result['uploaded'] else 'without'} its files."
