"""Fleets of real customers in a folder, whose nights are run in this process, one a day."""

import contextlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from mlflow.tracking._tracking_service import utils

from infra.local_storage import LocalStorage
from pipelines.journal import Entry, history
from pipelines.nightly.driver import Progress
from pipelines.nightly.ledger import FleetLedger
from pipelines.nightly.records import Row
from pipelines.nightly.run import NightOutcome, run
from pipelines.workspace import Workspace
from tests.pipelines.command_line import installation
from workers.data.rows import Row as TrainedRow
from workers.data.store import load_rows
from workers.job import DataRef, Job

DataRow = Mapping[str, Any]
DAY = 86400.0
NOON = 1_748_779_200.0
"""2025-06-01, 12:00 UTC: before the nights that tests of the command line run today."""
TASK = "calls"
MLFLOW_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Columns of MLflow's database with absolute paths."""
JOB = {
    "task": TASK,
    "data": {"train": "unused", "validation_split": 0.1},
    "peft": {"r": 4, "lora_alpha": 8},
    "training": {"max_steps": 6, "learning_rate": 1.0e-2, "per_device_train_batch_size": 8, "max_length": 96},
}


@dataclass
class Town:
    """A folder with a fleet, its customers' data and an installation; each night begins a day after the one before."""

    folder: Path
    now: float = NOON
    _stamp: int = 0

    def write(self, base: Path, *, limits: Mapping[str, Any] | None = None, **defaults: Any) -> None:
        """Write job.yaml, and a fleet of everybody who has a folder in data/."""
        self.write_job(base)
        self.set_fleet(limits=limits or {}, defaults=defaults)

    def write_job(self, base: Path, **changes: Any) -> None:
        """Write job.yaml with values put in by path ("training.max_steps")."""
        job = json.loads(json.dumps(JOB | {"base_model": {"name_or_path": str(base)}}))
        for path, value in changes.items():
            *parents, last = path.split(".")
            place = job
            for name in parents:
                place = place.setdefault(name, {})
            place[last] = value
        (self.folder / "job.yaml").write_text(yaml.safe_dump(job))

    def set_fleet(self, *, customers: Sequence[Mapping[str, Any]] = (), **changes: Mapping[str, Any]) -> None:
        """Write fleet.yaml; what `changes` leave out is as it was. `customers` are beside those discovered."""
        before = yaml.safe_load(self.fleet.read_text()) if self.fleet.exists() else {"name": "town", "limits": {}}
        given = {"gates": None, "min_new_rows": 5, "holdout": 0.25}
        defaults = given | before.get("defaults", {}) | dict(changes.pop("defaults", {}))
        entries = [{"discover": "data/{tenant}/"}, *map(dict, customers)]
        body = before | {"defaults": defaults, "customers": entries} | {name: dict(value) for name, value in changes.items()}
        self.fleet.write_text(yaml.safe_dump(body, sort_keys=False))

    @property
    def fleet(self) -> Path:
        return self.folder / "fleet.yaml"

    def send(self, tenant: str, rows: Sequence[DataRow]) -> None:
        """Let these be a customer's rows from now on."""
        path = self.folder / "data" / tenant / "rows.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        self._stamp += 1
        os.utime(path, ns=(0, (1_700_000_000 + self._stamp) * 10**9))  # tests may be faster than a clock's ticks

    def night(self, *, retry: Sequence[str] | None = None, on_progress: Callable[[Progress], None] | None = None) -> "Night":
        """Run tomorrow's night."""
        self.now += DAY
        return self.again(retry=retry, on_progress=on_progress)

    def again(self, *, retry: Sequence[str] | None = None, on_progress: Callable[[Progress], None] | None = None) -> "Night":
        """Run the command once more on the same day."""
        outcome = run(self.workspace, self.fleet, retry=retry, on_progress=on_progress or (lambda _: None), now=lambda: self.now)
        return Night(outcome)

    @property
    def workspace(self) -> Workspace:
        return Workspace.here()

    @property
    def store(self) -> LocalStorage:
        return LocalStorage(self.folder / ".lorafleet" / "store")

    def journal(self, tenant: str) -> list[Entry]:
        """Return who was champion of a customer when."""
        return history(self.store, tenant, TASK)

    def champion(self, tenant: str) -> str:
        """Return who is champion of a customer."""
        return self.journal(tenant)[-1].adapter_id

    def job(self, tenant: str, night: str) -> Job:
        """Return what a night decided to train for a customer."""
        plan = FleetLedger(self.store, "town").plan(night, tenant, TASK)
        assert plan is not None
        return Job.from_json(plan.job)

    def rows_of(self, tenant: str, data: DataRef | None) -> list[TrainedRow]:
        """Return the rows of a job's training, validation or holdout."""
        return [] if data is None else load_rows(self.store, tenant, data.digest)

    def nights(self) -> list[str]:
        """Return the names of all nights in the store."""
        return sorted(path.parent.name for path in (self.folder / ".lorafleet/store/fleets").glob("*/nights/*/night.json"))

    def listing(self) -> dict[str, str]:
        """Key -> etag of everything in the store but claims, which whoever looks may renew."""
        return {info.key: info.etag for info in self.store.list("") if not info.key.endswith("claim.json")}

    def standing(self) -> AbstractContextManager[None]:
        """Stand in the folder, with hosts in this process."""
        return installation(self.folder)

    def copy(self, folder: Path) -> "Town":
        """Return a town that has had the same nights, and whose MLflow keeps its files in the copy and knows of them all."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        with contextlib.closing(sqlite3.connect(folder / ".lorafleet" / "mlflow.db")) as database, database:
            for table, column in MLFLOW_PLACES:
                database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(self.folder), str(folder)))
        utils._artifact_repos_cache.clear()  # by run id: those of the copy are the same
        for offsets in (folder / ".lorafleet" / "tracking").glob("*.offset"):  # by the database's place
            offsets.write_text(offsets.read_text().replace(str(self.folder), str(folder)))
        return Town(folder, self.now, self._stamp)


@dataclass
class Night:
    """What a night came to."""

    outcome: NightOutcome
    rows: dict[str, Row] = field(init=False)
    """By tenant."""

    def __post_init__(self) -> None:
        report = self.outcome.report
        self.rows = {row.tenant: row for row in report.rows} if report is not None else {}

    def __getitem__(self, tenant: str) -> Row:
        return self.rows[tenant]

    @property
    def name(self) -> str:
        """The night's date."""
        assert self.outcome.report is not None
        return self.outcome.report.night

    @property
    def ends(self) -> dict[str, tuple[str, str]]:
        """(status, reason) by tenant."""
        return {tenant: (row.status, row.reason) for tenant, row in self.rows.items()}

    @property
    def adapters(self) -> dict[str, str | None]:
        """adapter_id by tenant, of those that were trained."""
        return {tenant: row.adapter_id for tenant, row in self.rows.items() if row.adapter_id is not None}
