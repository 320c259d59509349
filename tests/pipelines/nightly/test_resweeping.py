"""A customer whose challengers keep being rejected: searched at the end of a night, judged like anybody, once."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.nightly.driver import Progress
from pipelines.nightly.run import run
from sweeps.ledger import read_trials
from tests.pipelines.nightly.conftest import Snips
from tests.pipelines.nightly.running import DAY, Night, Town

REPOSITORY = Path(__file__).parents[3]
GOOD, BAD = 2.0e-2, 1.0e-6
SWEEP: dict[str, Any] = {
    "name": "search",
    "job": "job.yaml",
    "sampler": {"type": "grid"},
    "num_trials": 2,
    "max_concurrent": 2,
    "space": {"training.learning_rate": {"type": "categorical", "choices": [BAD, GOOD]}},
}
LIMITS = {"deadline": "06:00"}
KILLED = """\
import sys
from pathlib import Path
from tests.pipelines.nightly.running import Town
town = Town(Path(sys.argv[1]), float(sys.argv[2]))
with town.standing():
    town.again()
"""


@pytest.fixture(scope="module")
def rejected(tmp_path_factory: pytest.TempPathFactory, test_data: Path, snips: Snips) -> Town:
    """A customer whose settings are of no use, and whose first challenger was rejected; any rejection calls for a search."""
    town = Town(tmp_path_factory.mktemp("rejected"))
    town.send("acme", snips("acme", 40))
    write_sweep(town)
    (town.folder / "gates.yaml").write_text("- {kind: better_than_champion, min_effect: 0.3}\n")
    town.write_job(test_data / "bases" / "stories260k", **{"training.learning_rate": BAD})
    town.set_fleet(defaults={"gates": "gates.yaml", "resweep": {"after_rejections": 1, "sweep": "sweep.yaml"}}, limits=LIMITS)
    with town.standing():
        night = town.night()
    assert night.ends == {"acme": ("rejected", "better_than_champion")}
    return town


@pytest.fixture
def town(rejected: Town, tmp_path: Path) -> Iterator[Town]:
    town = rejected.copy(tmp_path)
    with town.standing():
        yield town


def write_sweep(town: Town, **changes: Any) -> None:
    job = {"tenant": "nobody", "task": "calls", "base_model": {"name_or_path": "elsewhere"}, "data": {"train": "nothing"}}
    (town.folder / "sweep.yaml").write_text(json.dumps(SWEEP | {"job": job} | changes))


def trial_jobs(town: Town, night: Night) -> list[dict[str, Any]]:
    """Return the jobs of a night's search, as hosts had them."""
    ids = [trial.job_id for trial in read_trials(town.store, "acme", f"night-{night.name}-calls")]
    keys = {info.key for info in town.store.list("tenants/acme/") if info.key.endswith("/spec.json")}
    return [json.loads(town.store.get(key)[0]) for key in keys if key.split("/")[4] in ids]


def test_best_of_a_search_becomes_champion_and_its_recipe_is_used_until_the_fleet_says_otherwise(
    town: Town, snips: Snips
) -> None:
    night = town.night()
    row, pinned = night["acme"], town.job("acme", night.name)
    assert row.status == "promoted"
    assert row.sweep == f"acme/night-{night.name}-calls"
    assert "2 challengers in a row were rejected, so a search of 2 trials was run" in row.sentence
    assert [entry.adapter_id for entry in town.journal("acme")] == [row.adapter_id]
    assert row.challenger is not None
    assert row.base is not None
    assert row.base - row.challenger > 0.3
    jobs = trial_jobs(town, night)
    assert {job["spec"]["training"]["learning_rate"] for job in jobs} == {BAD, GOOD}
    assert pinned.validation is not None
    assert pinned.test is not None
    for job in jobs:
        assert job["train"]["digest"] == pinned.train.digest
        assert job["validation"]["digest"] == pinned.validation.digest
        assert job["test"]["digest"] == pinned.test.digest

    assert town.night().ends == {"acme": ("skipped", "unchanged")}  # the found recipe is no change
    town.send("acme", snips("acme", 60))
    with_recipe = town.night()
    job = town.job("acme", with_recipe.name)
    assert job.spec.training.learning_rate == GOOD
    assert job.init_adapter_id == row.adapter_id

    town.set_fleet(customers=[{"tenant": "acme", "set": {"training.max_steps": 5}}])
    job = town.job("acme", town.night().name)
    assert (job.spec.training.learning_rate, job.spec.training.max_steps) == (BAD, 5)


