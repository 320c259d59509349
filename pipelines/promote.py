"""Who becomes champion of a task: promotion, rollback, freezing, and offering a candidate.

The journal's next entry is the deed; everything before it checks, everything after it may be repeated. Who finds the champion to
be another than the gates compared with is judged again. MLflow follows and never stands in the way: what it missed is told in the
outcome and made up for by the same command or by `lorafleet reconcile`. Tensors are looked at for a promotion only, so that a
rollback loads neither torch nor, without a registry, MLflow.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from infra.crashpoints import crashpoint
from infra.errors import BadInput, GateRejected, ServiceUnavailable, WorkFailed, WrongBase
from infra.storage import Storage
from pipelines.evidence import Binding, keep, refuse_stale
from pipelines.journal import (
    Candidate,
    Change,
    Entry,
    Overtaken,
    changes_of_champion,
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
from workers.data.contract import has_tokenizer, prompt_contract
from workers.identity import identify
from workers.manifests import AdapterRef, check_base

if TYPE_CHECKING:  # MLflow takes seconds to import, and whoever has a registry to hand in has imported it
    from infra.mlflow_registry import ModelRegistry
    from pipelines.judging import Judgement, Jury

MAX_TRIES = 10
"""How often a promotion is judged anew because the champion changed meanwhile."""


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
    jury: Jury | None = None,
    force: bool = False,
    actor: str,
    reason: str = "",
) -> PromotionOutcome:
    """Make an adapter champion of a task, after it was read back whole, found to belong to the task's base, and passed the gates.

    If somebody else is faster, the gates judge anew against the new champion; without gates, or forced, a person has to.

    Args:
        registry: MLflow; None leaves it to a later `reconcile`.
        ref: The adapter: id, unique prefix, or <tenant>.<task>@<alias>.
        task: None takes the one `ref` is named by, or else the one the adapter was trained for.
        base: A base folder that must be the adapter's; its digests are cached below `cache_dir`.
        change_base: Allow a base other than the one the task serves.
        jury: Judges by gates; None: there are none.
        force: Promote whatever the gates say; the journal tells so, with the reason.

    Raises:
        GateRejected: a gate refuses the adapter; its evidence is kept.
        WrongBase: the adapter belongs to another base than the task serves, or than `base` holds.
        BadInput: there is no such adapter, it is damaged, does nothing, or has no task; the task is frozen; a gate cannot be run.
        WorkFailed: somebody else promoted meanwhile.
    """
    if force and not reason.strip():
        raise BadInput("a promotion that is forced needs a reason, which the journal keeps; give --reason.")
    found = find_reference(store, ref, tenant)
    manifest = _verified(store, found)
    if base is not None:
        contract = prompt_contract(base) if has_tokenizer(base) else None  # which a folder of mere weights cannot have wrong
        check_base(manifest, identify(base, cache_dir), prompt_contract=contract, trained_on=read_base(store, found.base_id))
    case = _Case(store, found, _task_of(ref, manifest) if task is None else task, manifest, base is not None)
    for num_left in reversed(range(MAX_TRIES)):
        head = read_head(store, found.tenant, case.task)
        _refuse_frozen(head, found.tenant, case.task)
        if head is not None and head.adapter_id == found.adapter_id:
            return _settled(store, registry, found.tenant, case.task, head, _is_champion(head, found.tenant, case.task))
        _check_served_base(head, manifest, case.task, change_base)
        evidence = _judged(case, head, jury, force)
        try:
            entry = _commit_promotion(case, head, evidence, actor, reason, force)
            return _done(store, registry, found.tenant, case.task, entry)
        except Overtaken:
            if jury is None or force or not num_left:
                raise
    raise AssertionError("the last try returns or raises")


@dataclass(frozen=True)
class _Case:
    """An adapter that was found to be whole, and is to become champion of a task."""

    store: Storage
    adapter: AdapterRef
    task: str
    manifest: Mapping[str, Any]
    is_base_checked: bool

    def binding(self, head: Entry | None, gates: str | None) -> Binding:
        return Binding(self.adapter, self.task, head, gates)


@dataclass(frozen=True)
class _Found:
    """What a promotion rests on."""

    binding: Binding
    keys: tuple[str, ...]
    """Of the evidence: the promotion's own first."""


def _judged(case: _Case, head: Entry | None, jury: Jury | None, force: bool) -> _Found:
    """Have the gates judge the case against `head`, and keep what they found. Raises GateRejected unless forced."""
    judgement = None if jury is None else jury.judge(case.adapter, case.task, head)
    binding = judgement.binding if judgement is not None else case.binding(head, None)
    key = keep(case.store, binding, "promotion", _findings(case, judgement))
    if judgement is not None and not judgement.passed and not force:
        failed = [verdict for verdict in judgement.verdicts if not verdict.passed]
        told = "; ".join(f"{verdict.gate}: {verdict.sentence}" for verdict in failed)
        raise GateRejected(
            f"{case.adapter.adapter_id[:12]} does not become champion of {case.adapter.tenant}.{case.task} ({told})."
        )
    return _Found(binding, (key, *(judgement.evaluations if judgement is not None else ())))


