"""Small real jobs on the stories base for the tests of hosts and fleets."""

import json
from pathlib import Path
from typing import Any

from infra.local_storage import LocalStorage
from infra.storage import Storage
from infra.strict import parse
from workers.host import EngineHost
from workers.job import Job
from workers.report import Evaluated, Finished, HostEvent, JobEvent, PackState
from workers.resolve import Resolver
from workers.spec import JobSpec

NUM_TRAIN, NUM_VALID = 24, 6


def write_rows(folder: Path, source: Path, num_train: int = NUM_TRAIN, num_valid: int = NUM_VALID) -> None:
    """Write train.jsonl and valid.jsonl with the first rows of a real set."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", num_train), ("valid", num_valid)):
        lines = (source / f"{split}.jsonl").read_text().splitlines()[:count]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


class Ground:
    """A store, rows of SNIPS get-weather and the stories base, for jobs of a few steps."""

    def __init__(self, folder: Path, test_data: Path) -> None:
        self.folder = folder
        self.store: Storage = LocalStorage(folder / "store")
        self.base = test_data / "bases" / "stories260k"
        write_rows(folder / "data", test_data / "sets/snips/customers/get-weather")
        self._hosts: list[EngineHost] = []
        self.resolver = Resolver(self.store, folder, folder / "cache", lambda tenant, reference: ("", reference))

    def spec(self, **sections: dict[str, Any]) -> JobSpec:
        """Return a job spec; keyword arguments change whole keys of its sections."""
        raw: dict[str, Any] = {
            "tenant": "acme",
            "task": "weather",
            "base_model": {"name_or_path": str(self.base)},
            "data": {"train": "data"},
            "peft": {"r": 2, "lora_alpha": 4, "target_modules": "attention"},
            "training": {
                "learning_rate": 5e-3,
                "max_steps": 6,
                "per_device_train_batch_size": 4,
                "eval_steps": 2,
                "max_length": 96,
            },
        }
        for name, changes in sections.items():
            raw[name] = {**raw.get(name, {}), **changes}
        return parse(JobSpec, json.loads(json.dumps(raw)), "job.yaml")

    def job(self, **sections: dict[str, Any]) -> Job:
        return self.resolver.resolve(self.spec(**sections))

    def host(self, **options: Any) -> EngineHost:
        """Return a new host, closed by `close` unless the test does."""
        self._hosts.append(EngineHost(self.store, self.folder / "cache", lease_seconds=5.0, **options))
        return self._hosts[-1]

    def close(self) -> None:
        for host in self._hosts:
            host.close()


def drive(host: EngineHost, *jobs: Job, stop_at: int | None = None) -> list[JobEvent]:
    """Step a host until the jobs have ended (or it has done `stop_at` passes), answering go to every evaluation."""
    events: list[JobEvent] = []
    open_jobs = {job.job_id for job in jobs}
    while True:
        for event in host.report():
            if isinstance(event, PackState):
                continue
            events.append(event)
            if isinstance(event, Evaluated) and not event.final:
                host.decide(event.job_id, True)
            if isinstance(event, Finished):
                open_jobs.discard(event.job_id)
        if not open_jobs or (host._loaded is not None and host._loaded.passes.num_passes == stop_at):
            return events
        host.step()


def drain(host: EngineHost) -> list[HostEvent]:
    """Step a host until it has nothing to do: all its jobs have ended or wait for an answer."""
    while host.step():
        pass
    return host.report()
