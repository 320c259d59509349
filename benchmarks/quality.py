"""What a search buys on real data: plain base, default LoRA and the best of a sweep, on rows nobody trained or selected on.

    python benchmarks/quality.py [--trials 24] [--seeds 3] [--steps 150] [--base stories260k] [--json]

For each data set and seed one sweep as a person would run it (TPE, ASHA, the default LoRA enqueued first), selected by validation
loss; then `lorafleet evaluate` on the test rows. Printed are mean and spread (lowest to highest) over the
seeds; the peer is the default LoRA.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import facts, test_data

SETS = {
    "snips/get-weather": ("sets/snips/customers/get-weather", r"GetWeather\([^()]*\)"),
    "e2e-nlg": ("sets/e2e-nlg", r"[A-Z][^\[\]]*[.!]"),
}
METRICS = ("eval/loss", "eval/perplexity", "eval/format_validity")
NUM_VALID, NUM_TEST, NUM_GENERATED = 100, 200, 100


def measure(name: str, seed: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run one sweep and return the test metrics of base, default and best."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, name, seed, options)
        swept = lorafleet(folder, "sweep", "run", str(folder / "sweep.yaml"), "--json")
        chosen = {"default LoRA": swept["default"]["adapter_id"], "best of the sweep": swept["best"]["adapter_id"]}
        if chosen["default LoRA"] is None:
            sys.exit("the default trial left no adapter to compare with; it must not be pruned")
        measured = lorafleet(folder, "evaluate", *dict.fromkeys(chosen.values()), "--generate", str(NUM_GENERATED), "--json")[
            "measured"
        ]
        by_id = {row["adapter_id"]: row["metrics"] for row in measured}
        found = {"plain base": by_id[None], **{label: by_id[adapter] for label, adapter in chosen.items()}}
        print(
            f"{name} seed {seed}: {swept['counts']} in {swept['seconds']:.0f}s, best {swept['best']['params']}", file=sys.stderr
        )
        return {label: {metric: metrics[metric] for metric in METRICS} for label, metrics in found.items()}


def prepare(folder: Path, name: str, seed: int, options: argparse.Namespace) -> None:
    """Write the rows (validation and test cut to a size that is measured in seconds), job.yaml and sweep.yaml."""
    source, pattern = SETS[name]
    for split, count in (("train", None), ("valid", NUM_VALID), ("test", NUM_TEST)):
        lines = (test_data() / source / f"{split}.jsonl").read_text().splitlines()[:count]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    training = {"max_steps": options.steps, "per_device_train_batch_size": 8, "eval_steps": 25, "max_length": 256, "seed": seed}
    job = {
        "tenant": "bench",
        "task": "quality",
        "base_model": {"name_or_path": str(test_data() / "bases" / options.base)},
        "data": {"train": "train.jsonl", "validation": "valid.jsonl", "test": "test.jsonl"},
        "training": training,
        "evaluation": {"generate": 0, "max_new_tokens": 64, "format_pattern": pattern},
    }
    default = {"peft.r": 16, "alpha_over_r": 2, "peft.target_modules": "all-linear", "training.learning_rate": 2.0e-4}
    sweep = {
        "name": "quality",
        "job": "job.yaml",
        "sampler": {"type": "tpe", "seed": seed},
        "pruner": {"type": "asha", "min_resource": 25, "reduction_factor": 3},
        "num_trials": options.trials,
        "max_concurrent": 2,
        "enqueue": [default],
        "space": {
            "peft.r": {"type": "categorical", "choices": [2, 4, 8, 16, 32]},
            "alpha_over_r": {"type": "categorical", "choices": [1, 2, 4]},
            "peft.target_modules": {"type": "categorical", "choices": ["attention", "mlp", "all-linear"]},
            "training.learning_rate": {"type": "float", "low": 1e-4, "high": 3e-2, "log": True},
        },
    }
    (folder / "job.yaml").write_text(json.dumps(job))
    (folder / "sweep.yaml").write_text(json.dumps(sweep))


def lorafleet(folder: Path, *arguments: str) -> Any:
    """Run a command in a home of its own and return its JSON."""
    environment = {**os.environ, "LORAFLEET_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return json.loads(done.stdout)


def main() -> int:
    """Measure all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--base", default="stories260k")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    started = time.time()
    runs = {name: [measure(name, seed, options) for seed in range(options.seeds)] for name in SETS}
    result = {
        "facts": facts("torch", "transformers", "optuna", "lorafleet"),
        "setting": f"{options.base}, {options.trials} trials of at most {options.steps} steps, batch 8, {options.seeds} seeds, "
        f"{NUM_TEST} test rows, answers to {NUM_GENERATED} of them",
        "seconds": time.time() - started,
        "runs": runs,
    }
    print(json.dumps(result, indent=2) if options.json else _table(result))
    return 0


def _table(result: dict[str, Any]) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in result["facts"].items()), result["setting"], ""]
    for name, runs in result["runs"].items():
        lines.append(f"{name:<22}" + "".join(f"{metric.removeprefix('eval/'):>28}" for metric in METRICS))
        for label in runs[0]:
            cells = []
            for metric in METRICS:
                values = [run[label][metric] for run in runs]
                cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
            lines.append(f"  {label:<20}" + "".join(f"{cell:>28}" for cell in cells))
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
