"""The same trials by Ray Tune + transformers' Trainer + PEFT, and by lorafleet: makespans, start-up and training apart, ratio.

    python benchmarks/sweep_vs_ray_tune.py [--trials 32] [--steps 50] [--batch 8] [--concurrent 16] [--json]

Both run in a process of their own from a cold start on two compute threads: the peer two trials at a time with one thread each,
lorafleet two hosts with one thread each, whose packs hold `--concurrent` trials in all. Both have the same base, rows,
row order, initial weights, batch, steps and evaluations. Losses must agree within 1e-3 or the comparison is void (exit code 1).
The peer is used as its own documentation shows it: a function trainable per trial, which loads the base and trains.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import facts, test_data

MAX_LOSS_DIFFERENCE = 1e-3
EVAL_STEPS, MAX_LENGTH, NUM_TRAIN, NUM_VALID = 50, 160, 800, 64
PEER_EVAL_BATCH = 8


def points(count: int) -> list[dict[str, Any]]:
    """Return the trials' values: ranks, targets and learning rates drawn once with a fixed seed."""
    rng = random.Random(7)
    return [
        {
            "peft.r": rng.choice([4, 8, 16]),
            "alpha_over_r": 2,
            "peft.target_modules": rng.choice(["attention", "mlp", "all-linear"]),
            "training.learning_rate": round(10 ** rng.uniform(-3.3, -2.0), 6),
        }
        for _ in range(count)
    ]


def prepare(folder: Path, num_trials: int, num_steps: int, batch: int, concurrent: int) -> None:
    """Write rows, job.yaml and sweep.yaml."""
    source = test_data() / "sets/snips/customers/get-weather"
    for split, count in (("train", NUM_TRAIN), ("valid", NUM_VALID)):
        lines = (source / f"{split}.jsonl").read_text().splitlines()[:count]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    job = {
        "tenant": "bench",
        "task": "weather",
        "base_model": {"name_or_path": str(test_data() / "bases/stories260k")},
        "data": {"train": "train.jsonl", "validation": "valid.jsonl"},
        "training": {
            "max_steps": num_steps,
            "per_device_train_batch_size": batch,
            "eval_steps": EVAL_STEPS,
            "max_length": MAX_LENGTH,
            "keep": "last",
        },
    }
    sweep = {
        "name": "bench",
        "job": "job.yaml",
        "sampler": {"type": "random", "seed": 0},
        "num_trials": num_trials,
        "max_concurrent": concurrent,
        "enqueue": points(num_trials),
        "space": {
            "peft.r": {"type": "categorical", "choices": [4, 8, 16]},
            "alpha_over_r": {"type": "categorical", "choices": [2]},
            "peft.target_modules": {"type": "categorical", "choices": ["attention", "mlp", "all-linear"]},
            "training.learning_rate": {"type": "float", "low": 1e-4, "high": 2e-2, "log": True},
        },
    }
    (folder / "job.yaml").write_text(json.dumps(job))
    (folder / "sweep.yaml").write_text(json.dumps(sweep))


def run_ours(folder: Path) -> dict[str, Any]:
    """Run `lorafleet sweep run` and read what its ledger says of the trials."""
    started = time.time()
    command = [sys.executable, "-m", "pipelines.cli", "sweep", "run", str(folder / "sweep.yaml"), "--json"]
    environment = {**os.environ, "LORAFLEET_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    makespan = time.time() - started
    trials = sorted(
        (json.loads(path.read_text()) for path in (folder / "home/store/tenants/bench/sweeps/bench/trials").glob("*.json")),
        key=lambda trial: trial["number"],
    )
    return {
        "makespan": makespan,
        "before_first": min(trial["started"] for trial in trials) - started,
        "training": sum(trial["seconds"] for trial in trials),
        "losses": [trial["metrics"]["eval/loss"] for trial in trials],
        "num_tokens": sum(trial["num_tokens"] for trial in trials),
    }


def run_peer(folder: Path, num_trials: int, num_steps: int, batch: int) -> dict[str, Any]:
    """Run the peer in a process of its own."""
    started = time.time()
    options = {"--peer": folder, "--trials": num_trials, "--steps": num_steps, "--batch": batch}
    command = [sys.executable, __file__, *(str(part) for option in options.items() for part in option)]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=sys.stderr)
    makespan = time.time() - started
    results = json.loads((folder / "peer.json").read_text())
    return {
        "makespan": makespan,
        "before_first": min(result["begun"] for result in results) - started,
        "loading": sum(result["loaded"] - result["begun"] for result in results),
        "training": sum(result["trained"] - result["loaded"] for result in results),
        "losses": [result["loss"] for result in results],
    }


