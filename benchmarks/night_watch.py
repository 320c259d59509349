"""`lorafleet nightly run` under a watch, for `night.py`: the same night, with the seconds of its stages taken in the driver.

    python benchmarks/night_watch.py FLEET.YAML RESULT.JSON

Stages are functions of the driver, wrapped from outside; the time of one excludes that of stages inside it, and the sums of a
customer are over all threads. What hosts spend in passes is what they tell of themselves.
"""

import functools
import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
STARTED = time.time()

from infra import local_storage, tracking_log  # noqa: E402
from pipelines import judging  # noqa: E402
from pipelines.nightly import closing, driver, judge, ledger, preparing, run, settling, shown  # noqa: E402
from pipelines.workspace import Workspace  # noqa: E402
from workers import fleet, resolve  # noqa: E402
from workers.report import Finished, PackState  # noqa: E402

WhoOf = Callable[..., str | None]


class _Open(threading.local):
    """Stages that a thread is in: [name, tenant, seconds of stages inside]."""

    def __init__(self) -> None:
        self.stack: list[list[Any]] = []


@dataclass
class Watch:
    """Seconds by stage and by customer."""

    stages: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cpu: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    customers: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    busy: dict[str, float] = field(default_factory=dict)
    """Seconds in passes, by host."""
    finished: list[float] = field(default_factory=list)
    """When trainings ended, seconds since the epoch."""
    _open: _Open = field(default_factory=_Open)
    _lock: Any = field(default_factory=threading.Lock)

    def wrap(self, owner: Any, name: str, stage: str, who: WhoOf = lambda *args, **options: None) -> None:
        """Take the time of a function or method; `who` tells from its arguments which tenant it works for."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            stack = self._open.stack
            tenant = who(*args, **options) or (stack[-1][1] if stack else None)
            frame = [stage, tenant, 0.0, 0.0]
            stack.append(frame)
            began, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **options)
            finally:
                took, took_cpu = time.perf_counter() - began, time.thread_time() - cpu
                stack.pop()
                if stack:
                    stack[-1][2] += took
                    stack[-1][3] += took_cpu
                self._count(frame, took, took_cpu)

        setattr(owner, name, timed)

    def _count(self, frame: list[Any], took: float, took_cpu: float) -> None:
        stage, tenant, inside, inside_cpu = frame
        with self._lock:
            self.calls[stage] += 1
            self.stages[stage] += took - inside
            self.cpu[stage] += took_cpu - inside_cpu
            if tenant is not None:
                self.customers[tenant] += took - inside

    def listen(self) -> None:
        """Hear what hosts tell."""
        events = fleet.HostFleet.events

        def heard(hosts: Any, timeout_seconds: float) -> Any:
            told = events(hosts, timeout_seconds)
            for event in told:
                if isinstance(event, PackState):
                    self.busy[event.host] = event.busy_seconds
                elif isinstance(event, Finished):
                    self.finished.append(time.time())
            return told

        setattr(fleet.HostFleet, "events", heard)  # noqa: B010

    def install(self) -> None:
        """Wrap the stages of a night."""
        self.listen()
        self.wrap(preparing.Preparer, "prepare", "plan", lambda self, one: one.customer.tenant)
        self.wrap(preparing, "look_after", "care")
        self.wrap(resolve.Resolver, "resolve_rows", "resolve")
        self.wrap(settling.Settler, "trained", "settle", lambda self, ready, *rest: ready.customer.tenant)
        self.wrap(settling.Settler, "judged", "settle", lambda self, row, judged: row.tenant)
        self.wrap(settling, "promote", "promote")
        self.wrap(judging.Jury, "judge", "gates")
        self.wrap(judge, "_prepared", "judge", lambda hearing: hearing.case.challenger.tenant)
        self.wrap(judge.Judge, "submit", "judge", lambda self, challenger, *rest: challenger.tenant)
        self.wrap(driver.Driver, "_end", "rows", lambda self, row, *rest, **more: row.tenant)
        self.wrap(ledger.FleetLedger, "keep_plan", "rows", lambda self, night, plan: plan.row.tenant)
        for name in ("begin", "points", "trained", "end"):
            self.wrap(shown.Shown, name, "tracking log", lambda self, ready, *rest: ready.customer.tenant)
        self.wrap(tracking_log, "_deliver", "MLflow runs", lambda tracker, call: tenant_in(call.key))
        self.wrap(shown, "project", "MLflow aliases", lambda store, registry, tenant, task: tenant)
        for name in ("put", "put_if_absent", "compare_and_put", "delete"):
            self.wrap(local_storage.LocalStorage, name, "store, written")
        for name in ("get", "head", "download"):
            self.wrap(local_storage.LocalStorage, name, "store, read")
        self.wrap(closing.Closing, "close", "page")


def tenant_in(key: str) -> str | None:
    """Return the tenant in the tracker's key of a customer's run, None for the night's."""
    parts = key.split("/")
    return parts[3].partition(".")[0] if len(parts) == 4 else None


def main(path: Path, result: Path) -> int:
    """Run the night and write what was seen."""
    watch = Watch()
    watch.install()
    began = time.time()
    outcome = run.run(Workspace.here(), path)
    ended = time.time()
    assert outcome.report is not None
    found = {
        "started": STARTED,
        "began": began,
        "ended": ended,
        "finished": watch.finished,
        "busy": watch.busy,
        "stages": dict(watch.stages),
        "cpu": dict(watch.cpu),
        "calls": dict(watch.calls),
        "customers": dict(watch.customers),
        "night": outcome.report.night,
        "counts": outcome.report.counts,
        "notes": [*outcome.notes, *outcome.report.remarks],
    }
    result.write_text(json.dumps(found))
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
