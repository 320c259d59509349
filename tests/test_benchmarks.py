"""The engine's benchmarks at their smallest setting: they run, and print what they promise."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_engine

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Give torch back the threads that it had: a benchmark sets their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.scale
def test_engine_is_compared_with_trainer_and_itself_alone_and_its_limit():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    setting = ["--hidden", "64", "--adapters", "1", "2", "--tokens", "32", "--rounds", "1", "--seconds", "0", "--json"]
    command = [sys.executable, str(REPOSITORY / "benchmarks/engine.py"), *setting]

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["facts"]["torch"] == torch.__version__
    assert found["largest_loss_difference"] <= 1e-3
    alone, pack = found["rows"]
    assert (alone["adapters"], pack["adapters"]) == (1, 2)
    assert pack["ranks"] == [8, 16]
    assert pack["tokens_per_adapter_step"] == 32
    assert pack["loss_ours"] < pack["loss_before"]
    assert alone["ratio_own_alone"] == 1.0
    for row in (alone, pack):
        assert row["ratio_trainer_peft"] == row["ms_trainer_peft"] / row["ms_ours"]
        assert row["tax_over_limit"] == row["ms_ours"] / row["ms_limit"] - 1.0


@pytest.mark.usefixtures("one_thread")
def test_gpu_benchmark_measures_a_tiny_shape_on_a_cpu(monkeypatch, capsys):
    setting = [
        "--shape",
        "tiny",
        "--tokens",
        "64",
        "--adapters",
        "3",
        "--tokens-per-pass",
        "128",
        "--rounds",
        "1",
        "--seconds",
        "0",
    ]
    monkeypatch.setattr(sys, "argv", ["gpu_engine.py", *setting, "--json"])

    assert gpu_engine.main() == 0

    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["shape"], row["adapters"], row["tokens_per_adapter_step"]) == ("tiny", 3, 64)
    assert row["predicted_bytes"] > 0
    for key in ("tokens_per_second", "ratio_peft_alone", "ratio_own_alone", "join_ms", "leave_ms"):
        assert row[key] > 0.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_benchmark_without_a_gpu_says_so_in_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_engine.py"])

    with pytest.raises(SystemExit, match=r"^this benchmark needs a GPU that torch can use, [^.]*\.$"):
        gpu_engine.main()
