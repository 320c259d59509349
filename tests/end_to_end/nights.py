"""A folder with a fleet of SNIPS customers, whose nights are run as cron does: one process per night."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from infra.mlflow_registry import ModelRegistry
from pipelines.journal import Entry, history
from tests.end_to_end.ground import Ground
from tests.end_to_end.mlflow_view import SeenRun, runs_in
from workers import layout

FLEET, TASK = "snips", "calls"
TRAINING = {"max_steps": 20, "eval_steps": 5, "learning_rate": 1.0e-2, "per_device_train_batch_size": 8, "max_length": 96}
NIGHT = ("nightly", "run", "fleet.yaml")


class NightGround(Ground):
    """Where a fleet's nights are driven."""

    def write_fleet(self, test_data: Path, customers: Mapping[str, int], steps: Mapping[str, int] | None = None) -> None:
        """Write a fleet of customers of SNIPS on the TinyStories base, with so many rows each; `steps` for who wants others."""
        job = {
            "task": TASK,
            "base_model": {"name_or_path": str(test_data / "bases" / "stories260k")},
            "data": {"train": "any", "validation_split": 0.1},
            "peft": {"r": 4, "lora_alpha": 8},
            "training": TRAINING,
        }
        # A deadline that is far away gives the night one name, also if midnight comes.
        deadline = (datetime.now(UTC) + timedelta(hours=12)).strftime("%H:%M")
        own = [{"tenant": tenant, "set": {"training.max_steps": number}} for tenant, number in (steps or {}).items()]
        fleet = {
            "name": FLEET,
            "defaults": {"gates": None, "min_new_rows": 5, "holdout": 0.25},
            "customers": [{"discover": "data/{tenant}/"}, *own],
            "limits": {"max_promotions_share": None, "deadline": deadline},
        }
        (self.folder / "job.yaml").write_text(yaml.safe_dump(job))
        (self.folder / "fleet.yaml").write_text(yaml.safe_dump(fleet))
        for tenant, num_rows in customers.items():
            self.send(test_data, tenant, num_rows)

    def send(self, test_data: Path, tenant: str, num_rows: int) -> None:
        """Let a customer have so many rows; "-later" behind a name gives rows from further down the same file."""
        name, start = tenant.removesuffix("-later"), 500 * tenant.endswith("-later")
        lines = (test_data / "sets" / "snips" / "customers" / name / "train.jsonl").read_text().splitlines()[start:]
        path = self.folder / "data" / tenant / "rows.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines[:num_rows]) + "\n")

    def report(self) -> dict[str, Any]:
        """Return the last night's report."""
        found: dict[str, Any] = self.json("nightly", "report", FLEET)
        return found

    def rows(self) -> dict[str, dict[str, Any]]:
        """Return the last night's rows by tenant; each has one."""
        customers = self.report()["customers"]
        found = {row["tenant"]: row for row in customers}
        assert len(found) == len(customers)
        return found

    def journal(self, tenant: str) -> list[Entry]:
        """Return who was champion of a customer when."""
        return history(self.storage, tenant, TASK)

    def nights(self) -> list[str]:
        """Return the nights that began, by name."""
        keys = [info.key.split("/") for info in self.storage.list(layout.nights(FLEET))]
        return sorted(parts[3] for parts in keys if parts[4:] == ["night.json"])

    def states(self) -> Counter[str]:
        """Return the statuses of all customers' jobs."""
        keys = [info.key for info in self.storage.list(layout.tenants()) if layout.parts_of_job_state(info.key) is not None]
        return Counter(json.loads(self.storage.get(key)[0])["body"]["status"] for key in keys)

    @property
    def mlflow(self) -> str:
        return f"sqlite:///{self.home}/mlflow.db"

    def runs(self) -> list[SeenRun]:
        """Return MLflow's runs; none of them stands there twice."""
        runs = runs_in(self.mlflow)
        keys = [run.tags["lorafleet.key"] for run in runs]
        assert len(set(keys)) == len(keys)
        return runs

    def shown_champion(self, tenant: str) -> str | None:
        """Return the adapter that MLflow shows as a customer's champion."""
        registry = ModelRegistry(self.mlflow)
        versions = {version.version: version.key for version in registry.versions(f"{tenant}.{TASK}")}
        return versions[registry.aliases(f"{tenant}.{TASK}")["champion"]]


@contextmanager
def nights_in(folder: Path, **settings: Any) -> Iterator[NightGround]:
    """Give a ground in `folder`, and end what it started."""
    ground = NightGround(folder, **settings)
    try:
        yield ground
    finally:
        ground.close()