def peer_main(folder: Path, num_trials: int, num_steps: int, batch: int) -> None:
    """The peer's driver: Ray Tune over a function trainable."""
    import ray
    from ray import tune

    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    space = {"point": tune.grid_search([json.dumps(point) for point in points(num_trials)])}
    fixed = {"folder": str(folder), "num_steps": num_steps, "batch": batch}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(peer_trial, fixed=fixed), {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(max_concurrent_trials=2),
        run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0),
    )
    found = {result.config["point"]: result.metrics for result in tuner.fit()}
    ordered = [found[json.dumps(point)] for point in points(num_trials)]
    (folder / "peer.json").write_text(
        json.dumps([{key: row[key] for key in ("begun", "loaded", "trained", "loss")} for row in ordered])
    )


def peer_trial(config: dict[str, Any], fixed: dict[str, Any]) -> None:
    """One trial of the peer: load the base, wrap it with PEFT, train with Trainer, report."""
    begun = time.time()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from peft import LoraConfig, get_peft_model
    from ray import tune
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    torch.set_num_threads(1)
    point = json.loads(config["point"])
    folder, batch = Path(fixed["folder"]), fixed["batch"]
    base = test_data() / "bases/stories260k"
    train, valid = (_examples(base, folder / f"{split}.jsonl") for split in ("train", "valid"))
    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    modules = _modules(model, point["peft.target_modules"])
    config_ = LoraConfig(r=point["peft.r"], lora_alpha=2 * point["peft.r"], target_modules=modules, task_type="CAUSAL_LM")
    model = get_peft_model(model, config_)
    _same_start(model, modules, point["peft.r"])
    arguments = TrainingArguments(
        output_dir=str(folder / "out" / tune.get_context().get_trial_id()),
        max_steps=fixed["num_steps"],
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=PEER_EVAL_BATCH,
        learning_rate=point["training.learning_rate"],
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=EVAL_STEPS,
        save_strategy="steps",
        save_steps=EVAL_STEPS,
        save_total_limit=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_num_workers=0,
        label_names=["labels"],
        average_tokens_across_devices=False,
    )
    trainer = _trainer_class(Trainer, len(train), batch)(
        model=model, args=arguments, train_dataset=train, eval_dataset=valid, data_collator=_collate
    )
    loaded = time.time()
    trainer.train()
    model.save_pretrained(arguments.output_dir, save_embedding_layers=False)
    trained = time.time()
    tune.report({"begun": begun, "loaded": loaded, "trained": trained, "loss": _loss_per_token(model, valid)})


