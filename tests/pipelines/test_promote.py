"""Promotion and rollback: checked, recorded once, shown by MLflow, and never stopped by it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from infra.errors import BadInput, WorkFailed, WrongBase
from infra.local_storage import LocalStorage
from infra.mlflow_registry import ModelRegistry
from infra.mlflow_tracking import MlflowTracker
from infra.tracking import RunStart
from pipelines.journal import Change, commit, generation_of, history, read_head, read_hint
from pipelines.projection import differences, project
from pipelines.promote import PromotionOutcome, promote, register_best, rollback
from pipelines.references import find_reference
from tests.pipelines.adapters import base_id_of, put_adapter
from tests.workers.tiny_bases import make_base
from workers import layout

ROLLBACK = """
import sys, pathlib
from infra.local_storage import LocalStorage
from pipelines.promote import rollback
registry = None
if sys.argv[3:]:
    from infra.mlflow_registry import ModelRegistry
    registry = ModelRegistry(sys.argv[3])
rollback(LocalStorage(pathlib.Path(sys.argv[1])), registry, "acme", sys.argv[2], actor="ann")
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def base_id(base: Path) -> str:
    return base_id_of(base)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('home')}/mlflow.db"


@pytest.fixture
def registry(uri: str) -> ModelRegistry:
    return ModelRegistry(uri)


@pytest.fixture
def task(request: pytest.FixtureRequest) -> str:
    """A task of this test alone, since all tests share one MLflow."""
    return "t" + "".join(c for c in request.node.name.removeprefix("test_") if c.isascii() and c.isalnum())[:60].lower()


@pytest.fixture
def dead_registry() -> ModelRegistry:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    return ModelRegistry(f"http://127.0.0.1:{port}")


def promoted(store: LocalStorage, ref: str, task: str, registry: ModelRegistry | None = None, **more: object) -> PromotionOutcome:
    return promote(store, registry, ref, task=task, actor="ann", **more)  # type: ignore[arg-type]


def shown_aliases(registry: ModelRegistry, task: str) -> dict[str, str | None]:
    keys = {version.version: version.key for version in registry.versions(f"acme.{task}")}
    return {alias: keys[version] for alias, version in registry.aliases(f"acme.{task}").items()}


def test_promoted_adapter_is_champion_in_store_and_mlflow(local_store, base, base_id, registry, task) -> None:
    a = put_adapter(local_store, base_id, 1)
    outcome = promoted(local_store, a[:8], task, registry, base=base, reason="first")
    assert (outcome.changed, outcome.note) == (True, None)
    assert outcome.sentence == f"{a[:12]} is champion of acme.{task} (generation 1)."
    entry = read_head(local_store, "acme", task)
    assert entry is not None
    assert (entry.kind, entry.adapter_id, entry.base_id, entry.actor, entry.reason, entry.previous) == (
        "promote",
        a,
        base_id,
        "ann",
        "first",
        None,
    )
    [version] = registry.versions(f"acme.{task}")
    assert version.tags.items() >= {
        ("lorafleet.adapter_id", a),
        ("lorafleet.base_id", base_id),
        ("lorafleet.job_id", "j" * 32),
    }
    assert Path(version.source, "adapter_model.safetensors").is_file()
    assert shown_aliases(registry, task) == {"champion": a}


def test_evidence_says_what_was_checked_and_compared(local_store, base, base_id, task) -> None:
    a, b = put_adapter(local_store, base_id, 1), put_adapter(local_store, base_id, 2)
    promoted(local_store, a, task)
    [key] = promoted(local_store, b, task, base=base).entry.evidence
    assert key.startswith(f"tenants/acme/evidence/{b}/")
    evidence = json.loads(local_store.get(key)[0])
    assert evidence["format"] == "evidence/1"
    assert evidence["checks"] == ["digests", "adapter_id", "finite", "effect", "base_folder"]
    assert evidence["metrics"] == {"eval/loss": 3.0}
    assert evidence["compared_with"] == {"generation": 1, "adapter_id": a, "base_id": base_id}


