"""`lorafleet adapters merge`: several stored adapters of one base made into one, after a report of how they conflict.

What was merged is stored as any other adapter; its manifest names the parents and the recipe, and what became of each parent's
own rows. A merged adapter that is worse there than the parent was is refused before anything is stored, unless forced.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from infra.errors import BadInput, GateRejected, WrongBase
from pipelines.adapters import refuse_bad_names
from pipelines.evaluate import Subject
from pipelines.workspace import Workspace
from workers import layout
from workers.adapter import adapter_id
from workers.adapter_store import store_adapter
from workers.forgotten import refuse_forgotten
from workers.manifests import AdapterRef
from workers.merge_report import PairReport, compare_all
from workers.merging import Merged, Parent, Recipe, check_recipe, merge
from workers.metrics_log import encode_number
from workers.spec import BaseModelSpec, EvaluationSpec

DEFAULT_TOLERANCE = 0.05
"""Nats per token by which a merged adapter may be worse than a parent on that parent's own rows."""
_LOSS_ONLY = EvaluationSpec()


@dataclass(frozen=True)
class Request:
    """What is asked for; None takes what the parents have in common, or what the recipe's documentation says."""

    references: tuple[str, ...]
    method: str = "linear"
    weights: tuple[float, ...] | None = None
    """None: the same share for each, adding up to 1."""
    density: float | None = None
    rank: int | None = None
    seed: int = 0
    tenant: str | None = None
    task: str | None = None
    tolerance: float = DEFAULT_TOLERANCE
    force: bool = False
    across_tenants: bool = False

    @property
    def recipe(self) -> Recipe:
        """The recipe, the weights filled in."""
        number = max(1, len(self.references))
        weights = (1.0 / number,) * number if self.weights is None else self.weights
        return Recipe(self.method, weights, self.density, self.rank, self.seed)


def parse_weights(text: str) -> tuple[float, ...]:
    """Read "0.5,0.5". Raises BadInput if it is no list of numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise BadInput(f"--weights {text[:60]!r} is no list of numbers; write one for each adapter: 0.5,0.5.") from None


@dataclass
class Family:
    """The adapters that are to be merged, found to belong together."""

    workspace: Workspace
    request: Request

    @cached_property
    def subjects(self) -> list[Subject]:
        """The parents. Raises BadInput or WrongBase unless base, training view, prompts and tenants allow to merge them."""
        subjects = [Subject(self.workspace, reference) for reference in self.request.references]
        _refuse_different(subjects)
        tenants = sorted({subject.tenant for subject in subjects})
        if len(tenants) > 1 and not self.request.across_tenants:
            raise BadInput(
                f"these adapters belong to different tenants ({', '.join(tenants)}), whose data would end in one adapter; where "
                "all of them allow it, give --across-tenants and --tenant with whose it will be."
            )
        if len(tenants) > 1 and self.request.tenant is None:
            raise BadInput("an adapter merged across tenants needs one of its own; name it with --tenant.")
        return subjects

    @cached_property
    def parents(self) -> list[Parent]:
        return [Parent(subject.stored.adapter_id, subject.stored.adapter) for subject in self.subjects]

    @property
    def base_id(self) -> str:
        return self.subjects[0].base_id

    @property
    def tenant(self) -> str:
        """Whose the merged adapter is. Raises BadInput if it is not the parents' own and they were not merged across tenants."""
        own, named = self.subjects[0].tenant, self.request.tenant
        if named is not None and named != own and not self.request.across_tenants:
            raise BadInput(
                f"these adapters belong to the tenant '{own}', not to '{named}'; to hand them on give --across-tenants."
            )
        return named or own

    @property
    def task(self) -> str | None:
        tasks = {subject.stored.manifest.get("task") for subject in self.subjects}
        return self.request.task or (tasks.pop() if len(tasks) == 1 else None)


def _refuse_different(subjects: Sequence[Subject]) -> None:
    """Raise WrongBase unless all were trained on one base, held in one way, with one tokenizer and template."""
    first = subjects[0]
    for subject in subjects[1:]:
        what = f"the adapters {first.stored.adapter_id} and {subject.stored.adapter_id} were trained"
        if subject.base_id != first.base_id:
            raise WrongBase(f"{what} on different bases ({first.base_id}, {subject.base_id}); merge adapters of one base only.")
        mine, others = first.stored.manifest, subject.stored.manifest
        if mine.get("prompt_contract") != others.get("prompt_contract"):
            raise WrongBase(f"{what} with different tokenizers or chat templates; merge those of one prompt contract only.")
        views = {view for view in (mine.get("training_view"), others.get("training_view")) if view is not None}
        if len(views) > 1:
            raise WrongBase(
                f"{what} on different views of their base (type or quantisation); merge those of one training view only."
            )


