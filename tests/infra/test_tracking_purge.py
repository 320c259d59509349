"""Runs are taken out of a tracking log without moving anything else in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from infra.errors import ClaimHeld
from infra.tracking import LocalTracker, Point, RunStart
from infra.tracking_log import Shipper, TrackingLog
from infra.tracking_purge import drop_runs


def is_acmes(event: Mapping[str, Any]) -> bool:
    return event["tags"].get("who") == "acme"


def write(path: Path, *names: str) -> None:
    log = TrackingLog(path)
    for name in names:
        log.run(RunStart(name, "nights", name, tags={"who": name.partition("/")[0]}))
        log.points(name, [Point("loss", 1.5, 1, 1)])
        log.end(name, "succeeded")
    log.close()


def ship(path: Path, tracker: LocalTracker) -> int:
    log = TrackingLog(path)
    left = Shipper(log, tracker, interval_seconds=0.01).close(timeout_seconds=10.0)
    log.close()
    return left


def keys_in(tracker: LocalTracker) -> set[str]:
    return {key for key in ("acme/1", "globex/1", "acme/2", "globex/2") if _has(tracker, key)}


def _has(tracker: LocalTracker, key: str) -> bool:
    try:
        return bool(tracker.read(key))
    except RuntimeError:
        return False


def test_what_was_shipped_is_not_shipped_again_and_what_waits_is_but_for_the_dropped(tmp_path: Path) -> None:
    path, first, second = tmp_path / "night.jsonl", LocalTracker(tmp_path / "first"), LocalTracker(tmp_path / "second")
    write(path, "acme/1", "globex/1")
    assert ship(path, first) == 0
    write(path, "acme/2", "globex/2")
    size = path.stat().st_size
    assert drop_runs(path, is_acmes) == 6
    assert drop_runs(path, is_acmes) == 0
    assert (path.stat().st_size, b"acme" in path.read_bytes()) == (size, False)
    assert (ship(path, first), ship(path, second)) == (0, 0)
    assert keys_in(first) == {"acme/1", "globex/1", "globex/2"}
    assert keys_in(second) == {"globex/1", "globex/2"}
    assert not path.with_name("night.jsonl.rejected").exists()


def test_a_log_of_nobody_else_goes_with_the_files_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "job.jsonl"
    write(path, "acme/1")
    ship(path, LocalTracker(tmp_path / "tracker"))
    path.with_name("job.jsonl.rejected").write_text("{}\n")
    drop_runs(path, is_acmes)
    assert list(tmp_path.glob("job*")) == []


def test_passed_over_events_of_dropped_runs_go_too(tmp_path: Path) -> None:
    path = tmp_path / "night.jsonl"
    write(path, "acme/1", "globex/1")
    log = TrackingLog(path)
    for key in ("acme/1", "globex/1"):
        log.file(key, tmp_path / "gone.html")
    log.close()
    ship(path, LocalTracker(tmp_path / "tracker"))
    drop_runs(path, is_acmes)
    rejected = path.with_name("night.jsonl.rejected").read_text()
    assert ("globex/1" in rejected, "acme/1" in rejected) == (True, False)


def test_a_log_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "night.jsonl"
    write(path, "acme/1")
    before, log = path.read_bytes(), TrackingLog(path)
    with pytest.raises(ClaimHeld):
        drop_runs(path, is_acmes)
    log.close()
    assert path.read_bytes() == before
