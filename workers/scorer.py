"""Carries out orders to score: one base resident at a time, adapters and rows read from the store, passes shared by all orders.

A plain class; `scoring_task` runs it where a launcher puts it.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from infra.errors import WrongBase
from infra.storage import Storage
from workers.adapter import Adapter
from workers.adapter_store import load_adapter
from workers.bases import materialise
from workers.data.contract import prompt_contract
from workers.data.rows import Row
from workers.data.store import load_rows
from workers.engine.resident import ResidentBase
from workers.host_reasons import reason_of
from workers.loading import load_model
from workers.scoring import PackedBench, ScoreCase
from workers.scoring_task import Score, Scored, Setting, ShareRows, StoredCase
from workers.spec import TaskType

ORDERS_AT_A_TIME = 64
"""Orders whose adapters and rows are in memory together."""
MAX_BENCHES = 8
"""Ways to render rows (length, labels) that are kept for the resident base."""
NUM_READERS = 8
"""Threads that read from the store."""
Found = TypeVar("Found")


def residence_of(setting: Setting) -> Hashable:
    """Return what orders must have in common to be measured on one base in memory."""
    spec = setting.spec
    quantization = spec.quantization and spec.quantization.model_dump_json()
    held = (spec.dtype, quantization, spec.trust_remote_code)
    return setting.base_id, setting.prompt_contract, bool(setting.labels), held


@dataclass
class _Resident:
    """The base in memory, and what rows were rendered with on it."""

    residence: Hashable
    path: Path
    base: ResidentBase
    benches: OrderedDict[Hashable, PackedBench] = field(default_factory=OrderedDict)


class Scorer:
    """Measures stored adapters. Used by one thread."""

    def __init__(self, store: Storage, cache_dir: Path, *, device: str = "cpu", max_tokens: int | None = None) -> None:
        self._store, self._cache_dir, self._device, self._max_tokens = store, cache_dir, device, max_tokens
        self._readers = ThreadPoolExecutor(NUM_READERS, "read")
        self._resident: _Resident | None = None
        self._shared: dict[str, Sequence[Row]] = {}

    def share(self, shared: ShareRows) -> None:
        """Keep rows for the orders that follow."""
        self._shared[shared.digest] = shared.rows

    def choose(self, waiting: Sequence[Score]) -> list[Score]:
        """Return which orders to carry out next: those on the resident base, else those on the base of the first."""
        if not waiting:
            return []
        present = self._resident.residence if self._resident is not None else None
        residences = [residence_of(order.setting) for order in waiting]
        wanted = present if present in residences else residences[0]
        own = [order for order, residence in zip(waiting, residences, strict=True) if residence == wanted]
        return own[:ORDERS_AT_A_TIME]

    def score(self, orders: Sequence[Score]) -> list[Scored]:
        """Carry out orders on one base. Nothing is raised: what went wrong stands in the place of what was asked for."""
        adapters = self._read_all(dict.fromkeys(key for order in orders for key in _adapters_of(order)), self._read_adapter)
        rows = self._read_all(dict.fromkeys(key for order in orders for key in _rows_of(order)), self._read_rows)
        found: dict[int, Scored] = {}
        for some in _alike(orders):
            try:
                bench = self._bench(some[0].setting)
            except Exception as error:
                found |= {order.number: _refused(order, reason_of(error)) for order in some}
                continue
            found |= _score_alike(bench, some, adapters, rows)
        return [found[order.number] for order in orders]

    def close(self) -> None:
        """Let go of the base."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._resident = None

    def _read_all(self, keys: Iterable[Any], read: Callable[[Any], Found]) -> dict[Any, Found | Exception]:
        """Read from the store, several at a time; where it raises stands what it raised."""

        def attempt(key: Any) -> Found | Exception:
            try:
                return read(key)
            except Exception as error:
                return error

        wanted = list(keys)
        return dict(zip(wanted, self._readers.map(attempt, wanted), strict=True))

    def _read_adapter(self, key: tuple[str, str, str]) -> Adapter:
        return load_adapter(self._store, *key).adapter

    def _read_rows(self, key: tuple[str, str]) -> Sequence[Row]:
        tenant, digest = key
        return self._shared[digest] if digest in self._shared else load_rows(self._store, tenant, digest)

    def _bench(self, setting: Setting) -> PackedBench:
        """Return the bench of a setting, loading its base unless it is resident."""
        resident = self._reside(setting)
        key = (setting.max_length, setting.labels)
        if key not in resident.benches:
            resident.benches[key] = PackedBench(
                resident.path,
                setting.spec,
                setting.max_length,
                setting.labels,
                max_tokens=self._max_tokens,
                base=resident.base,
            )
            while len(resident.benches) > MAX_BENCHES:
                resident.benches.popitem(last=False)
        resident.benches.move_to_end(key)
        return resident.benches[key]

    def _reside(self, setting: Setting) -> _Resident:
        residence = residence_of(setting)
        if self._resident is None or self._resident.residence != residence:
            self._resident = None  # one base in memory at a time
            path = materialise(setting.base_id, Path(setting.path), self._store, self._cache_dir)
            if prompt_contract(path) != setting.prompt_contract:  # a base's id does not cover its tokenizer
                raise WrongBase(
                    f"the tokenizer or chat template in {path} is not the one the adapter was trained with; restore the folder."
                )
            task_type: TaskType = "SEQ_CLS" if setting.labels else "CAUSAL_LM"
            model = load_model(path, setting.spec, task_type=task_type, device=self._device)
            self._resident = _Resident(residence, path, ResidentBase(model))
        return self._resident


