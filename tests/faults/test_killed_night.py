"""A night whose driver, hosts and scorer are killed, and which the same command continues, ends as the undisturbed one."""

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contracts.storage_servers import S3Server
from tests.end_to_end.ground import Ground, wait_until
from tests.end_to_end.nights import FLEET, NIGHT, TASK, NightGround, nights_in
from tests.faults.campaign import SEED, Campaign, assert_no_job_was_done_twice, crashpoints, names_in
from tests.faulty_proxy import FaultyProxy
from workers import layout

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]
GROWN = ("add-to-playlist", "get-weather", "get-weather-later", "play-music", "play-music-later")
UNCHANGED = "rate-book"
ROWS_BEFORE, ROWS = 50, 80
STEPS = dict(zip(GROWN, (200, 300, 400, 500, 600), strict=True))
"""Each ends at another time."""

LIVES = (
    "claim-taken:1",
    "night-begun:1",
    "data-rows-written:2",
    "night-planned:2",
    "random+job-claimed:1+step-done:7",
    "tracking-shipped:2",
    "random+checkpoint-written:2+job-resumed:1",
    "random+checkpoint-committed:2",
    "random+adapter-files-written:1",  # from here on customers end their training
    "random+manifest-written:1",
    "random+record-written:1",
    "random+job-committed:1",
    "candidate-written:1",
    "evidence-written:1+orders-taken:1",
    "journal-written:1",
    "night-row-written:1",
    "head-written:1",
    "night-outcomes-written:1",  # when all rows have ended
    "night-page-written:1",
    "night-finished:1",
)
"""How drivers die, one after the other, and hosts and scorers in their lives."""
FEWER_LIVES = (
    "night-planned:1",
    "random+checkpoint-written:2+job-resumed:1",
    "random+manifest-written:1",
    "journal-written:1+orders-taken:1",
    "night-page-written:1",
)
ELSEWHERE = {"night-resweep-offered", "night-resweep-settled"}


@pytest.fixture(scope="module")
def first_night(tmp_path_factory: pytest.TempPathFactory, test_data: Path) -> Iterator[NightGround]:
    """A fleet after its first night, whose customers have sent more rows since, but for one."""
    with nights_in(tmp_path_factory.mktemp("first")) as ground:
        ground.write_fleet(test_data, dict.fromkeys((*GROWN, UNCHANGED), ROWS_BEFORE), STEPS)
        done = ground.run(*NIGHT)
        assert done.code == 0, done.err
        for tenant in GROWN:
            ground.send(test_data, tenant, ROWS)
        yield ground


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, first_night: NightGround) -> Iterator[NightGround]:
    """The second night, left alone."""
    with nights_in(copied(first_night, tmp_path_factory.mktemp("undisturbed") / "ground")) as ground:
        done = ground.run(*NIGHT)
        assert done.code == 0, done.err
        yield ground


def copied(ground: Ground, folder: Path) -> Path:
    """Copy a ground, but for the trace of what its processes did."""
    return Path(shutil.copytree(ground.folder, folder, ignore=shutil.ignore_patterns("trace", "command-*")))


def assert_ended_as(ground: NightGround, undisturbed: NightGround) -> None:
    """Compare what kills must not change."""
    facts = ("status", "reason", "adapter_id", "champion_id", "generation", "state_key", "challenger", "champion", "base",
             "num_rows", "num_new", "num_rejections", "train_digest", "holdout_digest")  # fmt: skip
    ours, theirs = (one.rows() for one in (ground, undisturbed))
    for tenant, row in theirs.items():
        assert {name: ours[tenant][name] for name in facts} == {name: row[name] for name in facts}, tenant
    assert ours.keys() == theirs.keys()
    assert ground.report()["counts"] == undisturbed.report()["counts"]
    for tenant in ours:
        journals = [[(e.kind, e.adapter_id, e.previous) for e in one.journal(tenant)] for one in (ground, undisturbed)]
        assert journals[0] == journals[1]
    assert_nothing_is_left_open(ground, len(ground.nights()))


