"""The benchmarks of nights at their smallest settings: contenders come to the same losses and adapters, with all figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.mark.scale
@pytest.mark.timeout(1800)
def test_a_night_is_compared_with_a_process_for_each_customer(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LORAFLEET_LAUNCHER": "ray"}
    setting = ["--customers", "6", "--sample", "2", "--folder", str(tmp_path), "--json"]
    command = [sys.executable, str(REPOSITORY / "benchmarks/night.py"), *setting]

    done = subprocess.run(command, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ours, peer = found["lorafleet"], found["trainer_peft"]
    assert ours["counts"]["failed"] == 0
    assert sum(ours["counts"].values()) == 6
    assert peer["customers"] == 2
    assert peer["largest_loss_difference"] <= 1e-2
    assert found["ratio_customers_per_hour"] == ours["customers_per_hour"] / peer["customers_per_hour"]
    over = ours["overhead"]
    assert {"care", "resolve", "judge", "gates", "promote", "rows", "MLflow runs", "MLflow aliases"} <= over["stages_ms"].keys()
    assert len(over["busy_seconds_of_hosts"]) == (os.cpu_count() or 1)
    assert 0.0 < over["driver_p50_ms"] <= over["driver_p99_ms"]
    assert "driver" in ours["memory"]


@pytest.mark.scale
@pytest.mark.timeout(1800)
def test_a_night_is_compared_with_one_that_has_poisoned_customers(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LORAFLEET_LAUNCHER": "in-process"}
    setting = ["--customers", "4", "--share", "1.5", "--huge-bytes", "4000000", "--folder", str(tmp_path), "--json"]
    command = [sys.executable, str(REPOSITORY / "benchmarks/poisoned_night.py"), *setting]

    done = subprocess.run(command, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same_adapters"]
    assert found["healthy"] == {"promoted": 4}
    assert len(found["poisoned"]) == 6
    assert found["poisoned"]["poison-settings"] == "failed(non_finite)"
    assert found["ratio"] == found["seconds"]["poisoned"] / found["seconds"]["healthy"]
