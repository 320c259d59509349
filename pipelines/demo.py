"""`lorafleet demo`: the main job on nothing but what the project makes itself.

A small base is built once, three customers get data, twelve adapters are tried for one of them, the best is promoted, and a
table shows what it bought on rows nobody trained or selected on. The files it writes are those a person would write.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines import demo_text
from pipelines.demo_base import ensure_demo_base
from pipelines.evaluate import evaluate
from pipelines.live import duration, watching
from pipelines.promote import promote
from pipelines.sweep import SweepOutcome, run
from pipelines.workspace import Workspace

TENANT, TASK, SWEEP = "acme", "tickets", "acme-tickets"

JOB_YAML = """\
tenant: {tenant}
task: {task}
base_model: {{name_or_path: {base}}}
data: {{train: {data}}}          # a folder with train, valid and test .jsonl
training:
  max_steps: {steps}
  per_device_train_batch_size: 8
  eval_steps: 20
  max_length: 96
evaluation: {{generate: 80, max_new_tokens: 48, format_pattern: '{pattern}'}}
"""

SWEEP_YAML = """\
name: {sweep}
job: job.yaml
objective: {{metric: eval/loss, direction: minimize}}
sampler: {{type: tpe, seed: 0}}
pruner: {{type: asha, min_resource: 20, reduction_factor: 3}}
num_trials: {trials}
max_concurrent: 2
enqueue:                          # the usual default first, so that the report can say what the search bought
  - {{peft.r: 16, alpha_over_r: 2, peft.target_modules: all-linear, training.learning_rate: 2.0e-4}}
space:
  peft.r: {{type: categorical, choices: [4, 8, 16, 32]}}
  alpha_over_r: {{type: categorical, choices: [1, 2, 4]}}
  peft.target_modules: {{type: categorical, choices: [attention, mlp, all-linear]}}
  training.learning_rate: {{type: float, low: 1.0e-4, high: 1.5e-2, log: true}}
register: {{task: {task}, alias: challenger}}
"""
NUM_STEPS = 100
DATA_SEED = 1
"""The demo's tasks were made on the rows of seed 0; these were looked at by nobody."""


def run_demo(workspace: Workspace, num_trials: int, folder: Path | None, console: Console) -> None:
    """Run the demo from base to promotion; every part that is done already is not done again."""
    home = folder or workspace.settings.home / "demo"
    base = ensure_demo_base(home, lambda line: _say(console, line))
    tenants = demo_text.write_customers(home / "data", seed=DATA_SEED)
    _say(console, f"data for {', '.join(tenants)} in {home / 'data'}")
    sweep_file = _write_files(home, base, tenants[TENANT], num_trials)
    _say(console, f"sweeping {num_trials} trials for {TENANT}: {sweep_file}")
    with watching(console) as view:
        outcome = run(workspace, sweep_file, on_change=view.show)
    promoted = promote(
        workspace.store, workspace.services.registry(), _best_id(outcome), task=TASK, actor=workspace.actor, reason="demo"
    )
    _say(console, promoted.sentence)
    _show(console, workspace, outcome)


def _write_files(home: Path, base: Path, data: Path, num_trials: int) -> Path:
    pattern = demo_text.FORMAT_PATTERNS[TENANT]
    job = JOB_YAML.format(tenant=TENANT, task=TASK, base=base, data=data, steps=NUM_STEPS, pattern=pattern)
    (home / "job.yaml").write_text(job)
    sweep_file = home / "sweep.yaml"
    sweep_file.write_text(SWEEP_YAML.format(sweep=SWEEP, task=TASK, trials=num_trials))
    return sweep_file


def _best_id(outcome: SweepOutcome) -> str:
    assert outcome.result.best is not None
    assert outcome.result.best.adapter_id is not None
    return outcome.result.best.adapter_id


def _show(console: Console, workspace: Workspace, outcome: SweepOutcome) -> None:
    """Print what was bought, where it lies, and what to try next."""
    default = outcome.result.default.adapter_id if outcome.result.default is not None else None
    best = _best_id(outcome)
    references = [one for one in dict.fromkeys([default, best]) if one is not None]
    measured = evaluate(workspace, references)
    console.print(_table(measured, default, best))
    settings = workspace.settings.public()
    reference = f"{TENANT}.{TASK}@champion"
    me = "lorafleet" if shutil.which("lorafleet") else os.path.relpath(sys.argv[0])
    lines = [
        "The task is made for a base this small and 100 steps; the default's learning rate is meant for larger bases.",
        f"{outcome.result.num_trials} trials in {duration(outcome.result.seconds)}; adapters in {settings['store']}",
        f"report   {outcome.report}",
        f"MLflow   {Path(me).with_name('mlflow')} ui --backend-store-uri {settings['tracking_uri']}",
        f"next     {me} sweep status {TENANT}/{SWEEP}",
        f"         {me} generate {reference} --rows 3",
        f"         {me} history {TENANT}.{TASK}",
        f"         {me} adapters list",
    ]
    for line in lines:
        _say(console, line)


def _table(measured: dict[str, Any], default_id: str | None, best_id: str) -> Table:
    names = {None: "plain base", default_id: "default LoRA", best_id: "best of the sweep"}
    table = Table(title=f"{TENANT}: {measured['num_rows']} held-out rows ({measured['data']})", title_justify="left")
    table.add_column("")
    for column in ("exact match", "format valid", "loss", "perplexity"):
        table.add_column(column, justify="right")
    for row in measured["measured"]:
        metrics = row["metrics"]
        table.add_row(
            names.get(row["adapter_id"], row["adapter_id"]),
            f"{metrics['eval/exact_match']:.0%}",
            f"{metrics['eval/format_validity']:.0%}",
            f"{metrics['eval/loss']:.3f}",
            f"{metrics['eval/perplexity']:.2f}",
        )
    return table


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
