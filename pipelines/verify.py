"""`lorafleet adapters verify`: stored adapters read back in full, and on request every object of the store.

An adapter is whole if its manifest, both files, their digests, its id, shapes, ranks and numbers agree, and the store knows its
base. What else lies in the store is read against the SHA-256 the store keeps, and against what its key or its neighbours promise
(`pipelines.contents`). Nothing is written.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

from infra.errors import BadInput, LorafleetError, ServiceUnavailable
from infra.storage import Storage
from pipelines.contents import check_object
from pipelines.references import find_reference
from workers import layout
from workers.adapter_files import FILE_NAMES
from workers.adapter_store import DESCRIBED, StoredAdapter, load_adapter
from workers.bases import read_base
from workers.identity import base_id_of
from workers.manifests import AdapterRef, adapter_refs

NUM_READERS = 16
"""Objects read at the same time: a store that is far away answers each in tens of milliseconds."""


@dataclass(frozen=True)
class Verification:
    """What was read, and what of it is damaged."""

    adapters: list[dict[str, Any]]
    """Every adapter read, with `ok` and `problem`."""
    damaged: list[dict[str, Any]]
    """Objects other than whole adapters that are damaged: `key`, `problem`."""
    num_objects: int | None = None
    """Objects read beside the adapters; None if only adapters were asked for."""
    num_bytes: int = 0
    """Bytes of those objects."""

    @property
    def ok(self) -> bool:
        return not self.damaged and all(one["ok"] for one in self.adapters)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the adapters as rows, then the damaged objects as rows without an adapter."""
        strays = [{"adapter_id": None, "base_id": None, "tenant": None, "ok": False, **one} for one in self.damaged]
        return [*self.adapters, *strays]


def verify(store: Storage, references: Sequence[str]) -> Verification:
    """Read the named adapters back. Raises BadInput if one is not there at all."""
    return Verification(_read_adapters(store, [find_reference(store, one) for one in references]), [])


def verify_all(store: Storage, *, read_data: bool = False) -> Verification:
    """Read every adapter of the store back, and with `read_data` every object. Raises ServiceUnavailable only."""
    adapters = _read_adapters(store, adapter_refs(store))
    if not read_data:
        return Verification(adapters, [])
    read = {key for one in adapters for key in _keys_of(AdapterRef(one["tenant"], one["base_id"], one["adapter_id"]))}
    infos = [info for info in store.list("") if info.key not in read]
    problems = _in_parallel(lambda info: _problem_of(lambda: check_object(store, info.key)), infos)
    pairs = zip(infos, problems, strict=True)
    damaged = [{"key": info.key, "problem": problem} for info, problem in pairs if problem is not None]
    return Verification(adapters, damaged, len(infos), sum(info.size_bytes for info in infos))


def _keys_of(ref: AdapterRef) -> list[str]:
    """Return what reading an adapter back reads."""
    return [layout.manifest(*ref), *(layout.adapter(*ref) + name for name in FILE_NAMES)]


def _read_adapters(store: Storage, refs: Iterator[AdapterRef] | Sequence[AdapterRef]) -> list[dict[str, Any]]:
    problem_of_base = cache(lambda base_id: _problem_of(lambda: check_base_record(store, base_id)))
    return _in_parallel(lambda ref: _row(store, ref, problem_of_base), refs)


def _in_parallel(read: Callable[[Any], Any], what: Any) -> list[Any]:
    with ThreadPoolExecutor(NUM_READERS, "verify") as readers:
        return list(readers.map(read, what))


def _row(store: Storage, ref: AdapterRef, problem_of_base: Callable[[str], str | None]) -> dict[str, Any]:
    problem = _problem_of(lambda: check_adapter(store, ref)) or problem_of_base(ref.base_id)
    return {
        "adapter_id": ref.adapter_id,
        "base_id": ref.base_id,
        "tenant": ref.tenant,
        "ok": problem is None,
        "problem": problem,
        "key": layout.manifest(*ref),
    }


def _problem_of(check: Callable[[], object]) -> str | None:
    """Return what is wrong, None if nothing is. A store that does not answer is no damage."""
    try:
        check()
    except ServiceUnavailable:
        raise
    except LorafleetError as error:
        return str(error)
    return None


def check_adapter(store: Storage, ref: AdapterRef) -> StoredAdapter:
    """Read an adapter back in full and return it. Raises BadInput, WorkFailed or ObjectNotFound if it is not whole."""
    stored = load_adapter(store, *ref)
    config = {key: stored.adapter.config[key] for key in DESCRIBED}
    said = (stored.manifest.get("peft"), stored.manifest.get("num_parameters"))
    if said != (config, stored.adapter.num_parameters):
        raise BadInput(
            f"{layout.manifest(*ref)} in the store {store.uri} describes another configuration than that of the adapter's files; "
            "restore the manifest from a copy of the store."
        )
    return stored


def check_base_record(store: Storage, base_id: str) -> Mapping[str, Any]:
    """Return the record of a base. Raises BadInput if the store has none, or one of another base."""
    body = read_base(store, base_id)
    if body is None:
        raise BadInput(f"the store {store.uri} has no record of the base {base_id}; run 'lorafleet base add' with its folder.")
    try:
        described = base_id_of(body["weights_root"], body["architecture"])
    except (KeyError, TypeError):
        described = "nothing"
    if (described, body.get("base_id")) != (base_id, base_id):
        raise BadInput(f"{layout.base(base_id)} in the store {store.uri} describes another base; restore it from a copy.")
    return body


def verification_text(found: Verification) -> str:
    """Return a line for each adapter, one for each other damaged object, and the totals."""
    adapters = found.adapters
    lines = [f"{one['adapter_id']}  {one['tenant']}  {'ok' if one['ok'] else 'DAMAGED: ' + one['problem']}" for one in adapters]
    lines += [f"{one['key']}  DAMAGED: {one['problem']}" for one in found.damaged]
    lines.append(f"{len(adapters)} adapters read, {sum(not one['ok'] for one in adapters)} of them damaged.")
    if found.num_objects is not None:
        lines.append(f"{found.num_objects} objects read ({found.num_bytes:,} bytes), {len(found.damaged)} of them damaged.")
    return "\n".join(lines)