def report(workspace: Workspace, request: Request) -> dict[str, Any]:
    """Return how the adapters conflict, without merging: `base_id`, `adapters` and `pairs`. Checks the request all the same."""
    family = _checked(workspace, request)
    return _report_json(family)


def merge_adapters(workspace: Workspace, request: Request, base: Path | None = None) -> dict[str, Any]:
    """Merge adapters, measure the result on each parent's own rows, and store it. The same request gives the same adapter_id.

    Returns the report's keys, `adapter_id`, `tenant`, `task`, `merged` (False if it was in the store already) and `merge`, which
    the manifest keeps.

    Raises:
        GateRejected: it is worse than a parent by more than the tolerance, or a parent has no rows to tell, and it is not forced.
        BadInput: the request does not fit the adapters, or one is damaged.
        WrongBase: they are of different bases, or `base` holds another one.
    """
    family = _checked(workspace, request)
    conflicts = _report_json(family)
    path = _find_base(family, base)
    merged = merge(family.parents, request.recipe)
    checks = _check_on_parents(family, merged, path)
    faults = [sentence for check in checks if (sentence := _fault(check, request.tolerance)) is not None]
    if faults and not request.force:
        raise GateRejected(f"not merged: {'; '.join(faults)}; try other weights or another method, or give --force.")
    ref = AdapterRef(family.tenant, family.base_id, adapter_id(family.base_id, merged.adapter))
    is_new = workspace.store.head(layout.manifest(*ref)) is None
    body = _manifest_body(family, merged, checks, path, forced=bool(faults))
    store_adapter(workspace.store, ref.tenant, ref.base_id, merged.adapter, body)
    return {**conflicts, **ref._asdict(), "task": family.task, "merged": is_new, "merge": body["merge"], "faults": faults}


def _checked(workspace: Workspace, request: Request) -> Family:
    refuse_bad_names(request.tenant, request.task)
    if not (math.isfinite(request.tolerance) and request.tolerance >= 0.0):
        raise BadInput(f"the tolerance is {request.tolerance:g}, expected nats per token from 0 up.")
    if len(request.references) < 2:
        raise BadInput(f"{len(request.references)} adapter was named, and merging takes two or more.")
    family = Family(workspace, request)
    check_recipe(family.parents, request.recipe)
    refuse_forgotten(workspace.store, family.tenant)
    return family


def _find_base(family: Family, named: Path | None) -> Path:
    """Return the base's folder: where a parent's job found it, or the one that was named. Each parent is checked against it."""
    path = family.subjects[0].find_base(named)
    for subject in family.subjects[1:]:
        subject.check(path)
    return path


def _check_on_parents(family: Family, merged: Merged, path: Path) -> list[dict[str, Any]]:
    """Measure the plain base, each parent and the merged adapter on that parent's own test or validation rows."""
    bench = _setting_of(family).bench(path)
    checks = []
    for subject in family.subjects:
        check: dict[str, Any] = {"adapter_id": subject.stored.adapter_id, "tenant": subject.tenant, "data": None}
        try:
            check["data"], rows = subject.rows(None)
        except BadInput:  # an imported one, or one trained without such rows: told as a fault
            checks.append(check)
            continue
        worn = {"base": None, "parent": subject.stored.adapter, "merged": merged.adapter}
        losses = {name: bench.evaluate(adapter, rows, _LOSS_ONLY)["eval/loss"] for name, adapter in worn.items()}
        checks.append(check | {"num_rows": len(rows), "eval/loss": losses})
    return checks


def _setting_of(family: Family) -> Subject:
    """Return the parent whose job says how the base is held: imported ones do not know."""
    return next((one for one in family.subjects if one.stored.manifest.get("training_view")), family.subjects[0])


def _fault(check: Mapping[str, Any], tolerance: float) -> str | None:
    if check["data"] is None:
        return f"the parent {check['adapter_id'][:12]} names no test or validation rows to measure on"
    losses = check["eval/loss"]
    worse = losses["merged"] - losses["parent"]
    if worse <= tolerance:  # False for NaN, too
        return None
    return (
        f"on the {check['data']} rows of {check['adapter_id'][:12]} its eval/loss is {losses['merged']:.4f} against the parent's "
        f"{losses['parent']:.4f}, worse by more than the tolerance of {tolerance:g}"
    )


def _manifest_body(
    family: Family, merged: Merged, checks: Sequence[Mapping[str, Any]], path: Path, *, forced: bool
) -> dict[str, Any]:
    first, setting = family.subjects[0].stored.manifest, _setting_of(family)
    spec, max_length = setting.setting(path)
    return {
        "job_id": None,
        "task": family.task,
        "task_type": merged.adapter.config["task_type"],
        "labels": [],
        "base_model_name_or_path": merged.adapter.config["base_model_name_or_path"],
        "trust_remote_code": any(subject.stored.manifest.get("trust_remote_code", False) for subject in family.subjects),
        "prompt_contract": first.get("prompt_contract"),
        "training_view": setting.stored.manifest.get("training_view"),
        "data": {},
        "init_adapter_id": None,
        "metrics": {},
        "created": time.time(),
        "parents": [parent.adapter_id for parent in family.parents],
        "merge": _merge_json(family, merged, checks, forced) | _base_json(spec, max_length, path),
    }


