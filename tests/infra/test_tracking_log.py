import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from infra.errors import BadInput, ClaimHeld, ServiceUnavailable
from infra.tracking import LocalTracker, Point, RunStart, refuse_server_with_local_store, without_credentials
from infra.tracking_log import Shipper, TrackingLog

RUN = RunStart("acme/s/0", "acme", "trial 0", tags={"lorafleet.sweep": "s"}, params={"r": "8"})


def point(step: int, value: float = 0.5, metric: str = "train/loss") -> Point:
    return Point(metric, value, step, 1_000 + step)


def steps_at(tracker: LocalTracker, key: str = RUN.key) -> list[int]:
    return [row[2] for row in tracker.read(key)["points"]]


class Interrupted(LocalTracker):
    """A local tracker that can be away, counts the calls that carry points, and can refuse a metric for good."""

    def __init__(self, folder: Path, refused: str = "") -> None:
        super().__init__(folder)
        self.away = threading.Event()
        self.num_points_calls = 0
        self.seconds_per_call = 0.0
        self._refused = refused

    def ensure_run(self, run: RunStart) -> str:
        self._answer()
        return super().ensure_run(run)

    def log_points(self, key: str, points: Sequence[Point]) -> None:
        self._answer()
        if any(one.metric == self._refused for one in points):
            raise BadInput(f"the metric {self._refused} is refused; name another.")
        self.num_points_calls += 1
        super().log_points(key, points)

    def _answer(self) -> None:
        time.sleep(self.seconds_per_call)
        if self.away.is_set():
            raise ServiceUnavailable("The tracker is away; wait.")


@pytest.fixture
def tracker(tmp_path: Path) -> Interrupted:
    return Interrupted(tmp_path / "tracker")


@pytest.fixture
def log(tmp_path: Path):
    log = TrackingLog(tmp_path / "tracking.jsonl")
    yield log
    log.close()


def test_everything_appended_arrives_and_nothing_is_left(log, tracker, tmp_path):
    page = tmp_path / "report.html"
    page.write_text("a page")
    shipper = Shipper(log, tracker)
    log.run(RUN)
    log.points(RUN.key, [point(1), point(2)])
    log.tags(RUN.key, {"lorafleet.adapter_id": "abc"})
    log.file(RUN.key, page, "reports")
    log.end(RUN.key, "complete")
    assert shipper.close(30) == 0
    run = tracker.read(RUN.key)
    assert run["points"] == [["train/loss", 0.5, 1, 1001], ["train/loss", 0.5, 2, 1002]]
    assert run["tags"]["lorafleet.adapter_id"] == "abc"
    assert (run["status"], run["params"], tracker.files(RUN.key)) == ("complete", {"r": "8"}, ["reports/report.html"])


def test_values_that_json_lacks_arrive_as_they_are(log, tracker):
    shipper = Shipper(log, tracker)
    log.run(RUN)
    log.points(RUN.key, [point(1, float("nan")), point(2, float("inf")), point(3, float("-inf")), point(4, 0.1 + 0.2)])
    assert shipper.close(30) == 0
    assert [row[1] for row in tracker.read(RUN.key)["points"]] == ["nan", "inf", "-inf", 0.1 + 0.2]
    for line in log.path.read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_points_of_runs_that_take_turns_are_merged_per_run(log, tracker):
    other = RunStart("acme/s/1", "acme", "trial 1")
    tracker.away.set()
    shipper = Shipper(log, tracker, interval_seconds=60)
    log.run(RUN)
    log.run(other)
    for step in range(50):
        log.points(RUN.key, [point(step)])
        log.points(other.key, [point(step)])
    tracker.away.clear()
    assert shipper.drain() == 0
    assert tracker.num_points_calls == 2
    assert steps_at(tracker) == steps_at(tracker, other.key) == list(range(50))
    shipper.close(5)


