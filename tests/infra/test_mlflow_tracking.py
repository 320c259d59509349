import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from infra.errors import BadInput, ServiceUnavailable
from infra.mlflow_tracking import MlflowTracker
from infra.tracking import Point, RunStart
from infra.tracking_log import Shipper, TrackingLog
from tests.contracts.mlflow_server import MlflowServer, mlflow_server  # noqa: F401

# MLflow 3.17 sets up its tables with a loader that SQLAlchemy 2.1 deprecates; here tests open databases themselves.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def runs_of(uri: str, sweep: str) -> dict[str, object]:
    """The runs of a sweep by key; a key that has two runs fails here."""
    client = MlflowClient(uri)
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(ids, f"tags.`lorafleet.sweep` = '{sweep}'")
    by_key = {run.data.tags["lorafleet.key"]: run for run in runs}
    assert len(by_key) == len(runs)
    return by_key


def steps_of(uri: str, run) -> list[int]:
    return sorted(metric.step for metric in MlflowClient(uri).get_metric_history(run.info.run_id, "train/loss"))


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creating the schema takes seconds; tests that do not look at that copy this file."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowTracker(f"sqlite:///{path}").check()
    return path


@pytest.fixture
def embedded(empty_database: Path, tmp_path: Path) -> str:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def test_a_server_that_was_away_has_every_point_once_and_no_run_left_running(mlflow_server: MlflowServer, tmp_path):  # noqa: F811
    sweep = f"s-{uuid.uuid4().hex[:8]}"
    log = TrackingLog(tmp_path / "tracking.jsonl")
    shipper = Shipper(log, MlflowTracker(mlflow_server.uri), interval_seconds=0.01)

    def train(first: int, last: int) -> None:
        for step in range(first, last):
            for trial in range(3):
                log.points(f"acme/{sweep}/{trial}", [Point("train/loss", 1.0 / (step + 1), step, 1_000 + step)])

    log.run(RunStart(f"acme/{sweep}", "acme", sweep, tags={"lorafleet.sweep": sweep}))
    for trial in range(2):
        log.run(RunStart(f"acme/{sweep}/{trial}", "acme", f"{trial}", f"acme/{sweep}", {"lorafleet.sweep": sweep}))
    assert shipper.drain(60) == 0
    mlflow_server.stop()
    log.run(RunStart(f"acme/{sweep}/2", "acme", "2", f"acme/{sweep}", {"lorafleet.sweep": sweep}))
    train(0, 40)
    assert shipper.drain(0.5) > 0
    assert "does not answer" in str(shipper.trouble)
    mlflow_server.start()
    train(40, 60)
    for trial in range(3):
        log.end(f"acme/{sweep}/{trial}", "complete")
    log.end(f"acme/{sweep}", "succeeded")
    assert shipper.drain(60) == 0
    assert shipper.close(10) == 0
    log.close()
    runs = runs_of(mlflow_server.uri, sweep)
    assert sorted(runs) == [f"acme/{sweep}"] + [f"acme/{sweep}/{trial}" for trial in range(3)]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for trial in range(3):
        assert steps_of(mlflow_server.uri, runs[f"acme/{sweep}/{trial}"]) == list(range(60))
    assert not (tmp_path / "tracking.jsonl.rejected").exists()


DRIVER = """
import sys
from pathlib import Path
from infra.mlflow_tracking import MlflowTracker
from infra.tracking import Point, RunStart
from infra.tracking_log import Shipper, TrackingLog
log = TrackingLog(Path(sys.argv[1]) / "tracking.jsonl")
if log.end_offset == 0:
    log.run(RunStart("acme/s", "acme", "s", tags={"lorafleet.sweep": "s"}))
    log.run(RunStart("acme/s/0", "acme", "0", "acme/s", {"lorafleet.sweep": "s"}, {"r": "8"}))
    log.points("acme/s/0", [Point("train/loss", float(step), step, step) for step in range(50)])
    log.end("acme/s/0", "complete")
    log.end("acme/s", "succeeded")
    log.flush()
raise SystemExit(Shipper(log, MlflowTracker(sys.argv[2])).close(60))
"""


def test_a_kill_between_shipping_and_noting_it_leaves_exact_runs_in_mlflow(embedded, tmp_path):
    environment = os.environ | {"LORAFLEET_CRASHPOINT": "tracking-shipped", "LORAFLEET_CRASHPOINT_SPENT": str(tmp_path)}
    done = [
        subprocess.run([sys.executable, "-c", DRIVER, str(tmp_path), embedded], env=environment, capture_output=True, timeout=120)
        for _ in range(2)
    ]
    assert [one.returncode for one in done] == [-signal.SIGKILL, 0], done
    assert [one.stdout + one.stderr for one in done] == [b"", b""]
    runs = runs_of(embedded, "s")
    assert {key: run.info.status for key, run in runs.items()} == {"acme/s": "FINISHED", "acme/s/0": "FINISHED"}
    assert steps_of(embedded, runs["acme/s/0"]) == list(range(50))


