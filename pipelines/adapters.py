"""`lorafleet adapters list|show`: what adapters there are. Manifests only, and no torch; reading them in full is in `verify`."""

import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from infra.errors import BadInput, WorkFailed
from infra.storage import Storage
from pipelines.evidence import audits_of
from pipelines.journal import candidates, history, models
from pipelines.references import aliases_in, find_reference, parse_model
from pipelines.workspace import Workspace
from workers import layout
from workers.manifests import AdapterRef, adapter_refs, read_manifest
from workers.spec import check_name

NUM_READERS = 16
"""Manifests read at the same time: a store that is far away answers each in tens of milliseconds."""

Models = Mapping[tuple[str, str], list[dict[str, Any]]]
"""(tenant, adapter_id) -> the registered models the adapter was offered to or serves."""


@dataclass(frozen=True)
class Listing:
    """The adapters there are, and a sentence for each that cannot be read."""

    adapters: list[dict[str, Any]]
    notes: list[str]


def list_adapters(workspace: Workspace, tenant: str | None = None, task: str | None = None) -> Listing:
    """Return adapters in the words of `adapters list --json`, newest last; of one tenant and one task if they are given."""
    store = workspace.store
    tenant, task = _named_task(tenant, task)
    known = _models(store, tenant)
    with ThreadPoolExecutor(NUM_READERS) as readers:
        read = list(readers.map(lambda ref: _row(store, ref, known), adapter_refs(store, tenant)))
    rows = [row for row in read if isinstance(row, dict) and (task is None or _is_of(row, task))]
    rows.sort(key=lambda row: (row["created"], row["adapter_id"]))
    return Listing(rows, [row for row in read if isinstance(row, str)])


def _named_task(tenant: str | None, task: str | None) -> tuple[str | None, str | None]:
    """Check the names; a task may be written with its tenant, as registered models are."""
    if task is not None and "." in task:
        of, task = parse_model(task)
        if tenant not in (None, of):
            raise BadInput(f"--task names the tenant '{of}' and --tenant '{tenant}'; give one of them.")
        tenant = of
    refuse_bad_names(tenant, task)
    return tenant, task


def refuse_bad_names(*names: str | None) -> None:
    """Raise BadInput with the rule if one of these tenants or tasks, where given, is no name."""
    try:
        for name in names:
            if name is not None:
                check_name(name)
    except ValueError as error:
        raise BadInput(f"{error}.") from None


def _models(store: Storage, tenant: str | None) -> Models:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for of, task in models(store, tenant):
        entries, offered = history(store, of, task), candidates(store, of, task)
        aliases = aliases_in(entries, offered)
        for adapter_id in dict.fromkeys([*(one.adapter_id for one in offered), *(one.adapter_id for one in entries)]):
            names = sorted(alias for alias, (_, pointed) in aliases.items() if pointed == adapter_id)
            found.setdefault((of, adapter_id), []).append({"task": task, "model": f"{of}.{task}", "aliases": names})
    return found


def _row(store: Storage, ref: AdapterRef, known: Models) -> dict[str, Any] | str:
    """Return what a list says of an adapter, or why its manifest cannot be read."""
    try:
        return _described(store, ref, read_manifest(store, ref), known)
    except (BadInput, WorkFailed) as error:
        return str(error)


def _described(store: Storage, ref: AdapterRef, manifest: Mapping[str, Any], known: Models) -> dict[str, Any]:
    peft = manifest.get("peft", {})
    return {
        "adapter_id": ref.adapter_id,
        "base_id": ref.base_id,
        "tenant": ref.tenant,
        "task": manifest.get("task"),
        "tasks": known.get((ref.tenant, ref.adapter_id), []),
        "job_id": manifest.get("job_id"),
        "metrics": manifest.get("metrics", {}),
        "uri": f"{store.uri}/{layout.adapter(*ref)}".rstrip("/"),
        "created": manifest.get("created", 0.0),
        "r": peft.get("r"),
        "lora_alpha": peft.get("lora_alpha"),
        "target_modules": peft.get("target_modules"),
        "num_parameters": manifest.get("num_parameters"),
    }


def _is_of(row: Mapping[str, Any], task: str) -> bool:
    return row["task"] == task or any(model["task"] == task for model in row["tasks"])


def rows_of(adapters: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Return adapters as rows of a table with the columns of COLUMNS."""
    return [
        [
            str(one["adapter_id"]),
            str(one["tenant"]),
            ", ".join(_model_text(model) for model in one["tasks"]) or str(one["task"] or "-"),
            str(one["r"]),
            ",".join(one["target_modules"] or []),
            _metric_text(one["metrics"]),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(one["created"])),
        ]
        for one in adapters
    ]


COLUMNS = ("adapter", "tenant", "task", "r", "target_modules", "eval/loss", "created")


def _model_text(model: Mapping[str, Any]) -> str:
    return "@".join([model["task"], "+".join(model["aliases"])]) if model["aliases"] else str(model["task"])


def _metric_text(metrics: Mapping[str, Any]) -> str:
    loss = metrics.get("eval/loss")
    return f"{float(loss):.4f}" if loss is not None else "-"


def show_adapter(workspace: Workspace, reference: str) -> dict[str, Any]:
    """Return all that is known of an adapter: what lists say, the rest of its manifest, its evidence and audits."""
    store = workspace.store
    ref = find_reference(store, reference)
    manifest = read_manifest(store, ref)
    evidence = [info.key for info in store.list(layout.evidence_of(ref.tenant, ref.adapter_id))]
    described = _described(store, ref, manifest, _models(store, ref.tenant))
    return {**manifest, **described, "evidence": evidence, "audits": audits_of(store, ref.tenant, ref.adapter_id)}


def _origin(shown: Mapping[str, Any]) -> str:
    parents = shown.get("parents")
    return f"none: {shown['merge']['method']} of {', '.join(parents)}" if parents else "none: imported"


def adapter_text(shown: Mapping[str, Any]) -> str:
    """Return an adapter as lines for a person."""
    peft = shown.get("peft", {})
    lines = [
        f"adapter  {shown['adapter_id']}",
        f"base     {shown['base_id']}  ({shown.get('base_model_name_or_path')})",
        f"tenant   {shown['tenant']}, task {shown['task'] or '-'}",
        *(f"model    {model['model']}  {', '.join(model['aliases'])}" for model in shown["tasks"]),
        f"job      {shown['job_id'] or _origin(shown)}",
        "peft     " + ", ".join(f"{key}={value}" for key, value in peft.items() if value not in ({}, None)),
        f"metrics  {', '.join(f'{name} {float(value):.4f}' for name, value in shown['metrics'].items()) or '-'}",
        f"size     {shown['num_parameters']:,} parameters",
        *(f"file     {name}  {file['size_bytes']:,} bytes  sha256 {file['sha256']}" for name, file in shown["files"].items()),
        *(f"audit    {sentence}" for sentence in shown["audits"]),
        *(f"evidence {key}" for key in shown["evidence"]),
        f"uri      {shown['uri']}",
    ]
    return "\n".join(lines)
