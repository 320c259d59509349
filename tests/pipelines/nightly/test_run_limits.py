"""Where a night stops: at its limits, at a kill or Ctrl-C, at canaries; and how the same command or the next night goes on."""

import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.nightly.driver import Progress
from pipelines.reconcile import reconcile
from tests.end_to_end.mlflow_view import runs_in
from tests.pipelines.nightly.conftest import CUSTOMERS, Snips
from tests.pipelines.nightly.poison import NAN_SETTINGS
from tests.pipelines.nightly.running import DAY, Night, Town

PROMOTED = ("promoted", "")
CAREFUL = {"canary": ["initech"], "max_canary_failures": 0.0, "max_promotions_share": None}
LONG = {"training.max_steps": 30}


@pytest.fixture
def grown(town: Town, snips: Snips) -> Town:
    """Everybody has sent more rows."""
    for tenant in CUSTOMERS:
        town.send(tenant, snips(tenant, 60))
    return town


@pytest.fixture
def passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Gives the details of a point's passings, in order."""
    trace = tmp_path / "trace"
    monkeypatch.setenv("LORAFLEET_CRASHPOINT_TRACE", str(trace))

    def details(name: str) -> list[str]:
        lines = [line.split(" ", 3) for line in trace.read_text().splitlines()] if trace.exists() else []
        return [detail for _, _, point, detail in lines if point == name]

    return details


def once(condition: Callable[[Progress], bool], act: Callable[[], None]) -> Callable[[Progress], None]:
    """Act when a night has come to a condition."""
    done: list[bool] = []

    def watch(progress: Progress) -> None:
        if not done and condition(progress):
            done.append(True)
            act()

    return watch


def interrupt() -> None:
    raise KeyboardInterrupt


def statuses(town: Town) -> Counter[str]:
    """Return MLflow's statuses of all runs."""
    return Counter(run.status for run in runs_in(f"sqlite:///{town.folder}/.lorafleet/mlflow.db"))


def test_night_replaces_no_more_champions_than_it_may_and_the_rest_follow_without_training(grown: Town) -> None:
    grown.set_fleet(limits={"max_promotions_share": 0.4})
    nights = [grown.night()]
    held = {tenant: row.adapter_id for tenant, row in nights[0].rows.items() if row.reason == "promotion_limit"}
    assert Counter(nights[0].ends.values()) == {PROMOTED: 1, ("held", "promotion_limit"): 2}
    assert None not in held.values()
    assert nights[0].outcome.exit_code == 0
    assert grown.again().outcome.report is None  # the same day brings no further quota
    for _ in range(2):
        nights.append(grown.night())
    for night in nights[1:]:
        [promoted] = [row for row in night.rows.values() if row.status == "promoted"]
        assert promoted.adapter_id == held.pop(promoted.tenant)
        assert {row.num_tokens for row in night.rows.values()} == {0}
    assert [len(grown.journal(tenant)) for tenant in CUSTOMERS] == [2, 2, 2]


def test_canaries_that_are_rejected_stop_the_night_before_anybody_else_is_trained(grown: Town) -> None:
    (grown.folder / "strict.yaml").write_text("- {kind: better_than_champion, min_effect: 100}\n")
    canary = {"tenant": "initech", "gates": "strict.yaml"}
    grown.set_fleet(limits=CAREFUL, customers=[canary])
    night = grown.night()
    assert night.ends["initech"] == ("rejected", "better_than_champion")
    assert night.ends["acme"] == night.ends["globex"] == ("held", "canary")
    assert night.outcome.exit_code == 1
    assert night.outcome.report is not None
    assert "initech.calls" in night.outcome.report.remarks[0]
    assert {row.num_tokens > 0 for row in night.rows.values() if row.tenant != "initech"} == {False}
    following = grown.night()
    assert following.ends["acme"] == following.ends["globex"] == PROMOTED


def test_canaries_that_had_stopped_a_night_stop_it_also_when_it_is_continued(grown: Town) -> None:
    (grown.folder / "strict.yaml").write_text("- {kind: better_than_champion, min_effect: 100}\n")
    canary = {"tenant": "initech", "gates": "strict.yaml"}
    grown.set_fleet(limits=CAREFUL, customers=[canary])
    with pytest.raises(KeyboardInterrupt):
        grown.night(on_progress=once(lambda progress: progress.num_ended == 1, interrupt))
    night = grown.again()
    assert night.ends["initech"][0] == "rejected"
    assert night.ends["acme"] == night.ends["globex"] == ("held", "canary")


