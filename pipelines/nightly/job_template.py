"""From a fleet's job template to each customer's job: a recipe, overrides, tenant, task, data and priority are put in.

A template is parsed once for each set of overrides; a customer's job is then a copy with other tenant and data, so that ten
thousand of them take a fraction of a second.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import BadInput
from infra.strict import parse
from pipelines.files import read_yaml
from workers.spec import DataSpec, JobSpec

RecipeReader = Callable[[str], Mapping[str, Any]]
"""Reference of a sweep -> `peft` and `training` of a job; raises BadInput."""

_ANY_NAME = "any"
_FIXED = {
    "tenant": "the entry's tenant",
    "task": "the entry's task",
    "data": "the entry's data, and paths such as data.format in 'set'",
    "data.train": "the entry's data",
    "peft.init_adapter": "warm_start",
    "resources.priority": "the entry's priority",
}
"""Paths that no override may set, and what says it instead."""


@dataclass(frozen=True)
class JobTemplate:
    """The job of a fleet's defaults, with placeholders for what each customer has of its own."""

    raw: Mapping[str, Any]
    """As written, the path of a local base made absolute."""
    path: Path
    task: str
    """Empty if the template names none."""

    def check(self, overrides: Mapping[str, Any], where: str, folder: Path) -> None:
        """Raise BadInput, beginning with `where`, unless the overrides make a job."""
        self.parsed({}, overrides, where, folder)

    def parsed(self, recipe: Mapping[str, Any], overrides: Mapping[str, Any], where: str, folder: Path) -> JobSpec:
        """Return the template with a recipe's sections and then the overrides put in.

        A base path that an override sets starts at `folder`. Raises BadInput, beginning with `where`.
        """
        body: dict[str, Any] = {**self.raw, **recipe}
        for path, value in overrides.items():
            if path in _FIXED:
                raise BadInput(f"{where}: '{path}' is not set so; write {_FIXED[path]}.")
            body = _with(body, path.split("."), value, f"{where}: '{path[:80]}'")
        return parse(JobSpec, _with_anchored_base(body, folder), where)


@dataclass(frozen=True)
class Variant:
    """What makes a customer's job differ from the template, beside tenant, task, data and priority."""

    recipe: str | None
    overrides: Mapping[str, Any]
    folder: Path
    """Where a base's path in the overrides starts."""


@dataclass
class JobMaker:
    """Makes customers' jobs, remembering what they share."""

    template: JobTemplate
    read_recipe: RecipeReader
    _parsed: dict[tuple[str | None, str, Path], JobSpec] = field(default_factory=dict)
    _recipes: dict[str, Mapping[str, Any] | BadInput] = field(default_factory=dict)

    def job(self, tenant: str, task: str, source: str, priority: int, variant: Variant) -> JobSpec:
        """Return a customer's job; `tenant` and `task` are names, checked by the caller.

        Raises BadInput for a recipe that cannot be read and overrides that make no job.
        """
        spec = self._variant(variant)
        data = spec.data.model_copy(update={"train": source})
        resources = spec.resources.model_copy(update={"priority": priority})
        return spec.model_copy(update={"tenant": tenant, "task": task, "data": data, "resources": resources})

    def recipe(self, reference: str) -> Mapping[str, Any]:
        """Return a recipe, read once. Raises BadInput."""
        if reference not in self._recipes:
            try:
                self._recipes[reference] = self.read_recipe(reference)
            except BadInput as error:
                self._recipes[reference] = error
        found = self._recipes[reference]
        if isinstance(found, BadInput):
            raise BadInput(str(found))
        return found

    def _variant(self, variant: Variant) -> JobSpec:
        key = (variant.recipe, json.dumps(variant.overrides, sort_keys=True) if variant.overrides else "", variant.folder)
        if key not in self._parsed:
            sections = self.recipe(variant.recipe) if variant.recipe is not None else {}
            self._parsed[key] = self.template.parsed(sections, variant.overrides, "set", variant.folder)
        return self._parsed[key]


def load_template(path: Path) -> JobTemplate:
    """Read a job file as a template: it may leave out tenant, task and data. Raises BadInput with one sentence."""
    raw = read_yaml(path)
    if not isinstance(raw, dict) or "space" in raw or "customers" in raw:
        raise BadInput(f"{path} should be a job, the template of the fleet's jobs; see 'lorafleet schema job'.")
    data = raw.get("data")
    # Validation and test rows of the template's own tenant must not meet another's.
    kept = {key: data[key] for key in data if key not in ("validation", "test")} if isinstance(data, dict) else data
    filled = {"tenant": _ANY_NAME, "task": _ANY_NAME, **raw, "data": {"train": _ANY_NAME} if data is None else kept}
    spec = parse(JobSpec, {**filled, **({"data": data} if data is not None else {})}, str(path))
    if spec.peft.init_adapter is not None:
        raise BadInput(f"{path}: 'peft.init_adapter' has no place in a fleet's template; set warm_start in the fleet's file.")
    return JobTemplate(_with_anchored_base(filled, path.parent), path, spec.task if "task" in raw else "")


def _with(body: Mapping[str, Any], parts: list[str], value: Any, where: str) -> dict[str, Any]:
    """Return a copy of `body` in which the path is `value`; mappings on the way are made where there are none."""
    key, rest = parts[0], parts[1:]
    if not rest:
        return {**body, key: value}
    below = body.get(key) or {}
    if not isinstance(below, Mapping):
        raise BadInput(f"{where} goes through '{key}', which holds {type(below).__name__} and no keys; set '{key}' as a whole.")
    return {**body, key: _with(below, rest, value, where)}


def _with_anchored_base(body: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return `body` with the path of a local base made absolute; what does not lie in `folder` is the name of a hub's model."""
    base = body.get("base_model")
    name = base.get("name_or_path") if isinstance(base, Mapping) else None
    if not isinstance(base, Mapping) or not isinstance(name, str) or "\0" in name:
        return dict(body)
    path = folder / Path(name)
    return {**body, "base_model": {**base, "name_or_path": str(path.absolute())}} if path.exists() else dict(body)


def data_named(data: DataSpec) -> dict[str, str]:
    """Return the sources of a data spec by role; those it leaves out are absent."""
    named = {"train": data.train, "validation": data.validation, "test": data.test}
    return {role: source for role, source in named.items() if source is not None}
