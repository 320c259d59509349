"""A night over many small customers: customers per hour against one process per customer, what is spent beside training, memory.

    python benchmarks/night.py [--customers 1000] [--sample 20] [--rows 100 300] [--epochs 1] [--folder FOLDER] [--json]

Customers have 100 to 300 rows of the demo's text and one base, the demo's, which is kept in `--folder`. `lorafleet nightly run`
runs with its defaults: Ray, a local store, MLflow on SQLite, one host per core with one thread each. Its time is that of the
whole command from a cold start.

The peer trains `--sample` of the customers as `night_trainer.py` does: a fresh process for each, two at a time with one thread
each, Trainer with PEFT on the same base, rows, row order and initial weights, steps, batch and learning rate, and the loss on the
same held-out rows. Losses must agree within 1e-2 or the comparison is void (exit code 1).

What a trained customer costs beside training is the wall time of the night less the time a host spends in passes, and by stage
the time that the driver spends, in all of its threads. Memory is sampled every second.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import ROOT, facts
from infra.local_storage import LocalStorage
from pipelines.demo_base import ensure_demo_base
from pipelines.demo_text import CUSTOMERS, customer_rows, write_jsonl
from pipelines.nightly.ledger import FleetLedger
from pipelines.nightly.records import Row
from workers.data.store import load_rows

MAX_LOSS_DIFFERENCE = 1e-2
FLEET, TASK = "bench", "answers"
RANK, BATCH, LEARNING_RATE, MAX_LENGTH = 8, 8, 5e-3, 96
PEERS_AT_A_TIME = 2
"""As many as the night has hosts on two cores."""
SAMPLE_SECONDS = 1.0
MIB = 1 << 20


def main() -> int:
    """Run the night and the peer, print the figures, and return 1 if the losses do not agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--customers", type=int, default=1000)
    parser.add_argument("--sample", type=int, default=20, help="customers that the peer trains too; 0 leaves it out")
    parser.add_argument("--rows", type=int, nargs=2, default=[100, 300], metavar=("FEWEST", "MOST"), help="of a customer")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/lorafleet-benchmarks", help="where the base is kept")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    base = ensure_demo_base(options.folder.absolute(), lambda line: print(line, file=sys.stderr))
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        ground = Ground(Path(name), base, options.epochs, *options.rows)
        ground.write(options.customers)
        ours = run_night(ground)
        peer = run_peer(ground, options.sample) if options.sample else None
    result = {
        "facts": facts("lorafleet", "torch", "transformers", "peft", "ray", "mlflow"),
        "setting": f"{options.customers} customers of {ground.fewest_rows} to {ground.most_rows} rows on the demo's base, "
        f"{options.epochs:g} epochs in batches of {BATCH}, rank {RANK} on all linears; the load before was {load:.2f}",
        "lorafleet": ours,
        "trainer_peft": peer,
        "ratio_customers_per_hour": peer and ours["customers_per_hour"] / peer["customers_per_hour"],
    }
    print(json.dumps(result, indent=2) if options.json else table(result))
    agrees = peer is None or peer["largest_loss_difference"] <= MAX_LOSS_DIFFERENCE
    return 0 if agrees and ours["counts"]["failed"] == 0 else 1


@dataclass(frozen=True)
class Ground:
    """A fleet's folder and home."""

    folder: Path
    base: Path
    epochs: float
    fewest_rows: int = 100
    most_rows: int = 300

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def write(self, number: int) -> None:
        """Write customers, job and fleet."""
        rng = random.Random(0)
        for index in range(number):
            kind = CUSTOMERS[index % len(CUSTOMERS)]
            place = self.folder / "customers" / f"{kind}-{index:05d}"
            place.mkdir(parents=True)
            write_jsonl(place / "rows.jsonl", customer_rows(kind, index, rng.randint(self.fewest_rows, self.most_rows)))
        job = {
            "tenant": "any",
            "task": TASK,
            "base_model": {"name_or_path": str(self.base)},
            "data": {"train": "put in by the fleet"},
            "peft": {"r": RANK, "lora_alpha": 2 * RANK},
            "training": {
                "num_train_epochs": self.epochs,
                "per_device_train_batch_size": BATCH,
                "learning_rate": LEARNING_RATE,
                "max_length": MAX_LENGTH,
                "keep": "last",
            },
        }
        fleet = {
            "name": FLEET,
            "defaults": {"job": "job.yaml", "gates": None},
            "customers": [{"discover": "customers/{tenant}/"}],
        }
        (self.folder / "job.yaml").write_text(json.dumps(job))
        (self.folder / "fleet.yaml").write_text(json.dumps(fleet))


