"""Run this somewhere: `Launcher`, `Handle` and `Channel`.

A *task* is a picklable callable `task(channel)`, run to its end in a process (or thread) of its own with resources of its own. Both sides
talk through the two ends of a channel; messages are picklable values. What is launched may die at any moment:
`Handle.poll` then says so, and messages it had not delivered are gone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Resources:
    """What a task needs. `num_threads` is set in the environment (OMP_NUM_THREADS) before the task's process imports anything."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    num_threads: int = 1


@dataclass(frozen=True)
class Exit:
    """How a launched task ended: returned, raised, or its process vanished (`lost`). `reason` is a sentence."""

    kind: Literal["returned", "raised", "lost"]
    reason: str = ""


class Channel(Protocol):
    """One end of a two-way mailbox: first in, first out, each message at most once. Thread-safe."""

    def send(self, message: Any) -> None:
        """Hand a message to the other end; returns at once. A message to an end that is gone is dropped."""
        ...

    def receive(self, timeout_seconds: float) -> list[Any]:
        """Return all messages that wait here, or wait for the first one; an empty list after the time-out."""
        ...


Task = Callable[[Channel], None]


class Handle(Protocol):
    """The launcher's side of one running task."""

    @property
    def name(self) -> str: ...

    @property
    def channel(self) -> Channel:
        """The driver's end. `receive` returns an empty list once the task is gone."""
        ...

    def poll(self) -> Exit | None:
        """Return None while the task runs (or starts), afterwards how it ended."""
        ...

    def kill(self) -> None:
        """End the task without asking it (where it cannot be killed: ask it to stop by closing its channel)."""
        ...


class Launcher(Protocol):
    """Starts tasks. Picklability is not promised."""

    def launch(self, task: Task, name: str, resources: Resources) -> Handle:
        """Start `task` under a name that is unique among the live ones; returns before it runs."""
        ...

    def capacity(self, resources: Resources) -> int:
        """How many tasks with these resources may run at the same time, at least 1."""
        ...

    def close(self) -> None:
        """Kill what still runs and free what the launcher started."""
        ...
