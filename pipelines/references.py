"""How people name an adapter: by its id, a unique prefix of it, or `<tenant>.<task>@<alias>`.

The aliases are read from the store, never from MLflow: champion and previous from the journal, challenger (and whatever alias
a sweep registers under) from the candidates.
"""

import difflib
from collections.abc import Iterator

from infra.errors import BadInput
from infra.storage import Storage
from pipelines.journal import Candidate, Entry, candidates, history, previous_champion
from workers.manifests import AdapterRef, find_adapter
from workers.spec import check_name

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"


def find_reference(store: Storage, ref: str, tenant: str | None = None) -> AdapterRef:
    """Return the adapter that `ref` names, looking at one tenant or at all.

    Raises BadInput with one sentence if it names none, several, or another tenant's.
    """
    named = model_in(ref)
    if named is None:
        return find_adapter(store, tenant, ref)
    found_tenant, task = named
    alias = ref.rpartition("@")[2]
    if tenant is not None and found_tenant != tenant:
        raise BadInput(f"{ref!r} belongs to the tenant '{found_tenant}', expected one of the tenant '{tenant}'.")
    known = aliases_in(history(store, found_tenant, task), candidates(store, found_tenant, task))
    if alias not in known:
        raise BadInput(_unknown_alias(ref, alias, list(known)))
    base_id, adapter_id = known[alias]
    return AdapterRef(found_tenant, base_id, adapter_id)


def model_in(ref: str) -> tuple[str, str] | None:
    """Return tenant and task of the model in "<tenant>.<task>@<alias>", None for a reference by id. Raises BadInput."""
    model, at, _ = ref.rpartition("@")
    return parse_model(model) if at else None


def parse_model(model: str) -> tuple[str, str]:
    """Return tenant and task of a registered model's name, "<tenant>.<task>". Raises BadInput."""
    tenant, _, task = model.partition(".")
    try:
        return check_name(tenant), check_name(task)
    except ValueError:
        raise BadInput(f"{model[:140]!r} is not a registered model; write <tenant>.<task>, such as acme.support.") from None


def aliases_in(entries: list[Entry], offered: list[Candidate]) -> dict[str, tuple[str, str]]:
    """Return (base_id, adapter_id) by alias, as journal and candidates say. Of several candidates the latest has the alias."""
    aliases = {candidate.alias: (candidate.base_id, candidate.adapter_id) for candidate in offered}
    return aliases | dict(_from_journal(entries))


def _from_journal(entries: list[Entry]) -> Iterator[tuple[str, tuple[str, str]]]:
    bases = {entry.adapter_id: entry.base_id for entry in entries}
    if entries:
        yield CHAMPION, (entries[-1].base_id, entries[-1].adapter_id)
    previous = previous_champion(entries)
    if previous is not None:
        yield PREVIOUS, (bases[previous], previous)


def _unknown_alias(ref: str, alias: str, known: list[str]) -> str:
    model = ref.rpartition("@")[0]
    every = sorted({CHAMPION, PREVIOUS, CHALLENGER, *known})
    if alias not in every:
        close = difflib.get_close_matches(alias, every, n=1)
        return f"{ref!r}: there is no alias '{alias}'. " + (
            f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(every)}."
        )
    way_out = {
        CHAMPION: f"promote an adapter first: lorafleet promote {model}@challenger",
        PREVIOUS: "it has had one champion at most",
        CHALLENGER: "run a sweep that registers its best adapter there, or name an adapter by its id",
    }
    return f"{ref!r}: {model} has no {alias} yet; {way_out[alias]}."
