"""What customers with poisoned data cost the others: the night of a fleet without and with them.

    python benchmarks/poisoned_night.py [--customers 500] [--share 0.02] [--huge-bytes 1073741824] [--folder FOLDER] [--json]

The healthy customers are those of `night.py`, on the demo's base with a chat template that never ends on one poisoned row. A
share of poisoned ones joins them, one of each kind in turn: settings that train to NaN, a name that is none, and those of the
tests (`poison.py`), among them binary garbage, a line of `--huge-bytes`, wrong encodings, prompts only and that template bomb.
Each night is `lorafleet nightly run` from a cold start. The healthy customers' adapters must be the same bits, and every poisoned
customer one row, or the exit code is 1.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, facts
from benchmarks.night import FLEET, Ground
from infra.local_storage import LocalStorage
from pipelines.demo_base import ensure_demo_base
from pipelines.nightly.ledger import FleetLedger
from pipelines.nightly.records import Row
from tests.pipelines.nightly.poison import NAN_SETTINGS, poisons, write_base_with_bomb

FIRST_KINDS = ("nan", "garbage", "huge-line", "latin1", "prompts-only", "template-bomb")
"""Of the tests' kinds those that come first; the others follow."""
NAN_CUSTOMER, HOSTILE_CUSTOMER = "poison-settings", "a b"


def main() -> int:
    """Run both nights, print the figures, and return 1 if the poison was felt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--customers", type=int, default=500)
    parser.add_argument("--share", type=float, default=0.02, help="poisoned customers to each healthy one")
    parser.add_argument("--huge-bytes", type=int, default=1 << 30)
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/lorafleet-benchmarks", help="where the base is kept")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    demo_base = ensure_demo_base(options.folder.absolute(), lambda line: print(line, file=sys.stderr))
    number = max(1, round(options.customers * options.share))
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        write_base_with_bomb(demo_base, base)
        nights = {}
        for kind in ("healthy", "poisoned"):
            ground = Ground(Path(name) / kind, base, epochs=1.0)
            ground.folder.mkdir()
            ground.write(options.customers)
            poisoned = write_poison(ground, number, options.huge_bytes) if kind == "poisoned" else []
            nights[kind] = run_night(ground)
    expected = {tenant: row.adapter_id for tenant, row in nights["healthy"][1].items()}
    rows = nights["poisoned"][1]
    same = {tenant: rows[tenant].adapter_id for tenant in expected} == expected and None not in expected.values()
    result: dict[str, Any] = {
        "facts": facts("lorafleet", "torch", "ray", "mlflow"),
        "setting": f"{options.customers} customers of 100 to 300 rows on the demo's base, and {number} poisoned ones",
        "seconds": {kind: seconds for kind, (seconds, _) in nights.items()},
        "ratio": nights["poisoned"][0] / nights["healthy"][0],
        "poisoned": {tenant: f"{rows[tenant].status}({rows[tenant].reason})" for tenant in poisoned if tenant in rows},
        "healthy": dict(Counter(rows[tenant].status for tenant in expected)),
        "same_adapters": same,
    }
    print(json.dumps(result, indent=2) if options.json else table(result))
    return 0 if same and rows.keys() == expected.keys() | set(poisoned) else 1


def write_poison(ground: Ground, number: int, huge_bytes: int) -> list[str]:
    """Write so many poisoned customers into a fleet; return their names."""
    folder = ground.folder / "customers"
    lines = next(folder.glob("*/rows.jsonl")).read_text().splitlines()
    kinds = poisons(huge_bytes)
    order = [*FIRST_KINDS, *(name for name in kinds if name not in FIRST_KINDS)]
    names = [NAN_CUSTOMER, HOSTILE_CUSTOMER, *(f"poison-{kind}" for kind in order)]
    chosen = list(islice(names, number))
    for name in chosen:
        (folder / name).mkdir()
        kind = kinds.get(name.removeprefix("poison-"))
        if kind is None:
            (folder / name / "rows.jsonl").write_text("\n".join(lines))
        else:
            kind.write(folder / name, lines)
    fleet = json.loads((ground.folder / "fleet.yaml").read_text())
    fleet["customers"].append({"tenant": NAN_CUSTOMER, "set": dict(NAN_SETTINGS)})
    (ground.folder / "fleet.yaml").write_text(json.dumps(fleet))
    return chosen


def run_night(ground: Ground) -> tuple[float, dict[str, Row]]:
    """Run a night; return its seconds and its rows by tenant."""
    environment = {**os.environ, "LORAFLEET_HOME": str(ground.home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pipelines.cli", "nightly", "run", str(ground.folder / "fleet.yaml")]
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode not in (0, 1):
        sys.exit(f"a night ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    ledger = FleetLedger(LocalStorage(ground.home / "store"), FLEET)
    return seconds, {row.tenant: row for row in ledger.outcomes(ledger.nights()[-1]).values()}


def table(result: dict[str, Any]) -> str:
    """Return the figures as text."""
    seconds = result["seconds"]
    return "\n".join(
        [
            ", ".join(f"{name} {value}" for name, value in result["facts"].items()),
            result["setting"],
            f"night without them {seconds['healthy']:.1f} s, with them {seconds['poisoned']:.1f} s: {result['ratio']:.3f}x",
            f"healthy customers: {result['healthy']}, adapters the same: {result['same_adapters']}",
            *(f"  {tenant}: {ended}" for tenant, ended in result["poisoned"].items()),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
