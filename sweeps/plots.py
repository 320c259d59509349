"""Optuna's plots of a sweep, as pieces of HTML without plotly's own script."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import optuna
import plotly.graph_objects as go
from optuna import visualization

from sweeps.spec import SweepSpec
from sweeps.study import build_study
from sweeps.trial import Trial

MIN_TRIALS_TO_COMPARE = 2
"""Importances, slices and coordinates say nothing about a single trial."""
FEW_PARAMS = 5
"""A contour plot has a panel for each pair of dimensions; beyond so many it cannot be read."""


@dataclass(frozen=True)
class Plot:
    """A titled figure. `html` is safe to put into a page that has plotly's script."""

    title: str
    caption: str
    html: str


def learning_curves(spec: SweepSpec, trials: Sequence[Trial]) -> go.Figure:
    """Return the reported values of the first objective over steps, a line per trial that trained."""
    figure = go.Figure()
    for trial in trials:
        reports = trial.reports
        if reports and trial.duplicate_of is None:
            dash = "solid" if trial.status == "complete" else "dot"
            name = f"{trial.number} {trial.status}"
            figure.add_scatter(x=list(reports), y=list(reports.values()), name=name, mode="lines+markers", line={"dash": dash})
    figure.update_layout(xaxis_title="step", yaxis_title=spec.objectives[0].metric)
    return figure


def plots_of(spec: SweepSpec, trials: Sequence[Trial]) -> list[Plot]:
    """Return the plots that these trials allow: none that would be empty."""
    with _quiet():
        study = build_study(spec, trials)
        if len(spec.objectives) > 1:
            return [_drawn(*entry) for entry in _for_several(spec, study, trials)]
        return [_drawn(*entry) for entry in _for_one(spec, study, trials)]


Drawing = tuple[str, str, Callable[[], go.Figure]]


def _for_one(spec: SweepSpec, study: optuna.Study, trials: Sequence[Trial]) -> Iterator[Drawing]:
    name = spec.objectives[0].metric
    complete = [trial for trial in trials if trial.status == "complete"]
    if any(trial.reports for trial in trials):
        yield (
            "Learning curves",
            f"{name} at every evaluation; dotted: pruned or not complete.",
            lambda: learning_curves(spec, trials),
        )
    if not complete:
        return
    yield (
        "History",
        f"{name} by trial, and the best so far.",
        lambda: visualization.plot_optimization_history(study, target_name=name),
    )
    yield (
        "Distribution",
        f"Share of trials at or below a value of {name}.",
        lambda: visualization.plot_edf(study, target_name=name),
    )
    varied = _varied(complete)
    if len(complete) < MIN_TRIALS_TO_COMPARE or not varied:
        return
    if len({trial.values for trial in complete}) > 1:
        yield (
            "Importance",
            "Share of the variance of the objective that a dimension explains (fANOVA).",
            lambda: visualization.plot_param_importances(
                study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=spec.sampler.seed), target_name=name
            ),
        )
    yield "Slices", f"{name} against each dimension.", lambda: visualization.plot_slice(study, params=varied, target_name=name)
    yield (
        "Parallel coordinates",
        "A line is a trial.",
        lambda: visualization.plot_parallel_coordinate(study, params=varied, target_name=name),
    )
    if 1 < len(varied) <= FEW_PARAMS:
        yield (
            "Contours",
            f"{name} over pairs of dimensions.",
            lambda: visualization.plot_contour(study, params=varied, target_name=name),
        )


def _for_several(spec: SweepSpec, study: optuna.Study, trials: Sequence[Trial]) -> Iterator[Drawing]:
    names = [objective.metric for objective in spec.objectives]
    if any(trial.reports for trial in trials):
        yield "Learning curves", f"{names[0]} at every evaluation.", lambda: learning_curves(spec, trials)
    complete = [trial for trial in trials if trial.status == "complete"]
    if complete and len(names) <= 3:
        yield "Pareto front", "Trials by their objectives.", lambda: visualization.plot_pareto_front(study, target_names=names)
    for index, name in enumerate(names if complete else []):
        yield (
            f"History of {name}",
            "By trial.",
            lambda index=index, name=name: visualization.plot_optimization_history(  # type: ignore[misc]
                study, target=lambda trial: trial.values[index], target_name=name
            ),
        )


def _varied(complete: Sequence[Trial]) -> list[str]:
    """The dimensions that all complete trials have and in which they differ."""
    shared = set.intersection(*(set(trial.params) for trial in complete))
    return sorted(path for path in shared if len({trial.params[path] for trial in complete}) > 1)


def _drawn(title: str, caption: str, draw: Callable[[], go.Figure]) -> Plot:
    figure = draw()
    # Optuna's own title repeats ours.
    figure.update_layout(title=None, margin={"t": 20}, template="plotly_white")
    return Plot(title, caption, figure.to_html(full_html=False, include_plotlyjs=False))


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
