"""What every tracker promises, over the local one, MLflow on SQLite, and MLflow behind a server."""

import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.errors import BadInput, WorkFailed
from infra.mlflow_tracking import MlflowTracker, mlflow_status
from infra.tracking import OPEN_STATUSES, LocalTracker, Point, RunStart, Tracker
from tests.contracts.mlflow_server import mlflow_server  # noqa: F401

# MLflow 3.17 sets up its tables with a loader that SQLAlchemy 2.1 deprecates; here tests open databases themselves.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@dataclass
class Seen:
    """A run as the tracker shows it. `points` as (metric, value, step, time_ms), `parent` is the tracker's id."""

    tracker_id: str
    status: str
    parent: str | None
    tags: dict[str, str]
    params: dict[str, str]
    points: list[tuple[str, float, int, int]]
    files: list[str]
    start_ms: int
    end_ms: int | None


@dataclass
class Case:
    tracker: Tracker
    see: Callable[[str], Seen]
    finished: str
    """The tracker's own word for a run that went well."""
    largest: float
    """What it makes of infinity."""


def see_local(tracker: LocalTracker, key: str) -> Seen:
    run = tracker.read(key)
    parent = None if run["parent"] is None else tracker.ensure_run(RunStart(run["parent"], "", ""))
    points = [(row[0], float(row[1]), row[2], row[3]) for row in run["points"]]
    tracker_id = tracker.ensure_run(RunStart(key, "", ""))
    start, end = run["time_ms"], run.get("end_time_ms")
    return Seen(tracker_id, run["status"], parent, run["tags"], run["params"], points, tracker.files(key), start, end)


def see_mlflow(uri: str, key: str) -> Seen:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(ids, f"tags.`lorafleet.key` = '{key}'")
    run_id = run.info.run_id
    history = [metric for name in run.data.metrics for metric in client.get_metric_history(run_id, name)]
    points = [(metric.key, metric.value, metric.step, metric.timestamp) for metric in history]
    files = [file.path for folder in client.list_artifacts(run_id) for file in client.list_artifacts(run_id, folder.path)]
    tags, info = run.data.tags, run.info
    return Seen(
        run_id, info.status, tags.get("mlflow.parentRunId"), tags, run.data.params, points, files, info.start_time, info.end_time
    )


@pytest.fixture(scope="module")
def embedded_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('my home')}/mlflow.db"


