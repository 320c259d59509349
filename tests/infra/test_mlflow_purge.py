"""Runs and models that bear a tag are taken out of MLflow for good; whatever else is there stays."""

import uuid
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType

from infra.mlflow_purge import MlflowPurge
from infra.mlflow_registry import ModelRegistry
from infra.mlflow_tracking import MlflowTracker
from infra.tracking import Point, RunStart
from tests.contracts.mlflow_server import mlflow_server  # noqa: F401

# MLflow 3.17 sets up its tables with a loader that SQLAlchemy 2.1 deprecates; here tests open databases themselves.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
TAG = "lorafleet.tenant"


@pytest.fixture
def who() -> str:
    return f"acme-{uuid.uuid4().hex[:8]}"


def fill(uri: str, who: str, folder: Path) -> None:
    """Log a run of `who` in its own experiment, one in an experiment of others beside a run of theirs, and a model."""
    tracker, registry = MlflowTracker(uri), ModelRegistry(uri)
    for key, experiment, tags in (
        (f"{who}/jobs/1", who, {TAG: who}),
        (f"fleet-{who}/night/1", f"fleet-{who}", {TAG: who}),
        (f"fleet-{who}/night/2", f"fleet-{who}", {TAG: "globex"}),
    ):
        tracker.ensure_run(RunStart(key, experiment, "a run", tags=tags, params={"secret": f"of {who}"}))
        tracker.log_points(key, [Point("loss", 1.5, 1, 1)])
        (folder / "rows.txt").write_text(f"rows of {tags[TAG]}")
        tracker.log_file(key, folder / "rows.txt", "data")
        tracker.end_run(key, "succeeded")
    registry.ensure_model(f"{who}.support", {TAG: who})
    registry.set_alias(f"{who}.support", "champion", registry.ensure_version(f"{who}.support", "a", "s3://bucket/a", {}))
    registry.ensure_model(f"globex.{who}", {TAG: "globex"})


def names(uri: str, who: str, view: int = ViewType.ACTIVE_ONLY) -> tuple[set[str], set[str], set[str]]:
    """Return experiments, keys of runs and registered models in which `who` is named."""
    client = MlflowClient(uri)
    experiments = client.search_experiments(view_type=view)
    runs = client.search_runs([one.experiment_id for one in experiments], f"params.secret = 'of {who}'", run_view_type=view)
    models = {one.name for one in client.search_registered_models() if who in one.name}
    return {one.name for one in experiments if who in one.name}, {run.data.tags["lorafleet.key"] for run in runs}, models


def test_nothing_is_left_in_the_embedded_database_or_its_folder(who: str, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/home/mlflow.db"
    fill(uri, who, tmp_path)
    (tmp_path / "rows.txt").unlink()
    purge = MlflowPurge(uri)
    held = purge.held(TAG, who, who)
    assert (held.models, len(held.runs), len(held.experiments)) == ((f"{who}.support",), 2, 1)
    for _ in range(2):
        assert purge.remove(held) is None  # the second finds all of it gone
    assert purge.held(TAG, who, who).count == 0
    assert names(uri, who, ViewType.ALL) == ({f"fleet-{who}"}, {f"fleet-{who}/night/2"}, {f"globex.{who}"})
    assert f"rows of {who}".encode() not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert [path.read_text() for path in tmp_path.rglob("rows.txt")] == ["rows of globex"]
    assert f"{who}/jobs/1".encode() not in (tmp_path / "home" / "mlflow.db").read_bytes()


def test_a_server_shows_nothing_of_it_any_more_and_what_it_keeps_is_told(mlflow_server, who: str, tmp_path: Path) -> None:  # noqa: F811
    uri = mlflow_server.uri
    fill(uri, who, tmp_path)
    purge = MlflowPurge(uri)
    left = purge.remove(purge.held(TAG, who, who))
    assert left is not None
    assert "2 deleted runs" in left
    assert "mlflow gc" in left
    assert names(uri, who) == ({f"fleet-{who}"}, {f"fleet-{who}/night/2"}, {f"globex.{who}"})
    MlflowTracker(uri).ensure_run(RunStart(f"{who}/jobs/2", who, "anew", tags={TAG: who}, params={"secret": f"of {who}"}))
    assert names(uri, who)[1] == {f"{who}/jobs/2", f"fleet-{who}/night/2"}  # the old experiment is not restored with its runs


def test_files_of_other_runs_are_written_anew(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = MlflowTracker(uri)
    for key, tags in (("night", {"fleet": "f"}), ("customer", {"fleet": "f", TAG: "globex"}), ("other", {})):
        tracker.ensure_run(RunStart(key, "nights", key, tags=tags))
        (tmp_path / "told.txt").write_text("acme and globex")
        tracker.log_file(key, tmp_path / "told.txt", "report")
    (tmp_path / "told.txt").unlink()

    def without(path: Path) -> list[Path]:
        if "acme" not in path.read_text():
            return []
        path.write_text("globex")
        return [path]

    assert [MlflowPurge(uri).rewrite_files("fleet", TAG, "report", without) for _ in range(2)] == [1, 0]
    told = sorted(path.read_text() for path in (tmp_path / "mlartifacts").rglob("told.txt"))
    assert told == ["acme and globex", "acme and globex", "globex"]
