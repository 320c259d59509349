"""What it costs to find out that nothing changed: planning the night of a fleet whose customers are as they were.

    python benchmarks/night_planning.py [--customers 10000] [--store local|s3|both] [--json]

Customers are discovered by one pattern, in a folder and in a bucket (moto's server, a process beside this one). Measured is all
that a night does with a customer who did not change: read fleet.yaml and the outcomes of the last night, find the customers
with their signatures, decide, and write the outcomes for the next night. Requests are those that boto3 sends. A second figure
is for customers who stand in a table, each with its own place in the bucket.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.httpsession
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import facts
from infra.errors import LorafleetError
from infra.fingerprint import id_of_bytes
from infra.local_storage import LocalStorage
from infra.s3 import S3Storage
from infra.storage import Storage
from infra.stores import open_store
from pipelines.gates import load_gates
from pipelines.nightly.customers import Customer, customers_of, signatures_of
from pipelines.nightly.ledger import FleetLedger
from pipelines.nightly.planning import Skip, decide
from pipelines.nightly.records import Row, Signature
from pipelines.nightly.spec import load_fleet
from pipelines.nightly.state_key import gates_digest, recipe_digest, state_key
from tests.contracts.storage_servers import ACCESS_KEY, SECRET_KEY, moto_server

BASE_ID, DATA = id_of_bytes(b"a base that nobody loads"), id_of_bytes(b"rows that nobody reads")
JOB = "task: support\nbase_model: {name_or_path: ./base}\n"
ROWS = json.dumps({"prompt": "say it", "completion": "it"}) + "\n"
NUM_WRITERS = 16
FILES = ("train.jsonl", "valid.jsonl")


def main() -> None:
    """Make the customers, plan two nights of them, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--customers", type=int, default=10_000)
    parser.add_argument("--store", choices=["local", "s3", "both"], default="both")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        if options.store != "s3":
            rows += [planned_locally(Path(scratch) / "local", options.customers)]
        if options.store != "local":
            rows += planned_on_s3(Path(scratch) / "s3", options.customers)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"facts": facts("lorafleet", "boto3", "moto"), "customers": options.customers, "peak_mib": peak, "rows": rows}
    print(json.dumps(found, indent=2) if options.json else table(found))


@dataclass
class Ground:
    """A fleet's folder, and the store that keeps its nights."""

    folder: Path
    store: Storage

    def write(self, customers: str) -> None:
        """Write the fleet's files."""
        (self.folder / "base").mkdir(parents=True, exist_ok=True)
        (self.folder / "job.yaml").write_text(JOB)
        (self.folder / "gates.yaml").write_text("- {kind: effect}\n")
        (self.folder / "fleet.yaml").write_text(f"name: fleet\ncustomers: [{customers}]\n")


def planned_locally(folder: Path, number: int) -> dict[str, Any]:
    """Plan customers in a folder."""
    for index in range(number):
        place = folder / "customers" / name_of(index)
        place.mkdir(parents=True)
        for name in FILES:
            (place / name).write_text(ROWS)
    ground = Ground(folder, LocalStorage(folder / "store"))
    ground.write("{discover: 'customers/{tenant}/'}")
    return measured(ground, number, "local, discovered")


def planned_on_s3(folder: Path, number: int) -> list[dict[str, Any]]:
    """Plan customers in a bucket: discovered by a pattern, and standing in a table."""
    folder.mkdir()
    with moto_server(folder) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        bucket = f"s3://{server.new_bucket()}"
        store = S3Storage(bucket)
        keys = [f"customers/{name_of(index)}/{name}" for index in range(number) for name in FILES]
        with ThreadPoolExecutor(NUM_WRITERS) as pool:
            list(pool.map(lambda key: store.put(key, ROWS.encode()), keys))
        ground = Ground(folder, S3Storage(f"{bucket}/lorafleet"))
        ground.write(f"{{discover: '{bucket}/customers/{{tenant}}/'}}")
        rows = [measured(ground, number, "S3, discovered")]
        lines = [f"{name_of(index)},{bucket}/customers/{name_of(index)}/\n" for index in range(number)]
        (folder / "customers.csv").write_text("".join(["tenant,data\n", *lines]))
        ground.write("{csv: customers.csv}")
        return [*rows, measured(ground, number, "S3, in a table")]


