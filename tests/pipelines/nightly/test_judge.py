"""The night's judge: measures for many customers together what each one's gates would, wherever the scorer runs or dies."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from infra.errors import GateRejected
from infra.launch import Channel, Handle, Launcher, Resources, Task
from infra.local_launch import ThreadLauncher
from infra.ray_launch import RayLauncher
from infra.storage import Storage
from pipelines.gates import Gates, load_gates
from pipelines.journal import Entry, read_head
from pipelines.judging import Jury
from pipelines.nightly.judge import MAX_LOSSES_IN_A_ROW, Judge, Judged
from pipelines.promote import promote
from pipelines.workspace import Workspace
from tests.pipelines.command_line import installation
from tests.pipelines.conftest import Trained
from workers import layout
from workers.adapter import make_adapter
from workers.adapter_store import load_adapter, store_adapter
from workers.manifests import AdapterRef
from workers.scoring_task import Score

TASK = "menus"
TENANTS = ("globex", "initech", "umbrella")
GATES = """\
- {kind: better_than_champion, metric: eval/loss, min_effect: 0.0}
- {kind: better_than_base, metric: eval/token_accuracy}
- {kind: guard, data: guard.jsonl, metric: eval/exact_match, max_regression: 0.5}
- {kind: effect}
"""
PATIENCE_SECONDS = 120.0


@pytest.fixture
def workspace(trained: Trained, tmp_path: Path) -> Iterator[Workspace]:
    """The installation of `trained`, where further tenants have the same job and adapter, and a second, spoilt adapter."""
    folder = shutil.copytree(trained.folder, tmp_path / "night")
    (folder / "gates.yaml").write_text(GATES)
    lines = (folder / "valid.jsonl").read_text().splitlines(keepends=True)
    (folder / "guard.jsonl").write_text("".join(lines[:2]))
    with installation(folder):
        found = Workspace.here()
        for tenant in TENANTS:
            settle(found.store, trained, tenant)
        yield found


def settle(store: Storage, trained: Trained, tenant: str) -> None:
    """Give a tenant the rows, the job and the adapter that `trained` has."""
    for info in list(store.list(layout.tenant("acme"))):
        if "/data/" in info.key or info.key.endswith("/spec.json"):
            store.put(info.key.replace("tenants/acme/", f"tenants/{tenant}/", 1), store.get(info.key)[0])
    stored = load_adapter(store, "acme", trained.base_id, trained.adapter_id)
    body = {key: value for key, value in stored.manifest.items() if key != "format"}
    store_adapter(store, tenant, trained.base_id, stored.adapter, body)


def spoil(store: Storage, trained: Trained, tenant: str, factor: float) -> AdapterRef:
    """Store an adapter whose update is so many times that of the trained one."""
    stored = load_adapter(store, "acme", trained.base_id, trained.adapter_id)
    tensors = {name: tensor * (factor if "lora_B" in name else 1) for name, tensor in stored.adapter.tensors.items()}
    body = {key: value for key, value in stored.manifest.items() if key != "format"}
    adapter_id = store_adapter(store, tenant, trained.base_id, make_adapter(stored.adapter.config, tensors, "a test"), body)
    return AdapterRef(tenant, trained.base_id, adapter_id)


@pytest.fixture
def gates(workspace: Workspace) -> Gates:
    return load_gates(workspace.settings.home.parent / "gates.yaml")


def challenger(trained: Trained, tenant: str) -> AdapterRef:
    return AdapterRef(tenant, trained.base_id, trained.adapter_id)


def measured(
    workspace: Workspace, launcher: Launcher, gates: Gates, challengers: Sequence[AdapterRef]
) -> dict[AdapterRef, Judged]:
    """Have all challengers measured beside the champions that are."""
    judge = Judge(workspace, launcher)
    try:
        for ref in challengers:
            judge.submit(ref, TASK, read_head(workspace.store, ref.tenant, TASK), gates)
        found: dict[AdapterRef, Judged] = {}
        while len(found) < len(challengers):
            told = judge.results(PATIENCE_SECONDS)
            assert told, "time ran out"
            found |= {one.challenger: one for one in told}
        assert judge.num_open == 0
        assert judge.results(0.0) == []
        return found
    finally:
        judge.close()


@pytest.fixture
def threads() -> Iterator[ThreadLauncher]:
    launcher = ThreadLauncher()
    yield launcher
    launcher.close()


def promoted(workspace: Workspace, ref: AdapterRef, jury: Jury) -> Entry:
    return promote(workspace.store, None, ref.adapter_id, tenant=ref.tenant, task=TASK, actor="night", jury=jury).entry


def evaluations(store: Storage, jury: Jury) -> list[dict[str, Any]]:
    """Return the scores that the last judgement kept."""
    assert jury.last is not None
    return [json.loads(store.get(key)[0])["scores"] for key in jury.last.evaluations]


def test_gates_find_everything_measured_and_say_what_they_say_alone(workspace, gates, trained, threads) -> None:
    first, second = challenger(trained, "globex"), challenger(trained, "initech")
    judged = measured(workspace, threads, gates, [first])[first]
    assert judged.problem == ""
    alone = Jury(workspace, gates)
    assert promoted(workspace, first, judged.jury).generation == promoted(workspace, second, alone).generation == 1
    assert evaluations(workspace.store, judged.jury) == evaluations(workspace.store, alone)
    assert judged.jury.last is not None
    assert alone.last is not None
    assert judged.jury.last.verdicts == alone.last.verdicts
    assert judged.jury._bench is None, "nothing was computed where it was promoted"
    own, base = judged.value("challenger", "eval/loss"), judged.value("base", "eval/loss")
    assert own is not None
    assert base is not None
    assert own < base
    assert judged.value("champion", "eval/loss") is None


def test_champion_is_measured_beside_its_challenger_and_the_plain_base(workspace, gates, trained, threads) -> None:
    promoted(workspace, challenger(trained, "globex"), Jury(workspace, gates))
    worse = spoil(workspace.store, trained, "globex", -30.0)
    judged = measured(workspace, threads, gates, [worse])[worse]
    assert set(judged.holdout) == {"challenger", "champion", "base"}
    with pytest.raises(GateRejected):
        promoted(workspace, worse, judged.jury)
    alone = Jury(workspace, gates)
    assert judged.jury.last is not None
    assert alone.judge(worse, TASK, judged.champion).verdicts == judged.jury.last.verdicts
    assert judged.jury._bench is None


def test_what_is_wrong_with_one_customer_is_told_of_that_customer(workspace, gates, trained, threads) -> None:
    store = workspace.store
    bad = spoil(store, trained, "umbrella", 2.0)
    weights = f"{layout.adapter(*bad)}adapter_model.safetensors"
    store.put(weights, store.get(weights)[0][:-8])
    gone = AdapterRef("initech", trained.base_id, "a" * 32)
    refs = [bad, challenger(trained, "globex"), gone, challenger(trained, "umbrella")]
    found = measured(workspace, threads, gates, refs)
    assert [ref for ref in refs if not found[ref].problem] == [refs[1], refs[3]]
    assert found[bad].problem.startswith("bad_input: ")
    assert "damaged" in found[bad].problem
    assert "no adapter" in found[gone].problem


def test_rows_that_vanished_are_a_problem_of_their_customer_alone(workspace, gates, trained, threads) -> None:
    for info in list(workspace.store.list(f"{layout.tenant('globex')}data/")):
        workspace.store.delete(info.key)
    refs = [challenger(trained, "globex"), challenger(trained, "initech")]
    found = measured(workspace, threads, gates, refs)
    assert "keeps no rows" in found[refs[0]].problem
    assert not found[refs[1]].problem


class Fragile:
    """A channel whose task dies as soon as it is to work for one of some tenants."""

    def __init__(self, channel: Channel, tenants: Sequence[str]) -> None:
        self._channel, self._tenants = channel, tenants

    @property
    def closed(self) -> bool:
        return self._channel.closed

    def send(self, message: Any) -> None:
        self._channel.send(message)

    def receive(self, timeout_seconds: float) -> list[Any]:
        messages = self._channel.receive(timeout_seconds)
        if any(isinstance(message, Score) and message.tenant in self._tenants for message in messages):
            raise RuntimeError("killed by its work")
        return messages


class FragileLauncher(ThreadLauncher):
    """Launches tasks that die of some tenants' orders."""

    def __init__(self, *tenants: str) -> None:
        super().__init__()
        self._tenants = tenants
        self.num_launched = 0

    def launch(self, task: Task, name: str, resources: Resources) -> Handle:
        self.num_launched += 1
        return super().launch(lambda channel: task(Fragile(channel, self._tenants)), name, resources)