def _findings(case: _Case, judgement: Judgement | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "checks": ["digests", "adapter_id", "finite", "effect", *(["base_folder"] if case.is_base_checked else [])],
        "metrics": case.manifest.get("metrics", {}),
        "job_id": case.manifest.get("job_id"),
    }
    if judgement is not None:
        found |= {
            "gates": [dict(gate) for gate in judgement.gates],
            "verdicts": [verdict.to_json() for verdict in judgement.verdicts],
            "evaluations": list(judgement.evaluations),
        }
    return found


def _commit_promotion(case: _Case, head: Entry | None, found: _Found, actor: str, reason: str, force: bool) -> Entry:
    """Write the promotion behind `head`, on evidence that was found against that head and no other."""
    refuse_stale(case.store, found.keys, case.binding(head, found.binding.gates))
    change = Change(
        kind="promote",
        adapter_id=case.adapter.adapter_id,
        base_id=case.adapter.base_id,
        evidence=found.keys,
        actor=actor,
        reason=reason,
        previous=head.adapter_id if head else None,
        forced=force,
    )
    return commit(case.store, case.adapter.tenant, case.task, change, generation_of(head))


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

    Who names an adapter gets it also if somebody else becomes champion meanwhile; who does not has to look again (WorkFailed).

    Raises BadInput if there is no earlier champion, `to` never was one, its files are gone, or the task is frozen.
    """
    for num_left in reversed(range(MAX_TRIES)):
        entries = history(store, tenant, task)
        if not entries:
            raise BadInput(f"{tenant}.{task} has no champion yet, so there is nothing to roll back; promote an adapter first.")
        head, deeds = entries[-1], changes_of_champion(entries)
        _refuse_frozen(head, tenant, task)
        if to is None and deeds[-1].kind == "rollback":
            return _settled(store, registry, tenant, task, head, _is_rolled_back(deeds[-1], tenant, task))
        target = _earlier_champion(store, deeds, tenant, task, to)
        if target.adapter_id == head.adapter_id:
            return _settled(store, registry, tenant, task, head, _is_champion(head, tenant, task))
        change = Change(
            kind="rollback",
            adapter_id=target.adapter_id,
            base_id=target.base_id,
            evidence=target.evidence,
            actor=actor,
            reason=reason,
            previous=head.adapter_id,
        )
        try:
            return _done(store, registry, tenant, task, commit(store, tenant, task, change, head.generation))
        except Overtaken:
            if to is None or not num_left:
                raise
    raise AssertionError("the last try returns or raises")


def _is_rolled_back(deed: Entry, tenant: str, task: str) -> str:
    return (
        f"{tenant}.{task} was rolled back to {deed.adapter_id[:12]} already by {deed.actor} (generation {deed.generation}); "
        "name an adapter with --to to go elsewhere."
    )


def freeze(store: Storage, tenant: str, task: str, *, actor: str, reason: str = "") -> PromotionOutcome:
    """Keep the champion of a task as it is: promotions and rollbacks are refused until `unfreeze`.

    Raises BadInput if the task has no champion.
    """
    return _turn(store, tenant, task, "freeze", actor, reason)


def unfreeze(store: Storage, tenant: str, task: str, *, actor: str, reason: str = "") -> PromotionOutcome:
    """Let promotions and rollbacks of a task happen again. Raises BadInput if the task has no champion."""
    return _turn(store, tenant, task, "unfreeze", actor, reason)


def _turn(
    store: Storage, tenant: str, task: str, kind: Literal["freeze", "unfreeze"], actor: str, reason: str
) -> PromotionOutcome:
    """Write a freeze or unfreeze entry unless it is so already. Whoever promotes meanwhile does not stand in its way."""
    while True:
        head = read_head(store, tenant, task)
        if head is None:
            raise BadInput(f"{tenant}.{task} has no champion yet, so there is nothing to {kind}; promote an adapter first.")
        done = "frozen" if kind == "freeze" else "open to promotions"
        if (head.kind == "freeze") == (kind == "freeze"):
            sentence = f"{tenant}.{task} is {done} already (champion {head.adapter_id[:12]}, generation {head.generation})."
            return _settled(store, None, tenant, task, head, sentence)
        change = Change(
            kind=kind, adapter_id=head.adapter_id, base_id=head.base_id, actor=actor, reason=reason, previous=head.adapter_id
        )
        try:
            entry = commit(store, tenant, task, change, head.generation)
        except Overtaken:
            continue
        sentence = f"{tenant}.{task} is {done}; {head.adapter_id[:12]} stays champion (generation {entry.generation})."
        return PromotionOutcome(tenant, task, entry, True, sentence, None)


def _refuse_frozen(head: Entry | None, tenant: str, task: str) -> None:
    if head is not None and head.kind == "freeze":
        why = f": {head.reason}" if head.reason else ""
        raise BadInput(
            f"{tenant}.{task} was frozen by {head.actor} (generation {head.generation}{why}); "
            f"let it move again with 'lorafleet unfreeze {tenant}.{task}'."
        )


def _is_champion(head: Entry, tenant: str, task: str) -> str:
    return f"{head.adapter_id[:12]} is the champion of {tenant}.{task} already (generation {head.generation})."


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
    deed = "is champion again" if entry.kind == "rollback" else "is champion, forced," if entry.forced else "is champion"
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
