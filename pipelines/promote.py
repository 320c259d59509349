"""Who becomes champion of a task: promotion, rollback, and offering a candidate.

The journal's next entry is the deed; everything before it checks, everything after it may be repeated. MLflow follows and never
stands in the way: what it missed is told in the outcome and made up for by the same command or by `lorafleet reconcile`.
Tensors are looked at for a promotion only, so that a rollback loads neither torch nor, without a registry, MLflow.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.crashpoints import crashpoint
from infra.errors import BadInput, ConditionFailed, ServiceUnavailable, WorkFailed, WrongBase
from infra.fingerprint import id_of_json
from infra.records import encode_record
from infra.storage import Storage
from pipelines.journal import (
    Candidate,
    Change,
    Entry,
    commit,
    generation_of,
    history,
    previous_champion,
    read_head,
    register_candidate,
    write_hint,
)
from pipelines.projection import project
from pipelines.references import CHALLENGER, CHAMPION, PREVIOUS, find_reference, model_in
from workers import layout
from workers.bases import read_base
from workers.identity import identify
from workers.manifests import AdapterRef, check_base

if TYPE_CHECKING:  # MLflow takes seconds to import, and whoever has a registry to hand in has imported it
    from infra.mlflow_registry import ModelRegistry

EVIDENCE_FORMAT = "evidence/1"


@dataclass(frozen=True)
class PromotionOutcome:
    """What a promotion or rollback came to."""

    tenant: str
    task: str
    entry: Entry
    """The journal's last entry: the new one, or the one that stood there already."""
    changed: bool
    """False if what was asked for was so already."""
    sentence: str
    """What happened, for a person."""
    note: str | None
    """Why MLflow does not show it yet; None if it does, or none was given."""


@dataclass(frozen=True)
class RegistrationOutcome:
    """What offering an adapter came to."""

    candidate: Candidate
    sentence: str
    note: str | None
    """As in PromotionOutcome."""


def promote(
    store: Storage,
    registry: ModelRegistry | None,
    ref: str,
    *,
    tenant: str | None = None,
    task: str | None = None,
    base: Path | None = None,
    cache_dir: Path | None = None,
    change_base: bool = False,
    actor: str,
    reason: str = "",
) -> PromotionOutcome:
    """Make an adapter champion of a task, after it was read back whole and found to belong to the task's base.

    Args:
        registry: MLflow; None leaves it to a later `reconcile`.
        ref: The adapter: id, unique prefix, or <tenant>.<task>@<alias>.
        task: None takes the one `ref` is named by, or else the one the adapter was trained for.
        base: A base folder that must be the adapter's; its digests are cached below `cache_dir`.
        change_base: Allow a base other than the one the task serves.

    Raises:
        WrongBase: the adapter belongs to another base than the task serves, or than `base` holds.
        BadInput: there is no such adapter, it is damaged, does nothing, or has no task.
        WorkFailed: somebody else promoted meanwhile.
    """
    found = find_reference(store, ref, tenant)
    manifest = _verified(store, found)
    if base is not None:
        check_base(manifest, identify(base, cache_dir), trained_on=read_base(store, found.base_id))
    task = _task_of(ref, manifest) if task is None else task
    head = read_head(store, found.tenant, task)
    if head is not None and head.adapter_id == found.adapter_id:
        sentence = f"{found.adapter_id[:12]} is the champion of {found.tenant}.{task} already (generation {head.generation})."
        return _settled(store, registry, found.tenant, task, head, sentence)
    _check_served_base(head, manifest, task, change_base)
    evidence = _write_evidence(store, found, task, manifest, head, checked_base=base is not None)
    change = Change(
        kind="promote",
        adapter_id=found.adapter_id,
        base_id=found.base_id,
        evidence=(evidence,),
        actor=actor,
        reason=reason,
        previous=head.adapter_id if head else None,
    )
    entry = commit(store, found.tenant, task, change, generation_of(head))
    return _done(store, registry, found.tenant, task, entry)


