"""`lorafleet adapters import`: adapters that were made elsewhere, read in full and stored if they fit their base."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.adapters import refuse_bad_names
from pipelines.workspace import Workspace
from workers import layout
from workers.adapter import Adapter, adapter_id
from workers.adapter_files import read_adapter_folder
from workers.adapter_store import store_adapter
from workers.bases import add_base
from workers.data.contract import prompt_contract
from workers.fitting import refuse_unfit
from workers.forgotten import refuse_forgotten
from workers.identity import identify
from workers.manifests import AdapterRef, read_manifest


def import_adapter(workspace: Workspace, folder: Path, base: Path, tenant: str, task: str | None) -> dict[str, Any]:
    """Store a PEFT folder that was made elsewhere, after its factors were found to fit the base. May be repeated.

    Returns `adapter_id`, `base_id`, `tenant`, `task` and `imported` (False if it was there before). Raises BadInput if the
    folder cannot be taken as it is, or does not fit the base.
    """
    refuse_bad_names(tenant, task)
    refuse_forgotten(workspace.store, tenant)
    adapter = read_adapter_folder(folder)
    identity = identify(base, workspace.services.cache_dir)
    contract = prompt_contract(base)
    refuse_unfit(adapter, base)
    ref = AdapterRef(tenant, identity.base_id, adapter_id(identity.base_id, adapter))
    is_new = workspace.store.head(layout.manifest(*ref)) is None
    add_base(workspace.store, base, identity)
    if is_new:
        body = _imported_body(adapter, folder, base, task, contract)
        store_adapter(workspace.store, tenant, identity.base_id, adapter, body)
    return {**ref._asdict(), "task": read_manifest(workspace.store, ref).get("task"), "imported": is_new}


def _imported_body(adapter: Adapter, folder: Path, base: Path, task: str | None, contract: str) -> dict[str, Any]:
    """Return what a manifest says of an adapter without a job; its prompt contract is that of the base's folder."""
    return {
        "job_id": None,
        "task": task,
        "task_type": adapter.config["task_type"] or "CAUSAL_LM",
        "labels": list(adapter.labels),
        "base_model_name_or_path": str(base),
        "trust_remote_code": False,
        "prompt_contract": contract,
        "training_view": None,
        "data": {},
        "init_adapter_id": None,
        "metrics": {},
        "created": time.time(),
        "imported": {"folder": str(folder.resolve()), "base_path": str(base.resolve())},
    }


def import_text(result: Mapping[str, Any]) -> str:
    """Return the end of an import as lines."""
    how = "imported" if result["imported"] else "was in the store already"
    task = "" if result["task"] else " --task TASK"
    return (
        f"adapter {result['adapter_id']} {how}: tenant {result['tenant']}, base {result['base_id']}\n"
        f"promote it with: lorafleet promote {result['adapter_id'][:12]}{task}"
    )
