"""The benchmark of planning at its smallest setting: it runs, and prints what it promises."""

import json
import subprocess
import sys
from pathlib import Path

from tests.contracts.storage_servers import require

REPOSITORY = Path(__file__).resolve().parent.parent


def test_planning_is_measured_in_a_folder_and_in_a_bucket() -> None:
    require("moto")
    command = [sys.executable, str(REPOSITORY / "benchmarks/night_planning.py"), "--customers", "30", "--json"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["customers"] == 30
    local, discovered, tabled = found["rows"]
    assert local["requests"] == 0
    assert discovered["requests"] < 30
    assert tabled["requests"] < 30
    for row in found["rows"]:
        assert row["ms_per_customer"] > 0.0
        assert row["requests_per_customer"] == row["requests"] / 30
