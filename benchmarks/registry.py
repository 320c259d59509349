"""What many registered models cost: looking an alias up, promoting and rolling back, with few models in the store and with many.

    python benchmarks/registry.py [--models 10000] [--few 10] [--mlflow 200] [--rounds 200] [--json]

Models lie in a local store, 100 of a tenant, each with a champion and a challenger (tiny adapters, whose bytes are checked at
promotion as always). MLflow on SQLite shows a sample of them: its time grows by statements per model, and ten thousand would take
an hour. Times are medians and 95th percentiles in this process, over models drawn at random; the last column is the median over
the one with few models.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import facts
from infra.fingerprint import id_of_bytes
from infra.local_storage import LocalStorage
from infra.mlflow_registry import ModelRegistry
from pipelines.journal import Candidate, Change, commit, read_head, register_candidate
from pipelines.projection import project
from pipelines.promote import promote, rollback
from pipelines.references import find_reference
from workers.adapter import A_SUFFIX, B_SUFFIX, PREFIX, lora_config, make_adapter
from workers.adapter_store import store_adapter

TASKS_PER_TENANT = 100
BASE_ID = id_of_bytes(b"a base that nobody loads")
NUM_WRITERS = 16
"""Fill the stores at the same time: a disk makes each of them wait for what it has written."""
MODULE, WIDTH = "model.layers.0.self_attn.q_proj", 64

Model = tuple[str, str]


def main() -> None:
    """Fill two stores, measure both, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--few", type=int, default=10)
    parser.add_argument("--mlflow", type=int, default=200, help="models that MLflow shows")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        few = Registered(Path(scratch) / "few", options.few)
        many = Registered(Path(scratch) / "many", options.models)
        rows = [
            {"what": what, "few": a, "many": b}
            for (what, a), (_, b) in zip(few.measured(options), many.measured(options), strict=True)
        ]
        found = {
            "facts": facts("lorafleet", "mlflow", "torch"),
            "setting": f"{options.few} and {options.models} models, {options.rounds} rounds; MLflow with {options.mlflow} models",
            "fill_seconds_per_model": many.fill_seconds / options.models,
            "rows": rows,
            "mlflow": in_mlflow(many, options, Path(scratch)),
        }
    print(json.dumps(found, indent=2) if options.json else table(found))


class Registered:
    """A local store with so many registered models."""

    def __init__(self, folder: Path, number: int) -> None:
        self.store = LocalStorage(folder)
        self.models = [(f"tenant-{n // TASKS_PER_TENANT:04d}", f"task-{n % TASKS_PER_TENANT:03d}") for n in range(number)]
        started = time.perf_counter()
        self.adapters = {tenant: self._adapters_of(tenant) for tenant in dict.fromkeys(tenant for tenant, _ in self.models)}
        with ThreadPoolExecutor(NUM_WRITERS) as writers:
            list(writers.map(self._register, *zip(*self.models, strict=True)))
        self.fill_seconds = time.perf_counter() - started

    def _adapters_of(self, tenant: str) -> tuple[str, str]:
        number = int(tenant.rpartition("-")[2])
        first, second = (put_noise(self.store, tenant, 2 * number + seed) for seed in range(2))
        return first, second

    def _register(self, tenant: str, task: str) -> None:
        champion, challenger = self.adapters[tenant]
        change = Change(kind="promote", adapter_id=champion, base_id=BASE_ID, actor="benchmark", previous=None)
        commit(self.store, tenant, task, change, 0)
        register_candidate(self.store, tenant, task, Candidate(challenger, BASE_ID, None, None, {}, time.time()))

    def measured(self, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
        """Yield what was measured and its times."""
        draw = random.Random(0)
        chosen = [draw.choice(self.models) for _ in range(options.rounds)]
        yield "alias to adapter", timed(chosen, lambda tenant, task: find_reference(self.store, f"{tenant}.{task}@champion"))
        yield "head of the journal", timed(chosen, lambda tenant, task: read_head(self.store, tenant, task))
        of_tenant = lambda tenant, task: find_reference(self.store, self.adapters[tenant][0][:10], tenant)  # noqa: E731
        yield "id prefix, tenant named", timed(chosen[:20], of_tenant)
        yield (
            "id prefix, any tenant",
            timed(chosen[:5], lambda tenant, _: find_reference(self.store, self.adapters[tenant][0][:10])),
        )
        once = list(dict.fromkeys(chosen))
        yield "promote", timed(once, self._promote)
        yield "rollback", timed(once, lambda tenant, task: rollback(self.store, None, tenant, task, actor="benchmark"))

    def _promote(self, tenant: str, task: str) -> None:
        outcome = promote(self.store, None, f"{tenant}.{task}@challenger", actor="benchmark")
        assert outcome.changed


def put_noise(store: LocalStorage, tenant: str, seed: int) -> str:
    """Store a tiny adapter and return its id."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{PREFIX}{MODULE}{A_SUFFIX}": torch.randn(8, WIDTH, generator=generator),
        f"{PREFIX}{MODULE}{B_SUFFIX}": torch.randn(WIDTH, 8, generator=generator),
    }
    names = {"target_modules": ["q_proj"], "base_model_name_or_path": "base"}
    config = lora_config(r=8, lora_alpha=16, lora_dropout=0.0, use_rslora=False, **names)  # type: ignore[arg-type]
    return store_adapter(store, tenant, BASE_ID, make_adapter(config, tensors, "the benchmark"), {"prompt_contract": "p" * 32})


def in_mlflow(many: Registered, options: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Show a sample of the models in MLflow and look at it there."""
    registry = ModelRegistry(f"sqlite:///{folder}/mlflow.db")
    registry.check()
    sample = random.Random(1).sample(many.models, min(options.mlflow, len(many.models)))
    return {
        "first projection": timed(sample, lambda tenant, task: project(many.store, registry, tenant, task)),
        "projection of nothing new": timed(sample, lambda tenant, task: project(many.store, registry, tenant, task)),
        "aliases of a model": timed(sample, lambda tenant, task: registry.aliases(f"{tenant}.{task}")),
    }


def timed(models: list[Model], work: Callable[[str, str], Any]) -> dict[str, float]:
    """Return the median and the 95th percentile of `work` over the models, in milliseconds."""
    times = []
    for tenant, task in models:
        with stopwatch(times):
            work(tenant, task)
    times.sort()
    return {"median_ms": statistics.median(times), "p95_ms": times[int(0.95 * (len(times) - 1))], "rounds": len(times)}


@contextmanager
def stopwatch(times: list[float]) -> Iterator[None]:
    """Append the time that the block takes, in milliseconds."""
    started = time.perf_counter()
    yield
    times.append(1000.0 * (time.perf_counter() - started))


def table(found: dict[str, Any]) -> str:
    """Return the figures as lines."""
    lines = [found["setting"], f"{'ms (median, p95)':<28}{'few':>18}{'many':>18}{'ratio':>8}"]
    for row in found["rows"]:
        few, many = row["few"], row["many"]
        ratio = f"{many['median_ms'] / few['median_ms']:>8.2f}"
        lines.append(f"{row['what']:<28}{pair(few)}{pair(many)}{ratio}")
    lines += [f"{'MLflow: ' + what:<46}{pair(times)}" for what, times in found["mlflow"].items()]
    return "\n".join([*lines, f"{found['fill_seconds_per_model'] * 1000:.2f} ms to register a model", str(found["facts"])])


def pair(times: dict[str, float]) -> str:
    """Return median and 95th percentile."""
    return f"{times['median_ms']:>9.2f}{times['p95_ms']:>9.2f}"


if __name__ == "__main__":
    main()
