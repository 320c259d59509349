"""Nights of real customers as cron runs them: trained in packs, promoted, shown, and finished after a Ctrl-C."""

import signal
from pathlib import Path

import pytest

from tests.end_to_end.ground import wait_until
from tests.end_to_end.nights import NIGHT, nights_in

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]
CUSTOMERS = {"get-weather": 60, "play-music": 60, "rate-book": 60}


def test_two_nights_bring_customers_up_to_date_and_an_interrupted_one_is_finished_by_the_same_command(
    tmp_path: Path, test_data: Path
) -> None:
    with nights_in(tmp_path) as ground:
        ground.write_fleet(test_data, CUSTOMERS)
        first = ground.run(*NIGHT)
        assert first.code == 0, first.err
        assert "3 promoted" in first.out
        assert {row["status"] for row in ground.rows().values()} == {"promoted"}
        [night] = ground.nights()

        again = ground.run(*NIGHT)  # starts no host, hence no Ray
        assert (again.code, again.out) == (0, f"page {ground.home}/nights/snips/{night}.html\n")
        assert ground.nights() == [night]

        # The second night is interrupted as from a terminal, which is told by its code.
        ground.send(test_data, "get-weather", 90)
        ground.send(test_data, "play-music", 90)
        steps = len(ground.passed("step-done"))
        driver = ground.start(*NIGHT, LORAFLEET_LAUNCHER="in-process")
        wait_until(lambda: driver.poll() is not None or len(ground.passed("step-done")) > steps + 1, "hosts train")
        driver.send_signal(signal.SIGINT)
        interrupted = ground.end_of(driver)
        assert interrupted.code == 130, interrupted.err
        assert "Traceback" not in interrupted.err
        assert ground.states()["running"] == 0
        assert "RUNNING" not in {run.status for run in ground.runs()}
        assert ground.json("nightly", "status", "snips")["is_finished"] is False

        second = ground.run(*NIGHT, LORAFLEET_LAUNCHER="in-process")
        assert second.code == 0, second.err
        rows = ground.rows()
        assert {tenant: row["status"] for tenant, row in rows.items()} == {
            "get-weather": "promoted",
            "play-music": "promoted",
            "rate-book": "skipped",
        }
        assert ground.nights() == [night, f"{night}-2"]
        assert len(ground.passed("job-committed")) == 5
        assert len({passing.detail for passing in ground.passed("step-done")}) == len(ground.passed("step-done"))
        assert set(ground.states()) == {"succeeded"}

        # MLflow shows it: a run for each night with its page, one for each training, and who serves.
        runs = ground.runs()
        assert {run.status for run in runs} == {"FINISHED"}
        assert len(runs) == 2 + 5
        for tenant in CUSTOMERS:
            champion = ground.journal(tenant)[-1].adapter_id
            assert ground.shown_champion(tenant) == champion
            assert champion == (rows[tenant]["adapter_id"] or rows[tenant]["champion_id"])
        page = (ground.home / "nights" / "snips" / f"{night}-2.html").read_text()
        assert 'src="http' not in page
        assert "get-weather" in page
