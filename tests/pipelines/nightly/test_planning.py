"""What is decided for a customer from its last outcome, a listing, and nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.fingerprint import id_of_bytes
from pipelines.nightly.customers import Customer, Resweep
from pipelines.nightly.planning import Decision, Look, Skip, Train, decide, place_in_line, why
from pipelines.nightly.records import OPEN_REASONS, Care, Row, Signature
from pipelines.nightly.state_key import state_key
from tests.pipelines.nightly.fleets import only_customer

BASE, RECIPE, DATA, GATES = (id_of_bytes(name) for name in (b"base", b"recipe", b"data", b"gates"))
FILES = Signature((("train.jsonl", 1000, "stamp"),))
NOW, DAY = 2_000_000_000.0, 86400.0


@pytest.fixture
def customer(tmp_path: Path) -> Customer:
    return only_customer(tmp_path)


def last(**fields: Any) -> Row:
    """The row of a customer who was promoted two days ago."""
    plain = {
        "status": "promoted",
        "state_key": state_key("acme", "support", BASE, RECIPE, DATA, 0.1, GATES),
        "signature": FILES,
        "data_digest": DATA,
        "recipe_digest": RECIPE,
        "gates_digest": GATES,
        "base_id": BASE,
        "num_rows": 100,
        "champion_id": id_of_bytes(b"champion"),
        "generation": 3,
        "num_tokens": 5000,
        "num_steps": 10,
        "seconds": 2.0,
        "cost": 0.1,
        "challenger": 1.0,
        "trained_at": NOW - 2 * DAY,
        "ended_at": NOW - 2 * DAY,
    }
    return Row("acme", "support", **(plain | fields))  # type: ignore[arg-type]


def decided(customer: Customer, row: Row | None, signature: Signature | None = FILES, **other: str) -> Decision:
    digests = {"base_id": BASE, "recipe_digest": RECIPE, "gates_digest": GATES} | other
    return decide(customer, row, signature, NOW, **digests)


def test_a_customer_of_whom_nothing_is_known_is_looked_at(customer: Customer) -> None:
    assert isinstance(found := decided(customer, None), Look)
    assert found.because == "new"


@pytest.mark.parametrize("status", ["promoted", "rejected"])
def test_nothing_changed_is_skipped_with_what_was_known_and_without_work(customer: Customer, status: str) -> None:
    before = last(status=status, num_rejections=2, care=Care(num_read=110, num_new=9))
    found = decided(customer, before)
    assert isinstance(found, Skip)
    row = found.row
    assert (row.status, row.reason) == ("skipped", "unchanged")
    assert row.sentence == "Its files, base, recipe and gates are as they were. It was trained 2 days ago."
    kept = ("state_key", "signature", "data_digest", "champion_id", "generation", "trained_at", "num_rejections", "num_rows")
    assert all(getattr(row, name) == getattr(before, name) for name in kept)
    assert (row.num_tokens, row.num_steps, row.seconds, row.cost, row.challenger) == (0, 0, 0.0, 0.0, None)
    assert (row.care.num_read, row.care.num_new) == (110, 0)
    assert isinstance(decided(customer, row), Skip)


def test_moved_files_are_read_and_named(customer: Customer) -> None:
    before = Signature((("gone.jsonl", 1, "a"), ("kept.jsonl", 1, "a"), ("train.jsonl", 5, "a")))
    now = Signature((("kept.jsonl", 1, "a"), ("new.jsonl", 1, "b"), ("train.jsonl", 5, "c")))
    found = decided(customer, last(signature=before), now)
    assert isinstance(found, Look)
    assert found.sentence == "Its rows are read: new.jsonl is new, gone.jsonl is gone, train.jsonl is changed."


@pytest.mark.parametrize("part", ["base", "recipe", "gates"])
def test_another_base_recipe_or_gates_train_again(customer: Customer, part: str) -> None:
    argument = {"base": "base_id", "recipe": "recipe_digest", "gates": "gates_digest"}[part]
    found = decided(customer, last(), FILES, **{argument: id_of_bytes(b"other")})
    assert isinstance(found, Train)
    assert (found.because, found.sentence) == (part, f"It is trained: its {part} changed since last time.")


def test_another_share_of_holdout_trains_again(customer: Customer) -> None:
    found = decided(replace(customer, holdout=0.2), last())
    assert isinstance(found, Train)
    assert found.because == "holdout"


@pytest.mark.parametrize("reason", sorted(OPEN_REASONS))
def test_what_was_left_open_is_taken_up_whether_files_moved_or_not(customer: Customer, reason: str) -> None:
    planned = last(status="skipped", reason=reason, job_id=id_of_bytes(b"job"))
    for signature in (FILES, Signature(())):
        found = decided(customer, planned, signature)
        assert isinstance(found, Train)
        assert found.because == reason
    assert isinstance(decided(customer, replace(planned, status="trained", reason="")), Train)


@pytest.mark.parametrize("reason", sorted(OPEN_REASONS))
def test_what_was_left_open_before_its_rows_were_read_is_read_but_not_trained_for_that_alone(
    customer: Customer, reason: str
) -> None:
    unread = last(status="failed", reason=reason, signature=None)
    found = decided(customer, unread)
    assert isinstance(found, Look)
    assert found.because == reason
    assert isinstance(decided(customer, unread, recipe_digest=id_of_bytes(b"other")), Train)


def test_a_night_that_ended_before_anything_was_known_is_begun_again(customer: Customer) -> None:
    digests = dict.fromkeys(("state_key", "data_digest", "recipe_digest", "gates_digest", "base_id"))
    found = decided(customer, last(status="failed", reason="bad_job", **digests))
    assert isinstance(found, Look)
    assert found.because == "unknown"


def test_a_failure_is_not_repeated_until_something_changes_and_stays_told(customer: Customer) -> None:
    failed = last(status="failed", reason="non_finite", sentence="the loss became NaN at step 3", next_step="Lower the rate.")
    first = decided(customer, failed)
    assert isinstance(first, Skip)
    assert (first.row.reason, first.row.next_step) == ("failed_before", "Lower the rate.")
    assert "non_finite: the loss became NaN at step 3" in first.row.sentence
    second = decided(customer, first.row)
    assert isinstance(second, Skip)
    assert (second.row.reason, second.row.sentence) == ("failed_before", first.row.sentence)
    assert isinstance(decided(customer, second.row, Signature(())), Look)


def test_a_held_customer_is_looked_at_again_since_limits_may_have_changed(customer: Customer) -> None:
    found = decided(customer, last(status="held", reason="collapsed"))
    assert isinstance(found, Look)
    assert found.because == "held"


def test_few_new_rows_wait_until_they_are_enough_or_old(customer: Customer) -> None:
    few = last(status="skipped", reason="too_few_new_rows", sentence="5 rows are new.", care=Care(num_new=5))
    waiting = decided(customer, few)
    assert isinstance(waiting, Skip)
    assert (waiting.row.reason, waiting.row.sentence, waiting.row.care.num_new) == ("too_few_new_rows", "5 rows are new.", 5)
    assert isinstance(decided(replace(customer, min_new_rows=5), few), Look)
    assert isinstance(decided(replace(customer, max_age_days=2.5), few), Skip)
    aged = decided(replace(customer, max_age_days=2.0), few)
    assert isinstance(aged, Train)
    assert aged.because == "max_age"
    assert "trained 2 days ago (max_age_days is 2)" in aged.sentence


def test_age_alone_trains_nobody_whose_rows_are_the_same(customer: Customer) -> None:
    assert isinstance(decided(replace(customer, max_age_days=1.0), last()), Skip)


def test_a_pinned_customer_is_skipped_until_it_is_pinned_no_more(customer: Customer) -> None:
    pinned = decided(replace(customer, pin="abcdef"), last(), None)
    assert isinstance(pinned, Skip)
    assert (pinned.row.status, pinned.row.reason) == ("skipped", "pinned")
    assert pinned.row.champion_id is not None
    assert isinstance(decided(replace(customer, pin="abcdef"), None, None), Skip)
    assert isinstance(decided(customer, pinned.row), Look)


def test_after_each_so_many_rejections_a_new_search_comes_once(customer: Customer) -> None:
    stubborn = replace(customer, resweep=Resweep(3, Path("sweep.yaml")))
    twice = last(status="rejected", num_rejections=2)
    assert isinstance(decided(stubborn, twice), Skip)
    thrice = replace(twice, num_rejections=3)
    found = decided(stubborn, thrice)
    assert isinstance(found, Train)
    assert (found.because, found.resweep) == ("resweep", True)
    searched = decided(stubborn, replace(twice, num_rejections=4))
    assert isinstance(searched, Skip)
    moved = decided(stubborn, replace(thrice, signature=None))
    assert isinstance(moved, Look)
    assert moved.resweep
    left_open = decided(stubborn, replace(thrice, status="skipped", reason="deadline", job_id=id_of_bytes(b"job")))
    assert isinstance(left_open, Train)
    assert left_open.resweep
    assert isinstance(decided(customer, thrice), Skip)


def test_canaries_go_first_then_what_was_left_open_then_priority_then_who_waited_longest(customer: Customer) -> None:
    look = Look("data", "-")
    line: dict[str, tuple[Customer, Row | None, Decision]] = {
        "skipped": (replace(customer, priority=100), last(), Skip(last())),
        "fresh": (customer, last(trained_at=NOW), look),
        "stale": (customer, last(trained_at=NOW - DAY), look),
        "never": (customer, None, look),
        "urgent": (replace(customer, priority=51), last(), look),
        "open": (replace(customer, priority=1), last(status="skipped", reason="deadline"), Train("deadline", "-")),
        "canary": (replace(customer, priority=0, is_canary=True), last(), look),
    }
    assert sorted(line, key=lambda name: place_in_line(*line[name])) == [
        *("canary", "open", "urgent", "never", "stale", "fresh", "skipped")
    ]


def test_the_reasons_are_told_in_sentences(customer: Customer) -> None:
    refused = ({"gate": "effect", "passed": True, "sentence": "-"}, {"gate": "better", "passed": False, "sentence": "by 0.001"})
    before = last(status="rejected", reason="gates", sentence="It is no better.", num_rejections=2, verdicts=refused)
    told = why(customer, before, decided(customer, before, Signature(())))
    assert told[0] == "acme.support has its rows in ./acme and trains from its champion, with priority 50."
    assert told[1] == "Last time on 2033-05-16: rejected (gates). It is no better."
    assert told[2] == "The gate better refused: by 0.001."
    assert told[3] == "2 of its challengers in a row were rejected."
    assert told[4].startswith("Its champion was ")
    assert told[5].startswith(
        "Tonight: its rows are read, which decides whether it is trained. Its rows are read: train.jsonl is gone"
    )
    assert why(customer, None, decided(customer, None))[1].startswith("Tonight: ")


def test_rows_with_their_digests_travel_as_json() -> None:
    assert Row.from_json(last().to_json()) == last()
