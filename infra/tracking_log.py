"""The local log of tracking events, and the one thread that ships it to a tracker.

Callers append to a `TrackingLog` and never wait for a tracker; a `Shipper` replays the log, in order and idempotently.
What the tracker did not get while it was away is replayed when it is back, also by a later process: how far a tracker has come
stands in `<log>.offset`, by the tracker's uri, written after the tracker took the events. Events between that write and a
kill are shipped twice, which a tracker does not notice; another tracker gets everything from the beginning.

One JSON object per line, `event` being run, points, tags, file or end. Values that JSON lacks (NaN, infinities) are strings.
"""

import fcntl
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.crashpoints import crashpoint
from infra.errors import ClaimHeld, ServiceUnavailable
from infra.records import decode_record, encode_record
from infra.tracking import Point, RunStart, Tracker

_log = logging.getLogger(__name__)

APPENDS_PER_SYNC = 200
"""Appends between two fsyncs if nobody flushes; the shipper flushes before each batch."""

EVENTS_PER_BATCH = 1000
"""Events read, merged and shipped before the offset is written."""

FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.5, 30.0


class TrackingLog:
    """An append-only file of events, for one process at a time. Safe to use from several threads.

    Opening recovers from a kill in the middle of an append: what follows the last whole line is cut off.
    Raises ClaimHeld if another process has the log open, ServiceUnavailable if it cannot be opened or written.
    `clock` gives seconds since the epoch.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._unsynced = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._unusable(error) from error
        self._claim()
        self._end = _end_of_last_line(self._file)
        os.ftruncate(self._file, self._end)

    def run(self, run: RunStart) -> None:
        """A run should exist (once); it begins now unless `run.time_ms` says otherwise."""
        time_ms = self._now_ms() if run.time_ms is None else run.time_ms
        self._append({"event": "run", **vars(run), "tags": dict(run.tags), "params": dict(run.params), "time_ms": time_ms})

    def points(self, key: str, points: Sequence[Point]) -> None:
        """A run has these points."""
        rows = [[point.metric, _encode_value(point.value), point.step, point.time_ms] for point in points]
        if rows:
            self._append({"event": "points", "key": key, "points": rows})

    def tags(self, key: str, tags: Mapping[str, str]) -> None:
        """A run has these tags from now on."""
        self._append({"event": "tags", "key": key, "tags": dict(tags)})

    def file(self, key: str, path: Path, folder: str = "") -> None:
        """A local file belongs to a run; it is read when it is shipped and must stay until then."""
        self._append({"event": "file", "key": key, "path": str(path.absolute()), "folder": folder})

    def end(self, key: str, status: str) -> None:
        """A run has this status now (see `Tracker.end_run`)."""
        self._append({"event": "end", "key": key, "status": status, "time_ms": self._now_ms()})

    def flush(self) -> None:
        """Return when everything appended so far would survive a power failure."""
        with self._lock:
            self._sync()

    def read(self, offset: int, limit: int) -> tuple[list[str], int]:
        """Return up to `limit` whole lines from byte `offset` on, and the offset behind the last of them."""
        lines: list[str] = []
        with self.path.open("rb") as file:
            file.seek(offset)
            while offset < self._end and len(lines) < limit:
                line = file.readline()
                offset += len(line)
                lines.append(line.decode(errors="replace"))
        return lines, offset

    @property
    def end_offset(self) -> int:
        """Bytes in the log: the offset at which a reader has everything."""
        return self._end

    def close(self) -> None:
        """Flush, and let another process open the log."""
        with self._lock:
            if self._file >= 0:
                self._sync()
                os.close(self._file)
                self._file = -1

    def _append(self, event: Mapping[str, Any]) -> None:
        line = json.dumps(event, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with self._lock:
            try:
                self._write_whole(line)
                self._unsynced += 1
                if self._unsynced >= APPENDS_PER_SYNC:
                    self._sync()
            except OSError as error:
                raise self._unusable(error) from error

    def _write_whole(self, line: bytes) -> None:
        """Append `line`, or (disk full) leave no part of it behind for the next append to follow."""
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError:
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(line)

    def _sync(self) -> None:
        if self._unsynced:
            os.fsync(self._file)
            self._unsynced = 0

    def _claim(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise ClaimHeld(f"Another process writes the tracking log {self.path}; wait until it has ended.") from None

    def _unusable(self, error: OSError) -> ServiceUnavailable:
        return ServiceUnavailable(f"The tracking log {self.path} cannot be written ({error.strerror}); free or repair its disk.")

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


@dataclass
class _Call:
    """One call to the tracker that stands for one event or, for points, for several of one run."""

    event: str
    key: str
    bodies: list[dict[str, Any]]


class Shipper:
    """Ships a log to a tracker from one background thread, until closed. Never raises into those who append.

    A tracker that does not answer is asked again, at growing intervals. An event that it refuses for good, or that cannot be
    read, is written with the reason to `<log>.rejected`, reported in the log of the process, and passed over.
    `interval_seconds` is the rhythm in which new events are collected to be shipped together.
    """

    def __init__(self, log: TrackingLog, tracker: Tracker, interval_seconds: float = 1.0) -> None:
        self._log = log
        self._tracker = tracker
        self._interval_seconds = interval_seconds
        self._offset = self._read_offset()
        self._changed = threading.Condition()
        self._num_wakes = 0
        self._stop_at: float | None = None
        self._patience_seconds = 0.0
        self._trouble: str | None = None
        self._thread = threading.Thread(target=self._run, name="tracking-shipper", daemon=True)
        self._thread.start()

    @property
    def trouble(self) -> str | None:
        """Why nothing gets through at the moment, as a sentence; None while all is well."""
        return self._trouble

    def num_waiting(self) -> int:
        """Return the number of events that the tracker has not taken yet."""
        count, offset = 0, self._offset
        while offset < self._log.end_offset:
            lines, offset = self._log.read(offset, EVENTS_PER_BATCH)
            count += len(lines)
        return count

    def drain(self, timeout_seconds: float = 30.0) -> int:
        """Ship everything appended so far now; return the number of events left when that is done or time is up."""
        target = self._log.end_offset
        self._wake()
        with self._changed:
            self._changed.wait_for(lambda: self._offset >= target, timeout_seconds)
        return self.num_waiting()

    def close(self, timeout_seconds: float) -> int:
        """Ship what can be shipped and stop; return the number of events left for a later process.

        A slow tracker is waited for while it takes events, one that does not answer or takes none for `timeout_seconds`.
        """
        self._patience_seconds = timeout_seconds
        self._stop_at = time.monotonic() + timeout_seconds
        self._wake()
        while self._thread.is_alive() and (left := self._stop_at - time.monotonic()) > 0:
            self._thread.join(left)
        return self.num_waiting()

    def _run(self) -> None:
        backoff_seconds = FIRST_BACKOFF_SECONDS
        while True:
            wakes = self._num_wakes
            try:
                self._ship_all()
                self._recovered()
                if self._stop_at is not None:
                    return
                backoff_seconds, pause_seconds = FIRST_BACKOFF_SECONDS, self._interval_seconds
            except OSError as error:  # ServiceUnavailable is one
                self._failed(str(error))
                if self._stop_at is not None:
                    backoff_seconds = FIRST_BACKOFF_SECONDS
                    if time.monotonic() + backoff_seconds >= self._stop_at:
                        return
                pause_seconds, backoff_seconds = backoff_seconds, min(2 * backoff_seconds, LONGEST_BACKOFF_SECONDS)
            self._pause(pause_seconds, wakes)

    def _wake(self) -> None:
        with self._changed:
            self._num_wakes += 1
            self._changed.notify_all()

    def _pause(self, seconds: float, wakes: int) -> None:
        """Wait, unless somebody called since `wakes` was read."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_wakes != wakes, seconds)

    def _ship_all(self) -> None:
        while self._offset < self._log.end_offset:
            self._log.flush()
            lines, end = self._log.read(self._offset, EVENTS_PER_BATCH)
            for call in self._plan(lines):
                self._ship(call)
                if self._stop_at is not None:
                    self._stop_at = time.monotonic() + self._patience_seconds
            crashpoint("tracking-shipped", f"{self._offset}-{end}")
            self._write_offset(end)
            with self._changed:
                self._offset = end
                self._changed.notify_all()

    def _plan(self, lines: Sequence[str]) -> list[_Call]:
        """Merge the points of a run into one call, as long as nothing else happens to that run in between."""
        calls: list[_Call] = []
        merging: dict[str, _Call] = {}
        for line in lines:
            if not line.strip():  # what stood there was taken out (`tracking_purge`)
                continue
            try:
                body = json.loads(line)
                call = _Call(body["event"], body["key"], [body])
            except (ValueError, KeyError, TypeError) as error:
                self._reject(line, f"unreadable event: {error!r}")
                continue
            if call.event == "points" and call.key in merging:
                merging[call.key].bodies.append(body)
                continue
            calls.append(call)
            merging.pop(call.key, None)
            if call.event == "points":
                merging[call.key] = call
        return calls

    def _ship(self, call: _Call) -> None:
        try:
            _deliver(self._tracker, call)
        except FileNotFoundError as error:
            self._reject_all(call, f"{error.filename} is gone")
        except OSError:
            raise
        except Exception as error:  # whatever it is, the events behind it are not to wait for ever
            self._reject_all(call, f"{type(error).__name__}: {error}")

    def _reject_all(self, call: _Call, reason: str) -> None:
        for body in call.bodies:
            self._reject(json.dumps(body), reason)

    def _reject(self, line: str, reason: str) -> None:
        _log.warning("A tracking event was passed over (%s); it stands in %s.", reason, self._beside("rejected"))
        with self._beside("rejected").open("a") as file:
            file.write(json.dumps({"reason": reason, "line": line.rstrip("\n")}) + "\n")

    def _failed(self, reason: str) -> None:
        if self._trouble is None:
            _log.warning("Tracking events wait in %s until they can be shipped: %s", self._log.path, reason)
        self._trouble = reason

    def _recovered(self) -> None:
        if self._trouble is not None:
            _log.info("Tracking events are shipped again to %s.", self._tracker.uri)
        self._trouble = None

    def _beside(self, suffix: str) -> Path:
        return self._log.path.with_name(f"{self._log.path.name}.{suffix}")

    def _read_offsets(self) -> dict[str, int]:
        path = self._beside("offset")
        return decode_record(path.read_bytes(), "tracking-offset/1", str(path))["offsets"] if path.exists() else {}

    def _read_offset(self) -> int:
        offset = self._read_offsets().get(self._tracker.uri, 0)
        return offset if offset <= self._log.end_offset else 0

    def _write_offset(self, offset: int) -> None:
        path, temporary = self._beside("offset"), self._beside("offset.new")
        offsets = self._read_offsets() | {self._tracker.uri: offset}
        with temporary.open("wb") as file:
            file.write(encode_record("tracking-offset/1", {"offsets": offsets}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _deliver(tracker: Tracker, call: _Call) -> None:
    body = call.bodies[0]
    match call.event:
        case "run":
            tracker.ensure_run(RunStart(**{name: value for name, value in body.items() if name != "event"}))
        case "points":
            rows = [row for one in call.bodies for row in one["points"]]
            tracker.log_points(call.key, [Point(row[0], float(row[1]), row[2], row[3]) for row in rows])
        case "tags":
            tracker.set_tags(call.key, body["tags"])
        case "file":
            tracker.log_file(call.key, Path(body["path"]), body["folder"])
        case "end":
            tracker.end_run(call.key, body["status"], body["time_ms"])
        case other:
            raise ValueError(f"an event of the kind {other!r} is not known")


def _encode_value(value: float) -> float | str:
    return float(value) if math.isfinite(value) else repr(float(value))


def _end_of_last_line(file: int) -> int:
    """Return the offset behind the last newline of an open file, searched backwards in blocks."""
    end = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - 65536)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
