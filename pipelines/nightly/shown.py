"""What MLflow shows of a night: a run for the night with its page, a run for each customer that was trained, and the aliases.

None of it is waited for: runs go through the tracking log, aliases through a thread of their own that makes MLflow's registered
models equal to the store. What could not be shown is said, and made up for by `lorafleet reconcile`.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from infra.errors import LorafleetError
from infra.storage import Storage
from infra.tracking import RunStart
from infra.tracking_log import TrackingLog
from pipelines.nightly.preparing import Ready
from pipelines.nightly.records import Row
from pipelines.projection import project
from pipelines.train import params_of, tags_of
from workers.metrics_log import decode_points
from workers.report import Finished

if TYPE_CHECKING:
    from infra.mlflow_registry import ModelRegistry

log = logging.getLogger(__name__)
Model = tuple[str, str]


class Aliases:
    """Makes registered models equal to the store, one after the other, in a thread. Opened with the registry when first used."""

    def __init__(self, store: Storage, open_registry: Callable[[], "ModelRegistry"]) -> None:
        self._store, self._open = store, open_registry
        self._queue: queue.SimpleQueue[Model | None] = queue.SimpleQueue()
        self._failed: dict[Model, str] = {}
        self._thread = threading.Thread(target=self._run, name="aliases", daemon=True)
        self._thread.start()

    def show(self, model: Model) -> None:
        """Have a model shown soon."""
        self._queue.put(model)

    def close(self, timeout_seconds: float) -> str | None:
        """Wait until everything is shown; return a sentence if something was not."""
        self._queue.put(None)
        self._thread.join(timeout_seconds)
        if self._thread.is_alive() or self._failed:
            why = next(iter(self._failed.values()), "it did not answer in time")
            return f"MLflow does not show all of it yet ({why.rstrip('.')}); 'lorafleet reconcile' will."
        return None

    def _run(self) -> None:
        registry: ModelRegistry | None = None
        while (model := self._queue.get()) is not None:
            try:
                registry = registry or self._open()
                project(self._store, registry, *model)
            except LorafleetError as error:
                log.warning("the aliases of %s are not shown: %s", ".".join(model), error)
                self._failed[model] = str(error)


@dataclass
class Shown:
    """Writes a night into the tracking log."""

    log: TrackingLog
    aliases: Aliases
    store: Storage
    fleet: str
    night: str
    _shipped: set[str] = field(default_factory=set)

    @property
    def parent(self) -> str:
        """The tracker's key of the night's run."""
        return f"fleets/{self.fleet}/{self.night}"

    def open(self) -> None:
        """The night is driven (again)."""
        self.log.run(RunStart(self.parent, self.fleet, f"night-{self.night}", tags={"lorafleet.fleet": self.fleet}))
        self.log.end(self.parent, "running")

    def begin(self, ready: Ready) -> None:
        """A customer is trained."""
        tags = tags_of(ready.job) | {"lorafleet.fleet": self.fleet}
        name = f"{ready.customer.name}-{self.night}"
        self.log.run(RunStart(self.key(ready), self.fleet, name, self.parent, tags=tags, params=params_of(ready.job)))
        self.log.end(self.key(ready), "running")

    def points(self, ready: Ready, chunks: Iterable[str]) -> None:
        """The points in these chunks are safe."""
        for chunk in chunks:
            if chunk and (name := f"{self.key(ready)} {chunk}") not in self._shipped:
                self._shipped.add(name)
                self.log.points(self.key(ready), decode_points(self.store.get(chunk)[0]))

    def trained(self, ready: Ready, finished: Finished) -> None:
        """A customer's training has ended."""
        self.points(ready, finished.chunks)
        ids = {"lorafleet.adapter_id": finished.adapter_id} if finished.adapter_id is not None else {}
        self.log.tags(self.key(ready), ids | {"lorafleet.attempt": str(finished.attempt)})
        self._shipped = {name for name in self._shipped if not name.startswith(f"{self.key(ready)} ")}

    def end(self, ready: Ready, row: Row) -> None:
        """A customer's night has ended; its registered model may have changed."""
        verdict = {"lorafleet.night": self.night, "lorafleet.candidate": row.status}
        self.log.tags(self.key(ready), verdict)
        done = "succeeded" if row.adapter_id is not None else "failed"
        self.log.end(self.key(ready), done if done == "succeeded" else f"failed({row.reason})")
        if row.adapter_id is not None:
            self.aliases.show(ready.key)

    def key(self, ready: Ready) -> str:
        """Return the tracker's key of a customer's run."""
        return f"{self.parent}/{ready.customer.name}"

    def left_open(self, readies: Sequence[Ready]) -> None:
        """These are checkpointed and go on another time."""
        for ready in readies:
            self.log.end(self.key(ready), "preempted")
