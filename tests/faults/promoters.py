"""Many promoters of one task that are killed and started again: a program for `test_killed_promotions`.

One process loads torch and the base once and forks the promoters, so that a new one costs milliseconds. `python -m
tests.faults.promoters '<Plan as JSON>'` ends when the journal is long enough and prints how the promoters died.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from infra.errors import BadInput, ServiceUnavailable, WorkFailed
from infra.settings import Settings
from infra.strict import parse
from pipelines.gates import load_gates
from pipelines.journal import Entry, generation_of, read_head
from pipelines.judging import Jury
from pipelines.promote import freeze, promote, rollback, unfreeze
from pipelines.workspace import Workspace
from workers.manifests import AdapterRef

TENANT, TASK = "acme", "menus"


@dataclass(frozen=True)
class Plan:
    """What is to happen."""

    home: str
    store: str
    endpoint_url: str
    tracking_uri: str
    gates: str
    base_id: str
    adapters: list[str]
    num_promoters: int
    num_generations: int
    points: list[str]
    """Where promoters die, one after the other: "journal-written:1"."""
    num_random_kills: int
    num_projecting: int
    """So many of each ten promoters show MLflow what they did."""
    seed: int


class Promoters:
    """The living promoters, and how the others died."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._draw = random.Random(plan.seed)
        self._points = list(plan.points)
        self._living: dict[int, str] = {}
        self._num_started = 0
        self.deaths: Counter[str] = Counter()
        self.is_done = False
        settings = {"home": plan.home, "store": plan.store, "s3_endpoint_url": plan.endpoint_url}
        self._workspace = Workspace(parse(Settings, settings | {"tracking_uri": plan.tracking_uri}, "the plan"))
        self._jury = Jury(self._workspace, load_gates(Path(plan.gates)))
        self._jury.judge(AdapterRef(TENANT, plan.base_id, plan.adapters[0]), "warm-up", None)
        self._jury.known.clear()

    def run(self) -> None:
        """Keep promoters alive until one of them has seen the journal's end; kill one now and then."""
        kills = self._plan.num_random_kills
        next_kill = time.monotonic()
        while self._living or not self.is_done:
            while not self.is_done and len(self._living) < self._plan.num_promoters:
                self._start()
            self._reap()
            if kills and self._living and not self.is_done and time.monotonic() > next_kill:
                kills -= 1
                next_kill = time.monotonic() + self._draw.uniform(0.05, 0.6)
                os.kill(self._draw.choice(sorted(self._living)), signal.SIGKILL)
            time.sleep(0.01)

    def _start(self) -> None:
        number, point = self._num_started, self._points.pop(0) if self._points else ""
        self._num_started += 1
        process = os.fork()
        if process:
            self._living[process] = point or "random"
            return
        if point:
            os.environ["LORAFLEET_CRASHPOINT"] = point
        code = 1
        try:
            self._promote_until_done(number, projects=number % 10 < self._plan.num_projecting or "projected" in point)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _reap(self) -> None:
        for process in list(self._living):
            found, status = os.waitpid(process, os.WNOHANG)
            if not found:
                continue
            how = self._living.pop(process)
            if os.WIFSIGNALED(status):
                self.deaths[how] += 1
            elif status:
                self.deaths["failed"] += 1
            else:
                self.is_done = True

    def _promote_until_done(self, number: int, projects: bool) -> None:
        draw, store = random.Random(f"{self._plan.seed}/{number}"), self._workspace.store
        registry: Any = self._workspace.services.registry() if projects else None
        while True:
            head = read_head(store, TENANT, TASK)
            if generation_of(head) >= self._plan.num_generations:
                return
            try:
                self._act(draw, head, registry, f"promoter-{number}")
            except (WorkFailed, BadInput, ServiceUnavailable) as error:
                if "Traceback" in str(error):
                    raise

    def _act(self, draw: random.Random, head: Entry | None, registry: Any, actor: str) -> None:
        """Promote somebody; now and then roll back or freeze instead, and let a frozen task move again."""
        store, chance = self._workspace.store, draw.random()
        if head is not None and head.kind == "freeze":
            unfreeze(store, TENANT, TASK, actor=actor)
        elif head is not None and chance < 0.015:
            freeze(store, TENANT, TASK, actor=actor)
        elif head is not None and chance < 0.07:
            rollback(store, registry, TENANT, TASK, draw.choice(self._plan.adapters), actor=actor)
        else:
            others = [one for one in self._plan.adapters if head is None or one != head.adapter_id]
            promote(store, registry, draw.choice(others), tenant=TENANT, task=TASK, jury=self._jury, actor=actor)


def main() -> None:
    """Run the plan that the first argument holds."""
    raw = json.loads(sys.argv[1])
    promoters = Promoters(Plan(**{one.name: raw[one.name] for one in fields(Plan)}))
    promoters.run()
    print(json.dumps(promoters.deaths))


if __name__ == "__main__":
    main()
