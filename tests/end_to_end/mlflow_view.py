"""What MLflow holds of a sweep, read with its own client and nothing of ours."""

from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import ViewType

Point = tuple[str, int, float]
"""(metric, step, value)"""


@dataclass(frozen=True)
class SeenRun:
    """A run that is not deleted."""

    run_id: str
    name: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    points: list[Point]
    """Every logged point, sorted; one that was logged twice at different times stands here twice."""


def runs_in(tracking_uri: str) -> list[SeenRun]:
    """Return all runs of all experiments, in the order of their names."""
    client = MlflowClient(tracking_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments(view_type=ViewType.ALL)]
    found = []
    for run in client.search_runs(experiments, max_results=1000):
        points = [
            (point.key, point.step, point.value)
            for metric in run.data.metrics
            for point in client.get_metric_history(run.info.run_id, metric)
        ]
        seen = SeenRun(
            run.info.run_id, run.info.run_name, run.info.status, dict(run.data.tags), dict(run.data.params), sorted(points)
        )
        found.append(seen)
    return sorted(found, key=lambda run: run.name)


def children(runs: list[SeenRun]) -> dict[int, SeenRun]:
    """Return the runs of trials by number; each number has one."""
    numbered = [(int(run.tags["lorafleet.trial"]), run) for run in runs if "lorafleet.trial" in run.tags]
    assert len(dict(numbered)) == len(numbered), "a trial has several runs"
    return dict(numbered)