def test_promoting_the_champion_again_changes_nothing(local_store, base_id, task) -> None:
    a = put_adapter(local_store, base_id, 1)
    first = promoted(local_store, a, task)
    again = promoted(local_store, a, task)
    assert (again.changed, again.entry) == (False, first.entry)
    assert again.sentence == f"{a[:12]} is the champion of acme.{task} already (generation 1)."


def test_task_comes_from_the_reference_or_the_manifest(local_store, base_id) -> None:
    a, b = put_adapter(local_store, base_id, 1), put_adapter(local_store, base_id, 2, task=None)
    assert promote(local_store, None, a, actor="ann").task == "support"
    with pytest.raises(BadInput, match="name one with --task"):
        promote(local_store, None, b, actor="ann")
    register(local_store, b, base_id, "sales")
    assert promote(local_store, None, "acme.sales@challenger", actor="ann").task == "sales"


def register(store: LocalStorage, adapter_id: str, base_id: str, task: str, registry: ModelRegistry | None = None, **more: str):
    return register_best(
        store,
        registry,
        tenant="acme",
        task=task,
        adapter_id=adapter_id,
        base_id=base_id,
        job_id="k" * 32,
        sweep="s1",
        metrics={"eval/loss": 1.0, "eval/perplexity": float("inf")},
        **more,
    )


def test_adapter_of_another_base_is_refused_unless_the_task_moves(local_store, base_id, other_base, task) -> None:
    other_id = base_id_of(other_base)
    a, b = put_adapter(local_store, base_id, 1), put_adapter(local_store, other_id, 1)
    promoted(local_store, a, task)
    with pytest.raises(WrongBase) as raised:
        promoted(local_store, b, task)
    assert base_id in str(raised.value)
    assert other_id in str(raised.value)
    assert "--change-base" in str(raised.value)
    assert [entry.adapter_id for entry in history(local_store, "acme", task)] == [a]
    assert promoted(local_store, b, task, change_base=True).entry.base_id == other_id
    assert rollback(local_store, None, "acme", task, actor="ann").entry.base_id == base_id


def test_base_folder_that_is_not_the_adapters_is_refused(local_store, base_id, other_base, task) -> None:
    a = put_adapter(local_store, base_id, 1)
    with pytest.raises(WrongBase, match=f"was trained on the base {base_id}"):
        promoted(local_store, a, task, base=other_base)
    assert read_head(local_store, "acme", task) is None


def test_damaged_adapter_is_not_promoted(local_store, base_id, task) -> None:
    a = put_adapter(local_store, base_id, 1)
    key = layout.adapter("acme", base_id, a) + "adapter_model.safetensors"
    data = bytearray(local_store.get(key)[0])
    data[-1] ^= 1
    local_store.put(key, bytes(data))
    with pytest.raises(BadInput, match="is damaged"):
        promoted(local_store, a, task)
    assert read_head(local_store, "acme", task) is None


def test_adapter_that_changes_nothing_is_not_promoted(local_store, base_id, task) -> None:
    with pytest.raises(BadInput, match="every lora_B is zero"):
        promoted(local_store, put_adapter(local_store, base_id, 1, scale=0.0), task)


def test_unknown_references_are_sentences(local_store, base_id, task) -> None:
    a = put_adapter(local_store, base_id, 1)
    promoted(local_store, a, task)
    for ref, sentence in [
        ("zzzzzz", "starts with 'zzzzzz'"),
        ("../x", "names no adapter"),
        (f"acme.{task}@champoin", "Did you mean 'champion'"),
        (f"acme.{task}@previous", "has had one champion at most"),
        (f"acme.{task}@challenger", "has no challenger yet"),
        ("acme.nothing@champion", "promote an adapter first"),
        ("acme@champion", "is not a registered model"),
        ("Acme.x@champion", "is not a registered model"),
    ]:
        with pytest.raises(BadInput, match=sentence):
            find_reference(local_store, ref)
    with pytest.raises(BadInput, match="belongs to the tenant 'acme'"):
        find_reference(local_store, f"acme.{task}@champion", "globex")
    with pytest.raises(BadInput, match="tenant 'globex'"):
        find_reference(local_store, a, "globex")
    assert find_reference(local_store, f"acme.{task}@champion") == ("acme", base_id, a)