OPENER = """
import sys
from infra.mlflow_tracking import MlflowTracker
from infra.tracking import RunStart
sys.stdin.readline()
tracker = MlflowTracker(sys.argv[1])
tracker.check()
tracker.ensure_run(RunStart(f"acme/s/{sys.argv[2]}", "acme", "x", tags={"lorafleet.sweep": "s"}))
"""


def test_two_processes_start_at_once_on_a_fresh_home(tmp_path):
    embedded = f"sqlite:///{tmp_path}/home/mlflow.db"
    openers = [
        subprocess.Popen([sys.executable, "-c", OPENER, embedded, str(number)], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        for number in range(2)
    ]
    for opener in openers:
        assert opener.stdin is not None
        opener.stdin.write(b"\n")
        opener.stdin.flush()
    errors = [opener.communicate(timeout=120)[1] for opener in openers]
    assert errors == [b"", b""]
    assert sorted(runs_of(embedded, "s")) == ["acme/s/0", "acme/s/1"]


def test_a_twin_that_a_lost_answer_left_is_removed(embedded):
    tracker = MlflowTracker(embedded)
    run = RunStart("acme/s/0", "acme", "0", tags={"lorafleet.sweep": "s"}, time_ms=1_000)
    first = tracker.ensure_run(run)
    client = MlflowClient(embedded)
    experiment = client.get_run(first).info.experiment_id
    client.create_run(experiment, start_time=2_000, tags={"lorafleet.key": run.key, "lorafleet.sweep": "s"})
    tracker.end_run(run.key, "complete")
    assert {key: (kept.info.run_id, kept.info.status) for key, kept in runs_of(embedded, "s").items()} == {
        run.key: (first, "FINISHED")
    }


def test_what_is_too_long_for_mlflow_is_cut(embedded):
    tracker = MlflowTracker(embedded)
    tracker.ensure_run(
        RunStart(
            "acme/s/0", "acme", "n" * 600, tags={"lorafleet.sweep": "s", "t" * 300: "v" * 9_000}, params={"p" * 300: "v" * 9_000}
        )
    )
    tracker.log_points("acme/s/0", [Point("m(1)" + "m" * 300, 0.5, 1, 1)])
    run = runs_of(embedded, "s")["acme/s/0"]
    assert (run.data.tags["t" * 250], run.data.params["p" * 250]) == ("v" * 5_000, "v" * 6_000)
    assert list(run.data.metrics) == ["m_1_" + "m" * 246]


def test_an_experiment_that_was_deleted_comes_back(embedded):
    tracker = MlflowTracker(embedded)
    tracker.ensure_run(RunStart("acme/s/0", "acme", "0"))
    client = MlflowClient(embedded)
    client.delete_experiment(client.get_experiment_by_name("acme").experiment_id)
    MlflowTracker(embedded).ensure_run(RunStart("acme/s/1", "acme", "1", tags={"lorafleet.sweep": "s"}))
    assert list(runs_of(embedded, "s")) == ["acme/s/1"]


def test_files_of_the_embedded_mlflow_lie_beside_its_database(embedded, tmp_path):
    tracker = MlflowTracker(embedded)
    tracker.ensure_run(RunStart("acme/s/0", "acme", "0"))
    (tmp_path / "page.html").write_text("a page")
    tracker.log_file("acme/s/0", tmp_path / "page.html", "reports")
    (found,) = (tmp_path / "mlartifacts" / "acme").rglob("page.html")
    assert found.read_text() == "a page"


def test_a_server_that_is_not_there_is_named_without_credentials():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ServiceUnavailable) as raised:
        MlflowTracker(f"http://user:secret@127.0.0.1:{port}").check()
    assert str(raised.value) == (
        f"MLflow at http://127.0.0.1:{port} does not answer; start it, or unset tracking_uri to use the embedded one."
    )


def test_a_server_that_takes_calls_and_never_answers_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(ServiceUnavailable, match="does not answer"):
            MlflowTracker(f"http://127.0.0.1:{silent.getsockname()[1]}").check()


class NotMlflow(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


def test_something_else_at_the_address_is_not_taken_for_mlflow():
    with ThreadingHTTPServer(("127.0.0.1", 0), NotMlflow) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with pytest.raises(ServiceUnavailable, match="does not answer"):
            MlflowTracker(f"http://127.0.0.1:{server.server_port}").check()
        server.shutdown()
        thread.join()


def test_a_database_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1_000)
    with pytest.raises(ServiceUnavailable, match=r"mlflow.db cannot be used .*file is not a database"):
        MlflowTracker(f"sqlite:///{tmp_path}/mlflow.db").check()


@pytest.mark.parametrize("uri", ["./mlruns", "file:///data/mlruns", "sqlite://", "sqlite:///:memory:", "postgresql://db/mlflow"])
def test_other_kinds_of_uri_are_refused(uri):
    with pytest.raises(BadInput, match="tracking_uri must be"):
        MlflowTracker(uri)
