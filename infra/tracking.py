"""Numbers and states on their way to an experiment tracker: the `Tracker` protocol, and a plain one of local files.

Callers do not talk to a tracker themselves: they append events to a `TrackingLog`, which a `Shipper` replays into a `Tracker`
(both in `infra/tracking_log.py`), so that training never waits for it. Runs are named by a key of ours (for example
"acme/acme-support/7"), never by the tracker's own run ids.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from infra.errors import BadInput, ServiceUnavailable, WorkFailed
from infra.fingerprint import id_of_bytes

OPEN_STATUSES = frozenset({"queued", "running", "preempted"})
"""The statuses of jobs and trials after which more may come; every other one is an end."""


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
    time_ms: int | None = None
    """When it began, milliseconds since the epoch; None: when the log (or else the tracker) hears of it."""


class Tracker(Protocol):
    """Where events end up. Every method may be called twice with the same arguments and then changes nothing the second time.

    Raises ServiceUnavailable when the tracker does not answer: the caller tries again later. Raises WorkFailed when it
    answers that it will never take this (an unknown run, a value it refuses): trying again is of no use.
    """

    @property
    def uri(self) -> str:
        """Where this tracker is, without credentials."""
        ...

    def check(self) -> None:
        """Answer within a few seconds or raise ServiceUnavailable with one sentence and the way out."""
        ...

    def ensure_run(self, run: RunStart) -> str:
        """Create the run unless one with this key exists (search by tag first); return the tracker's id of it.

        Of a run that exists, missing tags and params are added; those it has stay, and so does its status.
        """
        ...

    def log_points(self, key: str, points: Sequence[Point]) -> None:
        """Add points to a run; one that stands there already (same metric, value, step and time) is not added again."""
        ...

    def set_tags(self, key: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run, whatever stood there."""
        ...

    def log_file(self, key: str, path: Path, folder: str) -> None:
        """Attach a local file to a run under `folder` ("" is the top), replacing one of the same name there."""
        ...

    def end_run(self, key: str, status: str, time_ms: int | None = None) -> None:
        """Put a run into a status of a job or trial (tag lorafleet.status), mapped to the tracker's own by one table.

        A reason in parentheses, "failed(out_of_memory)", becomes the tag lorafleet.reason. One of OPEN_STATUSES opens a run
        that had ended. `time_ms` is when it ended (None: now, or as it stands if the run has this status already).
        """
        ...

    def open_runs(self, sweep: str) -> list[str]:
        """Keys, sorted, of the runs tagged lorafleet.sweep=`sweep` that the tracker does not show as ended."""
        ...

    def open_statuses(self) -> dict[str, str]:
        """Status by key of all runs of ours that the tracker does not show as ended, whoever's they are.

        A status is "running", or another of OPEN_STATUSES for a run that waits.
        """
        ...


def without_credentials(uri: str) -> str:
    """Return `uri` without user name, password and query, as it may stand in a message."""
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")) if parts.netloc else uri


def refuse_server_with_local_store(tracking_uri: str, store_uri: str) -> None:
    """Raise BadInput if `tracking_uri` is an MLflow server and `store_uri` a local folder: it refuses sources that are local."""
    if urlsplit(tracking_uri).scheme in ("http", "https") and urlsplit(store_uri).scheme in ("", "file"):
        raise BadInput(
            f"MLflow at {without_credentials(tracking_uri)} is a server and cannot take adapters from the local store "
            f"{store_uri}; set store to s3://... or unset tracking_uri to use the embedded one."
        )


def split_status(status: str) -> tuple[str, str | None]:
    """Split "failed(out_of_memory)" into the word and the reason, which is None where there is no parenthesis."""
    word, parenthesis, rest = status.partition("(")
    return word, rest.removesuffix(")") if parenthesis else None


def status_tags(status: str) -> dict[str, str]:
    """Return the tags in which a run carries a status of ours."""
    word, reason = split_status(status)
    return {"lorafleet.status": word} | ({} if reason is None else {"lorafleet.reason": reason})


class LocalTracker:
    """A tracker in a folder: one sub-folder per run with `run.json`, replaced whole at each change, and its files.

    For tests and small work: each call rewrites the run. One process at a time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def uri(self) -> str:
        return self._folder.absolute().as_uri()

    def check(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ServiceUnavailable(
                f"The tracking folder {self._folder} cannot be used ({error.strerror}); name one you may write to."
            ) from error

    def ensure_run(self, run: RunStart) -> str:
        if run.parent is not None:
            self.read(run.parent)
        path = self._run_folder(run.key) / "run.json"
        now = _now_ms() if run.time_ms is None else run.time_ms
        body = self.read(run.key) if path.exists() else asdict(run) | {"status": "running", "time_ms": now, "points": []}
        body["tags"] = {"lorafleet.key": run.key, "lorafleet.status": "running"} | dict(run.tags) | body["tags"]
        body["params"] = dict(run.params) | body["params"]
        self._write(run.key, body)
        return path.parent.name

    def log_points(self, key: str, points: Sequence[Point]) -> None:
        body = self.read(key)
        rows = [[point.metric, _plain(point.value), point.step, point.time_ms] for point in points]
        body["points"] = [list(row) for row in dict.fromkeys(tuple(row) for row in body["points"] + rows)]
        self._write(key, body)

    def set_tags(self, key: str, tags: Mapping[str, str]) -> None:
        body = self.read(key)
        self._write(key, body | {"tags": body["tags"] | dict(tags)})

    def log_file(self, key: str, path: Path, folder: str) -> None:
        self.read(key)
        target = self._run_folder(key) / "files" / folder
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / path.name)

    def end_run(self, key: str, status: str, time_ms: int | None = None) -> None:
        body = self.read(key)
        word, _ = split_status(status)
        if word not in OPEN_STATUSES and (time_ms is not None or body["status"] != word):
            body["end_time_ms"] = _now_ms() if time_ms is None else time_ms
        self._write(key, body | {"status": word, "tags": body["tags"] | status_tags(status)})

    def open_runs(self, sweep: str) -> list[str]:
        bodies = [json.loads(path.read_bytes()) for path in self._folder.glob("*/run.json")]
        return sorted(
            body["key"] for body in bodies if body["tags"].get("lorafleet.sweep") == sweep and body["status"] in OPEN_STATUSES
        )

    def open_statuses(self) -> dict[str, str]:
        bodies = [json.loads(path.read_bytes()) for path in self._folder.glob("*/run.json")]
        return {body["key"]: body["status"] for body in bodies if body["status"] in OPEN_STATUSES}

    def read(self, key: str) -> dict[str, Any]:
        """Return what is known of a run: the fields of RunStart, `status`, and `points` as [metric, value, step, time_ms]."""
        try:
            body: dict[str, Any] = json.loads((self._run_folder(key) / "run.json").read_bytes())
        except FileNotFoundError:
            raise WorkFailed(f"The tracker at {self._folder} has no run {key!r}; start it before its points.") from None
        return body

    def files(self, key: str) -> list[str]:
        """Return the paths of a run's files, relative and sorted."""
        root = self._run_folder(key) / "files"
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())

    def _run_folder(self, key: str) -> Path:
        return self._folder / id_of_bytes(key.encode())

    def _write(self, key: str, body: Mapping[str, Any]) -> None:
        folder = self._run_folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "run.json.new"
        temporary.write_text(json.dumps(body, indent=1))
        os.replace(temporary, folder / "run.json")


def _plain(value: float) -> float | str:
    return value if abs(value) < float("inf") else repr(value)


def _now_ms() -> int:
    return int(time.time() * 1000)
