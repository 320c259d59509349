"""Evidence: what was found out about an adapter, kept for good under the digest of its content.

Two kinds belong to a promotion. `evaluation`: the scores of each row of one data set for challenger, champion and plain base.
`promotion`: the verdicts, and the keys of the evaluations they rest on. Both are bound to a question (`Binding`): which adapter,
which task, which champion of which generation, which gates. Evidence for another question is stale: what was found against a
champion that is none any more is neither reused nor accepted by the journal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infra.crashpoints import crashpoint
from infra.errors import BadInput, ConditionFailed, ObjectNotFound, WorkFailed
from infra.fingerprint import id_of_json
from infra.records import decode_record, encode_record
from infra.storage import Storage
from pipelines.journal import Entry
from workers import layout
from workers.job import NUMERICS_VERSION
from workers.manifests import AdapterRef
from workers.scores import RowScores

EVIDENCE_FORMAT = "evidence/1"


@dataclass(frozen=True)
class Binding:
    """What evidence is about. Two findings are about the same question if their bindings are equal."""

    adapter: AdapterRef
    task: str
    head: Entry | None
    """The journal's end as it was; its adapter is the champion that was compared with. None: there was none."""
    gates: str | None
    """Digest of the gates; None if there were none."""

    @property
    def body(self) -> dict[str, Any]:
        """The binding as it stands in every evidence object."""
        head = self.head
        return {
            "adapter_id": self.adapter.adapter_id,
            "base_id": self.adapter.base_id,
            "task": self.task,
            "compared_with": head and {"generation": head.generation, "adapter_id": head.adapter_id, "base_id": head.base_id},
            "gates_digest": self.gates,
        }


@dataclass(frozen=True)
class Evaluation:
    """Scores of each row of one data set, by side (challenger, champion, base)."""

    data_digest: str
    num_rows: int
    setting: Mapping[str, Any]
    """All else that the numbers depend on: how the base was held, where rows were cut, how long answers may be."""
    scores: Mapping[str, RowScores]


def keep(store: Storage, binding: Binding, kind: str, found: Mapping[str, Any]) -> str:
    """Keep what was found and return its key. The same findings are one object, however often they are kept.

    What stands there damaged is replaced: the key says what should.
    """
    body = {"kind": kind, **binding.body, **found}
    key = layout.evidence(binding.adapter.tenant, binding.adapter.adapter_id, id_of_json(body))
    data = encode_record(EVIDENCE_FORMAT, body)
    try:
        store.put_if_absent(key, data)
    except ConditionFailed:
        try:
            read(store, key)
        except (BadInput, WorkFailed):
            store.put(key, data)
    crashpoint("evidence-written", key)
    return key


def keep_evaluation(store: Storage, binding: Binding, evaluation: Evaluation) -> str:
    """Keep the scores of a data set and return their key."""
    found = {
        "data": {"digest": evaluation.data_digest, "num_rows": evaluation.num_rows},
        "setting": {**evaluation.setting, "numerics": NUMERICS_VERSION},
        "scores": {side: scores.to_json() for side, scores in evaluation.scores.items()},
    }
    return keep(store, binding, "evaluation", found)


def find_evaluation(store: Storage, binding: Binding, data_digest: str, setting: Mapping[str, Any]) -> dict[str, RowScores]:
    """Return the scores by side that answer this very question on this very data. Stale and damaged ones are passed over."""
    found: dict[str, RowScores] = {}
    wanted = {**setting, "numerics": NUMERICS_VERSION}
    since = _written(store, binding)
    for info in store.list(layout.evidence_of(binding.adapter.tenant, binding.adapter.adapter_id)):
        if info.modified < since:
            continue
        try:
            body = read(store, info.key)
        except (BadInput, WorkFailed, ObjectNotFound):
            continue  # what is damaged is measured again
        if body.get("kind") != "evaluation" or not is_fresh(body, binding):
            continue
        if body["data"]["digest"] == data_digest and body["setting"] == wanted:
            found |= {side: RowScores.from_json(columns) for side, columns in body["scores"].items()}
    return found


def _written(store: Storage, binding: Binding) -> float:
    """Return when the journal's end was written, by the store's clock in whole seconds: older evidence is stale unread."""
    if binding.head is None:
        return 0.0
    info = store.head(layout.journal(binding.adapter.tenant, binding.task, binding.head.generation))
    return 0.0 if info is None else float(int(info.modified))


def read(store: Storage, key: str) -> dict[str, Any]:
    """Return the body of an evidence object. Raises BadInput if its content is not what its key says, ObjectNotFound."""
    body = decode_record(store.get(key)[0], EVIDENCE_FORMAT, key)
    if id_of_json(body) != key.rpartition("/")[2].removesuffix(".json"):
        raise BadInput(f"{key} in the store {store.uri} does not match its digest; restore it from a copy of the store.")
    return body


def audits_of(store: Storage, tenant: str, adapter_id: str) -> list[str]:
    """Return the sentences of an adapter's audits, the newest last; what is damaged is `adapters verify`'s subject."""
    found = []
    for info in sorted(store.list(layout.evidence_of(tenant, adapter_id)), key=lambda info: (info.modified, info.key)):
        try:
            body = read(store, info.key)
        except (BadInput, WorkFailed, ObjectNotFound):
            continue
        if body.get("kind") == "audit":
            found.append(str(body["sentence"]))
    return found


def is_fresh(body: Mapping[str, Any], binding: Binding) -> bool:
    """Tell whether an evidence object is about this question: the same adapter, task, champion, generation and gates."""
    return {name: body.get(name) for name in binding.body} == binding.body


def refuse_stale(store: Storage, keys: tuple[str, ...], binding: Binding) -> None:
    """Raise WorkFailed unless all of the evidence is there, whole, and about this question. The last look before the journal."""
    for key in keys:
        try:
            body = read(store, key)
        except ObjectNotFound:
            raise WorkFailed(f"the evidence {key} is not in the store {store.uri}; promote again.") from None
        if not is_fresh(body, binding):
            raise WorkFailed(f"the evidence {key} was found against another champion, or for other gates; promote again.")
