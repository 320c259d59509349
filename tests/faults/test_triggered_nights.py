"""A night that is triggered twenty times, by two machines, in the hour that clocks have twice, and killed: it happens once."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.end_to_end.ground import wait_until
from tests.end_to_end.nights import nights_in
from tests.faults.campaign import assert_no_job_was_done_twice

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]
CUSTOMERS = {"get-weather": 60, "play-music": 60, "rate-book": 60}
NUM_TRIGGERS = 20
SUMMER, WINTER = 1_761_438_600.0, 1_761_442_200.0
"""2025-10-26 in Berlin, where it is 02:30 twice: 00:30 and 01:30 UTC."""
NIGHT_AT = """
import sys
from pathlib import Path
from pipelines.nightly.run import run
from pipelines.workspace import Workspace

outcome = run(Workspace.here(), Path("fleet.yaml"), now=lambda: float(sys.argv[1]))
print(*outcome.notes)
sys.exit(outcome.exit_code)
"""


def test_night_triggered_twenty_times_by_two_machines_while_clocks_change_happens_once(tmp_path: Path, test_data: Path) -> None:
    in_process = {"LORAFLEET_LAUNCHER": "in-process", "LORAFLEET_LEASE_SECONDS": "5"}
    with nights_in(tmp_path, environment=in_process) as ground:
        ground.write_fleet(test_data, CUSTOMERS)
        fleet = tmp_path / "fleet.yaml"
        deadline = next(line for line in fleet.read_text().splitlines() if "deadline" in line)
        fleet.write_text(fleet.read_text().replace(deadline, "  timezone: Europe/Berlin"))
        one = {"LORAFLEET_STORE": str(ground.home / "store"), "LORAFLEET_TRACKING_URI": ground.mlflow}
        machines = [one, one | {"LORAFLEET_HOME": str(tmp_path / "other")}]

        started = [
            ground.start_python("-c", NIGHT_AT, str((SUMMER, WINTER)[number // 2 % 2]), **machines[number % 2])
            for number in range(NUM_TRIGGERS)
        ]
        wait_until(lambda: len(ground.passed("step-done")) > 5, "somebody trains")
        os.kill(ground.passed("step-done")[-1].pid, signal.SIGKILL)
        ends = [ground.end_of(process) for process in started]
        assert Counter(ended.code for ended in ends) == {0: NUM_TRIGGERS - 1, -signal.SIGKILL: 1}, [one.err for one in ends]
        last = ground.end_of(ground.start_python("-c", NIGHT_AT, str(WINTER), **machines[1]))
        assert last.code == 0, last.err

        assert ground.nights() == ["2025-10-26"]
        assert {tenant: row["status"] for tenant, row in ground.rows().items()} == dict.fromkeys(CUSTOMERS, "promoted")
        assert [len(ground.journal(tenant)) for tenant in CUSTOMERS] == [1] * len(CUSTOMERS)
        assert_no_job_was_done_twice(ground)
        assert set(ground.states()) == {"succeeded"}
        assert {run.status for run in ground.runs()} == {"FINISHED"}
        assert len(ground.runs()) == 1 + len(CUSTOMERS)
