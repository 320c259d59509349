"""From a trained and measured challenger to the end of its customer's night: promoted, rejected, or held by a limit.

The promotion itself is `pipelines.promote`, with a jury that has everything measured. A night that is continued after a kill
comes here again with the same adapter: whoever is champion already was promoted by this night.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from infra.errors import BadInput, GateRejected, LorafleetError, ServiceUnavailable, WorkFailed
from infra.storage import Storage
from pipelines.gates import Verdict
from pipelines.journal import Candidate, Entry, history, read_head, register_candidate
from pipelines.nightly.judge import Judged
from pipelines.nightly.limits import PromotionQuota
from pipelines.nightly.preparing import Ready
from pipelines.nightly.records import Row
from pipelines.promote import promote
from pipelines.references import CHALLENGER
from workers.manifests import AdapterRef
from workers.report import Finished

_STEPS = {
    "non_finite": "Lower training.learning_rate for this customer, or look at its rows.",
    "out_of_memory": "Lower per_device_train_batch_size or max_length for this customer.",
    "no_effect": "Train longer, or with a higher learning rate.",
    "host_lost": "It is first in line next night; look at the hosts if it happens again.",
}
METRIC = "eval/loss"


@dataclass
class Settler:
    """Ends the rows of customers that were trained."""

    store: Storage
    fleet: str
    night: str
    quota: PromotionQuota
    now: Callable[[], float] = time.time
    """Seconds since the epoch."""

    def trained(self, ready: Ready, finished: Finished, cost: float) -> Row:
        """Return a customer's row after its training: of status `trained` if there is an adapter to judge, else ended."""
        row = replace(
            ready.row,
            num_steps=finished.num_steps,
            num_tokens=0 if finished.reused else finished.num_tokens,
            seconds=0.0 if finished.reused else finished.seconds,
            cost=cost,
            ended_at=self.now(),
        )
        if finished.status == "succeeded":
            assert finished.adapter_id is not None
            self._offer(ready, finished)
            digest = ready.job.train.digest
            return replace(row, status="trained", adapter_id=finished.adapter_id, trained_at=self.now(), train_digest=digest)
        if finished.status in ("preempted", "cancelled"):
            return replace(row, status="held" if finished.status == "preempted" else "failed", reason=finished.status)
        word, _, sentence = finished.reason.partition(": ")
        return replace(row, status="failed", reason=word or "error", sentence=sentence, next_step=_STEPS.get(word, ""))

    def champion_before(self, row: Row) -> Entry | None:
        """Return whom a trained row's adapter is compared with: the head, or the one before if this night promoted it already."""
        head = read_head(self.store, row.tenant, row.task)
        if head is None or head.adapter_id != row.adapter_id or not self._is_ours(head):
            return head
        earlier = history(self.store, row.tenant, row.task)[: head.generation - 1]
        return earlier[-1] if earlier else None

    def judged(self, row: Row, judged: Judged) -> Row:
        """Return the end of a trained customer's night. Raises nothing that is this customer's alone."""
        row = self._measured(row, judged)
        if judged.problem:
            word, _, sentence = judged.problem.partition(": ")
            return replace(row, status="failed", reason=word, sentence=sentence or judged.problem)
        try:
            return self._settled(row, judged)
        except ServiceUnavailable as error:
            return replace(row, status="failed", reason="service", sentence=str(error))
        except LorafleetError as error:
            return replace(row, status="failed", reason="not_judged", sentence=str(error))

    def _settled(self, row: Row, judged: Judged) -> Row:
        ref, head = judged.challenger, read_head(self.store, row.tenant, row.task)
        replaces = head is not None
        if head is not None and head.adapter_id == ref.adapter_id:
            return self._champion_already(row, judged)
        if not self.quota.allows(replaces):
            return self._beyond_the_limit(row, judged)
        try:
            outcome = promote(
                self.store,
                None,  # MLflow follows in a thread of its own
                ref.adapter_id,
                tenant=row.tenant,
                task=row.task,
                jury=judged.jury,
                actor=f"nightly {self.fleet}",
                reason=f"night {self.night}",
            )
        except GateRejected as error:
            return _rejected(row, judged, str(error))
        except (BadInput, WorkFailed) as error:
            return replace(row, status="failed", reason="not_promoted", sentence=str(error), verdicts=_verdicts(judged))
        self.quota.count(replaces)
        return replace(
            row,
            status="promoted",
            sentence=outcome.sentence,
            verdicts=_verdicts(judged),
            champion_id=outcome.entry.adapter_id,
            generation=outcome.entry.generation,
            num_rejections=0,
            num_withdrawn=0,
        )

    def _champion_already(self, row: Row, judged: Judged) -> Row:
        """It was promoted by this night before a kill; or training gave the very adapter that is champion."""
        entry = read_head(self.store, row.tenant, row.task)
        assert entry is not None
        known: dict[str, Any] = {"champion_id": entry.adapter_id, "generation": entry.generation, "num_rejections": 0}
        if self._is_ours(entry):
            self.quota.count(entry.previous is not None)
            judged.jury.judge(judged.challenger, row.task, judged.champion)
            said = "It was promoted before the night was interrupted."
            return replace(row, status="promoted", sentence=said, verdicts=_verdicts(judged), **known)
        return replace(row, status="skipped", reason="same_adapter", sentence="Training gave the champion again.", **known)

    def _is_ours(self, entry: Entry) -> bool:
        return entry.actor == f"nightly {self.fleet}" and entry.reason == f"night {self.night}"

    def _beyond_the_limit(self, row: Row, judged: Judged) -> Row:
        head = read_head(self.store, row.tenant, row.task)
        judgement = judged.jury.judge(judged.challenger, row.task, head)
        if not judgement.passed:
            return _rejected(row, judged, "")
        said = f"It passed its gates, and the night has replaced {self.quota.most} champions, as many as it may."
        step = "It is first in line next night; promote it by hand, or raise limits.max_promotions_share."
        return replace(row, status="held", reason="promotion_limit", sentence=said, next_step=step, verdicts=_verdicts(judged))

    def _offer(self, ready: Ready, finished: Finished) -> None:
        job, adapter_id = ready.job, str(finished.adapter_id)
        metrics = {name: float(value) for name, value in finished.metrics.items() if abs(value) < float("inf")}
        offered = Candidate(adapter_id, job.base.base_id, job.job_id, None, metrics, time.time(), CHALLENGER)
        register_candidate(self.store, *ready.key, offered)

    def _measured(self, row: Row, judged: Judged) -> Row:
        return replace(
            row,
            metric=METRIC,
            challenger=judged.value("challenger", METRIC),
            champion=judged.value("champion", METRIC),
            base=judged.value("base", METRIC),
            holdout_digest=judged.holdout_digest or row.holdout_digest,
            ended_at=self.now(),
        )


