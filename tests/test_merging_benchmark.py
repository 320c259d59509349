"""The merging benchmark at its smallest setting: it runs, and compares with PEFT what it says it compares."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.scale
def test_merging_is_compared_with_peft_on_both_customers(test_data: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LORAFLEET_TEST_DATA": str(test_data)}
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "merging.py"), "--steps", "2", "--rank", "2", "--rows", "2"]
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = {(row["who"], row["method"], row["weights"], row["r"]): row for row in found["rows"]}
    assert len(rows) == 33
    assert all(len(row["loss"]) == 2 for row in rows.values())
    for weights in ("mean", "sum"):  # what PEFT does exactly we do as well
        ours, peft = rows["ours", "cat", weights, 4], rows["peft", "cat", weights, 4]
        assert ours["mean"] == pytest.approx(peft["mean"], rel=1e-4)
        assert ours["ratio"] == peft["mean"] / ours["mean"]
        assert rows["ours", "svd", weights, 2]["mean"] == pytest.approx(rows["peft", "svd", weights, 2]["mean"], rel=1e-4)
        assert rows["ours", "linear", weights, 4]["error"] == 0.0
