"""Named points where a crash matters, armed from outside the process by tests.

`LORAFLEET_CRASHPOINT=<name>:<n>` kills the process with SIGKILL when it passes the point for the n-th time;
several are separated by commas. A point that has killed is spent: with `LORAFLEET_CRASHPOINT_SPENT=<folder>` a
marker file is left there first, so that the restarted process passes. `LORAFLEET_CRASHPOINT_TRACE=<file>`
appends one line per passing (time, process id, name, detail), which is how tests count what was really executed.
With none of these set a point costs one dictionary look-up.
"""

import os
import signal
import threading
import time
from pathlib import Path

_counts: dict[str, int] = {}
_lock = threading.Lock()


def crashpoint(name: str, detail: str = "") -> None:
    """Pass the point `name`; die here if it is armed. `detail` stands in the trace (a job id, a step)."""
    armed = os.environ.get("LORAFLEET_CRASHPOINT")
    trace = os.environ.get("LORAFLEET_CRASHPOINT_TRACE")
    if trace:
        with open(trace, "a") as file:
            file.write(f"{time.time():.6f} {os.getpid()} {name} {detail}\n")
    if armed:
        _die_if_armed(name, armed)


def _die_if_armed(name: str, armed: str) -> None:
    with _lock:
        _counts[name] = _counts.get(name, 0) + 1
        for entry in armed.split(","):
            point, _, count = entry.partition(":")
            if point == name and int(count or "1") == _counts[name] and not _is_spent(entry):
                os.kill(os.getpid(), signal.SIGKILL)


def _is_spent(entry: str) -> bool:
    folder = os.environ.get("LORAFLEET_CRASHPOINT_SPENT")
    if folder is None:
        return False
    marker = Path(folder) / entry.replace(":", "-")
    if marker.exists():
        return True
    marker.touch()
    return False