def test_rollback_returns_to_the_champion_before_and_is_not_done_twice(local_store, base_id, registry, task) -> None:
    a, b = put_adapter(local_store, base_id, 1), put_adapter(local_store, base_id, 2)
    promoted(local_store, a, task, registry)
    promoted(local_store, b, task, registry)
    outcome = rollback(local_store, registry, "acme", task, actor="bob", reason="worse")
    assert (outcome.entry.kind, outcome.entry.adapter_id, outcome.entry.previous, outcome.note) == ("rollback", a, b, None)
    assert shown_aliases(registry, task) == {"champion": a, "previous": b}
    again = rollback(local_store, registry, "acme", task, actor="bob")
    assert not again.changed
    assert "rolled back" in again.sentence
    assert rollback(local_store, registry, "acme", task, f"acme.{task}@previous", actor="bob").entry.adapter_id == b
    assert [entry.adapter_id for entry in history(local_store, "acme", task)] == [a, b, a, b]


def test_rollback_goes_to_former_champions_only(local_store, base_id, task) -> None:
    a, b, c, d = (put_adapter(local_store, base_id, seed) for seed in range(4))
    with pytest.raises(BadInput, match="has no champion yet"):
        rollback(local_store, None, "acme", task, actor="ann")
    promoted(local_store, a, task)
    with pytest.raises(BadInput, match="has had one champion only"):
        rollback(local_store, None, "acme", task, actor="ann")
    promoted(local_store, b, task)
    promoted(local_store, c, task)
    with pytest.raises(BadInput, match=f"never was champion .* latest first: {c[:12]}, {b[:12]}, {a[:12]}"):
        rollback(local_store, None, "acme", task, d, actor="ann")
    assert rollback(local_store, None, "acme", task, a[:6], actor="ann").entry.adapter_id == a
    local_store.delete(layout.manifest("acme", base_id, b))
    with pytest.raises(BadInput, match="in the store .* no more"):
        rollback(local_store, None, "acme", task, b, actor="ann")


def test_two_promoters_of_one_head_do_not_both_win(local_store, base_id, task) -> None:
    a, b = put_adapter(local_store, base_id, 1), put_adapter(local_store, base_id, 2)
    head = read_head(local_store, "acme", task)
    promoted(local_store, a, task)
    late = Change(kind="promote", adapter_id=b, base_id=base_id, actor="bob", previous=None)
    with pytest.raises(WorkFailed, match=f"ann promoted {a[:12]} meanwhile"):
        commit(local_store, "acme", task, late, generation_of(head))


def test_promotion_and_rollback_work_while_mlflow_is_down(local_store, base_id, registry, dead_registry, task) -> None:
    a, b = put_adapter(local_store, base_id, 1), put_adapter(local_store, base_id, 2)
    for outcome in (
        register(local_store, a, base_id, task, dead_registry),
        promoted(local_store, a, task, dead_registry),
        promoted(local_store, b, task, dead_registry),
        rollback(local_store, dead_registry, "acme", task, actor="ann"),
    ):
        assert "does not answer" in str(outcome.note)
        assert "lorafleet reconcile" in str(outcome.note)
    assert [entry.adapter_id for entry in history(local_store, "acme", task)] == [a, b, a]
    assert project(local_store, registry, "acme", task) != []
    assert shown_aliases(registry, task) == {"champion": a, "previous": b, "challenger": a}