def assert_nothing_is_left_open(ground: NightGround, num_nights: int) -> None:
    assert_no_job_was_done_twice(ground)
    assert set(ground.states()) == {"succeeded"}
    assert len(ground.nights()) == num_nights
    kept = [info.key.rpartition("/")[2] for info in ground.storage.list(f"{layout.night(FLEET, ground.nights()[-1])}rows/")]
    assert sorted(kept) == sorted(f"{tenant}.{TASK}.json" for tenant in (*GROWN, UNCHANGED))  # copied files are looked at
    runs = ground.runs()
    assert {run.status for run in runs} == {"FINISHED"}
    assert Counter("mlflow.parentRunId" in run.tags for run in runs)[False] == num_nights
    for tenant in (*GROWN, UNCHANGED):
        assert ground.shown_champion(tenant) == ground.journal(tenant)[-1].adapter_id


def test_every_named_crash_point_of_a_night_is_one_it_is_killed_at() -> None:
    names = {name for name in crashpoints() if name.startswith("night-")}
    assert names <= names_in(LIVES) | ELSEWHERE


def test_night_killed_at_every_point_and_at_random_ends_as_if_undisturbed(
    tmp_path: Path, first_night: NightGround, undisturbed: NightGround
) -> None:
    with nights_in(copied(first_night, tmp_path / "ground")) as ground:
        kills = Campaign(ground, NIGHT, list(LIVES), [])
        kills.run()
        assert kills.num_driver_kills >= 15
        assert kills.num_host_kills >= 10
        assert_ended_as(ground, undisturbed)


def test_night_killed_while_its_store_loses_answers_ends_as_if_undisturbed(
    tmp_path: Path, test_data: Path, moto: S3Server
) -> None:
    with FaultyProxy("127.0.0.1", moto.port, seed=SEED, drop_answer=0.03, cut_body=0.02) as proxy:
        settings = {"store": f"s3://{moto.new_bucket()}/lora", "endpoint_url": moto.url}
        with nights_in(tmp_path, environment={"LORAFLEET_S3_ENDPOINT_URL": proxy.url}, **settings) as ground:
            ground.write_fleet(test_data, dict.fromkeys(GROWN, ROWS), STEPS)
            kills = Campaign(ground, NIGHT, list(FEWER_LIVES), [])
            kills.run()
            assert proxy.num_faults["drop"] > 10
            assert {row["status"] for row in ground.rows().values()} == {"promoted"}
            assert [len(ground.journal(tenant)) for tenant in GROWN] == [1] * len(GROWN)
            assert_no_job_was_done_twice(ground)
            assert set(ground.states()) == {"succeeded"}
            assert {run.status for run in ground.runs()} == {"FINISHED"}


@pytest.mark.parametrize("away_seconds", [3.0, 60.0])
def test_night_whose_store_is_away_for_a_while_ends_as_if_it_had_not_been(
    tmp_path: Path, test_data: Path, moto: S3Server, away_seconds: float
) -> None:
    """For a short while nobody notices; after a long one the same command goes on."""
    with FaultyProxy("127.0.0.1", moto.port, seed=SEED) as proxy:
        settings = {"store": f"s3://{moto.new_bucket()}/lora", "endpoint_url": moto.url}
        with nights_in(tmp_path, environment={"LORAFLEET_S3_ENDPOINT_URL": proxy.url}, **settings) as ground:
            ground.write_fleet(test_data, dict.fromkeys(GROWN, ROWS), STEPS)
            driver = ground.start(*NIGHT)
            wait_until(lambda: driver.poll() is not None or len(ground.passed("step-done")) > 20, "hosts train")
            proxy.drop_answer = 1.0
            until = time.monotonic() + away_seconds
            while time.monotonic() < until and driver.poll() is None:
                time.sleep(0.1)
            proxy.drop_answer = 0.0
            ended = ground.end_of(driver)
            assert ended.code in (0, 4), ended.err
            assert "Traceback" not in ended.err
            done = ground.run(*NIGHT)
            assert done.code == 0, done.err
            assert {row["status"] for row in ground.rows().values()} == {"promoted"}
            assert [len(ground.journal(tenant)) for tenant in GROWN] == [1] * len(GROWN)
            assert_no_job_was_done_twice(ground)
            assert set(ground.states()) == {"succeeded"}
            assert {run.status for run in ground.runs()} == {"FINISHED"}