def test_canaries_that_are_well_go_first_and_the_others_follow(grown: Town, passed: Callable[[str], list[str]]) -> None:
    grown.set_fleet(limits={"canary": ["initech"]})
    assert set(grown.night().ends.values()) == {PROMOTED, ("held", "promotion_limit")}
    assert passed("night-row-written")[0] == "initech.calls"
    assert passed("night-planned")[0] == "initech.calls"


def test_deadline_checkpoints_what_trains_and_the_next_night_begins_with_it(
    grown: Town, passed: Callable[[str], list[str]], snips: Snips, test_data: Path
) -> None:
    grown.set_fleet(limits={"deadline": "13:00", "max_promotions_share": None})
    grown.write_job(test_data / "bases" / "stories260k", **LONG)

    def late() -> None:
        grown.now += DAY / 24

    night = grown.night(on_progress=once(lambda progress: len(passed("step-done")) > 1, late))
    assert set(night.ends.values()) == {("held", "deadline")}
    assert night.outcome.exit_code == 0
    assert night.outcome.report is not None
    assert "deadline" in night.outcome.report.remarks[0]
    assert "RUNNING" not in statuses(grown)
    grown.send("hooli", snips("acme", 30))
    grown.set_fleet(customers=[{"tenant": "hooli", "priority": 100}])
    following = grown.again()  # an hour later it is tomorrow's night
    assert following.name > night.name
    assert following.ends == dict.fromkeys([*CUSTOMERS, "hooli"], PROMOTED)
    assert passed("night-planned")[-1] == "hooli.calls"
    assert max(int(detail.split()[1]) for detail in passed("job-resumed")) > 0
    assert max(Counter(passed("step-done")).values()) == 1
    assert set(statuses(grown)) <= {"FINISHED", "KILLED"}


def test_night_whose_hours_are_spent_holds_the_rest_for_another_date(grown: Town) -> None:
    grown.set_fleet(limits={"gpu_hours": 1e-9, "max_promotions_share": None})
    night = grown.night()
    assert set(night.ends.values()) == {("held", "budget")}
    assert night.outcome.exit_code == 0
    assert grown.again().outcome.report is None
    grown.set_fleet(limits={"gpu_hours": None, "max_promotions_share": None})
    assert set(grown.night().ends.values()) == {PROMOTED}