def _base_json(spec: BaseModelSpec, max_length: int, path: Path) -> dict[str, Any]:
    """Return what evaluating the merged adapter needs to know of its base."""
    return {"base_model": spec.model_dump(mode="json"), "max_length": max_length, "base_path": str(path.resolve())}


def _merge_json(family: Family, merged: Merged, checks: Sequence[Mapping[str, Any]], forced: bool) -> dict[str, Any]:
    recipe = family.request.recipe
    return {
        "method": recipe.method,
        "density": recipe.density,
        "rank": recipe.rank,
        "seed": recipe.seed,
        "parents": [
            {"tenant": subject.tenant, "adapter_id": subject.stored.adapter_id, "weight": weight}
            for subject, weight in zip(family.subjects, recipe.weights, strict=True)
        ],
        "error": merged.error,
        "layers": [asdict(layer) for layer in merged.layers],
        "tolerance": family.request.tolerance,
        "checks": [_encoded(check) for check in checks],
        "forced": forced,
    }


def _encoded(check: Mapping[str, Any]) -> dict[str, Any]:
    losses = check.get("eval/loss")
    return dict(check) | ({"eval/loss": {name: encode_number(loss) for name, loss in losses.items()}} if losses else {})


def _report_json(family: Family) -> dict[str, Any]:
    return {
        "base_id": family.base_id,
        "adapters": [parent.adapter_id for parent in family.parents],
        "pairs": [_pair_json(pair) for pair in compare_all(family.parents)],
    }


def _pair_json(pair: PairReport) -> dict[str, Any]:
    overlap_in, overlap_out = pair.overlap
    return {
        **asdict(pair),
        "sign_conflicts": pair.sign_conflicts,
        "cosine": pair.cosine,
        "overlap_in": overlap_in,
        "overlap_out": overlap_out,
    }


def report_text(result: Mapping[str, Any]) -> str:
    """Return a table of layers for every two adapters; in brackets the overlap that random directions would have."""
    lines: list[str] = []
    for pair in result["pairs"]:
        width = max([len(layer["module"]) for layer in pair["layers"]] + [10]) + 2
        lines += [
            f"{pair['a']} and {pair['b']}",
            f"{'layer':<{width}}{'sign conflicts':>16}{'cosine':>10}{'overlap in':>18}{'overlap out':>18}",
        ]
        for layer in pair["layers"]:
            overlaps = [f"{layer[f'overlap_{side}']:.2f} ({layer[f'by_chance_{side}']:.2f})" for side in ("in", "out")]
            lines.append(
                f"{layer['module']:<{width}}{layer['sign_conflicts']:>15.1%} {layer['cosine']:>10.3f}"
                f"{overlaps[0]:>18}{overlaps[1]:>18}"
            )
        lines.append(
            f"{'all layers':<{width}}{pair['sign_conflicts']:>15.1%} {pair['cosine']:>10.3f}{pair['overlap_in']:>18.2f}"
            f"{pair['overlap_out']:>18.2f}"
        )
        for side in ("a", "b"):
            if pair[f"only_{side}"]:
                lines.append(f"{len(pair[f'only_{side}'])} layers are adapted by {pair[side]} only")
    return "\n".join(lines)


def merge_text(result: Mapping[str, Any]) -> str:
    """Return the report, what the merged adapter is on each parent's rows, and its id."""
    made = result["merge"]
    lines = [report_text(result), "", f"{'eval/loss on the rows of':<34}{'rows':>6}{'base':>10}{'parent':>10}{'merged':>10}"]
    for check in made["checks"]:
        if check["data"] is None:
            lines.append(f"{check['adapter_id']:<34}  has no test or validation rows")
            continue
        losses = "".join(f"{float(check['eval/loss'][name]):>10.4f}" for name in ("base", "parent", "merged"))
        lines.append(f"{check['adapter_id']:<34}{check['num_rows']:>6}{losses}")
    worst = max(made["layers"], key=lambda layer: layer["error"])
    error = f"relative error {made['error']:.3g}, at most {worst['error']:.3g} ({worst['module']})" if worst["error"] else "exact"
    how = "merged" if result["merged"] else "was in the store already"
    return "\n".join(
        [
            *lines,
            f"{made['method']}: {error}",
            *(f"forced although {fault}" for fault in result["faults"]),
            f"adapter {result['adapter_id']} {how}: tenant {result['tenant']}, parents {', '.join(result['adapters'])}",
        ]
    )
