"""Where an adapter comes from, as an in-toto statement (v1) with SLSA provenance (v1): its files, and all they were made of.

Everything in it is read from the store, nothing from this machine or this moment, so that the same adapter gives the same bytes
wherever and whenever it is asked for. Ids of ours (base, data, adapter: 160 bits of a SHA-256 over content) stand under
`lorafleet` in a digest set, beside which in-toto leaves room for digests of one's own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.errors import BadInput, ObjectNotFound
from infra.fingerprint import canonical_json
from infra.records import decode_record
from infra.storage import Storage
from pipelines.references import find_reference
from pipelines.workspace import Workspace
from workers import layout
from workers.bases import read_base
from workers.job import JOB_FORMAT
from workers.job_state import STATE_FORMAT
from workers.manifests import AdapterRef, read_manifest

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:lorafleet:adapter:v1"
BUILDER = "urn:lorafleet"
DIGEST_NAME = "lorafleet"
RECORD_FORMAT = "record/1"


def provenance(workspace: Workspace, reference: str) -> bytes:
    """Return the statement about an adapter: canonical JSON and a newline. Raises BadInput if there is no such adapter."""
    return statement_bytes(workspace.store, find_reference(workspace.store, reference))


def statement_bytes(store: Storage, ref: AdapterRef) -> bytes:
    """Return the statement about an adapter as bytes that are a function of what the store says."""
    return canonical_json(statement(store, ref)) + b"\n"


def statement(store: Storage, ref: AdapterRef) -> dict[str, Any]:
    """Return the statement about an adapter; what an imported or merged one has no job for is left out."""
    manifest = read_manifest(store, ref)
    files = manifest["files"]
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": files[name]["sha256"]}} for name in sorted(files)],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": _asked_for(store, ref, manifest),
                "internalParameters": _identity(ref, manifest),
                "resolvedDependencies": _dependencies(store, ref, manifest),
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": _versions(store, ref, manifest)},
                "metadata": {"invocationId": manifest["job_id"]} if manifest.get("job_id") else {},
            },
        },
    }


def _identity(ref: AdapterRef, manifest: Mapping[str, Any]) -> dict[str, Any]:
    named = ("task", "task_type", "labels", "prompt_contract", "training_view", "peft", "num_parameters")
    return {**ref._asdict(), **{name: manifest[name] for name in named if manifest.get(name) is not None}}


def _asked_for(store: Storage, ref: AdapterRef, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a person asked for: the job's spec, or how it was merged or imported."""
    job_id = manifest.get("job_id")
    if job_id is not None:
        body = _read(store, layout.job_spec(ref.tenant, ref.base_id, job_id), JOB_FORMAT)
        return {"job_id": job_id, **({"spec": body["spec"]} if body is not None else {})}
    return {name: manifest[name] for name in ("imported", "merge", "parents") if manifest.get(name) is not None}


def _dependencies(store: Storage, ref: AdapterRef, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return base, rows, and the adapters it continued or was merged from, each with its digest."""
    described = read_base(store, ref.base_id)
    digest = {DIGEST_NAME: ref.base_id} | ({"weightsMerkleRoot": described["weights_root"]} if described is not None else {})
    found = [{"name": "base", "uri": layout.base(ref.base_id), "digest": digest}]
    for split, data in sorted(manifest.get("data", {}).items()):
        if data:
            found.append({"name": f"data/{split}", "uri": layout.data(ref.tenant, data), "digest": {DIGEST_NAME: data}})
    parents = [manifest["init_adapter_id"]] if manifest.get("init_adapter_id") else []
    for parent in [*parents, *manifest.get("parents", [])]:
        found.append({"name": "adapter", "uri": f"adapter:{parent}", "digest": {DIGEST_NAME: parent}})
    return found


def _versions(store: Storage, ref: AdapterRef, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions of what trained it, as the attempt that ended recorded them; empty where there is no record."""
    if manifest.get("job_id") is None:
        return {}
    state = _read(store, layout.job_state(ref.tenant, ref.base_id, manifest["job_id"]), STATE_FORMAT)
    key = (state or {}).get("body", {}).get("record")
    record = _read(store, key, RECORD_FORMAT) if key else None
    return {} if record is None else {**record["versions"], "python": record["python"]}


def _read(store: Storage, key: str, format: str) -> dict[str, Any] | None:
    try:
        return decode_record(store.get(key)[0], format, key)
    except ObjectNotFound:
        return None


def write_statement(path: Path, data: bytes) -> None:
    """Write a statement to a file. Raises BadInput if it cannot be written."""
    try:
        path.write_bytes(data)
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror or error}); name another file with --out.") from None
