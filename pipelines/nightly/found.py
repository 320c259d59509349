"""Recipes that a night's own searches found: taken up by the nights that follow, as long as what they were found for stands.

A recipe is kept in the customer's row: the sweep it comes from, its `peft` and `training`, the base, and the digest of the
settings it replaces. Whoever changes these settings in the fleet's files means the new ones, so the recipe is dropped then.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from infra.errors import BadInput
from infra.fingerprint import id_of_json
from infra.strict import parse
from pipelines.nightly.customers import Customer
from pipelines.nightly.records import Row
from workers.spec import JobSpec

log = logging.getLogger(__name__)


def found_recipe(customer: Customer, base_id: str, sweep: str, sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe as rows keep it; `sections` are `peft` and `training` of the best trial of `sweep` ("tenant/name")."""
    template = customer.template or template_digest(customer.job)
    return {"sweep": sweep, "template": template, "base_id": base_id, **sections}


def with_recipe(customer: Customer, recipe: Mapping[str, Any]) -> Customer:
    """Return a customer who trains with a recipe. Raises BadInput if it makes no job any more."""
    body = customer.job.model_dump(mode="json") | {name: recipe[name] for name in ("peft", "training")}
    job = parse(JobSpec, body, f"the recipe of {recipe['sweep']}")
    template = customer.template or template_digest(customer.job)
    return replace(customer, job=job, recipe=str(recipe["sweep"]), template=template)


def taken_up(customer: Customer, last: Row | None, base_id: str) -> tuple[Customer, Row | None]:
    """Return a customer with the recipe of its last row, or as it is and the row without one that does not hold any more."""
    if last is None or last.recipe is None:
        return customer, last
    if last.recipe["base_id"] == base_id and last.recipe["template"] == template_digest(customer.job):
        try:
            return with_recipe(customer, last.recipe), last
        except BadInput as error:  # of a version that knew other settings
            log.warning("%s trains as its fleet says: %s", customer.name, error)
    return customer, replace(last, recipe=None)


def template_digest(job: JobSpec) -> str:
    """Name the settings that a recipe replaces, and what they belong to."""
    peft = job.peft.model_dump(mode="json", exclude={"init_adapter"})
    held = job.base_model.model_dump(mode="json", include={"dtype", "quantization"})
    training = job.training.model_dump(mode="json")
    return id_of_json({"task_type": job.task_type, "peft": peft, "training": training, "held": held})