def _trainer_class(trainer: type, num_rows: int, batch: int) -> type:
    """Return Trainer with the row order of lorafleet, so that both see the same batches."""
    from workers.engine.batches import rows_of_step
    from workers.spec import TrainingSpec

    class SameOrder(trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any) -> list[int]:
            spec = TrainingSpec(per_device_train_batch_size=batch)
            return [row for step in range(num_rows // batch) for rows in rows_of_step(spec, num_rows, step) for row in rows]

    return SameOrder


def _same_start(model: Any, modules: list[str], r: int) -> None:
    """Give PEFT's factors the initial weights of lorafleet."""
    import torch

    from workers.engine.dropout import generator_of
    from workers.engine.lora import initial_a

    with torch.no_grad():
        for name in modules:
            layer = model.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(initial_a(r, layer.in_features, generator_of("init", 0, name)))


def _modules(model: Any, preset: str) -> list[str]:
    from torch import nn

    from workers.targets import can_be_adapted, select_targets

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and can_be_adapted(name)]
    return select_targets(preset, names)


def _examples(base: Path, path: Path) -> list[dict[str, list[int]]]:
    from workers.data.render import Renderer
    from workers.data.splits import load_splits
    from workers.data.tokenizer import load_tokenizer
    from workers.spec import DataSpec

    rows = load_splits(DataSpec(train=str(path)), path.parent).train
    examples = Renderer(load_tokenizer(base), MAX_LENGTH, context_length=512).render_all(rows)
    return [
        {
            "input_ids": one.input_ids,
            "labels": [token if target else -100 for token, target in zip(one.input_ids, one.supervised, strict=True)],
        }
        for one in examples
    ]


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    import torch

    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> Any:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def _loss_per_token(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Nats per supervised token over all rows: Trainer's own eval_loss is a mean over batches."""
    import torch

    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), PEER_EVAL_BATCH):
            batch = _collate(rows[start : start + PEER_EVAL_BATCH])
            targets = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].float()
            flat = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="sum")
            total, count = total + float(flat), count + int((targets != -100).sum())
    return total / count


def main() -> int:
    """Run both, print a table, and return 1 if the losses do not agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--concurrent", type=int, default=16, help="trials that lorafleet trains at a time")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer is not None:
        peer_main(options.peer, options.trials, options.steps, options.batch)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.trials, options.steps, options.batch, options.concurrent)
        ours = run_ours(folder)
        peer = run_peer(folder, options.trials, options.steps, options.batch)
    difference = max(abs(a - b) for a, b in zip(ours["losses"], peer["losses"], strict=True))
    tokens = ours["num_tokens"] / options.trials / options.steps
    result = {
        "facts": facts("torch", "transformers", "peft", "ray", "optuna", "lorafleet"),
        "setting": f"stories260k (width 64), SNIPS get-weather, {options.trials} trials x {options.steps} steps, "
        f"batch {options.batch}, "
        f"{tokens:.0f} tokens per step, evaluation every {EVAL_STEPS} steps on {NUM_VALID} rows; "
        f"the peer 2 at a time, lorafleet {options.concurrent} on 2 hosts, 1 thread each",
        "lorafleet": ours,
        "ray_tune_trainer_peft": peer,
        "ratio_makespan": peer["makespan"] / ours["makespan"],
        "ratio_training": peer["training"] / ours["training"],
        "largest_loss_difference": difference,
    }
    print(json.dumps(result, indent=2) if options.json else _table(result))
    return 0 if difference <= MAX_LOSS_DIFFERENCE else 1


def _table(result: dict[str, Any]) -> str:
    ours, peer = result["lorafleet"], result["ray_tune_trainer_peft"]
    lines = [", ".join(f"{key} {value}" for key, value in result["facts"].items()), result["setting"], ""]
    lines.append(f"{'seconds':<34}{'lorafleet':>12}{'peer':>12}")
    for label, key in (("makespan, cold start to end", "makespan"), ("  until the first trial", "before_first")):
        lines.append(f"{label:<34}{ours[key]:>12.1f}{peer[key]:>12.1f}")
    lines.append(f"{'  loading, summed over trials':<34}{'in training':>12}{peer['loading']:>12.1f}")
    lines.append(f"{'  training, summed over trials':<34}{ours['training']:>12.1f}{peer['training']:>12.1f}")
    lines.append("")
    lines.append(f"ratio of makespans {result['ratio_makespan']:.2f}, of training {result['ratio_training']:.2f}")
    lines.append(f"largest difference of a trial's loss {result['largest_loss_difference']:.2e} (allowed {MAX_LOSS_DIFFERENCE})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
