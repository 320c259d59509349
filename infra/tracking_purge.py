"""Taking runs out of a local tracking log, so that no event of theirs is kept, or shipped any more.

Lines are overwritten with blanks where they stand: offsets into the log stay right, and a kill in between leaves nothing torn. A
log that is blank then goes, with the files beside it.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from infra.tracking_log import TrackingLog

RunTest = Callable[[Mapping[str, Any]], bool]
"""Tells of the event that began a run (see `infra.tracking.RunStart`) whether the run is to go."""


def runs_in(path: Path, is_meant: RunTest) -> set[str]:
    """Return the keys of the runs in a log that are meant."""
    with path.open("rb") as file:
        events = (_event(line) for line in file)
        return {str(event["key"]) for event in events if event is not None and event.get("event") == "run" and is_meant(event)}


def drop_runs(path: Path, is_meant: RunTest) -> int:
    """Remove every event of the runs that are meant from a log; return how many there were.

    Raises ClaimHeld while another process has the log open, ServiceUnavailable if it cannot be written.
    """
    log = TrackingLog(path)
    try:
        keys = runs_in(path, is_meant)
        num_dropped, is_blank = _blank(path, keys) if keys else (0, False)
        _drop_rejected(path.with_name(f"{path.name}.rejected"), keys)
        if is_blank:
            for one in (path.with_name(f"{path.name}.rejected"), path.with_name(f"{path.name}.offset"), path):
                one.unlink(missing_ok=True)
        return num_dropped
    finally:
        log.close()


def _blank(path: Path, keys: set[str]) -> tuple[int, bool]:
    """Blank the events of `keys`, and lines that nobody can read; return how many, and whether nothing else is left."""
    num_dropped, is_blank = 0, True
    with path.open("r+b", buffering=0) as file:
        for start, line in _lines(path):
            event = _event(line)
            if event is not None and event.get("key") not in keys:
                is_blank = False
            elif line.strip():
                os.pwrite(file.fileno(), b" " * (len(line) - 1), start)
                num_dropped += event is not None
        os.fsync(file.fileno())
    return num_dropped, is_blank


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    start = 0
    with path.open("rb") as file:
        for line in file:
            yield start, line
            start += len(line)


def _drop_rejected(path: Path, keys: set[str]) -> None:
    """Write the events that were passed over anew, without those of `keys`."""
    if not path.exists() or not keys:
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if not _is_of(line, keys)]
    if len(kept) < len(lines):
        draft = path.with_name(f"{path.name}.new")
        draft.write_bytes(b"".join(kept))
        draft.replace(path)


def _is_of(rejected: bytes, keys: set[str]) -> bool:
    outer = _event(rejected)
    inner = _event(str(outer.get("line", "")).encode()) if outer is not None else None
    return inner is not None and inner.get("key") in keys


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(line)
    except ValueError:
        return None
    return body if isinstance(body, dict) else None
