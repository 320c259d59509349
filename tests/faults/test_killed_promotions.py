"""Promoters that are killed anywhere, whose answers get lost: one journal, on fresh evidence, which MLflow shows in the end."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from infra.mlflow_registry import ModelRegistry
from infra.mlflow_tracking import MlflowTracker
from infra.s3 import S3Storage
from infra.storage import Storage
from pipelines.evidence import Binding, read, refuse_stale
from pipelines.journal import Entry, history, read_head, read_hint
from pipelines.reconcile import reconcile
from tests.contracts.storage_servers import S3Server
from tests.faults.promoters import TASK, TENANT, Plan
from tests.faulty_proxy import FaultyProxy
from workers import layout
from workers.adapter import A_SUFFIX, B_SUFFIX, PREFIX, lora_config, make_adapter
from workers.adapter_store import store_adapter
from workers.data.contract import prompt_contract
from workers.identity import identify
from workers.manifests import AdapterRef

REPOSITORY = Path(__file__).parents[2]
SEED = int(os.environ.get("FAULTS_SEED", "20261122"))
LOST_SHARE = 0.3
MODULE, WIDTH, NUM_ADAPTERS = "model.layers.0.self_attn.q_proj", 64, 6
POINTS = ("evidence-written", "journal-written", "head-written", "promotion-projected")
GATES = (
    "- {kind: guard, data: rows.jsonl, metric: eval/loss, max_regression: 100}\n"  # lets everybody pass, and compares
    "- {kind: effect}\n"
)


@dataclass(frozen=True)
class Ground:
    """A store behind a proxy that loses answers, adapters, and MLflow."""

    folder: Path
    store: Storage
    """Without the proxy."""
    proxy: FaultyProxy
    bucket: str
    base_id: str
    adapters: list[str]

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"

    def run(self, **changes: object) -> Counter[str]:
        """Let promoters promote; return how many died at which point, and at random."""
        plan = Plan(
            home=str(self.folder / "home"),
            store=self.bucket,
            endpoint_url=self.proxy.url,
            tracking_uri=self.tracking_uri,
            gates=str(self.folder / "gates.yaml"),
            base_id=self.base_id,
            adapters=self.adapters,
            seed=SEED,
            **changes,  # type: ignore[arg-type]
        )
        command = [sys.executable, "-m", "tests.faults.promoters", json.dumps(asdict(plan))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return Counter(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture
def ground(tmp_path: Path, moto: S3Server, test_data: Path) -> Iterator[Ground]:
    bucket, base = f"s3://{moto.new_bucket()}", test_data / "bases" / "stories260k"
    store, base_id = S3Storage(bucket, endpoint_url=moto.url), identify(base).base_id
    rows = (test_data / "sets" / "e2e-nlg" / "valid.jsonl").read_text().splitlines(keepends=True)[:8:2]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    (tmp_path / "gates.yaml").write_text(GATES)
    adapters = [put_noise(store, base, base_id, seed) for seed in range(NUM_ADAPTERS)]
    MlflowTracker(f"sqlite:///{tmp_path}/mlflow.db").check()
    with FaultyProxy("127.0.0.1", moto.port, seed=SEED, drop_conditional=LOST_SHARE) as proxy:
        yield Ground(tmp_path, store, proxy, bucket, base_id, adapters)


def put_noise(store: Storage, base: Path, base_id: str, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{PREFIX}{MODULE}{A_SUFFIX}": torch.randn(2, WIDTH, generator=generator),
        f"{PREFIX}{MODULE}{B_SUFFIX}": torch.randn(WIDTH, 2, generator=generator) / 10,
    }
    config = lora_config(
        r=2, lora_alpha=4, lora_dropout=0.0, use_rslora=False, target_modules=["q_proj"], base_model_name_or_path="base"
    )
    body = {"task": TASK, "prompt_contract": prompt_contract(base), "imported": {"base_path": str(base)}}
    return store_adapter(store, TENANT, base_id, make_adapter(config, tensors, "a test"), body)


def assert_unbroken(entries: list[Entry]) -> None:
    assert [entry.generation for entry in entries] == list(range(1, len(entries) + 1))
    assert [entry.previous for entry in entries] == [None, *(entry.adapter_id for entry in entries[:-1])]
    assert len({entry.nonce for entry in entries}) == len(entries)
    for before, entry in zip(entries, entries[1:], strict=False):
        if entry.kind in ("freeze", "unfreeze"):
            assert (entry.adapter_id, before.kind == "freeze") == (before.adapter_id, entry.kind == "unfreeze")
        else:
            assert entry.adapter_id != before.adapter_id, f"generation {entry.generation} changed nothing"
            assert before.kind != "freeze", f"generation {entry.generation} moved a frozen task"


def assert_fresh(store: Storage, entries: list[Entry]) -> None:
    """Every promotion rests on scores and verdicts found against the very head that it replaced."""
    for before, entry in zip([None, *entries], entries, strict=False):
        if entry.kind == "promote":
            ref = AdapterRef(TENANT, entry.base_id, entry.adapter_id)
            bodies = [read(store, key) for key in entry.evidence]
            assert [body["kind"] for body in bodies] == ["promotion", "evaluation"]
            refuse_stale(store, entry.evidence, Binding(ref, TASK, before, bodies[0]["gates_digest"]))
            assert all(verdict["passed"] for verdict in bodies[0]["verdicts"])
            assert set(bodies[1]["scores"]) == {"challenger", "champion" if before else "base"}


def num_stale(store: Storage, entries: list[Entry], adapters: list[str]) -> int:
    """Count the evidence that no promotion rests on: of those who came too late, or died."""
    keys = {info.key for one in adapters for info in store.list(layout.evidence_of(TENANT, one))}
    return len(keys - {key for entry in entries for key in entry.evidence})


def assert_shown_after_one_reconcile(ground: Ground, entries: list[Entry]) -> None:
    registry, tracker = ModelRegistry(ground.tracking_uri), MlflowTracker(ground.tracking_uri)
    assert all(found.fixed for found in reconcile(ground.store, registry, tracker, fix=True))
    assert reconcile(ground.store, registry, tracker, fix=False) == []
    keys = {version.version: version.key for version in registry.versions(f"{TENANT}.{TASK}")}
    assert len(set(keys.values())) == len(keys), "twins"
    aliases = {alias: keys[version] for alias, version in registry.aliases(f"{TENANT}.{TASK}").items()}
    previous = next(entry.adapter_id for entry in reversed(entries) if entry.adapter_id != entries[-1].adapter_id)
    assert aliases == {"champion": entries[-1].adapter_id, "previous": previous}
    assert read_hint(ground.store, TENANT, TASK) == len(entries)
    assert read_head(ground.store, TENANT, TASK) == entries[-1]


@pytest.mark.faults
def test_promoters_killed_at_every_point_leave_one_journal(ground: Ground) -> None:
    deaths = ground.run(
        num_promoters=4, num_generations=12, points=[f"{point}:1" for point in POINTS], num_random_kills=2, num_projecting=0
    )
    entries = history(ground.store, TENANT, TASK)
    assert {point: deaths[f"{point}:1"] for point in POINTS} == dict.fromkeys(POINTS, 1)
    assert deaths["failed"] == 0
    assert len(entries) >= 12
    assert ground.proxy.num_faults["drop"] > 0
    assert_unbroken(entries)
    assert_fresh(ground.store, entries)
    assert_shown_after_one_reconcile(ground, entries)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_twenty_promoters_and_two_hundred_promotions(ground: Ground) -> None:
    points = [f"{point}:{number}" for number in (1, 2, 3) for point in POINTS] * 2
    deaths = ground.run(num_promoters=20, num_generations=260, points=points, num_random_kills=60, num_projecting=2)
    entries = history(ground.store, TENANT, TASK)
    print(
        f"seed {SEED}: {dict(Counter(entry.kind for entry in entries))}, deaths {dict(deaths)}, {dict(ground.proxy.num_faults)}"
    )
    assert {point.partition(":")[0] for point in deaths if ":" in point} == set(POINTS)
    assert deaths["random"] >= 20
    assert deaths["failed"] == 0
    assert sum(entry.kind == "promote" for entry in entries) >= 200
    assert ground.proxy.num_faults["drop"] >= 100
    assert num_stale(ground.store, entries, ground.adapters) >= 50, "nobody came too late, so nothing was tried"
    assert_unbroken(entries)
    assert_fresh(ground.store, entries)
    assert_shown_after_one_reconcile(ground, entries)