def test_projection_mends_what_others_changed_and_nothing_else(local_store, base_id, registry, task) -> None:
    a, b = put_adapter(local_store, base_id, 1), put_adapter(local_store, base_id, 2)
    promoted(local_store, a, task, registry)
    promoted(local_store, b, task, registry)
    assert project(local_store, registry, "acme", task) == []
    one = registry.aliases(f"acme.{task}")["previous"]
    registry.set_alias(f"acme.{task}", "champion", one)
    registry.set_alias(f"acme.{task}", "challenger", one)
    registry.set_alias(f"acme.{task}", "mine", one)
    told = [f"the alias champion is {a[:12]}, the store says {b[:12]}", "the alias challenger stands, the store knows none"]
    assert differences(local_store, registry, "acme", task) == told
    assert project(local_store, registry, "acme", task) == told
    assert shown_aliases(registry, task) == {"champion": b, "previous": a, "mine": a}
    assert differences(local_store, registry, "acme", task) == []


def test_best_of_a_sweep_is_the_challenger(local_store, base_id, registry, task) -> None:
    a, b = put_adapter(local_store, base_id, 1), put_adapter(local_store, base_id, 2)
    first = register(local_store, a, base_id, task, registry)
    assert first.candidate.metrics == {"eval/loss": 1.0}
    assert register(local_store, a, base_id, task, registry).candidate == first.candidate
    assert shown_aliases(registry, task) == {"challenger": a}
    register(local_store, b, base_id, task, registry)
    assert shown_aliases(registry, task) == {"challenger": b}
    assert find_reference(local_store, f"acme.{task}@challenger").adapter_id == b
    assert [version.tags["lorafleet.sweep"] for version in registry.versions(f"acme.{task}")] == ["s1", "s1"]
    with pytest.raises(BadInput, match="moved by promote and rollback only"):
        register(local_store, a, base_id, task, alias="champion")


def test_version_of_the_best_comes_from_its_run(local_store, base_id, registry, uri, task) -> None:
    run_id = MlflowTracker(uri).ensure_run(RunStart(f"acme/s/{task}", "acme", "s-0000"))
    register(local_store, put_adapter(local_store, base_id, 1), base_id, task, registry, run_id=run_id)
    [version] = registry.versions(f"acme.{task}")
    assert MlflowClient(uri).get_model_version(f"acme.{task}", version.version).run_id == run_id


@pytest.mark.parametrize("point", ["journal-written", "head-written", "promotion-projected"])
def test_rollback_that_was_killed_is_finished_by_the_same_command(local_store, base_id, registry, uri, point, task) -> None:
    a, b = put_adapter(local_store, base_id, 1), put_adapter(local_store, base_id, 2)
    promoted(local_store, a, task)
    promoted(local_store, b, task, registry)
    command = [sys.executable, "-c", ROLLBACK, str(local_store.root), task, *([uri] if point == "promotion-projected" else [])]
    killed = subprocess.run(command, env={**os.environ, "LORAFLEET_CRASHPOINT": point}, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert not rollback(local_store, registry, "acme", task, actor="ann").changed
    assert [entry.adapter_id for entry in history(local_store, "acme", task)] == [a, b, a]
    assert read_hint(local_store, "acme", task) == 3
    assert shown_aliases(registry, task) == {"champion": a, "previous": b}


def test_promotion_whose_projection_was_cut_off_is_finished_by_the_same_command(local_store, base_id, registry, task) -> None:
    a = put_adapter(local_store, base_id, 1)
    promoted(local_store, a, task)
    local_store.delete(layout.head("acme", task))
    assert not promoted(local_store, a, task, registry).changed
    assert read_hint(local_store, "acme", task) == 1
    assert shown_aliases(registry, task) == {"champion": a}


def test_rollback_loads_neither_torch_nor_mlflow() -> None:
    heavy = "{'torch', 'ray', 'optuna', 'boto3', 'transformers', 'mlflow'}"
    code = f"import sys, pipelines.promote; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