def test_points_are_not_merged_across_the_end_of_their_run(log, tracker):
    tracker.away.set()
    shipper = Shipper(log, tracker)
    log.run(RUN)
    log.points(RUN.key, [point(1)])
    log.end(RUN.key, "preempted")
    log.points(RUN.key, [point(2)])
    tracker.away.clear()
    assert shipper.close(30) == 0
    assert tracker.num_points_calls == 2
    assert tracker.read(RUN.key)["status"] == "preempted"


def test_a_tracker_that_is_away_stops_nobody_and_gets_everything_when_it_is_back(log, tracker):
    tracker.away.set()
    shipper = Shipper(log, tracker, interval_seconds=0.01)
    log.run(RUN)
    log.points(RUN.key, [point(1)])
    assert shipper.drain(timeout_seconds=0.3) == 2
    assert shipper.trouble == "The tracker is away; wait."
    tracker.away.clear()
    assert shipper.drain() == 0
    assert shipper.close(5) == 0
    assert shipper.trouble is None
    assert steps_at(tracker) == [1]


def test_a_slow_tracker_is_waited_for_as_long_as_it_takes_events(log, tracker):
    tracker.seconds_per_call = 0.5
    for number in range(6):
        log.run(RunStart(f"acme/s/{number}", "acme", f"trial {number}"))
    assert Shipper(log, tracker).close(2.0) == 0


def test_what_was_left_is_shipped_by_a_later_process(log, tracker):
    tracker.away.set()
    shipper = Shipper(log, tracker)
    log.run(RUN)
    log.points(RUN.key, [point(1)])
    assert shipper.close(0.1) == 2
    log.close()
    tracker.away.clear()
    later = TrackingLog(log.path)
    assert Shipper(later, tracker).close(30) == 0
    assert steps_at(tracker) == [1]
    later.close()


def test_another_tracker_gets_everything_from_the_beginning(log, tracker, tmp_path):
    first = Shipper(log, tracker)
    log.run(RUN)
    log.points(RUN.key, [point(1)])
    assert first.close(30) == 0
    second = LocalTracker(tmp_path / "second")
    assert Shipper(log, second).close(30) == 0
    assert steps_at(second) == [1]


def test_a_refused_event_is_kept_aside_and_those_behind_it_arrive(log, tmp_path):
    tracker = Interrupted(tmp_path / "tracker", refused="bad")
    shipper = Shipper(log, tracker)
    log.run(RUN)
    log.points("acme/unknown", [point(1)])
    log.points(RUN.key, [point(1, metric="bad")])
    log.tags(RUN.key, {"a": "b"})
    log.file(RUN.key, tmp_path / "nowhere.html")
    log.points(RUN.key, [point(2)])
    assert shipper.close(30) == 0
    assert steps_at(tracker) == [2]
    rejected = [json.loads(line) for line in log.path.with_name("tracking.jsonl.rejected").read_text().splitlines()]
    assert [json.loads(entry["line"])["event"] for entry in rejected] == ["points", "points", "file"]
    assert "has no run 'acme/unknown'" in rejected[0]["reason"]
    assert "nowhere.html is gone" in rejected[2]["reason"]


@pytest.mark.parametrize("tail", [b'{"event":"points","key":"acme/s/0","poi', b"\x00\xff", b'{"event":"tags"}'])
def test_a_torn_tail_is_cut_off_and_the_log_goes_on(tmp_path, tail):
    path = tmp_path / "tracking.jsonl"
    log = TrackingLog(path)
    log.run(RUN)
    log.points(RUN.key, [point(1)])
    log.close()
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    log = TrackingLog(path)
    assert path.read_bytes() == whole
    log.points(RUN.key, [point(2)])
    tracker = LocalTracker(tmp_path / "tracker")
    assert Shipper(log, tracker).close(30) == 0
    assert steps_at(tracker) == [1, 2]
    assert not path.with_name("tracking.jsonl.rejected").exists()
    log.close()


def test_a_log_of_nothing_but_a_torn_line_starts_anew(tmp_path):
    path = tmp_path / "tracking.jsonl"
    path.write_bytes(b"x" * 200_000)
    log = TrackingLog(path)
    assert path.read_bytes() == b""
    log.close()


