"""The launched scorer: orders of several tenants, lengths and bases go in together, and each gets its own answer."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.launch import Resources
from infra.local_launch import ThreadLauncher
from infra.services import Services
from infra.settings import Settings
from infra.storage import Storage
from tests.workers.tiny_adapters import BODY, classify_with_peft, train_with_peft
from tests.workers.tiny_bases import WORDS, make_base, write_tokenizer
from workers.adapter import Adapter
from workers.adapter_files import read_adapter_folder
from workers.adapter_store import store_adapter
from workers.data.contract import prompt_contract
from workers.data.rows import Row, canonical_rows, digest_of
from workers.data.store import save_rows
from workers.evaluate import Bench
from workers.identity import identify
from workers.scoring_task import Order, Score, Scored, ScoringTask, Setting, ShareRows, Shutdown, StoredCase
from workers.spec import BaseModelSpec, EvaluationSpec

PATIENCE_SECONDS = 60.0


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    found = [make_base(tmp_path_factory.mktemp("bases") / str(seed), seed=seed) for seed in range(2)]
    for base in found:
        write_tokenizer(base, "llama")
    return found


@pytest.fixture
def services(tmp_path: Path) -> Services:
    return Services(Settings(home=tmp_path / "home"))


def trained(folder: Path, seed: int) -> Adapter:
    train_with_peft(folder, seed=seed)
    return read_adapter_folder(folder)


def texts(number: int) -> list[Row]:
    return [Row({"text": " ".join(WORDS[place : place + number])}, "a row") for place in range(number)]


def setting_of(base: Path, max_length: int = 32, labels: tuple[str, ...] = ()) -> Setting:
    spec = BaseModelSpec(name_or_path=str(base))
    return Setting(identify(base).base_id, str(base), prompt_contract(base), spec, max_length, labels)


def put(store: Storage, tenant: str, base: Path, adapter: Adapter) -> str:
    return store_adapter(store, tenant, identify(base).base_id, adapter, BODY)


@pytest.fixture
def launcher() -> Iterator[ThreadLauncher]:
    launcher = ThreadLauncher()
    yield launcher
    launcher.close()


def carried_out(launcher: ThreadLauncher, services: Services, orders: list[Order]) -> dict[int, Scored]:
    """Send orders to a scorer and shut it down; return what it answered."""
    handle = launcher.launch(ScoringTask(services), "scorer", Resources())
    for order in [*orders, Shutdown()]:
        handle.channel.send(order)
    found: dict[int, Scored] = {}
    while not handle.channel.closed:
        found |= {scored.number: scored for scored in handle.channel.receive(PATIENCE_SECONDS)}
    ended = handle.poll()
    assert ended is not None
    assert ended.kind == "returned", ended.details
    return found | {scored.number: scored for scored in handle.channel.receive(0.0)}


def test_each_order_gets_what_a_bench_of_its_own_gives(tmp_path, bases, services, launcher) -> None:
    orders: list[Order] = []
    expected = {}
    for number in range(6):
        base, tenant, max_length = bases[number % 2], f"t{number}", (8, 32)[number // 3]
        adapter, rows = trained(tmp_path / str(number), number), texts(number + 2)
        own_id, digest = put(services.store, tenant, base, adapter), save_rows(services.store, tenant, rows).digest
        cases = (StoredCase(own_id, digest), StoredCase(None, digest))
        orders.append(Score(number, tenant, setting_of(base, max_length), cases, (own_id,)))
        bench = Bench(base, BaseModelSpec(name_or_path=str(base)), max_length)
        scores = tuple(bench.scores(one, rows, EvaluationSpec()) for one in (adapter, None))
        expected[number] = Scored(number, scores, (bench.moves_logits(adapter),))
    assert carried_out(launcher, services, orders) == expected


def test_classifiers_with_labels_of_their_own_share_a_base(tmp_path, bases, services, launcher) -> None:
    orders: list[Order] = []
    for number in range(2):
        classify_with_peft(tmp_path / str(number), "llama", num_labels=number + 2, seed=number)
        adapter = read_adapter_folder(tmp_path / str(number))
        rows = [Row({"text": word, "label": adapter.labels[place % (number + 2)]}, word) for place, word in enumerate(WORDS)]
        own_id, digest = put(services.store, "acme", bases[0], adapter), save_rows(services.store, "acme", rows).digest
        orders.append(Score(number, "acme", setting_of(bases[0], 32, adapter.labels), (StoredCase(own_id, digest),), (own_id,)))
    found = carried_out(launcher, services, orders)
    assert [type(found[number].scores[0]).__name__ for number in range(2)] == ["RowScores"] * 2
    assert [found[number].effects for number in range(2)] == [(True,), (True,)]


def test_shared_rows_belong_to_no_tenant_and_what_is_missing_is_told_in_its_place(tmp_path, bases, services, launcher) -> None:
    own_id = put(services.store, "acme", bases[0], trained(tmp_path / "adapter", 1))
    guard = texts(3)
    digest = digest_of(canonical_rows(guard))
    cases = (StoredCase(own_id, digest), StoredCase("a" * 32, digest), StoredCase(own_id, "b" * 32))
    order = Score(1, "acme", setting_of(bases[0]), cases, (own_id, "a" * 32))
    stranger = Score(2, "globex", setting_of(bases[0]), (StoredCase(own_id, digest),))
    found = carried_out(launcher, services, [ShareRows(digest, tuple(guard)), order, stranger])
    good, no_adapter, no_rows = found[1].scores
    assert not isinstance(good, str)
    assert str(no_adapter).startswith("bad_input: ")
    assert "keeps no rows" in str(no_rows)
    assert found[1].effects[0] is True
    assert "no adapter" in str(found[1].effects[1])
    assert "globex" in str(found[2].scores[0]), "an adapter is its tenant's only"


def test_base_with_another_tokenizer_is_refused(tmp_path, bases, services, launcher) -> None:
    right = setting_of(bases[0])
    wrong = Setting(right.base_id, right.path, "p" * 32, right.spec, right.max_length)
    digest = save_rows(services.store, "acme", texts(2)).digest
    found = carried_out(
        launcher, services, [Score(n, "acme", one, (StoredCase(None, digest),)) for n, one in enumerate([wrong, right])]
    )
    assert "tokenizer or chat template" in str(found[0].scores[0])
    assert not isinstance(found[1].scores[0], str)


def test_driver_that_launches_a_scorer_loads_no_torch() -> None:
    code = "import sys, workers.scoring_task; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