def test_best_that_is_rejected_too_leaves_everything_as_it_was_and_is_not_searched_again(town: Town) -> None:
    (town.folder / "gates.yaml").write_text("- {kind: better_than_champion, min_effect: 50}\n")
    night = town.night()
    row = night["acme"]
    assert (row.status, row.reason, row.num_rejections) == ("rejected", "better_than_champion", 2)
    assert "a search of 2 trials was run" in row.sentence
    assert (row.recipe, town.journal("acme")) == (None, [])
    assert town.night().ends == {"acme": ("skipped", "unchanged")}


@pytest.mark.parametrize(
    ("sweep", "job", "sentence"),
    [
        ({"space": {"peft.r": {"type": "categorical", "choices": [5000, 6000]}}}, {}, "none of its 2 trials gave an adapter"),
        ({}, {"data.validation_split": 0.0}, "needs validation rows"),
    ],
)
def test_search_that_fails_is_the_customers_row(
    town: Town, test_data: Path, sweep: dict[str, Any], job: dict[str, Any], sentence: str
) -> None:
    write_sweep(town, **sweep)
    town.write_job(test_data / "bases" / "stories260k", **{"training.learning_rate": BAD} | job)
    night = town.night()
    row = night["acme"]
    assert (row.status, row.reason) == ("failed", "resweep")
    assert sentence in row.sentence
    assert f"lorafleet sweep status acme/night-{night.name}-calls" in row.next_step
    assert night.outcome.report is not None
    assert night.outcome.report.is_finished


def test_no_search_begins_after_the_deadline_and_the_next_night_begins_with_it(town: Town) -> None:
    seen: list[int] = []

    def let_the_deadline_come(progress: Progress) -> None:
        seen.append(progress.num_judging)
        if any(seen) and not progress.num_judging:
            town.now += 20 * 3600

    night = town.night(on_progress=let_the_deadline_come)
    row = night["acme"]
    assert (row.status, row.reason) == ("held", "deadline")
    assert "the deadline came before a search" in row.sentence
    assert not list(town.store.list("tenants/acme/sweeps/"))
    town.now -= 20 * 3600
    after = town.night()["acme"]
    assert (after.status, after.sweep is not None) == ("promoted", True)


def test_search_that_the_deadline_ends_is_judged_by_what_it_found(town: Town) -> None:
    choices = [GOOD, *(BAD * number for number in range(1, 8))]
    space = {"training.learning_rate": {"type": "categorical", "choices": choices}}
    write_sweep(
        town, num_trials=8, max_concurrent=1, space=space, sampler={"type": "random"}, enqueue=[dict.fromkeys(space, GOOD)]
    )
    begin = town.now + DAY

    def now() -> float:
        """The deadline comes when the first trial is through."""
        keys = [info.key for info in town.store.list("tenants/acme/sweeps/") if info.key.endswith("/trials/000000.json")]
        is_through = any(json.loads(town.store.get(key)[0])["status"] == "complete" for key in keys)
        return begin + 20 * 3600 * is_through

    night = Night(run(town.workspace, town.fleet, now=now))
    assert night["acme"].status == "promoted"
    trials = read_trials(town.store, "acme", str(night["acme"].sweep).split("/")[1])
    assert 1 <= len(trials) < 8
    assert not [info.key for info in town.store.list("tenants/acme/sweeps/") if info.key.endswith("stop.json")]


@pytest.mark.faults
def test_night_killed_after_the_search_was_promoted_does_it_once(town: Town) -> None:
    town.now += DAY
    command = [sys.executable, "-c", KILLED, str(town.folder), str(town.now)]
    armed = {"LORAFLEET_CRASHPOINT": "night-resweep-settled:1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    killed = subprocess.run(command, env=os.environ | armed, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert town.nights()[-1] not in {
        path.parent.name for path in town.folder.glob(".lorafleet/store/fleets/*/nights/*/report.json")
    }
    before = {key: etag for key, etag in town.listing().items() if "/jobs/" in key or "/journal/" in key or "/trials/" in key}
    row = town.again()["acme"]
    after = {key: etag for key, etag in town.listing().items() if "/jobs/" in key or "/journal/" in key or "/trials/" in key}
    assert after.keys() == before.keys()
    assert {key: etag for key, etag in after.items() if not key.endswith("spec.json")} == {
        key: etag for key, etag in before.items() if not key.endswith("spec.json")
    }
    assert row.status == "promoted"
    assert [entry.adapter_id for entry in town.journal("acme")] == [row.adapter_id]
    assert row.recipe is not None
    assert row.recipe["training"]["learning_rate"] == GOOD
