"""`lorafleet train` as the tracker sees it."""

import json
from pathlib import Path

import pytest

from infra.services import Services
from infra.settings import load_settings
from infra.tracking_log import TrackingLog
from pipelines.train import _train_tracked
from pipelines.workspace import Workspace
from tests.workers.test_attempt import a_job
from tests.workers.test_fleet import OpenLauncher
from workers.fleet import HostFleet
from workers.report import JobEvent, Progress


def test_training_that_is_interrupted_does_not_stand_as_running(tmp_path: Path) -> None:
    settings, launcher, job = load_settings(tmp_path, {}), OpenLauncher(), a_job()
    fleet, log = HostFleet(Services(settings), launcher), TrackingLog(tmp_path / "log.jsonl")
    launcher.hosts[0].host_end.send(Progress(job.job_id, 1, 10, 2.0, 100.0, 10))

    def interrupt(event: JobEvent) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _train_tracked(Workspace(settings), job, fleet, log, interrupt)
    log.close()
    told = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [event["status"] for event in told if event["event"] == "end"] == ["running", "preempted"]