def _alike(orders: Sequence[Score]) -> list[list[Score]]:
    """Group orders by how their rows are rendered."""
    groups: dict[Hashable, list[Score]] = {}
    for order in orders:
        groups.setdefault((order.setting.max_length, order.setting.labels), []).append(order)
    return list(groups.values())


def _score_alike(
    bench: PackedBench, orders: Sequence[Score], adapters: Mapping[Any, Adapter | Exception], rows: Mapping[Any, Any]
) -> dict[int, Scored]:
    """Measure the cases of all orders together, and give each order its own."""
    cases = [_case(order, case, adapters, rows) for order in orders for case in order.cases]
    probed = [adapters[_adapter_key(order, adapter_id)] for order in orders for adapter_id in order.probed]
    scores = iter(_try(bench.try_score, cases))
    effects = iter(_try(bench.try_effects, probed))
    return {
        order.number: Scored(order.number, tuple(next(scores) for _ in order.cases), tuple(next(effects) for _ in order.probed))
        for order in orders
    }


def _case(
    order: Score, case: StoredCase, adapters: Mapping[Any, Adapter | Exception], rows: Mapping[Any, Any]
) -> ScoreCase | Exception:
    adapter = None if case.adapter_id is None else adapters[_adapter_key(order, case.adapter_id)]
    own = rows[order.tenant, case.rows]
    if isinstance(adapter, Exception):
        return adapter
    return own if isinstance(own, Exception) else ScoreCase(adapter, own, case.evaluation, case.answers)


def _try(measure: Callable[[list[Any]], list[Any]], given: Sequence[Any]) -> list[Any]:
    """Measure what could be read; whatever failed becomes a reason."""
    found = iter(measure([one for one in given if not isinstance(one, Exception)]))
    told = [one if isinstance(one, Exception) else next(found) for one in given]
    return [reason_of(one) if isinstance(one, Exception) else one for one in told]


def _refused(order: Score, reason: str) -> Scored:
    return Scored(order.number, (reason,) * len(order.cases), (reason,) * len(order.probed))


def _adapter_key(order: Score, adapter_id: str) -> tuple[str, str, str]:
    return order.tenant, order.setting.base_id, adapter_id


def _adapters_of(order: Score) -> list[tuple[str, str, str]]:
    named = [case.adapter_id for case in order.cases if case.adapter_id is not None]
    return [_adapter_key(order, adapter_id) for adapter_id in dict.fromkeys([*named, *order.probed])]


def _rows_of(order: Score) -> list[tuple[str, str]]:
    return [(order.tenant, case.rows) for case in order.cases]
