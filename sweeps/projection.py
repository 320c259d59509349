"""How a sweep appears in an experiment tracker: a parent run, a child run per trial, the points of its job.

All of it can be said again and changes nothing then, so after a crash the last trial is simply projected once more.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from infra.tracking import Point, RunStart
from infra.tracking_log import TrackingLog
from sweeps.ledger import Header
from sweeps.trial import Trial
from workers.job import Job

ReadChunk = Callable[[str], Sequence[Point]]
"""Gives the metric points under a key of the store."""


def sweep_key(tenant: str, name: str) -> str:
    """Return the tracker's key of a sweep's parent run."""
    return f"{tenant}/{name}"


def trial_key(tenant: str, name: str, number: int) -> str:
    """Return the tracker's key of a trial's run."""
    return f"{tenant}/{name}/{number}"


class Projection:
    """Writes a sweep into the tracking log. `job` is the sweep's base job."""

    def __init__(self, log: TrackingLog, header: Header, job: Job, read_chunk: ReadChunk) -> None:
        self._log, self._header, self._job, self._read_chunk = log, header, job, read_chunk
        self._parent = sweep_key(header.tenant, header.spec.name)
        self._shown: set[tuple[int, str]] = set()
        self._attempts: dict[int, int] = {}

    def begin(self) -> None:
        """The sweep is being driven (again)."""
        self._log.run(
            RunStart(
                self._parent,
                self._header.tenant,
                self._header.spec.name,
                tags=self._tags(),
                params={"sampler": self._header.spec.sampler.type, "pruner": self._header.spec.pruner.type},
                time_ms=round(self._header.created * 1000),
            )
        )
        self._log.end(self._parent, "running")

    def end(self, status: str) -> None:
        """The sweep is driven no longer."""
        self._log.end(self._parent, status)

    def start_trial(self, trial: Trial, *, again: bool = False) -> None:
        """A trial began; `again`: it goes on, whatever was told of it."""
        params = {path: str(value) for path, value in trial.params.items()}
        name = f"{self._header.spec.name}-{trial.number:04d}"
        key = self._key(trial.number)
        self._log.run(
            RunStart(key, self._header.tenant, name, self._parent, self._trial_tags(trial), params, round(trial.started * 1000))
        )
        if again:
            self._log.end(key, "running")

    def pause_trial(self, number: int) -> None:
        """A trial is driven no longer, and will go on."""
        self._log.end(self._key(number), "preempted")

    def chunk(self, number: int, chunk: str, attempt: int | None = None) -> None:
        """The points in a chunk are safe; `attempt` is the epoch that measured them."""
        if attempt is not None and self._attempts.get(number) != attempt:
            self._attempts[number] = attempt
            self._log.tags(self._key(number), {"lorafleet.attempt": str(attempt)})
        if chunk and (number, chunk) not in self._shown:
            self._shown.add((number, chunk))
            self._log.points(self._key(number), self._read_chunk(chunk))

    def end_trial(self, trial: Trial) -> None:
        """A trial ended: what was not told of it yet is told now."""
        key = self._key(trial.number)
        if trial.duplicate_of is None:
            for chunk in trial.chunks:
                self.chunk(trial.number, chunk)
        self._log.points(key, _kept(trial))
        if trial.adapter_id is not None:
            self._log.tags(key, {"lorafleet.adapter_id": trial.adapter_id})
        self._log.end(key, f"{trial.status}({trial.reason})" if trial.reason else trial.status)

    def repeat(self, trials: Iterable[Trial]) -> None:
        """Tell of ended trials again from the beginning."""
        for trial in trials:
            self.start_trial(trial)
            self.end_trial(trial)

    def open_numbers(self, open_runs: Iterable[str]) -> set[int]:
        """Return the numbers of this sweep's trials among the keys of open runs."""
        lead = self._parent + "/"
        return {int(key.removeprefix(lead)) for key in open_runs if key.startswith(lead)}

    def _key(self, number: int) -> str:
        return trial_key(self._header.tenant, self._header.spec.name, number)

    def _tags(self) -> dict[str, str]:
        return {
            "lorafleet.sweep": self._header.spec.name,
            "lorafleet.tenant": self._header.tenant,
            "lorafleet.base_id": self._job.base.base_id,
            "lorafleet.data_digest": self._job.train.digest,
        }

    def _trial_tags(self, trial: Trial) -> Mapping[str, str]:
        tags = self._tags() | {"lorafleet.trial": str(trial.number)}
        if trial.job_id is not None:
            tags["lorafleet.job_id"] = trial.job_id
        if trial.duplicate_of is not None:
            tags["lorafleet.duplicate_of"] = str(trial.duplicate_of)
        return tags


def _kept(trial: Trial) -> list[Point]:
    """The metrics of the weights that were kept, which are not always the last ones measured."""
    time_ms = round((trial.ended or trial.started) * 1000)
    return [Point(f"kept/{metric}", value, trial.best_step, time_ms) for metric, value in sorted(trial.metrics.items())]