def rollback(
    store: Storage,
    registry: ModelRegistry | None,
    tenant: str,
    task: str,
    to: str | None = None,
    *,
    actor: str,
    reason: str = "",
) -> PromotionOutcome:
    """Make an earlier champion the champion again; nothing is loaded or trained.

    `to` names it (id, prefix, alias); None is the champion before the present one. Said again without `to` it changes nothing,
    so that the command may be repeated when it was killed; to go further back, name the adapter.

    Raises BadInput if there is no earlier champion, `to` never was one, or its files are gone; WorkFailed as `promote`.
    """
    entries = history(store, tenant, task)
    if not entries:
        raise BadInput(f"{tenant}.{task} has no champion yet, so there is nothing to roll back; promote an adapter first.")
    head = entries[-1]
    if to is None and head.kind == "rollback":
        sentence = (
            f"{tenant}.{task} was rolled back to {head.adapter_id[:12]} already by {head.actor} (generation {head.generation}); "
            "name an adapter with --to to go elsewhere."
        )
        return _settled(store, registry, tenant, task, head, sentence)
    target = _earlier_champion(store, entries, tenant, task, to)
    if target.adapter_id == head.adapter_id:
        sentence = f"{head.adapter_id[:12]} is the champion of {tenant}.{task} already (generation {head.generation})."
        return _settled(store, registry, tenant, task, head, sentence)
    change = Change(
        kind="rollback",
        adapter_id=target.adapter_id,
        base_id=target.base_id,
        evidence=target.evidence,
        actor=actor,
        reason=reason,
        previous=head.adapter_id,
    )
    return _done(store, registry, tenant, task, commit(store, tenant, task, change, head.generation))


def register_best(
    store: Storage,
    registry: ModelRegistry | None,
    *,
    tenant: str,
    task: str,
    adapter_id: str,
    base_id: str,
    job_id: str | None,
    sweep: str | None,
    metrics: Mapping[str, float],
    alias: str = CHALLENGER,
    run_id: str | None = None,
) -> RegistrationOutcome:
    """Offer an adapter to a task under an alias: a candidate in the store, and a version in MLflow.

    `run_id` is MLflow's run that the version comes from. Offered before, the candidate stays as it was.

    Raises BadInput if the alias is one that only the journal moves.
    """
    if alias in (CHAMPION, PREVIOUS):
        raise BadInput(f"the alias '{alias}' is moved by promote and rollback only; register under 'challenger'.")
    offered = Candidate(adapter_id, base_id, job_id, sweep, _finite(metrics), time.time(), alias)
    candidate = register_candidate(store, tenant, task, offered)
    note = _note_of_projection(store, registry, tenant, task, {adapter_id: run_id} if run_id else {})
    return RegistrationOutcome(candidate, f"{adapter_id[:12]} is registered with {tenant}.{task} as {alias}.", note)


def _verified(store: Storage, found: AdapterRef) -> dict[str, Any]:
    """Return the manifest of an adapter whose bytes and id are right, whose numbers are finite, and which does something."""
    from workers.adapter_store import load_adapter  # torch, which nothing else here needs

    stored = load_adapter(store, *found)
    if not any(stored.adapter.factors(module)[1].any() for module in stored.adapter.modules):
        raise BadInput(
            f"the adapter {found.adapter_id[:12]} changes nothing (every lora_B is zero) and cannot be promoted; train it again."
        )
    return stored.manifest


def _task_of(ref: str, manifest: Mapping[str, Any]) -> str:
    named = model_in(ref)
    task: str | None = named[1] if named else manifest.get("task")
    if task is None:
        raise BadInput(f"the adapter {manifest['adapter_id'][:12]} was not trained for a task; name one with --task.")
    return task


def _check_served_base(head: Entry | None, manifest: Mapping[str, Any], task: str, change_base: bool) -> None:
    if head is not None and head.base_id != manifest["base_id"] and not change_base:
        raise WrongBase(
            f"{manifest['tenant']}.{task} serves the base {head.base_id}, and the adapter {manifest['adapter_id'][:12]} is of "
            f"{manifest['base_id']}; promote one of that base, or move the task to the other base with --change-base."
        )


