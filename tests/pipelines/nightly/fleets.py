"""Fleets in a folder, and customers as planning sees them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.local_storage import LocalStorage
from infra.stores import open_store
from pipelines.nightly.customers import Customer, customers_of
from pipelines.nightly.records import Row
from pipelines.nightly.spec import Fleet, load_fleet

JOB = """\
task: support
base_model: {name_or_path: ./base}
data: {train: unused, format: messages, validation: other/valid.jsonl}
training: {num_train_epochs: 2, per_device_train_batch_size: 4}
"""


def write_fleet(folder: Path, text: str, job: str = JOB) -> Path:
    """Write fleet.yaml, its job and gates, and an empty folder as its base; return the path of the first."""
    (folder / "base").mkdir(exist_ok=True)
    (folder / "job.yaml").write_text(job)
    (folder / "gates.yaml").write_text("- {kind: effect}\n")
    (folder / "fleet.yaml").write_text(f"name: prod\n{text}")
    return folder / "fleet.yaml"


def write_rows(path: Path, *, count: int = 3, word: str = "hello") -> Path:
    """Write some chat rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": word}]}
    path.write_text("".join(f"{json.dumps(row)}\n" for _ in range(count)))
    return path


def found_in(path: Path) -> tuple[Fleet, list[Customer], list[Row]]:
    """Return a fleet with its customers and refusals; a store for recipes lies beside it."""
    fleet = load_fleet(path)
    return fleet, *customers_of(fleet, open_store, LocalStorage(path.parent / "store"))


def only_customer(folder: Path, entry: str = "tenant: acme, data: ./acme", **defaults: Any) -> Customer:
    """Return the one customer of a fleet with this entry."""
    path = write_fleet(folder, f"defaults: {json.dumps(defaults)}\ncustomers: [{{{entry}}}]\n")
    _, [customer], refused = found_in(path)
    assert refused == []
    return customer


def by_name(customers: list[Customer]) -> Mapping[str, Customer]:
    """Return customers by "tenant.task"."""
    return {customer.name: customer for customer in customers}
