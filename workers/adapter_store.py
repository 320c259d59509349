"""Adapters in the store: the files first, then the manifest that makes them count; read back with every digest checked."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infra.crashpoints import crashpoint
from infra.errors import BadInput, ConditionFailed, ObjectNotFound, WorkFailed
from infra.fingerprint import sha256_hex
from infra.records import encode_record
from infra.storage import Storage
from workers import layout
from workers.adapter import Adapter, adapter_id
from workers.adapter_files import FILE_NAMES, adapter_files, parse_adapter
from workers.job import Job
from workers.manifests import MANIFEST_FORMAT, AdapterRef, find_adapter, read_manifest
from workers.metrics_log import encode_number

DESCRIBED = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern")
"""Keys of the configuration that a manifest repeats, so that lists need not open the files."""
_WAY_OUT = "restore the adapter from a copy of the store."


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter that was read back and found whole."""

    adapter_id: str
    manifest: dict[str, Any]
    adapter: Adapter


def manifest_body(job: Job, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return what a manifest says of the job an adapter came from; `metrics` are those of the weights that were kept."""
    return {
        "job_id": job.job_id,
        "task": job.spec.task,
        "task_type": job.spec.task_type,
        "labels": list(job.labels),
        "base_model_name_or_path": job.spec.base_model.name_or_path,
        "trust_remote_code": job.spec.base_model.trust_remote_code,
        "prompt_contract": job.base.prompt_contract,
        "training_view": job.base.training_view,
        "data": {
            "train": job.train.digest,
            "validation": job.validation and job.validation.digest,
            "test": job.test and job.test.digest,
        },
        "init_adapter_id": job.init_adapter_id,
        "metrics": {name: encode_number(value) for name, value in sorted(metrics.items())},
        "created": time.time(),
    }


def store_adapter(store: Storage, tenant: str, base_id: str, adapter: Adapter, manifest_body: Mapping[str, Any]) -> str:
    """Store an adapter and its manifest (`manifest_body` with what follows from the adapter); return its id.

    May be repeated. Two jobs may give one adapter: then the manifest, and the configuration file, of the first stay.
    """
    own_id = adapter_id(base_id, adapter)
    key = layout.manifest(tenant, base_id, own_id)
    if store.head(key) is None:
        files = _store_files(store, layout.adapter(tenant, base_id, own_id), base_id, adapter)
        crashpoint("adapter-files-written", own_id)
        body = {**manifest_body, **_described(tenant, base_id, own_id, adapter, files)}
        try:
            store.put_if_absent(key, encode_record(MANIFEST_FORMAT, body))
        except ConditionFailed:
            return own_id
    crashpoint("manifest-written", own_id)
    return own_id


def _store_files(store: Storage, prefix: str, base_id: str, adapter: Adapter) -> dict[str, bytes]:
    """Store the files unless they are there; return what is there.

    The adapter's id does not cover all of its configuration (dropout, the base's name), so a rival may store other bytes
    for the same adapter. Whichever came first stay, so that a manifest never names bytes that a later put replaced; only
    what does not read as this adapter, as a damaged disk leaves it, is replaced.
    """
    files = adapter_files(adapter)
    try:
        stored = {name: _settle(store, prefix + name, data) for name, data in files.items()}
        if adapter_id(base_id, parse_adapter(stored, prefix)) == adapter_id(base_id, adapter):
            return stored
    except (BadInput, WorkFailed, ObjectNotFound):
        pass  # damaged: replaced below
    for name, data in files.items():
        store.put(prefix + name, data)
    return files


def _settle(store: Storage, key: str, data: bytes) -> bytes:
    """Store `data` unless the key is taken; return what stands there."""
    try:
        store.put_if_absent(key, data)
        return data
    except ConditionFailed:
        return store.get(key)[0]


def _described(tenant: str, base_id: str, own_id: str, adapter: Adapter, files: Mapping[str, bytes]) -> dict[str, Any]:
    return {
        "tenant": tenant,
        "base_id": base_id,
        "adapter_id": own_id,
        "peft": {key: adapter.config[key] for key in DESCRIBED},
        "num_parameters": adapter.num_parameters,
        "files": {name: {"sha256": sha256_hex(data), "size_bytes": len(data)} for name, data in sorted(files.items())},
    }


def load_adapter(store: Storage, tenant: str, base_id: str | None, ref: str) -> StoredAdapter:
    """Read an adapter by id or unique prefix, every digest and the id itself checked. Raises BadInput if it is not whole."""
    found = find_adapter(store, tenant, ref, base_id)
    manifest = read_manifest(store, found)
    adapter = parse_adapter(_read_files(store, found, manifest), f"the adapter {found.adapter_id}")
    own_id = adapter_id(found.base_id, adapter)
    if own_id != found.adapter_id:
        raise BadInput(f"the files of adapter {found.adapter_id} are those of {own_id}; {_WAY_OUT}")
    return StoredAdapter(own_id, manifest, adapter)


def _read_files(store: Storage, ref: AdapterRef, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    prefix = layout.adapter(*ref)
    files: dict[str, bytes] = {}
    for name in FILE_NAMES:
        try:
            files[name], _ = store.get(prefix + name)
        except ObjectNotFound:
            raise BadInput(f"the store {store.uri} has lost {prefix}{name}; {_WAY_OUT}") from None
        except WorkFailed as error:
            raise BadInput(str(error)) from error
        known = manifest["files"][name]
        if len(files[name]) != known["size_bytes"] or sha256_hex(files[name]) != known["sha256"]:
            raise BadInput(
                f"{prefix}{name} in the store {store.uri} is damaged ({len(files[name])} bytes, not the {known['size_bytes']} "
                f"with SHA-256 {known['sha256'][:12]}… of its manifest); {_WAY_OUT}"
            )
    return files
