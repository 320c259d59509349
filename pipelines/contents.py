"""What the content of a stored object must be: asked of any key, answered by reading the object in full.

The store checks every object against the SHA-256 it was stored with. Here the content is held against what is known beside that,
so that also a store whose own notes were lost in copying is checked as far as possible: rows against the digest in their key,
a base's files against its listing, evidence against its name, a checkpoint against its standing, a record against its format.
"""

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from infra.errors import BadInput, ObjectNotFound, WorkFailed
from infra.fingerprint import canonical_json, id_of_json, sha256_hex, sha256_of_file
from infra.storage import Storage
from workers import layout
from workers.bases import LISTING_NAME, read_listing
from workers.data.rows import digest_of
from workers.identity import base_id_of
from workers.metrics_log import decode_points

FORMATS = {
    "base.json": "base",
    "data.json": "data",
    "spec.json": "job",
    "state.json": "state",
    "cancel.json": "cancel",
    "record.json": "record",
    "standing.json": "checkpoint",
    "sweep.json": "sweep",
    "settings.json": "settings",
    "claim.json": "sweep-claim",
    "stop.json": "stop",
    "packs.json": "packs",
    "HEAD": "head",
    LISTING_NAME: "base-files",
}
"""Name of the format by the name of the object."""
FORMATS_IN = {
    "manifests": "manifest",
    "tombstones": "tombstone",
    "trials": "trial",
    "candidates": "candidate",
    "journal": "journal",
    "evidence": "evidence",
}
"""Name of the format by the folder it lies in."""
_FORMAT = re.compile(r"([a-z-]+)/[0-9]+")
_WAY_OUT = "restore it from a copy of the store."


def check_object(store: Storage, key: str) -> None:
    """Read an object in full and check it; one that was deleted meanwhile is well.

    Raises WorkFailed, BadInput or ObjectNotFound, with one sentence, if it is damaged or lacks what belongs to it.
    """
    try:
        if _is_file_of_base(key):
            _check_base_file(store, key)
        else:
            _check_content(store, key, store.get(key)[0])
    except ObjectNotFound:
        if store.head(key) is not None:
            raise


def _is_file_of_base(key: str) -> bool:
    parts = key.split("/")
    return parts[0] == "bases" and len(parts) == 5 and parts[2] == "files"


def _check_base_file(store: Storage, key: str) -> None:
    """Weights may be larger than memory: they go through a file."""
    _, base_id, _, set_id, name = key.split("/")
    with tempfile.TemporaryDirectory() as folder:
        store.download(key, Path(folder) / "content")
        found = sha256_of_file(Path(folder) / "content")
    listing = read_listing(store, base_id)
    if listing is None or listing["set"] != set_id:
        return  # an upload that was not finished, or was beaten
    if listing["files"].get(name, {}).get("sha256") != found:
        raise _damaged(store, key, "its SHA-256 is not the one in the base's listing")


def _check_content(store: Storage, key: str, data: bytes) -> None:
    match key.split("/"):
        case ["tenants", _, "data", digest, "rows.jsonl"]:
            _expect(digest_of(data) == digest, store, key, "its digest is not the one in its key")
        case ["tenants", _, _, "jobs", _, "attempts", _, "checkpoints", _, "state.safetensors"]:
            _check_checkpoint(store, key, data)
        case [*_, name] if name.endswith(".jsonl"):
            _check_points(store, key, data)
        case [*_, name] if name.endswith(".json") or name == "HEAD":
            _check_record(store, key, data)
        case _:
            return  # the store's own SHA-256 is all that is known


def _check_checkpoint(store: Storage, key: str, data: bytes) -> None:
    standing = f"{key.rpartition('/')[0]}/standing.json"
    try:
        expected = json.loads(store.get(standing)[0])["sha256"]
    except ObjectNotFound:
        return  # its writer was killed in between: nothing points at it
    except (ValueError, KeyError, TypeError):
        raise _damaged(store, standing, "it is no record of a checkpoint") from None
    _expect(sha256_hex(data) == expected, store, key, "its SHA-256 is not the one in standing.json")


def _check_points(store: Storage, key: str, data: bytes) -> None:
    try:
        decode_points(data)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _damaged(store, key, "it holds a line that is no metric point") from None


def _check_record(store: Storage, key: str, data: bytes) -> None:
    expected = _format_of(key)
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise _damaged(store, key, "it is not valid JSON") from None
    if expected is None:
        return
    found = _FORMAT.fullmatch(str(body.get("format"))) if isinstance(body, dict) else None
    _expect(found is not None and found[1] == expected, store, key, f"its format is not {expected}/<version>")
    _expect(canonical_json(body) + b"\n" == data, store, key, "it is not written as records are")
    del body["format"]
    try:
        agrees = _IDENTITIES.get(expected, lambda body, key: True)(body, key)
        if expected == "data":
            agrees = sha256_hex(store.get(f"{key.rpartition('/')[0]}/rows.jsonl")[0]) == body["sha256"]
    except (KeyError, TypeError, ValueError, AttributeError):
        agrees = False
    _expect(agrees, store, key, "it does not say what its key stands for")


def _format_of(key: str) -> str | None:
    """Return the name of the format that a record under `key` has, None for a file that is no record of ours."""
    parts = key.split("/")
    if len(parts) >= 6 and parts[0] == "tenants" and parts[3] == "adapters":
        return None
    folders = [FORMATS_IN[part] for part in parts[2:-1] if part in FORMATS_IN]
    return folders[-1] if folders else FORMATS.get(parts[-1])


def _is_of_evidence(body: Mapping[str, Any], key: str) -> bool:
    return id_of_json(body) == key.rpartition("/")[2].removesuffix(".json")


def _is_of_base(body: Mapping[str, Any], key: str) -> bool:
    base_id = key.split("/")[1]
    return body["base_id"] == base_id == base_id_of(body["weights_root"], body["architecture"])


def _is_of_entry(body: Mapping[str, Any], key: str) -> bool:
    return key == f"{key.rpartition('/')[0]}/{body['generation']:06d}.json"


def _is_of_job(body: Mapping[str, Any], key: str) -> bool:
    return bool(body["job_id"] == key.split("/")[4])


def _is_of_listing(body: Mapping[str, Any], key: str) -> bool:
    return bool(id_of_json(body["files"]) == body["set"])


def _is_of_adapter(body: Mapping[str, Any], key: str) -> bool:
    return key == layout.manifest(body["tenant"], body["base_id"], body["adapter_id"])


_IDENTITIES: dict[str, Callable[[Mapping[str, Any], str], bool]] = {
    "evidence": _is_of_evidence,
    "base": _is_of_base,
    "journal": _is_of_entry,
    "job": _is_of_job,
    "base-files": _is_of_listing,
    "manifest": _is_of_adapter,
}
"""Whether a record says what its key stands for, by the name of its format."""


def _expect(holds: bool, store: Storage, key: str, otherwise: str) -> None:
    if not holds:
        raise _damaged(store, key, otherwise)


def _damaged(store: Storage, key: str, why: str) -> WorkFailed | BadInput:
    return WorkFailed(f"the object {key} in the store {store.uri} is damaged: {why}; {_WAY_OUT}")