@pytest.mark.faults
def test_interrupted_night_leaves_nothing_running_and_the_same_command_finishes_it(
    grown: Town, passed: Callable[[str], list[str]], test_data: Path, tmp_path: Path
) -> None:
    grown.set_fleet(limits={"max_promotions_share": None})
    grown.write_job(test_data / "bases" / "stories260k", **LONG)
    undisturbed = grown.copy(tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        grown.night(on_progress=once(lambda progress: len(passed("step-done")) > 1, interrupt))
    assert "RUNNING" not in statuses(grown)
    night = grown.again()
    assert night.ends == dict.fromkeys(CUSTOMERS, PROMOTED)
    assert max(Counter(passed("step-done")).values()) == 1
    assert set(statuses(grown)) == {"FINISHED"}
    with undisturbed.standing():
        assert undisturbed.night().adapters == night.adapters


def test_night_that_nobody_finished_is_closed_by_the_next_one_which_takes_up_what_was_left(
    grown: Town, passed: Callable[[str], list[str]], test_data: Path
) -> None:
    grown.set_fleet(limits={"max_promotions_share": None})
    grown.write_job(test_data / "bases" / "stories260k", **LONG)
    with pytest.raises(KeyboardInterrupt):
        grown.night(on_progress=once(lambda progress: len(passed("step-done")) > 1, interrupt))
    [cut_off] = grown.nights()[1:]
    night = grown.night()
    assert night.name > cut_off
    assert night.ends == dict.fromkeys(CUSTOMERS, PROMOTED)
    assert max(Counter(passed("step-done")).values()) == 1
    page = grown.folder / ".lorafleet" / "nights" / "town" / f"{cut_off}.html"
    assert "cut off" in page.read_text()
    assert set(statuses(grown)) == {"FINISHED", "KILLED"}


def test_rows_that_ended_before_a_night_was_continued_count_against_its_limits(grown: Town) -> None:
    grown.set_fleet(limits={"max_promotions_share": 0.4})
    with pytest.raises(KeyboardInterrupt):
        grown.night(on_progress=once(lambda progress: progress.counts.get("promoted", 0) == 1, interrupt))
    assert Counter(grown.again().ends.values()) == {PROMOTED: 1, ("held", "promotion_limit"): 2}


def test_promotions_stand_while_mlflows_registry_is_away_and_reconcile_shows_them(grown: Town) -> None:
    grown.set_fleet(limits={"max_promotions_share": None})
    database = sqlite3.connect(grown.folder / ".lorafleet" / "mlflow.db", check_same_thread=False)
    table, hidden = "registered_model_aliases", "away"

    def leave() -> None:
        while grown.workspace.services.tracker().run_id(f"fleets/town/{grown.nights()[-1]}") is None:
            time.sleep(0.1)  # what ships runs looks for the registry, too, as it opens the database
        with database:
            database.execute(f"ALTER TABLE {table} RENAME TO {hidden}")

    night = grown.night(on_progress=once(lambda progress: progress.num_training > 0, leave))
    assert night.ends == dict.fromkeys(CUSTOMERS, PROMOTED)
    assert night.outcome.exit_code == 0
    assert night.outcome.report is not None
    [remark] = night.outcome.report.remarks
    assert "'lorafleet reconcile --fix' will" in remark
    with database:
        database.execute(f"ALTER TABLE {hidden} RENAME TO {table}")
    database.close()
    services = grown.workspace.services
    found = reconcile(grown.store, services.registry(), services.tracker(), fix=True)
    assert {finding.subject for finding in found if finding.kind == "registry"} == {f"{tenant}.calls" for tenant in CUSTOMERS}
    assert reconcile(grown.store, services.registry(), services.tracker(), fix=False) == []
    versions = {version.version: version.key for version in services.registry().versions("acme.calls")}
    assert versions[services.registry().aliases("acme.calls")["champion"]] == grown.champion("acme")


def test_person_may_ask_for_a_training_though_nothing_changed(town: Town) -> None:
    night = town.night(retry=["acme"])
    assert night.ends["globex"] == night.ends["initech"] == ("skipped", "unchanged")
    assert night["acme"].adapter_id is not None
    assert night["acme"].num_tokens > 0


def test_retry_takes_up_those_that_failed_and_nobody_else(town: Town) -> None:
    town.set_fleet(customers=[{"tenant": "acme", "set": dict(NAN_SETTINGS)}])
    night = town.night()
    assert night.ends["acme"] == ("failed", "non_finite")
    assert night.outcome.exit_code == 1
    assert night["acme"].next_step
    following = town.night()
    assert following.ends["acme"] == ("skipped", "failed_before")
    assert following.outcome.exit_code == 0
    again = town.again(retry=[])
    assert again.ends == {
        "acme": ("failed", "non_finite"),
        "globex": ("skipped", "unchanged"),
        "initech": ("skipped", "unchanged"),
    }
    assert len(town.journal("acme")) == 1


def test_retry_without_anybody_to_retry_begins_no_night(town: Town) -> None:
    town.night()
    nights = town.nights()
    assert town.again(retry=[]).outcome.report is None
    assert town.nights() == nights


def test_retry_trains_also_a_customer_who_waits_for_more_rows(town: Town, snips: Snips) -> None:
    town.send("acme", snips("acme", 42))
    assert town.night().ends["acme"] == ("skipped", "too_few_new_rows")
    retried: Night = town.again(retry=["acme"])
    assert retried["acme"].adapter_id is not None
    town.send("acme", snips("acme", 44))
    assert town.night(retry=["acme"])["acme"].adapter_id is not None


def test_customer_whose_search_is_due_has_one_row_too(town: Town) -> None:
    job = yaml.safe_load((town.folder / "job.yaml").read_text()) | {"tenant": "acme"}
    sweep: dict[str, Any] = {
        "name": "anew",
        "job": job,
        "num_trials": 2,
        "space": {"training.learning_rate": {"type": "float", "low": 1e-3, "high": 1e-2, "log": True}},
    }
    (town.folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    (town.folder / "strict.yaml").write_text("- {kind: better_than_champion, min_effect: 100}\n")
    resweep = {"after_rejections": 1, "sweep": "sweep.yaml"}
    town.set_fleet(customers=[{"tenant": "acme", "gates": "strict.yaml", "resweep": resweep}])
    assert town.night().ends["acme"] == ("rejected", "better_than_champion")
    assert town.night().ends.keys() == CUSTOMERS.keys()
