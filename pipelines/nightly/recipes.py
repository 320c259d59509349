"""Recipes: the hyper-parameters that a sweep found, for jobs of other customers."""

from collections.abc import Mapping
from typing import Any

from infra.errors import BadInput
from infra.storage import Storage
from sweeps.ledger import read_header, read_trials
from sweeps.space import apply
from sweeps.trial import best_of
from workers.spec import check_name


def recipe_of(store: Storage, reference: str) -> Mapping[str, Any]:
    """Return `peft` and `training` of the best trial of the sweep "tenant/name" (of several objectives: the best in the first).

    No initial adapter belongs to a recipe. Raises BadInput if there is no such sweep or none of its trials is complete yet.
    """
    tenant, _, name = reference.partition("/")
    try:
        spec = read_header(store, check_name(tenant), check_name(name)).spec
    except ValueError as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"the recipe {reference[:80]!r} names no sweep; write tenant/sweep, such as acme/acme-support.") from None
    best = best_of(read_trials(store, tenant, name), spec.objectives)
    if best is None:
        raise BadInput(f"the recipe {reference} has no complete trial yet; finish it with 'lorafleet sweep resume {reference}'.")
    body = apply(spec.base_job, best.params).model_dump(mode="json", include={"peft", "training"})
    body["peft"].pop("init_adapter")
    return body
