"""A night takes up what changed, leaves alone what did not, and keeps each customer's data and champion as they should be."""

import json
from pathlib import Path
from typing import Any

import pytest

from infra.claims import Owner, claim
from pipelines.nightly.holdout import known
from pipelines.nightly.ledger import CLAIM_FORMAT
from pipelines.nightly.run import run
from pipelines.promote import freeze, promote, rollback, unfreeze
from tests.pipelines.nightly.conftest import CUSTOMERS, Snips
from tests.pipelines.nightly.running import DAY, TASK, Night, Town
from tests.pipelines.nightly.test_recipes import end, swept
from workers import layout

PROMOTED, UNCHANGED = ("promoted", ""), ("skipped", "unchanged")


def said(rows: Any) -> set[bytes]:
    """Return the questions of rows."""
    return {known(row).question for row in rows}


def test_first_night_makes_first_champions_better_than_the_plain_base(first_night: Town) -> None:
    for tenant in CUSTOMERS:
        [entry] = first_night.journal(tenant)
        assert (entry.kind, entry.previous, entry.actor) == ("promote", None, "nightly town")
    page = first_night.folder / ".lorafleet" / "nights" / "town" / "2025-06-02.html"
    assert "acme" in page.read_text()


def test_unchanged_night_does_nothing_and_asks_for_no_ray(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    town.night()  # as files that were copied are other files
    monkeypatch.setenv("LORAFLEET_LAUNCHER", "ray")
    monkeypatch.setenv("LORAFLEET_RAY_ADDRESS", "127.0.0.1:1")  # where nobody answers
    before = town.listing()
    night = town.night()
    assert set(night.ends.values()) == {UNCHANGED}
    assert night.outcome.exit_code == 0
    new = {key for key, etag in town.listing().items() if before.get(key) != etag}
    assert {key.rpartition("/")[2] for key in new} == {"night.json", "outcomes.json", "report.json", "page.html"}


def test_files_that_were_touched_without_a_change_are_read_and_skipped(town: Town, snips: Snips) -> None:
    town.send("acme", list(reversed(snips("acme", 40))))
    assert town.night().ends == dict.fromkeys(CUSTOMERS, UNCHANGED)
    assert len(town.journal("acme")) == 1


def test_appended_rows_are_trained_on_from_the_champion(town: Town, snips: Snips) -> None:
    champion = town.champion("acme")
    town.send("acme", snips("acme", 70))
    night = town.night()
    assert night.ends == {"acme": PROMOTED, "globex": UNCHANGED, "initech": UNCHANGED}
    row = night["acme"]
    assert (row.care.num_new > 10, row.care.num_deleted) == (True, 0)
    assert row.challenger is not None
    assert row.champion is not None
    assert row.base is not None
    assert row.challenger < row.champion < row.base
    assert town.job("acme", night.name).init_adapter_id == champion
    assert [entry.previous for entry in town.journal("acme")] == [None, champion]


def test_deleted_row_is_nowhere_in_the_new_adapters_data_and_training_does_not_start_from_who_saw_it(
    town: Town, snips: Snips
) -> None:
    [deleted, *_] = town.rows_of("acme", town.job("acme", "2025-06-02").train)
    rows = [row for row in snips("acme", 40) if row["messages"] != deleted.body["messages"]]
    assert len(rows) == 39
    town.send("acme", rows)
    night = town.night()
    assert night["acme"].care.num_deleted == 1
    assert night["acme"].num_withdrawn == (1 if night["acme"].status == "rejected" else 0)
    assert ("--force" in night["acme"].next_step) == (night["acme"].status == "rejected")
    assert night["acme"].adapter_id not in (None, town.journal("acme")[0].adapter_id)
    job = town.job("acme", night.name)
    assert job.init_adapter_id is None
    for data in (job.train, job.validation, job.test):
        assert known(deleted).question not in said(town.rows_of("acme", data))


def test_rewritten_answer_counts_as_one_row_gone_and_one_new(town: Town, snips: Snips) -> None:
    [old, *_] = town.rows_of("acme", town.job("acme", "2025-06-02").train)
    rows = snips("acme", 40)
    [changed] = [row for row in rows if row["messages"] == old.body["messages"]]
    changed["messages"][-1]["content"] = "GetWeather(city=nowhere)"
    town.send("acme", rows)
    night = town.night()
    assert (night["acme"].care.num_new, night["acme"].care.num_deleted) == (1, 1)
    job = town.job("acme", night.name)
    assert job.init_adapter_id is None
    trained = [row.body["messages"] for row in town.rows_of("acme", job.train)]
    assert changed["messages"] in trained
    assert old.body["messages"] not in trained


def test_holdout_never_leaks_into_training_as_data_grows_and_answers_change(town: Town, snips: Snips) -> None:
    nights = ["2025-06-02"]
    for size in (60, 90):
        rows = snips("acme", size)
        for row in rows[:10]:
            row["messages"][-1]["content"] += f" revision {size}"
        town.send("acme", [*rows, *rows[:5]])
        nights.append(town.night().name)
    jobs = [town.job("acme", night) for night in nights]
    held = [said(town.rows_of("acme", job.test)) for job in jobs]
    assert held[0] < held[1] < held[2]
    for job in jobs:
        assert not held[-1] & said(town.rows_of("acme", job.train))
        assert not held[-1] & said(town.rows_of("acme", job.validation))


def test_rows_are_awaited_until_there_are_enough_or_the_champion_is_old(town: Town, snips: Snips) -> None:
    town.send("acme", snips("acme", 42))
    assert town.night().ends["acme"] == ("skipped", "too_few_new_rows")
    assert town.night().ends["acme"] == ("skipped", "too_few_new_rows")
    town.set_fleet(defaults={"max_age_days": 3})
    assert town.night()["acme"].adapter_id is not None


def test_rejected_challenger_leaves_the_champion_and_is_not_trained_again(town: Town) -> None:
    (town.folder / "strict.yaml").write_text("- {kind: better_than_champion, min_effect: 100}\n")
    town.set_fleet(defaults={"gates": "strict.yaml"})
    champions = [town.champion(tenant) for tenant in CUSTOMERS]
    night = town.night()
    assert set(night.ends.values()) == {("rejected", "better_than_champion")}
    assert "asked is" in night["acme"].sentence
    assert night["acme"].num_rejections == 1
    assert night.outcome.exit_code == 0
    assert [town.champion(tenant) for tenant in CUSTOMERS] == champions
    assert set(town.night().ends.values()) == {UNCHANGED}


def test_champion_that_was_rolled_back_by_hand_is_left_in_peace_and_trained_from(town: Town, snips: Snips) -> None:
    first = town.champion("acme")
    town.send("acme", snips("acme", 60))
    town.night()
    rollback(town.store, None, "acme", TASK, actor="ann", reason="a customer complained")
    assert town.night().ends["acme"] == UNCHANGED
    assert town.champion("acme") == first
    town.send("acme", snips("acme", 80))
    night = town.night()
    assert town.job("acme", night.name).init_adapter_id == first
    assert [entry.kind for entry in town.journal("acme")] == ["promote", "promote", "rollback", "promote"]
    assert town.journal("acme")[-1].previous == first


def test_frozen_customer_is_held_until_a_person_lets_it_move(town: Town, snips: Snips) -> None:
    freeze(town.store, "acme", TASK, actor="ann", reason="audit")
    town.send("acme", snips("acme", 60))
    night = town.night()
    assert night.ends["acme"] == ("held", "frozen")
    assert "ann" in night["acme"].sentence
    assert "unfreeze acme.calls" in night["acme"].next_step
    unfreeze(town.store, "acme", TASK, actor="ann")
    assert town.night().ends["acme"] == PROMOTED


def test_pinned_customer_is_not_trained_until_the_pin_is_gone(town: Town, snips: Snips) -> None:
    town.send("acme", snips("acme", 60))
    town.set_fleet(customers=[{"tenant": "acme", "pin": town.champion("acme")}])
    assert town.night().ends["acme"] == ("skipped", "pinned")
    town.set_fleet()
    assert town.night().ends["acme"] == PROMOTED


def test_training_begins_anew_where_the_adapters_form_differs_or_warm_starts_are_off(town: Town, test_data: Path) -> None:
    town.write_job(test_data / "bases" / "stories260k", **{"peft.r": 2, "peft.lora_alpha": 4})
    night = town.night()
    assert {town.job(tenant, night.name).init_adapter_id for tenant in CUSTOMERS} == {None}
    assert {town.job(tenant, night.name).spec.peft.r for tenant in CUSTOMERS} == {2}


def test_customer_that_wants_no_warm_start_trains_from_fresh_weights(town: Town, snips: Snips) -> None:
    town.set_fleet(customers=[{"tenant": "acme", "warm_start": "none"}])
    for tenant in ("acme", "globex"):
        town.send(tenant, snips(tenant, 60))
    night = town.night()
    assert town.job("acme", night.name).init_adapter_id is None
    assert town.job("globex", night.name).init_adapter_id is not None


def test_customer_with_a_recipe_trains_as_the_sweeps_best_did(town: Town, snips: Snips) -> None:
    ledger = swept(town.store)
    end(ledger, 4, 0.01, loss=2.0)
    end(ledger, 8, 0.02, loss=1.0)
    town.set_fleet(customers=[{"tenant": "acme", "recipe": "acme/menus", "set": {"training.max_steps": 5}}])
    night = town.night()
    spec = town.job("acme", night.name).spec
    assert (spec.peft.r, spec.training.learning_rate, spec.training.max_steps) == (8, 0.02, 5)
    assert night.ends["globex"] == UNCHANGED


def test_customer_who_lost_nearly_all_rows_is_held_and_taken_as_before_when_they_are_back(town: Town, snips: Snips) -> None:
    town.send("acme", snips("acme", 3))
    town.send("globex", snips("globex", 60))
    night = town.night()
    assert night.ends == {"acme": ("held", "collapsed"), "globex": PROMOTED, "initech": UNCHANGED}
    assert night["acme"].next_step
    assert night.outcome.exit_code == 0
    assert town.night().ends["acme"] == ("held", "collapsed")
    town.send("acme", snips("acme", 40))
    assert town.night().ends["acme"] == UNCHANGED


def test_customer_whose_answers_are_all_the_same_is_held(town: Town, snips: Snips) -> None:
    rows = snips("acme", 40)
    for row in rows:
        row["messages"][-1]["content"] = "Yes."
    town.send("acme", rows)
    assert town.night().ends["acme"] == ("held", "one_answer")


def test_night_that_is_triggered_again_and_again_is_one_night(town: Town, snips: Snips) -> None:
    town.send("acme", snips("acme", 60))
    town.send("globex", snips("globex", 2))
    assert town.night().ends["globex"] == ("held", "collapsed")
    before = town.listing()
    for _ in range(3):
        again = town.again()
        assert (again.outcome.report, again.outcome.is_new, again.outcome.exit_code) == (None, False, 0)
    assert town.listing() == before
    assert len(town.nights()) == 2


def test_rows_that_come_after_the_night_make_a_further_one_of_the_same_date(town: Town, snips: Snips) -> None:
    town.send("acme", snips("acme", 60))
    first = town.night()
    town.send("acme", snips("acme", 80))
    second = town.again()
    assert (first.name, second.name) == ("2025-06-03", "2025-06-03-2")
    assert second.ends == {"acme": PROMOTED, "globex": UNCHANGED, "initech": UNCHANGED}


def test_second_driver_at_the_same_time_is_turned_away_and_changes_nothing(town: Town, snips: Snips) -> None:
    town.send("acme", snips("acme", 60))
    turned_away: list[Night] = []

    def intrude(progress: Any) -> None:
        if progress.num_training and not turned_away:
            before = {key for key in town.listing() if key.startswith("fleets/")}
            turned_away.append(town.again())
            assert {key for key in town.listing() if key.startswith("fleets/")} == before

    assert town.night(on_progress=intrude).ends["acme"] == PROMOTED
    [second] = turned_away
    assert (second.outcome.report, second.outcome.exit_code) == (None, 0)
    assert "being run already" in second.outcome.notes[0]
    assert len(town.journal("acme")) == 2


def test_one_training_comes_of_many_triggers_while_clocks_go_back_over_the_deadline(town: Town, snips: Snips) -> None:
    town.set_fleet(limits={"deadline": "02:30", "timezone": "Europe/Berlin"})
    town.send("acme", snips("acme", 60))
    town.now = 1_761_426_000.0  # 2025-10-25, 23:00 in Berlin; at 03:00 of the next day it is 02:00 again
    for _ in range(20):
        town.again()
        town.now += 900
    assert len(town.journal("acme")) == 2
    assert town.nights() == ["2025-06-02", "2025-10-26", "2025-10-27"]


def test_fleet_whose_night_belongs_to_a_living_process_elsewhere_is_left_alone(town: Town, snips: Snips) -> None:
    town.send("acme", snips("acme", 60))
    elsewhere = Owner("elsewhere", 1, 1, "b")
    lease = claim(town.store, layout.fleet_claim("town"), CLAIM_FORMAT, {}, owner=elsewhere, lease_seconds=3.0)
    with lease.keep_alive():
        assert town.night().outcome.report is None
    lease.release()
    assert town.night().ends["acme"] == PROMOTED


def test_adapter_that_is_promoted_by_hand_during_a_night_is_what_the_challenger_is_compared_with(
    town: Town, snips: Snips
) -> None:
    town.send("acme", snips("acme", 60))
    town.night()
    first, second = (entry.adapter_id for entry in town.journal("acme"))
    rollback(town.store, None, "acme", TASK, actor="ann")
    town.send("acme", snips("acme", 80))
    done: list[str] = []

    def by_hand(progress: Any) -> None:
        if progress.num_training and not done:
            done.append(promote(town.store, None, second, tenant="acme", task=TASK, actor="ann").entry.adapter_id)

    night = town.night(on_progress=by_hand)
    assert done == [second]
    assert night.ends["acme"][0] in ("promoted", "rejected")
    assert night["acme"].verdicts
    entries = town.journal("acme")
    assert [entry.adapter_id for entry in entries[:4]] == [first, second, first, second]
    assert all(entry.previous == second for entry in entries[4:])


def test_report_is_kept_as_json_and_page_on_this_machine_and_in_the_store(town: Town) -> None:
    night = town.night()
    folder = town.folder / ".lorafleet" / "nights" / "town"
    body = json.loads((folder / f"{night.name}.json").read_text())
    assert body["counts"]["skipped"] == 3
    assert [one["night"] for one in body["trend"]] == ["2025-06-02"]
    stored, _ = town.store.get(layout.night_file("town", night.name, "page.html"))
    assert stored == (folder / f"{night.name}.html").read_bytes()


def test_fleet_that_cannot_be_read_begins_no_night(town: Town) -> None:
    before = town.listing()
    (town.folder / "job.yaml").write_text("task: calls\nbase_model: {name: x}\n")
    with pytest.raises(ValueError, match=r"base_model\.name"):
        run(town.workspace, town.fleet, now=lambda: town.now + DAY)
    assert town.listing() == before
