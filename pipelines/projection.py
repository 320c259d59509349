"""What MLflow shows of a registered model: made equal to the store, never the other way round.

Registered model `<tenant>.<task>`; one version per adapter that was ever offered or promoted; aliases champion, previous,
challenger. Aliases that people set themselves under other names are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infra.errors import BadInput
from infra.storage import Storage
from pipelines.journal import Candidate, Entry, candidates, history
from pipelines.references import CHALLENGER, CHAMPION, PREVIOUS, aliases_in
from workers import layout
from workers.manifests import AdapterRef, read_manifest

if TYPE_CHECKING:  # MLflow takes seconds to import, and whoever has a registry to hand in has imported it
    from infra.mlflow_registry import ModelRegistry, RegisteredVersion


@dataclass(frozen=True)
class Shown:
    """What MLflow should show of one model."""

    tenant: str
    task: str
    store_uri: str
    tags: Mapping[str, Mapping[str, str]]
    """Tags of the version of each adapter."""
    aliases: Mapping[str, str]
    """Adapter by alias."""

    @property
    def name(self) -> str:
        """The registered model's name."""
        return f"{self.tenant}.{self.task}"

    def source(self, adapter_id: str) -> str:
        """Return where an adapter lies: the store's uri and its key."""
        key = layout.adapter(self.tenant, self.tags[adapter_id]["lorafleet.base_id"], adapter_id)
        return f"{self.store_uri}/{key}".rstrip("/")


def shown_by(store: Storage, tenant: str, task: str) -> Shown:
    """Return what MLflow should show, as journal and candidates say."""
    entries, offered = history(store, tenant, task), candidates(store, tenant, task)
    tags = {candidate.adapter_id: _tags_of_candidate(candidate) for candidate in offered}
    for entry in entries:
        if entry.adapter_id not in tags:
            tags[entry.adapter_id] = _tags_of_entry(store, tenant, entry)
    aliases = {alias: adapter_id for alias, (_, adapter_id) in aliases_in(entries, offered).items()}
    return Shown(tenant, task, store.uri, tags, aliases)


def project(
    store: Storage, registry: ModelRegistry, tenant: str, task: str, run_ids: Mapping[str, str] | None = None
) -> list[str]:
    """Make MLflow show what the store says; return a sentence for each thing that differed. Nothing changes the second time.

    `run_ids` are MLflow's runs that new versions come from, by adapter. Raises ServiceUnavailable if MLflow does not answer.
    """
    told: list[str] = []
    while True:
        keys, shown = _keys(store, tenant, task), shown_by(store, tenant, task)
        told += _mend(registry, shown, run_ids or {})
        # Aliases have no compare-and-set: whoever moved the store meanwhile may have been overwritten.
        if _keys(store, tenant, task) == keys:
            return told


def _keys(store: Storage, tenant: str, task: str) -> list[str]:
    """Return the keys of what a model's aliases follow from, none of which is ever changed."""
    keys = [info.key for info in store.list(layout.model(tenant, task))]
    return [key for key in keys if key.endswith(".json")]


def differences(store: Storage, registry: ModelRegistry, tenant: str, task: str) -> list[str]:
    """Return a sentence for each thing in which MLflow differs from the store, and change nothing."""
    shown = shown_by(store, tenant, task)
    versions = registry.versions(shown.name)
    return _wrong_versions(shown, versions) + _wrong_aliases(shown, versions, registry.aliases(shown.name))


def _mend(registry: ModelRegistry, shown: Shown, run_ids: Mapping[str, str]) -> list[str]:
    aliases = registry.ensure_model(shown.name, {"lorafleet.tenant": shown.tenant, "lorafleet.task": shown.task})
    versions = registry.versions(shown.name)
    told = _wrong_versions(shown, versions)
    for _ in range(2):  # the second time where a rival has made a twin meanwhile
        if unlike := _unlike(shown, versions):
            known = _numbers(versions)
            for adapter_id in unlike:
                make = registry.ensure_version if adapter_id in known else registry.add_version
                make(shown.name, adapter_id, shown.source(adapter_id), shown.tags[adapter_id], run_ids.get(adapter_id))
            versions = registry.versions(shown.name)
    told += _wrong_aliases(shown, versions, aliases)
    _mend_aliases(registry, shown, versions, aliases)
    return told


def _mend_aliases(registry: ModelRegistry, shown: Shown, versions: list[RegisteredVersion], aliases: Mapping[str, str]) -> None:
    numbers = _numbers(versions)
    for alias, adapter_id in shown.aliases.items():
        if aliases.get(alias) != numbers[adapter_id]:
            registry.set_alias(shown.name, alias, numbers[adapter_id])
    for alias in _unfounded(shown, aliases):
        registry.delete_alias(shown.name, alias)


def _wrong_versions(shown: Shown, versions: list[RegisteredVersion]) -> list[str]:
    known = _numbers(versions)
    return [
        f"the version of {adapter_id[:12]} " + ("is missing" if adapter_id not in known else "has other tags or a twin")
        for adapter_id in _unlike(shown, versions)
    ]


def _wrong_aliases(shown: Shown, versions: list[RegisteredVersion], aliases: Mapping[str, str]) -> list[str]:
    keys = {version.version: version.key for version in versions}
    told = []
    for alias, adapter_id in shown.aliases.items():
        found = keys.get(aliases.get(alias, ""))
        if found != adapter_id:
            told.append(f"the alias {alias} is {'nowhere' if found is None else found[:12]}, the store says {adapter_id[:12]}")
    return told + [f"the alias {alias} stands, the store knows none" for alias in _unfounded(shown, aliases)]


def _unlike(shown: Shown, versions: list[RegisteredVersion]) -> list[str]:
    """Adapters whose version is missing, has other tags, or stands there twice."""
    found: dict[str | None, list[RegisteredVersion]] = {}
    for version in versions:
        found.setdefault(version.key, []).append(version)
    return [
        adapter_id
        for adapter_id, tags in shown.tags.items()
        if len(found.get(adapter_id, [])) != 1 or not tags.items() <= found[adapter_id][0].tags.items()
    ]


def _unfounded(shown: Shown, aliases: Mapping[str, str]) -> list[str]:
    """Aliases of ours that MLflow has and the store has not."""
    return [alias for alias in (CHAMPION, PREVIOUS, CHALLENGER) if alias in aliases and alias not in shown.aliases]


def _numbers(versions: list[RegisteredVersion]) -> dict[str, str]:
    """The oldest version by adapter."""
    return {version.key: version.version for version in reversed(versions) if version.key is not None}


def _tags_of_candidate(candidate: Candidate) -> dict[str, str]:
    said = {"job_id": candidate.job_id, "sweep": candidate.sweep}
    return _tags(candidate.adapter_id, candidate.base_id, said)


def _tags_of_entry(store: Storage, tenant: str, entry: Entry) -> dict[str, str]:
    """Tags of an adapter that was promoted without having been offered: its manifest knows the job, unless it is gone."""
    try:
        manifest = read_manifest(store, AdapterRef(tenant, entry.base_id, entry.adapter_id))
    except BadInput:
        manifest = {}
    return _tags(entry.adapter_id, entry.base_id, {"job_id": manifest.get("job_id")})


def _tags(adapter_id: str, base_id: str, said: Mapping[str, str | None]) -> dict[str, str]:
    told = {"adapter_id": adapter_id, "base_id": base_id} | {key: value for key, value in said.items() if value}
    return {f"lorafleet.{key}": value for key, value in told.items()}