def _write_evidence(
    store: Storage, found: AdapterRef, task: str, manifest: Mapping[str, Any], head: Entry | None, *, checked_base: bool
) -> str:
    """Keep what the promotion rests on under its digest, and return the key. The same findings are one object."""
    body = {
        "kind": "promotion",
        "adapter_id": found.adapter_id,
        "base_id": found.base_id,
        "task": task,
        "checks": ["digests", "adapter_id", "finite", "effect", *(["base_folder"] if checked_base else [])],
        "metrics": manifest.get("metrics", {}),
        "job_id": manifest.get("job_id"),
        "compared_with": head and {"generation": head.generation, "adapter_id": head.adapter_id, "base_id": head.base_id},
    }
    key = layout.evidence(found.tenant, found.adapter_id, id_of_json(body))
    try:
        store.put_if_absent(key, encode_record(EVIDENCE_FORMAT, body))
    except ConditionFailed:
        return key
    return key


def _earlier_champion(store: Storage, entries: Sequence[Entry], tenant: str, task: str, to: str | None) -> Entry:
    """Return the entry by which the adapter to go back to became champion for the last time."""
    wanted = previous_champion(entries) if to is None else _former(store, entries, tenant, task, to)
    if wanted is None:
        raise BadInput(
            f"{tenant}.{task} has had one champion only ({entries[-1].adapter_id[:12]}), so there is none to go back to."
        )
    found = next(entry for entry in reversed(entries) if entry.adapter_id == wanted)
    if store.head(layout.manifest(tenant, found.base_id, wanted)) is None:
        raise BadInput(f"the adapter {wanted[:12]} is in the store {store.uri} no more; name another with --to.")
    return found


def _former(store: Storage, entries: Sequence[Entry], tenant: str, task: str, to: str) -> str:
    """Return the id of the former champion that `to` names. A prefix need be unique among the champions only."""
    champions = list(dict.fromkeys(entry.adapter_id for entry in reversed(entries)))
    fitting = [adapter_id for adapter_id in champions if to and adapter_id.startswith(to)]
    if model_in(to) is not None:
        fitting = [one for one in champions if one == find_reference(store, to, tenant).adapter_id]
    if len(fitting) != 1:
        listed = ", ".join(adapter_id[:12] for adapter_id in champions[:8])
        how = "fits several champions" if fitting else "never was champion"
        raise BadInput(
            f"{to[:80]!r} {how} of {tenant}.{task}; its champions, the latest first: {listed}. For others use promote."
        )
    return fitting[0]


def _done(store: Storage, registry: ModelRegistry | None, tenant: str, task: str, entry: Entry) -> PromotionOutcome:
    deed = "is champion" if entry.kind == "promote" else "is champion again"
    before = f" after {entry.previous[:12]}" if entry.previous else ""
    sentence = f"{entry.adapter_id[:12]} {deed} of {tenant}.{task}{before} (generation {entry.generation})."
    note = _note_of_projection(store, registry, tenant, task)
    return PromotionOutcome(tenant, task, entry, True, sentence, note)


def _settled(
    store: Storage, registry: ModelRegistry | None, tenant: str, task: str, head: Entry, sentence: str
) -> PromotionOutcome:
    """Nothing is to be done, except what a command that was killed may have left undone."""
    write_hint(store, tenant, task, head.generation)
    note = _note_of_projection(store, registry, tenant, task)
    return PromotionOutcome(tenant, task, head, False, sentence, note)


def _note_of_projection(
    store: Storage, registry: ModelRegistry | None, tenant: str, task: str, run_ids: Mapping[str, str] | None = None
) -> str | None:
    if registry is None:
        return None
    try:
        project(store, registry, tenant, task, run_ids)
    except (ServiceUnavailable, WorkFailed) as error:
        return f"{str(error).rstrip('.')}. The store has it; MLflow will follow with 'lorafleet reconcile'."
    crashpoint("promotion-projected", f"{tenant}.{task}")
    return None


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """JSON has no word for NaN and the infinities; they say nothing about a candidate either."""
    return {name: float(value) for name, value in metrics.items() if float("-inf") < value < float("inf")}
