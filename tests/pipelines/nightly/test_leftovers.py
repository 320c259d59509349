"""Runs of nights that a machine left open when it went are closed by reconcile, and those of a living night are left alone."""

from typing import Any

import pytest

from pipelines.leftovers import Finding
from pipelines.reconcile import reconcile
from tests.pipelines.nightly.conftest import Snips
from tests.pipelines.nightly.running import Town


def found_in(town: Town, *, fix: bool) -> list[Finding]:
    services = town.workspace.services
    return [one for one in reconcile(town.store, services.registry(), services.tracker(), fix=fix) if one.kind == "night"]


def test_open_runs_of_a_night_that_is_over_end_as_it_did(town: Town) -> None:
    tracker = town.workspace.services.tracker()
    keys = ["fleets/town/2025-06-02", "fleets/town/2025-06-02/acme.calls"]
    for key in keys:
        tracker.end_run(key, "running")  # as where the machine that was to tell of the end is gone
    found = found_in(town, fix=False)
    assert [(one.subject, one.fixed) for one in found] == [("town/2025-06-02", False)] * 2
    assert set(tracker.open_statuses()) == set(keys)
    assert len(found_in(town, fix=True)) == 2
    assert tracker.open_statuses() == {}
    assert found_in(town, fix=True) == []


def test_runs_of_a_killed_night_wait_for_the_command_that_finishes_it(town: Town, snips: Snips) -> None:
    town.send("acme", snips("acme", 60))

    def interrupt(progress: Any) -> None:
        if progress.num_training:
            assert found_in(town, fix=True) == []  # it is driven
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        town.night(on_progress=interrupt)
    tracker = town.workspace.services.tracker()
    assert found_in(town, fix=True) == []
    tracker.end_run("fleets/town/2025-06-03", "running")  # as a kill leaves it
    [one] = found_in(town, fix=True)
    assert (one.subject, one.fixed) == ("town/2025-06-03", True)
    assert "run the same command again" in one.sentence
    assert set(tracker.open_statuses().values()) == {"preempted"}
    assert town.again().ends["acme"] == ("promoted", "")
    assert tracker.open_statuses() == {}
