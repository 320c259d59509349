"""The page that says what a sweep found: one HTML file that needs no network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from infra.storage import Storage
from sweeps.ledger import Header, read_header, read_spec, read_trials
from sweeps.plots import Plot, plots_of
from sweeps.space import apply, space_digest
from sweeps.spec import SweepSpec
from sweeps.trial import Trial, best_of, count_by_status, pareto_front

Audits = Mapping[str, str]
"""What the last audit of an adapter found, by adapter_id."""
NO_AUDITS: Audits = MappingProxyType({})


@dataclass(frozen=True)
class Cell:
    """A cell of the leaderboard; `number` is what it is sorted by, None for text."""

    text: str
    number: float | None = None


@dataclass(frozen=True)
class Row:
    """A trial's line of the leaderboard."""

    status: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Page:
    """What the template shows."""

    title: str
    facts: list[tuple[str, str]]
    bought: list[str]
    counts: list[tuple[str, int]]
    reasons: list[tuple[str, str, str]]
    columns: list[str]
    rows: list[Row]
    front: str
    plots: list[Plot]
    reproduce: str
    best_adapter: str
    audits: list[tuple[str, str, str]]
    """(trial, adapter, what its audit found)."""
    asked: str
    plotly_js: str = field(repr=False)


def write_report(store: Storage, tenant: str, name: str, path: Path, audits: Audits = NO_AUDITS) -> Path:
    """Write the page of a sweep as its ledger stands, and return `path`. Raises BadInput if there is no such sweep."""
    header, spec = read_header(store, tenant, name), read_spec(store, tenant, name)
    html = render(header, spec, read_trials(store, tenant, name), audits)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


def render(header: Header, spec: SweepSpec, trials: Sequence[Trial], audits: Audits = NO_AUDITS) -> str:
    """Return the page for these trials; `spec` bears the settings in force."""
    environment = Environment(loader=PackageLoader("sweeps"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html").render(page=page_of(header, spec, trials, audits))


def page_of(header: Header, spec: SweepSpec, trials: Sequence[Trial], audits: Audits = NO_AUDITS) -> Page:
    """Return what the page says about these trials."""
    best = best_of(trials, spec.objectives)
    front = pareto_front(trials, spec.objectives)
    return Page(
        title=f"{header.tenant}/{spec.name}",
        facts=_facts(header, spec, trials),
        bought=what_the_search_bought(spec, trials),
        counts=sorted(count_by_status(trials).items()),
        reasons=_reasons(trials),
        columns=_columns(spec),
        rows=[_row(spec, trial) for trial in _ranked(spec, trials)],
        front=", ".join(str(trial.number) for trial in front) if len(spec.objectives) > 1 else "",
        plots=plots_of(spec, trials),
        reproduce=_yaml(apply(spec.base_job, best.params).model_dump(mode="json")) if best else "",
        best_adapter=(best.adapter_id or "") if best else "",
        audits=_audited(_ranked(spec, trials), audits),
        asked=_yaml(spec.model_dump(mode="json", by_alias=True)),
        plotly_js=get_plotlyjs(),
    )


def _audited(trials: Sequence[Trial], audits: Audits) -> list[tuple[str, str, str]]:
    made = [(trial.number, trial.adapter_id) for trial in trials if trial.adapter_id is not None]
    return [(str(number), adapter_id, audits[adapter_id]) for number, adapter_id in made if adapter_id in audits]


def what_the_search_bought(spec: SweepSpec, trials: Sequence[Trial]) -> list[str]:
    """Return a sentence per objective: the default LoRA (the first enqueued trial) against the best trial."""
    best = best_of(trials, spec.objectives)
    if best is None:
        return ["No trial is complete yet, so there is nothing to compare."]
    default = next((trial for trial in trials if trial.number == 0 and spec.enqueue), None)
    if default is None:
        found = ", ".join(
            f"{objective.metric} {value:.6g}" for objective, value in zip(spec.objectives, best.values, strict=True)
        )
        return [f"Best is trial {best.number} with {found}. Nothing was enqueued as the default to compare with."]
    if default.status != "complete":
        return [
            f"The default LoRA (trial 0) is {default.status}, so the best, trial {best.number}, has nothing to be compared with."
        ]
    return [
        _compared(objective.metric, objective.direction, default.values[index], best, best.values[index])
        for index, objective in enumerate(spec.objectives)
    ]


def _compared(metric: str, direction: str, before: float, best: Trial, after: float) -> str:
    gain = before - after if direction == "minimize" else after - before
    found = f"{metric}: {before:.6g} with the default LoRA, {after:.6g} with the best, trial {best.number}: "
    if gain == 0:
        return found + "the search bought nothing."
    relative = f" ({100 * abs(gain / before):.2f} %)" if before else ""
    return f"{found}{abs(gain):.6g}{relative} {'better' if gain > 0 else 'worse'}."


def _facts(header: Header, spec: SweepSpec, trials: Sequence[Trial]) -> list[tuple[str, str]]:
    return [
        ("base", str(header.content["base model"])),
        ("training data", str(header.content["data (train)"])),
        ("task", spec.base_job.task),
        ("space", space_digest(spec.space)),
        ("trials", f"{len(trials)} of {spec.num_trials}"),
        ("training time", f"{sum(trial.seconds for trial in trials):.0f} s"),
        ("tokens", f"{sum(trial.num_tokens for trial in trials):,}"),
    ]


def _reasons(trials: Sequence[Trial]) -> list[tuple[str, str, str]]:
    numbers: dict[tuple[str, str], list[str]] = {}
    for trial in trials:
        if trial.reason:
            numbers.setdefault((trial.status, trial.reason), []).append(str(trial.number))
    return [(status, reason, ", ".join(found)) for (status, reason), found in sorted(numbers.items())]


def _ranked(spec: SweepSpec, trials: Sequence[Trial]) -> list[Trial]:
    """Complete trials first, the best on top; then the others by number."""
    sign = 1.0 if spec.objectives[0].direction == "minimize" else -1.0
    return sorted(trials, key=lambda trial: (not trial.values, sign * trial.values[0] if trial.values else 0.0, trial.number))


def _columns(spec: SweepSpec) -> list[str]:
    return ["trial", "status", *(objective.metric for objective in spec.objectives), *spec.space, "steps", "seconds", "adapter"]


def _row(spec: SweepSpec, trial: Trial) -> Row:
    values = [Cell(f"{value:.6g}", value) for value in trial.values] or [Cell("")] * len(spec.objectives)
    params = [_param_cell(trial.params[path]) if path in trial.params else Cell("") for path in spec.space]
    status = trial.status if trial.duplicate_of is None else f"{trial.status} (as {trial.duplicate_of})"
    return Row(
        trial.status,
        (
            Cell(str(trial.number), trial.number),
            Cell(status),
            *values,
            *params,
            Cell(str(trial.num_steps), trial.num_steps),
            Cell(f"{trial.seconds:.1f}", trial.seconds),
            Cell(trial.adapter_id or ""),
        ),
    )


def _param_cell(value: object) -> Cell:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(f"{value:.4g}" if isinstance(value, float) else str(value), float(value))
    return Cell(str(value))


def _yaml(body: object) -> str:
    return yaml.safe_dump(body, sort_keys=False, allow_unicode=True)