def name_of(index: int) -> str:
    """Return a tenant's name."""
    return f"tenant-{index:05d}"


def measured(ground: Ground, number: int, what: str) -> dict[str, Any]:
    """Let a first night end, then plan the second, and return its times and requests."""
    night("2026-11-22", ground, settled)
    watch = Watch()
    with counted() as requests:
        rows = night("2026-11-23", ground, unchanged, watch)
    assert len(rows) == number
    assert Counter(row.reason for row in rows) == {"unchanged": number}, Counter(row.reason for row in rows)
    total = sum(watch.seconds.values())
    return {
        "what": what,
        "ms_per_customer": 1000 * total / number,
        "requests_per_customer": requests["count"] / number,
        "requests": requests["count"],
        "seconds": {"all": total, **watch.seconds},
    }


class Watch:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Count the time of the block."""
        started = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started


Deciding = Callable[[Customer, Row | None, Signature, str, str], Row]


def night(name: str, ground: Ground, deciding: Deciding, watch: Watch | None = None) -> list[Row]:
    """Plan a night and keep its outcomes."""
    watch = watch or Watch()
    ledger = FleetLedger(ground.store, "fleet")
    with watch.on("read the fleet"):
        fleet = load_fleet(ground.folder / "fleet.yaml")
        gates = gates_digest(load_gates(ground.folder / "gates.yaml"))
    with watch.on("read the last night"):
        past, _ = ledger.memory()
    with watch.on("find customers"):
        customers, refused = customers_of(fleet, open_store, ground.store)
    with watch.on("signatures"):
        signatures = signatures_of(customers, open_store)
    with watch.on("decide"):
        rows = [*refused]
        for customer, signature in zip(customers, signatures, strict=True):
            assert not isinstance(signature, LorafleetError), signature
            recipe = recipe_digest(customer.job)
            rows.append(deciding(customer, past.get(customer.key), signature, recipe, gates))
    with watch.on("write the outcomes"):
        ledger.keep_outcomes(name, rows)
        summary = {"night": name, "started": 0.0, "seconds": 0.0, "counts": {}, "num_tokens": 0, "cost": 0.0, "mean_gain": None}
        ground.store.put(f"fleets/fleet/nights/{name}/night.json", b"{}")
        ledger.keep_report(name, {"trend": [], "summary": summary}, b"")
    return rows


def settled(customer: Customer, past: Row | None, signature: Signature, recipe: str, gates: str) -> Row:
    """Return the row of a customer who was promoted."""
    key = state_key(*customer.key, BASE_ID, recipe, DATA, customer.holdout, gates)
    return Row(
        customer.tenant,
        customer.task,
        "promoted",
        state_key=key,
        signature=signature,
        data_digest=DATA,
        recipe_digest=recipe,
        gates_digest=gates,
        base_id=BASE_ID,
        num_rows=200,
        trained_at=time.time(),
        ended_at=time.time(),
    )


def unchanged(customer: Customer, past: Row | None, signature: Signature, recipe: str, gates: str) -> Row:
    """Return what is decided for a customer, who must be one to be skipped."""
    decision = decide(customer, past, signature, time.time(), BASE_ID, recipe, gates)
    assert isinstance(decision, Skip), decision
    return decision.row


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the requests that boto3 sends in the block."""
    found = {"count": 0}
    send = botocore.httpsession.URLLib3Session.send

    def counting(self: Any, request: Any) -> Any:
        found["count"] += 1
        return send(self, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.httpsession.URLLib3Session, "send", counting)
        yield found


def table(found: dict[str, Any]) -> str:
    """Return the figures as lines."""
    lines = [f"{found['customers']} customers who did not change; {found['peak_mib']:.0f} MiB at most"]
    lines += [f"{'':<20}{'ms/customer':>13}{'requests/customer':>20}  of which, in seconds"]
    for row in found["rows"]:
        parts = ", ".join(f"{what} {seconds:.2f}" for what, seconds in row["seconds"].items() if what != "all")
        lines.append(f"{row['what']:<20}{row['ms_per_customer']:>13.3f}{row['requests_per_customer']:>20.4f}  {parts}")
    return "\n".join([*lines, str(found["facts"])])


if __name__ == "__main__":
    main()