def test_customer_that_ends_its_scorer_is_told_from_its_neighbours(workspace, gates, trained) -> None:
    launcher = FragileLauncher("initech")
    refs = [challenger(trained, tenant) for tenant in TENANTS]
    try:
        found = measured(workspace, launcher, gates, refs)
    finally:
        launcher.close()
    assert [bool(found[ref].problem) for ref in refs] == [False, True, False]
    assert found[refs[1]].problem.startswith("host_lost: ")
    assert "killed by its work" in found[refs[1]].problem


def test_scorers_that_die_again_and_again_are_given_up_with_a_reason(workspace, gates, trained) -> None:
    launcher = FragileLauncher("acme", *TENANTS)
    refs = [challenger(trained, tenant) for tenant in ("acme", *TENANTS)]
    try:
        found = measured(workspace, launcher, gates, refs)
    finally:
        launcher.close()
    assert all(found[ref].problem.startswith("host_lost: ") for ref in refs)
    assert launcher.num_launched == MAX_LOSSES_IN_A_ROW


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayLauncher]:
    launcher = RayLauncher(num_cpus=1)
    yield launcher
    launcher.close()


def test_scorer_that_is_killed_is_replaced_and_every_customer_measured(
    workspace, gates, trained, cluster, threads, tmp_path, monkeypatch
) -> None:
    (tmp_path / "spent").mkdir()
    monkeypatch.setenv("LORAFLEET_CRASHPOINT", "orders-taken:1")
    monkeypatch.setenv("LORAFLEET_CRASHPOINT_SPENT", str(tmp_path / "spent"))
    refs = [challenger(trained, tenant) for tenant in TENANTS]
    found = measured(workspace, cluster, gates, refs)
    assert list((tmp_path / "spent").iterdir()), "the scorer was killed"
    monkeypatch.delenv("LORAFLEET_CRASHPOINT")
    undisturbed = measured(workspace, threads, gates, refs)
    for ref in refs:
        assert not found[ref].problem
        assert found[ref].jury.known == undisturbed[ref].jury.known
        assert found[ref].jury.effects == {ref.adapter_id: True}
