"""Three nights over real customers whose data grows by the day: what is trained, promoted, rejected, held and skipped, and why.

    python benchmarks/three_nights.py [--folder DIR] [--max-steps 60] [--rows 300] [--json]

Four customers of SNIPS and twenty services of SGD share one small base (stories260k). Each night is `lorafleet nightly run`, as
cron would start it. Between the nights rows are added for everybody but three. For the second night one customer, who has test
rows of its own, sends answers that belong to other questions, which the gates should notice; afterwards one is rolled back by
hand. For the third night one customer takes rows back, and one loses nearly all of them by mistake.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import facts, test_data

SHARES = (0.6, 0.8, 1.0)
"""Of a customer's rows that it has sent by each night."""
UNCHANGED = {"snips-add-to-playlist", "sgd-media-1", "sgd-homes-1"}
SCRAMBLED, ROLLED_BACK, TAKES_BACK, COLLAPSED = "snips-play-music", "snips-rate-book", "sgd-events-1", "sgd-movies-1"
TASK = "answers"
TOLD = ("status", "reason", "sentence", "challenger", "champion", "base", "generation")

JOB = """\
tenant: any
task: {task}
base_model: {{name_or_path: {base}}}
data: {{train: any, validation_split: 0.1}}
peft: {{r: 8, lora_alpha: 16}}
training: {{max_steps: {steps}, learning_rate: 5.0e-3, per_device_train_batch_size: 8, max_length: 256, eval_steps: 20}}
"""
FLEET = """\
name: real
defaults: {job: job.yaml, gates: gates.yaml, min_new_rows: 10}
customers:
  - {discover: "data/{tenant}/"}
limits: {max_promotions_share: 0.9}
"""
GATES = """\
- {kind: better_than_champion, metric: eval/loss, min_effect: 0.01, confidence: 0.95}
- {kind: better_than_base, metric: eval/loss}
- {kind: effect}
"""


def write_fleet(folder: Path, base: Path, steps: int) -> None:
    """Write the files of the fleet but for its data."""
    (folder / "job.yaml").write_text(JOB.format(task=TASK, base=base, steps=steps))
    (folder / "fleet.yaml").write_text(FLEET)
    (folder / "gates.yaml").write_text(GATES)


def rows_by_tenant(data: Path, most: int) -> dict[str, list[dict[str, Any]]]:
    """Return the training rows of all customers, `most` each."""
    found = {}
    for name in ("snips", "sgd"):
        for customer in sorted((data / "sets" / name / "customers").iterdir()):
            lines = (customer / "train.jsonl").read_text().splitlines()[:most]
            found[f"{name}-{customer.name}"] = [json.loads(line) for line in lines]
    return found


def scrambled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with each other's answers."""
    answers = [row["messages"][-1]["content"] for row in rows]
    random.Random(0).shuffle(answers)
    return [
        {"messages": [*row["messages"][:-1], {"role": "assistant", "content": answer}]}
        for row, answer in zip(rows, answers, strict=True)
    ]


def send(folder: Path, data: Path, customers: dict[str, list[dict[str, Any]]], night: int, most: int) -> None:
    """Write what customers have sent by a night (0, 1, 2); files of those who sent nothing new stay as they are."""
    for tenant, rows in customers.items():
        if night and tenant in UNCHANGED:
            continue
        sent = rows[: int(len(rows) * SHARES[night])]
        if tenant == SCRAMBLED:
            own = data / "sets" / "snips" / "customers" / tenant.removeprefix("snips-") / "test.jsonl"
            _write(folder / tenant / "test.jsonl", [json.loads(line) for line in own.read_text().splitlines()[: most // 4]])
            sent = scrambled(sent) if night == 1 else sent
        if tenant == TAKES_BACK and night == 2:
            sent = sent[20:]
        if tenant == COLLAPSED and night == 2:
            sent = sent[:12]
        _write(folder / tenant / "train.jsonl", sent)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as cron does."""
    environment = os.environ | {"LORAFLEET_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *words], cwd=folder, env=environment, capture_output=True, text=True
    )


def run_night(folder: Path) -> dict[str, Any]:
    """Run one night; return what its report says."""
    started = time.monotonic()
    done = command(folder, "nightly", "run", "fleet.yaml", "--json")
    if done.returncode not in (0, 1) or not done.stdout.strip():
        sys.exit(f"the night ended with {done.returncode}: {done.stderr[-2000:]}")
    report = json.loads(done.stdout)
    trained = [row for row in report["customers"] if row["num_steps"]]
    return {
        "night": report["night"],
        "exit_code": done.returncode,
        "seconds": time.monotonic() - started,
        "counts": report["counts"],
        "reasons": report["reasons"],
        "num_tokens": report["summary"]["num_tokens"],
        "mean_gain": report["summary"]["mean_gain"],
        "trained": len(trained),
        "told": {
            row["name"]: {
                key: row[key] for key in ("status", "reason", "sentence", "challenger", "champion", "base", "generation")
            }
            for row in report["customers"]
            if row["tenant"] in {SCRAMBLED, ROLLED_BACK, TAKES_BACK, COLLAPSED} | UNCHANGED or row["status"] in ("failed", "held")
        },
    }


def main() -> int:
    """Run the nights and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=None, help="where files, store and pages are kept; a new one by default")
    parser.add_argument("--max-steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=300, help="of each customer at most")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    data = test_data()
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="three-nights-"))).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_fleet(folder, data / "bases" / "stories260k", options.max_steps)
    customers = rows_by_tenant(data, options.rows)
    nights = []
    for night in range(len(SHARES)):
        send(folder / "data", data, customers, night, options.rows)
        nights.append(run_night(folder))
        if night == 1:
            rolled = command(folder, "rollback", f"{ROLLED_BACK}.{TASK}", "--reason", "a customer complained")
            nights[-1]["rolled_back"] = {"exit_code": rolled.returncode, "said": (rolled.stdout or rolled.stderr).strip()}
    history = json.loads(command(folder, "history", f"{ROLLED_BACK}.{TASK}", "--json").stdout)
    result = {
        "facts": facts("torch", "transformers", "peft", "ray", "mlflow", "lorafleet"),
        "setting": f"{len(customers)} customers of SNIPS and SGD, {options.rows} rows at most, {options.max_steps} steps each",
        "nights": nights,
        "history_of_rolled_back": [{key: one[key] for key in ("generation", "kind", "adapter_id", "actor")} for one in history],
    }
    print(json.dumps(result, indent=2) if options.json else _text(result, folder))
    return 0


def _text(result: dict[str, Any], folder: Path) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in result["facts"].items()), result["setting"], ""]
    for night in result["nights"]:
        counts = ", ".join(f"{count} {status}" for status, count in night["counts"].items() if count)
        lines.append(f"night {night['night']}: {counts}; {night['trained']} trained, {night['seconds']:.0f} s")
        lines += [f"    {name}: {row['status']} ({row['reason']}) {row['sentence']}" for name, row in night["told"].items()]
        if "rolled_back" in night:
            lines.append(f"    by hand: {night['rolled_back']['said']}")
    lines += [
        "",
        *(f"generation {one['generation']}: {one['kind']} by {one['actor']}" for one in result["history_of_rolled_back"]),
    ]
    return "\n".join([*lines, f"pages in {folder / 'home' / 'nights' / 'real'}"])


if __name__ == "__main__":
    sys.exit(main())
