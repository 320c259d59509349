"""What MLflow shows of a night: a run for the night with its page, a run for each customer that was trained, and the aliases.

None of it is waited for: runs go through the tracking log, aliases through a thread of their own that makes MLflow's registered
models equal to the store. What could not be shown is said, and made up for by `lorafleet reconcile`.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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
            return f"MLflow does not show all of it yet ({why.rstrip('.')}); 'lorafleet reconcile --fix' will."
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
    aliases: Aliases | None
    """None: of a night that nobody drives any more."""
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
        self._run_of_night()
        self.log.end(self.parent, "running")

    def pause(self) -> None:
        """The night was interrupted, and waits for the command that finishes it."""
        self.log.end(self.parent, "preempted")

    def begin(self, ready: Ready) -> None:
        """A customer is trained."""
        self._run_of(ready.key, tags_of(ready.job), params_of(ready.job))
        self.log.end(self.key(ready), "running")

    def again(self, rows: Iterable[Row]) -> None:
        """These ended before the night was interrupted, which may have come before their registered models were shown."""
        for row in rows:
            if row.adapter_id is not None and self.aliases is not None:
                self.aliases.show((row.tenant, row.task))

    def wait(self, timeout_seconds: float) -> str | None:
        """Wait until all registered models are shown; return a sentence if one is not."""
        return None if self.aliases is None else self.aliases.close(timeout_seconds)

    def cut_off(self, planned: Iterable[Row], page: Path) -> None:
        """Nobody finishes this night any more: close its run, and those of customers it planned and did not end."""
        self._run_of_night()
        for row in planned:
            key = (row.tenant, row.task)
            self._run_of(key, {}, {})
            self.log.end(self._key(key), f"cancelled({row.reason})")
        self._pages(page)
        self.log.end(self.parent, "cancelled")

    def close(self, counts: Mapping[str, int], page: Path) -> None:
        """The night has ended."""
        self.log.tags(self.parent, {f"lorafleet.{status}": str(count) for status, count in counts.items()})
        self._pages(page)
        self.log.end(self.parent, "failed" if counts["failed"] else "succeeded")

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
        ended = "failed" if row.status == "failed" else "cancelled"  # by a limit of the night
        self.log.end(self.key(ready), "succeeded" if row.adapter_id is not None else f"{ended}({row.reason})")
        self.again([row])

    def key(self, ready: Ready) -> str:
        """Return the tracker's key of a customer's run."""
        return self._key(ready.key)

    def left_open(self, readies: Sequence[Ready]) -> None:
        """These are checkpointed and go on another time."""
        for ready in readies:
            self.log.end(self.key(ready), "preempted")

    def _key(self, customer: Model) -> str:
        return f"{self.parent}/{'.'.join(customer)}"

    def _run_of_night(self) -> None:
        self.log.run(RunStart(self.parent, self.fleet, f"night-{self.night}", tags={"lorafleet.fleet": self.fleet}))

    def _run_of(self, customer: Model, tags: Mapping[str, str], params: Mapping[str, str]) -> None:
        name = f"{'.'.join(customer)}-{self.night}"
        own = {"lorafleet.fleet": self.fleet, "lorafleet.tenant": customer[0]}
        self.log.run(RunStart(self._key(customer), self.fleet, name, self.parent, tags={**tags, **own}, params=params))

    def _pages(self, page: Path) -> None:
        for path in (page, page.with_suffix(".json")):
            self.log.file(self.parent, path, "report")
