"""Numbers and states on their way to an experiment tracker, without ever making training wait.

Callers append events to a `TrackingLog`, a local append-only JSONL file; one `Shipper` thread per driver replays them, in
order and idempotently, into a `Tracker`. What MLflow did not get while it was away is replayed when it is back, also by a later process.
Runs are named by a key of ours (for example "acme/acme-support/7"), never by the tracker's own run ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Point:
    """One value of one metric. `time_ms` is fixed where it was measured, so that a replay writes the same point again."""

    metric: str
    value: float
    step: int
    time_ms: int


@dataclass(frozen=True)
class RunStart:
    """A run that should exist: parent and tags as given. `key` identifies it (it becomes the tag lorafleet.key)."""

    key: str
    experiment: str
    name: str
    parent: str | None = None
    """Key of the parent run, which must have been started before."""
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)


class Tracker(Protocol):
    """Where events end up. Every method may be called twice with the same arguments and then changes nothing the second time.

    Raises ServiceUnavailable when the tracker does not answer; the caller tries again later.
    """

    def check(self) -> None:
        """Answer within a few seconds or raise ServiceUnavailable with one sentence and the way out."""
        ...

    def ensure_run(self, run: RunStart) -> str:
        """Create the run unless one with this key exists (search by tag first); return the tracker's id of it."""
        ...

    def log_points(self, key: str, points: Sequence[Point]) -> None: ...

    def set_tags(self, key: str, tags: Mapping[str, str]) -> None: ...

    def log_file(self, key: str, path: Path, folder: str) -> None:
        """Attach a local file to a run under `folder`."""
        ...

    def end_run(self, key: str, status: str) -> None:
        """End the run with a status of DESIGN §2 (tag lorafleet.status), mapped to the tracker's own by one table."""
        ...

    def open_runs(self, sweep: str) -> list[str]:
        """Keys of the runs tagged lorafleet.sweep=`sweep` that the tracker does not show as ended."""
        ...