@pytest.fixture(params=["local", "sqlite", "server"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    if request.param == "local":
        local = LocalTracker(tmp_path / "tracker")
        return Case(local, lambda key: see_local(local, key), "complete", math.inf)
    uri = request.getfixturevalue("embedded_uri") if request.param == "sqlite" else request.getfixturevalue("mlflow_server").uri
    return Case(MlflowTracker(uri), lambda key: see_mlflow(uri, key), "FINISHED", 1.7976931348623157e308)


@pytest.fixture
def sweep() -> str:
    """A name of its own for each test, since they share a server."""
    return f"s-{uuid.uuid4().hex[:8]}"


def a_run(sweep: str, number: int = 0, **changes) -> RunStart:
    fields = {
        "key": f"acme/{sweep}/{number}",
        "experiment": "acme",
        "name": f"trial {number}",
        "tags": {"lorafleet.sweep": sweep},
    }
    return RunStart(**fields | changes)


def test_it_answers(case):
    case.tracker.check()
    assert "@" not in case.tracker.uri


def test_a_run_asked_for_twice_is_one_run(case, sweep):
    run = a_run(sweep, params={"peft.r": "8"}, time_ms=1_700_000_000_000)
    first = case.tracker.ensure_run(run)
    assert case.tracker.ensure_run(run) == first
    seen = case.see(run.key)
    assert seen.tracker_id == first
    assert seen.params == {"peft.r": "8"}
    assert seen.start_ms == 1_700_000_000_000
    assert {"lorafleet.key": run.key, "lorafleet.sweep": sweep, "lorafleet.status": "running"}.items() <= seen.tags.items()


def test_a_run_that_exists_gets_what_it_lacks_and_keeps_what_it_has(case, sweep):
    case.tracker.ensure_run(a_run(sweep, params={"r": "8"}, tags={"lorafleet.sweep": sweep, "a": "1"}))
    case.tracker.ensure_run(a_run(sweep, params={"r": "16", "alpha": "2"}, tags={"a": "2", "b": "3"}))
    seen = case.see(f"acme/{sweep}/0")
    assert seen.params == {"r": "8", "alpha": "2"}
    assert (seen.tags["a"], seen.tags["b"], seen.tags["lorafleet.sweep"]) == ("1", "3", sweep)


def test_a_trial_is_a_child_of_its_sweep(case, sweep):
    parent = a_run(sweep, key=f"acme/{sweep}")
    parent_id = case.tracker.ensure_run(parent)
    case.tracker.ensure_run(a_run(sweep, parent=parent.key))
    assert case.see(f"acme/{sweep}/0").parent == parent_id
    assert case.see(parent.key).parent is None


def test_points_logged_twice_stand_there_once(case, sweep):
    run = a_run(sweep)
    case.tracker.ensure_run(run)
    points = [Point("train/loss", 1 / step, step, 1_000 + step) for step in range(1, 6)]
    points += [
        Point("eval/loss", math.nan, 5, 2_000),
        Point("eval/loss", -math.inf, 6, 2_000),
        Point("eval/loss", math.inf, 7, 2_000),
    ]
    case.tracker.log_points(run.key, points)
    case.tracker.log_points(run.key, points)
    case.tracker.log_points(run.key, points[2:] + [Point("train/loss", 0.1, 6, 1_006)])
    seen = {(metric, step, time_ms): value for metric, value, step, time_ms in case.see(run.key).points}
    assert len(case.see(run.key).points) == len(seen) == 9
    assert [seen["train/loss", step, 1_000 + step] for step in range(1, 6)] == [1 / step for step in range(1, 6)]
    assert math.isnan(seen["eval/loss", 5, 2_000])
    assert (seen["eval/loss", 6, 2_000], seen["eval/loss", 7, 2_000]) == (-case.largest, case.largest)


def test_more_points_than_fit_into_one_batch_arrive(case, sweep):
    run = a_run(sweep)
    case.tracker.ensure_run(run)
    case.tracker.log_points(run.key, [Point("train/loss", 0.5, step, step) for step in range(2_100)])
    assert sorted(step for _, _, step, _ in case.see(run.key).points) == list(range(2_100))


def test_tags_are_set_and_set_again(case, sweep):
    run = a_run(sweep)
    case.tracker.ensure_run(run)
    case.tracker.set_tags(run.key, {"lorafleet.attempt": "1"})
    case.tracker.set_tags(run.key, {"lorafleet.attempt": "2"})
    assert case.see(run.key).tags["lorafleet.attempt"] == "2"


def test_a_file_is_attached_and_replaced(case, sweep, tmp_path):
    run = a_run(sweep)
    case.tracker.ensure_run(run)
    page = tmp_path / "sweep report.html"
    for text in ("first", "second"):
        page.write_text(text)
        case.tracker.log_file(run.key, page, "reports")
    assert case.see(run.key).files == ["reports/sweep report.html"]
    with pytest.raises(FileNotFoundError):
        case.tracker.log_file(run.key, tmp_path / "nowhere.html", "reports")


def test_an_ended_run_ends_once_and_keeps_its_time(case, sweep):
    run = a_run(sweep)
    case.tracker.ensure_run(run)
    for _ in range(2):
        case.tracker.end_run(run.key, "complete", 1_700_000_000_123)
    case.tracker.end_run(run.key, "complete")
    seen = case.see(run.key)
    assert (seen.status, seen.end_ms, seen.tags["lorafleet.status"]) == (case.finished, 1_700_000_000_123, "complete")
    case.tracker.ensure_run(run)
    assert case.see(run.key).status == case.finished


def test_a_reason_becomes_a_tag(case, sweep):
    run = a_run(sweep)
    case.tracker.ensure_run(run)
    case.tracker.end_run(run.key, "infeasible(out_of_memory)", 5)
    tags = case.see(run.key).tags
    assert (tags["lorafleet.status"], tags["lorafleet.reason"]) == ("infeasible", "out_of_memory")


def test_open_runs_are_those_of_the_sweep_that_have_not_ended(case, sweep):
    for number in range(4):
        case.tracker.ensure_run(a_run(sweep, number))
    case.tracker.ensure_run(a_run(f"{sweep}-other"))
    case.tracker.end_run(f"acme/{sweep}/0", "pruned", 5)
    case.tracker.end_run(f"acme/{sweep}/1", "failed(nan)", 5)
    case.tracker.end_run(f"acme/{sweep}/2", "preempted", 5)
    assert case.tracker.open_runs(sweep) == [f"acme/{sweep}/2", f"acme/{sweep}/3"]
    case.tracker.end_run(f"acme/{sweep}/0", "running")
    assert case.tracker.open_runs(sweep) == [f"acme/{sweep}/0", f"acme/{sweep}/2", f"acme/{sweep}/3"]
    assert case.tracker.open_runs(f"{sweep}-nobody") == []


def test_open_statuses_tell_runs_that_go_on_from_runs_that_wait(case, sweep):
    for number in range(3):
        case.tracker.ensure_run(a_run(sweep, number))
    case.tracker.end_run(f"acme/{sweep}/0", "pruned", 5)
    case.tracker.end_run(f"acme/{sweep}/1", "preempted", 5)
    mine = {key: status for key, status in case.tracker.open_statuses().items() if f"/{sweep}/" in key}
    assert mine == {f"acme/{sweep}/1": "preempted", f"acme/{sweep}/2": "running"}


def test_an_unknown_run_is_refused_for_good(case, sweep):
    with pytest.raises(WorkFailed, match=f"has no run 'acme/{sweep}/9'"):
        case.tracker.log_points(f"acme/{sweep}/9", [Point("train/loss", 0.5, 1, 1)])
    with pytest.raises(WorkFailed, match="has no run"):
        case.tracker.ensure_run(a_run(sweep, parent=f"acme/{sweep}/9"))


@pytest.mark.parametrize(
    "status",
    ["queued", "running", "preempted", "succeeded", "stopped", "cancelled", "failed", "complete", "pruned", "infeasible"],
)
def test_every_status_of_jobs_and_trials_has_its_place_in_mlflow(status):
    assert (mlflow_status(f"{status}(why)") in ("RUNNING", "SCHEDULED")) == (status in OPEN_STATUSES)


def test_a_word_that_is_no_status_is_refused():
    with pytest.raises(BadInput, match="'finished' is no status"):
        mlflow_status("finished")