# The night.


def run_night(ground: Ground) -> dict[str, Any]:
    """Run the night in a process of its own and return what it took."""
    watched = ground.folder / "watched.json"
    command = [sys.executable, str(ROOT / "benchmarks/night_watch.py"), str(ground.folder / "fleet.yaml"), str(watched)]
    environment = {**os.environ, "LORAFLEET_HOME": str(ground.home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = time.time()
    with subprocess.Popen(command, env=environment, stdout=sys.stderr) as process:
        memory = Memory(psutil.Process(process.pid))
        while process.poll() is None:
            memory.look()
            time.sleep(SAMPLE_SECONDS)
    seconds = time.time() - started
    if not watched.exists():
        sys.exit(f"the night ended with exit code {process.returncode} before its end.")
    found = json.loads(watched.read_text())
    number = sum(found["counts"].values()) - found["counts"]["skipped"]
    ended = found["finished"]
    return {
        "seconds": seconds,
        "customers_per_hour": 3600 * number / seconds,
        "before_first": ended[0] - started,
        "training": ended[-1] - ended[0],
        "after_last": started + seconds - ended[-1],
        "counts": found["counts"],
        "notes": found["notes"],
        "overhead": overhead_of(found, seconds, number),
        "cpu_ms_per_customer": {role: 1000 * spent / number for role, spent in memory.cpu_seconds().items()},
        "memory": memory.growth(ended[0], ended[-1]),
    }


def overhead_of(found: dict[str, Any], seconds: float, number: int) -> dict[str, Any]:
    """Return milliseconds per customer beside training: amortised, of the driver by customer, and of the driver by stage."""
    busy = list(found["busy"].values())
    customers = sorted(found["customers"].values())
    steady = found["finished"][-1] - found["finished"][0]
    return {
        "amortised_ms": 1000 * (seconds - statistics.mean(busy)) / number,
        "amortised_while_training_ms": 1000 * max(0.0, steady - statistics.mean(busy)) / number,
        "driver_p50_ms": 1000 * quantile(customers, 0.5),
        "driver_p99_ms": 1000 * quantile(customers, 0.99),
        "busy_seconds_of_hosts": busy,
        "stages_ms": {stage: 1000 * spent / number for stage, spent in sorted(found["stages"].items())},
        "stages_cpu_ms": {stage: 1000 * spent / number for stage, spent in sorted(found["cpu"].items())},
        "stages_calls": {stage: calls / number for stage, calls in sorted(found["calls"].items())},
    }


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which a share of the sorted values lies."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass
class Memory:
    """Resident memory and processor time of a process and its descendants, as looked at now and then."""

    driver: psutil.Process
    samples: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    """(seconds since the epoch, bytes) by who it is."""
    spent: dict[int, tuple[str, float]] = field(default_factory=dict)
    """Who it is and its processor seconds, by process."""

    def look(self) -> None:
        """Take a sample."""
        now = time.time()
        try:
            every = [self.driver, *self.driver.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for one in every:
            try:
                who = "driver" if one.pid == self.driver.pid else role_of(one)
                times, size = one.cpu_times(), one.memory_info().rss
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            if who is not None:
                self.samples[who].append((now, size))
                self.spent[one.pid] = who, times.user + times.system

    def cpu_seconds(self) -> dict[str, float]:
        """Return processor seconds by role, of each task apart: hosts first, the scorer last."""
        total: dict[str, float] = defaultdict(float)
        for who, seconds in self.spent.values():
            total[who] += seconds
        return dict(total)

    def growth(self, since: float, until: float) -> dict[str, dict[str, float]]:
        """Return, of driver and tasks, MiB over the first and the last third of a time, and at most."""
        third = (until - since) / 3
        found = {}
        for who, samples in self.samples.items():
            if who.partition(" ")[0] not in ("driver", "task"):
                continue
            first = [size for at, size in samples if since <= at <= since + third]
            last = [size for at, size in samples if until - third <= at <= until]
            if first and last:
                before, after = statistics.median(first) / MIB, statistics.median(last) / MIB
                most = max(size for _, size in samples) / MIB
                found[who] = {"first_third_mib": before, "last_third_mib": after, "growth_mib": after - before, "most_mib": most}
        return found


def role_of(process: psutil.Process) -> str | None:
    """Tell tasks that lorafleet launched (hosts and the scorer, each by itself), Ray's own processes, and others.

    None: it is about to end, and its memory is gone.
    """
    words = " ".join(process.cmdline())
    if "Runner" in words:
        return f"task {process.pid}"
    return ("ray" if "ray" in words else "other") if words else None


# The peer.


def run_peer(ground: Ground, number: int) -> dict[str, Any]:
    """Have the peer train some of the customers, spread over the fleet."""
    store = LocalStorage(ground.home / "store")
    ledger = FleetLedger(store, FLEET)
    rows = sorted(ledger.outcomes(ledger.nights()[-1]).values(), key=lambda row: row.tenant)
    trained = [row for row in rows if row.challenger is not None]
    chosen = trained[:: max(1, len(trained) // number)][:number]
    start = ground.folder / "start.safetensors"
    write_start(ground.base, start)
    folders = [write_peer(ground, store, row, start) for row in chosen]
    started, before = time.time(), os.times()
    with ThreadPoolExecutor(PEERS_AT_A_TIME) as pool:
        results = list(pool.map(train_one, folders))
    seconds, after = time.time() - started, os.times()
    cpu_seconds = after.children_user + after.children_system - before.children_user - before.children_system
    differences = [abs(result["loss"] - (row.challenger or 0.0)) for result, row in zip(results, chosen, strict=True)]
    assert [result["num_steps"] for result in results] == [row.num_steps for row in chosen], "the steps differ"
    return {
        "customers": len(chosen),
        "seconds": seconds,
        "customers_per_hour": 3600 * len(chosen) / seconds,
        "cpu_ms_per_customer": 1000 * cpu_seconds / len(chosen),
        "seconds_of_a_customer": {
            "process": PEERS_AT_A_TIME * seconds / len(chosen),
            "training": statistics.mean(result["trained"] - result["loaded"] for result in results),
        },
        "largest_loss_difference": max(differences),
        "losses": [result["loss"] for result in results],
    }


def write_peer(ground: Ground, store: LocalStorage, row: Row, start: Path) -> Path:
    """Write what the peer needs for one customer."""
    from workers.engine.batches import rows_of_step
    from workers.spec import TrainingSpec

    assert row.train_digest is not None
    assert row.holdout_digest is not None
    folder = ground.folder / "peer" / row.tenant
    folder.mkdir(parents=True)
    train = load_rows(store, row.tenant, row.train_digest)
    write_jsonl(folder / "train.jsonl", [one.body for one in train])
    write_jsonl(folder / "holdout.jsonl", [one.body for one in load_rows(store, row.tenant, row.holdout_digest)])
    spec = TrainingSpec(per_device_train_batch_size=BATCH)
    steps = [rows_of_step(spec, len(train), step) for step in range(row.num_steps)]
    (folder / "order.json").write_text(json.dumps([number for step in steps for rows in step for number in rows]))
    setting = {
        "base": str(ground.base),
        "start": str(start),
        "num_steps": row.num_steps,
        "batch": BATCH,
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "learning_rate": LEARNING_RATE,
        "max_length": MAX_LENGTH,
    }
    (folder / "setting.json").write_text(json.dumps(setting))
    return folder


def write_start(base: Path, path: Path) -> None:
    """Write the initial factors A, which are the same for all customers: they follow from the seed."""
    from safetensors.torch import save_file
    from torch import nn
    from transformers import AutoModelForCausalLM

    from workers.engine.dropout import generator_of
    from workers.engine.lora import initial_a
    from workers.targets import can_be_adapted

    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    layers = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and can_be_adapted(name)}
    save_file({name: initial_a(RANK, one.in_features, generator_of("init", 0, name)) for name, one in layers.items()}, path)


def train_one(folder: Path) -> dict[str, Any]:
    """Let the peer train one customer in a fresh process."""
    command = [sys.executable, str(ROOT / "benchmarks/night_trainer.py"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"the peer failed: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def table(result: dict[str, Any]) -> str:
    """Return the figures as lines."""
    ours = result["lorafleet"]
    lines = [", ".join(f"{key} {value}" for key, value in result["facts"].items()), result["setting"], ""]
    lines.append(f"lorafleet {ours['customers_per_hour']:.0f} customers per hour ({ours['counts']})")
    lines.append(f"  {ours['seconds']:.1f} s, of which {ours['before_first']:.1f} before the first was trained")
    lines[-1] += f" and {ours['after_last']:.1f} after the last was"
    if result["trainer_peft"] is not None:
        lines += peer_lines(result)
    return "\n".join([*lines, "", *overhead_lines(ours), "", *memory_lines(ours)])


def peer_lines(result: dict[str, Any]) -> list[str]:
    """Return the peer's figures, and the ratio."""
    peer = result["trainer_peft"]
    each = peer["seconds_of_a_customer"]
    return [
        f"Trainer + PEFT {peer['customers_per_hour']:.0f} customers per hour ({peer['customers']} in {peer['seconds']:.1f} s)",
        f"  a process takes {each['process']:.1f} s, of which training {each['training']:.1f}; processor ms per customer: "
        f"{peer['cpu_ms_per_customer']:.0f}",
        f"ratio {result['ratio_customers_per_hour']:.1f}; largest difference of a loss {peer['largest_loss_difference']:.1e} "
        f"(allowed {MAX_LOSS_DIFFERENCE})",
    ]


def overhead_lines(ours: dict[str, Any]) -> list[str]:
    """Return what is spent beside training."""
    over = ours["overhead"]
    cpu = ", ".join(f"{role} {ms:.0f}" for role, ms in ours["cpu_ms_per_customer"].items())
    lines = [
        f"beside training, ms per customer: {over['amortised_ms']:.0f} of the whole command, "
        f"{over['amortised_while_training_ms']:.0f} between the first and the last end of a training",
        f"in the driver, ms: p50 {over['driver_p50_ms']:.0f}, p99 {over['driver_p99_ms']:.0f}",
        f"processor ms per customer: {cpu}",
        f"{'stage of the driver':<22}{'ms':>8}{'cpu ms':>8}{'calls':>8}",
    ]
    for stage, ms in over["stages_ms"].items():
        lines.append(f"{stage:<22}{ms:>8.1f}{over['stages_cpu_ms'][stage]:>8.1f}{over['stages_calls'][stage]:>8.1f}")
    return lines


def memory_lines(ours: dict[str, Any]) -> list[str]:
    """Return how memory grew."""
    lines = [f"{'memory in MiB':<22}{'first third':>13}{'last third':>13}{'growth':>9}{'most':>9}"]
    for who, sizes in ours["memory"].items():
        first, last = sizes["first_third_mib"], sizes["last_third_mib"]
        lines.append(f"{who:<22}{first:>13.1f}{last:>13.1f}{sizes['growth_mib']:>9.1f}{sizes['most_mib']:>9.1f}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