def test_threads_append_whole_lines(log, tracker):
    log.run(RUN)

    def append(first: int) -> None:
        for step in range(first, first + 100):
            log.points(RUN.key, [point(step)])

    threads = [threading.Thread(target=append, args=(1000 * number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Shipper(log, tracker).close(30) == 0
    assert sorted(steps_at(tracker)) == sorted(1000 * number + step for number in range(8) for step in range(100))


def test_one_log_has_one_writer(log):
    with pytest.raises(ClaimHeld, match="Another process writes the tracking log"):
        TrackingLog(log.path)


def test_a_log_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ServiceUnavailable, match="tracking.jsonl cannot be written"):
        TrackingLog(tmp_path / "file" / "tracking.jsonl")


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path):
    resource = pytest.importorskip("resource")
    log = TrackingLog(tmp_path / "tracking.jsonl")
    log.run(RUN)
    whole = log.path.read_bytes()
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 40, limits[1]))
    try:
        with pytest.raises(ServiceUnavailable, match="free or repair its disk"):
            log.points(RUN.key, [point(1)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert log.path.read_bytes() == whole
    log.points(RUN.key, [point(2)])
    assert log.path.read_bytes().startswith(whole)
    assert len(log.read(0, 100)[0]) == 2
    log.close()


DRIVER = """
import sys
from pathlib import Path
from infra.tracking import LocalTracker, Point, RunStart
from infra.tracking_log import Shipper, TrackingLog
log = TrackingLog(Path(sys.argv[1]) / "tracking.jsonl")
shipper = Shipper(log, LocalTracker(Path(sys.argv[1]) / "tracker"), interval_seconds=0.01)
log.run(RunStart("acme/s/0", "acme", "trial 0"))
start = len(log.read(0, 10**6)[0])
for step in range(start, start + 20):
    log.points("acme/s/0", [Point("train/loss", 0.5, step, step)])
    if step % 5 == 0:
        shipper.drain()
log.end("acme/s/0", "complete")
raise SystemExit(shipper.close(30))
"""


def test_a_kill_between_shipping_and_noting_it_loses_and_doubles_nothing(tmp_path):
    environment = os.environ | {
        "LORAFLEET_CRASHPOINT": "tracking-shipped:2,tracking-shipped:3",
        "LORAFLEET_CRASHPOINT_SPENT": str(tmp_path),
    }
    codes = [
        subprocess.run([sys.executable, "-c", DRIVER, str(tmp_path)], env=environment, timeout=60).returncode for _ in range(3)
    ]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    events = [json.loads(line) for line in (tmp_path / "tracking.jsonl").read_text().splitlines()]
    logged = [row[2] for event in events if event["event"] == "points" for row in event["points"]]
    tracker = LocalTracker(tmp_path / "tracker")
    assert steps_at(tracker) == logged
    assert tracker.read("acme/s/0")["status"] == "complete"


def test_nothing_of_the_environment_is_in_the_log(log, tracker, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-tell")
    log.run(RUN)
    log.end(RUN.key, "failed(out_of_memory)")
    Shipper(log, tracker).close(30)
    assert b"do-not-tell" not in b"".join(path.read_bytes() for path in log.path.parent.glob("tracking.jsonl*"))


def test_a_server_with_a_local_store_is_refused_with_the_way_out():
    with pytest.raises(BadInput, match=r"MLflow at http://mlflow:5000 is a server .* local store /data/store; set store to s3"):
        refuse_server_with_local_store("http://user:secret@mlflow:5000", "/data/store")
    refuse_server_with_local_store("http://mlflow:5000", "s3://bucket/prefix")
    refuse_server_with_local_store("sqlite:////data/mlflow.db", "/data/store")


def test_credentials_are_cut_from_uris():
    assert without_credentials("https://user:secret@host:1/path?token=secret") == "https://host:1/path"
    assert without_credentials("sqlite:////data/mlflow.db") == "sqlite:////data/mlflow.db"
