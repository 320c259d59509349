"""What a launched scorer runs: orders in, scores out, one base in memory at a time, until it is told to end.

Orders that wait at the same time are measured together, whoever's they are: those on one base share their passes. The task reads
adapters and rows from the store itself. Light on purpose, as `host_task` is.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from infra.crashpoints import crashpoint
from infra.launch import Channel
from infra.services import Services
from workers.data.rows import Row
from workers.scores import RowScores
from workers.spec import BaseModelSpec, EvaluationSpec

if TYPE_CHECKING:
    from workers.scorer import Scorer

IDLE_SECONDS = 0.5


@dataclass(frozen=True)
class Setting:
    """All that scores depend on beside adapters and rows."""

    base_id: str
    path: str
    """Where the base may lie on this node: a hint."""
    prompt_contract: str
    spec: BaseModelSpec
    """How the base is held."""
    max_length: int
    labels: tuple[str, ...] = ()
    """Of classifiers, in the order of their heads' rows."""


@dataclass(frozen=True)
class StoredCase:
    """An adapter (None: the plain base) to be measured on rows, all in the store or among the rows that were shared."""

    adapter_id: str | None
    rows: str
    """Digest."""
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    answers: bool = False


@dataclass(frozen=True)
class Score:
    """An order: cases of one tenant on one base, and the adapters whose effect is asked for."""

    number: int
    tenant: str
    setting: Setting
    cases: tuple[StoredCase, ...]
    probed: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShareRows:
    """Rows that are no tenant's own, such as those of a guard, for all orders that follow."""

    digest: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Shutdown:
    """No more orders will come."""


Order = Score | ShareRows | Shutdown


@dataclass(frozen=True)
class Scored:
    """What an order found, in its order. Where something could not be measured stands why: a word of `report.Finished.reason`, a
    colon, a sentence."""

    number: int
    scores: tuple[RowScores | str, ...]
    effects: tuple[bool | str, ...] = ()


@dataclass(frozen=True)
class ScoringTask:
    """A picklable task that measures what it is asked to, over the services it rebuilds where it lands."""

    services: Services
    device: str = "cpu"
    """Where torch computes: "cpu", or "cuda" if the launcher gives the task a GPU."""
    max_tokens: int | None = None
    """Tokens of a pass at most; None leaves it to the device."""

    def __call__(self, channel: Channel) -> None:
        make = importlib.import_module("workers.scorer").Scorer  # torch is loaded here, in the task's own process
        scorer: Scorer = make(self.services.store, self.services.cache_dir, device=self.device, max_tokens=self.max_tokens)
        try:
            _serve(channel, scorer)
        finally:
            scorer.close()


def _serve(channel: Channel, scorer: "Scorer") -> None:
    waiting: list[Score] = []
    told_to_end = False
    while waiting or not (told_to_end or channel.closed):
        orders: Sequence[Order] = channel.receive(0.0 if waiting else IDLE_SECONDS)
        told_to_end |= any(isinstance(order, Shutdown) for order in orders)
        for order in orders:
            if isinstance(order, ShareRows):
                scorer.share(order)
        waiting += [order for order in orders if isinstance(order, Score)]
        if channel.closed:
            return
        chosen = scorer.choose(waiting)
        taken = {order.number for order in chosen}
        waiting = [order for order in waiting if order.number not in taken]
        if chosen:
            crashpoint("orders-taken", " ".join(f"{order.tenant}:{order.number}" for order in chosen))
        for scored in scorer.score(chosen):
            channel.send(scored)