def challenger_of(row: Row) -> AdapterRef:
    """Return the adapter of a row that was trained."""
    assert row.base_id is not None
    assert row.adapter_id is not None
    return AdapterRef(row.tenant, row.base_id, row.adapter_id)


def _rejected(row: Row, judged: Judged, sentence: str) -> Row:
    verdicts = _verdicts(judged)
    failed = "; ".join(f"{one['gate']}: {one['sentence']}" for one in verdicts if not one["passed"])
    first = next((one["gate"] for one in verdicts if not one["passed"]), "gate")
    return replace(
        row,
        status="rejected",
        reason=str(first).split(" ")[0],
        sentence=failed or sentence,
        next_step=_step_after_withdrawal(row),
        verdicts=verdicts,
        num_rejections=row.num_rejections + 1,
    )


def _step_after_withdrawal(row: Row) -> str:
    """Say what to do where the champion that stays knows rows that were taken back: the gates know nothing of that."""
    if not row.num_withdrawn or row.adapter_id is None:
        return ""
    return (
        f"The champion was trained on {row.num_withdrawn} rows that were withdrawn since. To serve without them: "
        f"lorafleet promote {row.adapter_id} --force --reason 'rows were withdrawn'."
    )


def _verdicts(judged: Judged) -> tuple[dict[str, Any], ...]:
    last = judged.jury.last
    return () if last is None else tuple(map(_verdict, last.verdicts))


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {name: value for name, value in verdict.to_json().items() if name != "figures"}


def held_rows(rows: Sequence[Row], reason: str, sentence: str, step: str, now: float) -> list[Row]:
    """Return the rows of customers whose turn did not come."""
    return [replace(row, status="held", reason=reason, sentence=sentence, next_step=step, ended_at=now) for row in rows]
