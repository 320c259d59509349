"""Two customers' adapters merged into one: combining their updates against adding their factors, on both customers' rows.

    python benchmarks/merging.py [--steps 150] [--rank 8] [--density 0.5] [--rows 100] [--base stories260k] [--json]

Both adapters are trained in one pack on SNIPS get-weather and add-to-playlist, then merged with equal weights: once as a mean
(each weight 1/2) and once as a sum (each weight 1). Rows printed, with the validation loss of each customer:
  plain base, and both adapters unmerged, each on its own and on the other's rows;
  PEFT's `add_weighted_adapter` as installed: linear, ties and dare_ties combine the factors A and B apart, its svd the updates;
  ours: in delta space, cut to the rank stated (cat and linear exact, the sparse methods also to the parents' rank).
The peer is PEFT; `ratio` is PEFT's mean loss over ours for the same method and weights (above 1: ours is better). For ties and
dare_ties weights mean other things: PEFT divides by the number of those that agree, so its sum is the paper's plain mean, which
is our mean. `error` is what the rank leaves out of the combined update, relative to it.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: its thread pool is made then
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # PEFT asks the hub about the base when it saves

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import PeftModel

from benchmarks.common import facts, test_data
from infra.strict import parse
from workers.adapter import Adapter, adapter_id, build_adapter
from workers.adapter_files import adapter_files, read_adapter_folder
from workers.data.rows import Row
from workers.data.splits import load_splits
from workers.engine.pack import Pack
from workers.evaluate import Bench
from workers.identity import identify
from workers.loading import load_model, quiet
from workers.merge_report import PairReport, compare
from workers.merging import Parent, Recipe, merge
from workers.spec import BaseModelSpec, DataSpec, EvaluationSpec, PeftSpec, TrainingSpec

CUSTOMERS = ("get-weather", "add-to-playlist")
MAX_LENGTH = 128
WEIGHTS = {"mean": (0.5, 0.5), "sum": (1.0, 1.0)}
PEERS = ("linear", "ties", "dare_linear", "dare_ties", "svd", "cat")
EXACT, SPARSE = ("cat", "linear", "svd"), ("ties", "dare_linear", "dare_ties")


def read_rows(customer: str, num_valid: int) -> tuple[list[Row], list[Row]]:
    """Return training and validation rows of a customer."""
    folder = test_data() / "sets" / "snips" / "customers" / customer
    splits = load_splits(parse(DataSpec, {"train": str(folder)}, "the benchmark"), Path.cwd())
    return splits.train, (splits.validation or [])[:num_valid]


def train(bench: Bench, rows: Mapping[str, list[Row]], options: argparse.Namespace) -> dict[str, Adapter]:
    """Train one adapter per customer, all in one pack."""
    peft = PeftSpec(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
    spec = TrainingSpec(learning_rate=5e-3, max_steps=options.steps, per_device_train_batch_size=8, max_length=MAX_LENGTH)
    pack = Pack(bench.base)
    trainings = {
        customer: pack.join(peft, spec.model_copy(update={"seed": seed}), bench.renderer.render_all(rows[customer]), [])
        for seed, customer in enumerate(rows)
    }
    while left := [training for training in trainings.values() if not training.is_done]:
        pack.advance(left)
    adapters = {
        customer: build_adapter(peft, bench.base.model, training.kept_tensors(), options.base)
        for customer, training in trainings.items()
    }
    for training in trainings.values():
        pack.leave(training)
    return adapters


def merge_with_peft(path: Path, adapters: Mapping[str, Adapter], options: argparse.Namespace) -> dict[tuple[str, str], Adapter]:
    """Return what PEFT's `add_weighted_adapter` makes of the adapters, by method and weights."""
    names = [customer.replace("-", "_") for customer in adapters]
    merged: dict[tuple[str, str], Adapter] = {}
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        folders = {name: write(Path(scratch) / name, adapter) for name, adapter in zip(names, adapters.values(), strict=True)}
        model = PeftModel.from_pretrained(load_model(path, plain(path)), folders[names[0]], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(folders[name], adapter_name=name)
        for label, weights in WEIGHTS.items():
            for method in PEERS:
                torch.manual_seed(0)  # DARE in PEFT has no seed of its own
                own, sparse = f"{method}_{label}", method in SPARSE
                density = {"density": options.density} if sparse else {}
                model.add_weighted_adapter(names, list(weights), own, combination_type=method, **density)
                model.save_pretrained(scratch, selected_adapters=[own], save_embedding_layers=False)
                merged[method, label] = read_adapter_folder(Path(scratch) / own)
    return merged


def write(folder: Path, adapter: Adapter) -> str:
    """Write an adapter as PEFT reads it."""
    folder.mkdir()
    for name, data in adapter_files(adapter).items():
        (folder / name).write_bytes(data)
    return str(folder)


def plain(path: Path) -> BaseModelSpec:
    """Return how the base is held: float32."""
    return BaseModelSpec(name_or_path=str(path))


def merge_ours(parents: Sequence[Parent], options: argparse.Namespace) -> list[tuple[str, str, Adapter, float]]:
    """Return method, weights, our merged adapter, and the error of its rank."""
    recipes = [(label, Recipe(method, weights)) for label, weights in WEIGHTS.items() for method in EXACT]
    for label, weights in WEIGHTS.items():
        for method in SPARSE:
            recipes += [(label, Recipe(method, weights, options.density, rank)) for rank in (None, options.rank)]
    results = [(label, recipe, merge(parents, recipe)) for label, recipe in recipes]
    return [(recipe.method, label, result.adapter, result.error) for label, recipe, result in results]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train, merge and measure; return what is printed."""
    started = time.time()
    path = test_data() / "bases" / options.base
    base_id = identify(path).base_id
    bench = Bench(path, plain(path), MAX_LENGTH)
    read = {customer: read_rows(customer, options.rows) for customer in CUSTOMERS}
    adapters = train(bench, {customer: rows for customer, (rows, _) in read.items()}, options)
    parents = [Parent(adapter_id(base_id, adapter), adapter) for adapter in adapters.values()]

    def row(who: str, method: str, weights: str, adapter: Adapter | None, error: float | None = None) -> dict[str, Any]:
        losses = {c: bench.evaluate(adapter, rows, EvaluationSpec())["eval/loss"] for c, (_, rows) in read.items()}
        rank = None if adapter is None else adapter.config["r"]
        mean = sum(losses.values()) / len(losses)
        return {"who": who, "method": method, "weights": weights, "r": rank, "error": error, "loss": losses, "mean": mean}

    rows = [row("base", "plain", "-", None), *(row("parent", name, "-", adapter) for name, adapter in adapters.items())]
    theirs = merge_with_peft(path, adapters, options)
    ours = merge_ours(parents, options)
    for label in WEIGHTS:
        rows += [row("peft", method, label, theirs[method, label]) for method in PEERS]
        rows += [row("ours", *found) for found in ours if found[1] == label]
    add_ratios(rows)
    return {
        "facts": facts("torch", "transformers", "peft", "lorafleet"),
        "setting": f"{options.base}, {options.steps} steps of 8 rows, r={options.rank}, all-linear, lr 5e-3, density "
        f"{options.density}, {options.rows} validation rows of each customer",
        "conflicts": conflicts(compare(*parents)),
        "rows": rows,
        "seconds": time.time() - started,
    }


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Set `ratio` of our rows: PEFT's mean loss by the same method and weights over ours."""
    peers = {(row["method"], row["weights"]): row["mean"] for row in rows if row["who"] == "peft"}
    for row in rows:
        key = (row["method"], row["weights"])
        row["ratio"] = peers[key] / row["mean"] if row["who"] == "ours" and key in peers else None


def conflicts(report: PairReport) -> dict[str, float]:
    """Return the report of the two adapters over all layers."""
    overlap_in, overlap_out = report.overlap
    return {
        "sign_conflicts": report.sign_conflicts,
        "cosine": report.cosine,
        "overlap_in": overlap_in,
        "overlap_out": overlap_out,
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as lines."""
    found = ", ".join(f"{name} {value:.3f}" for name, value in result["conflicts"].items())
    lines = [", ".join(f"{key} {value}" for key, value in result["facts"].items()), result["setting"], f"report: {found}", ""]
    lines.append(
        f"{'who':<8}{'method':<16}{'weights':<9}{'r':>4}{'error':>8}" + "".join(f"{c:>17}" for c in CUSTOMERS) + f"{'ratio':>8}"
    )
    for row in result["rows"]:
        error = "" if row["error"] is None else f"{row['error']:.3f}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        losses = "".join(f"{row['loss'][customer]:>17.4f}" for customer in CUSTOMERS)
        lines.append(f"{row['who']:<8}{row['method']:<16}{row['weights']:<9}{row['r'] or '':>4}{error:>8}{losses}{ratio:>8}")
    return "\n".join([*lines, "", f"{result['seconds']:.0f} seconds"])


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--rows", type=int, default=100, help="validation rows of each customer")
    parser.add_argument("--base", default="stories260k")
    parser.add_argument("--json", action="store_true")
    result = run(options := parser.parse_args())
    print(json.dumps(result, indent=2) if options.json else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
