"""Run this somewhere: `Launcher`, `Handle` and `Channel`.

A *task* is a picklable callable `task(channel)`, run to its end in a process (or thread) of its own with resources
of its own. Both sides talk through the two ends of a channel; messages are picklable values. What is launched may die
at any moment: `Handle.poll` then says so, and messages it had not delivered are gone.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from infra.errors import LorafleetError


@dataclass(frozen=True)
class Resources:
    """What a task needs. `num_threads` is set in the environment (OMP_NUM_THREADS) before the task's process imports anything."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    num_threads: int = 1


@dataclass(frozen=True)
class Exit:
    """How a launched task ended: returned, raised, or its process vanished or was killed (`lost`)."""

    kind: Literal["returned", "raised", "lost"]
    reason: str = ""
    """One sentence."""
    details: str = ""
    """The traceback of a task that raised: for the log, not for people."""


@dataclass(frozen=True)
class Place:
    """Where a task runs."""

    node: str
    """Host name."""
    pid: int


class Channel(Protocol):
    """One end of a two-way mailbox: first in, first out, each message at most once. Thread-safe."""

    def send(self, message: Any) -> None:
        """Hand a message to the other end; returns at once. A message to an end that is gone is dropped."""
        ...

    def receive(self, timeout_seconds: float) -> list[Any]:
        """Return all messages that wait here, or wait for the first one; an empty list after the time-out.

        Once the other end is gone it returns what had arrived, then empty lists at once: look at `closed` in loops.
        """
        ...

    @property
    def closed(self) -> bool:
        """Whether the other end is gone or the task was killed; what is sent from then on is dropped. A task then ends."""
        ...


Task = Callable[[Channel], None]


class Handle(Protocol):
    """The launcher's side of one running task."""

    @property
    def name(self) -> str: ...

    @property
    def channel(self) -> Channel:
        """The driver's end."""
        ...

    @property
    def place(self) -> Place | None:
        """Where the task runs; None until it has started."""
        ...

    def poll(self) -> Exit | None:
        """Return None while the task runs (or starts), afterwards how it ended.

        When it says "returned" or "raised", everything the task had sent waits in the channel.
        """
        ...

    def kill(self) -> None:
        """End the task without asking it (where it cannot be killed: ask it to stop by closing its channel).

        Its channel is closed and what waited in it is gone. Nothing happens if the task has ended.
        """
        ...


class Launcher(Protocol):
    """Starts tasks. Picklability is not promised."""

    def launch(self, task: Task, name: str, resources: Resources) -> Handle:
        """Start `task` under a name that is unique among the live ones; returns before it runs."""
        ...

    def capacity(self, resources: Resources) -> int:
        """How many tasks with these resources may run at the same time, at least 1."""
        ...

    @property
    def num_gpus(self) -> int:
        """How many GPUs there are to launch tasks on."""
        ...

    def close(self) -> None:
        """Kill what still runs and free what the launcher started."""
        ...


def ended_by(task: Task, channel: Channel) -> Exit:
    """Run `task` to its end and tell how it ended; an exception becomes one sentence."""
    try:
        task(channel)
    except BaseException as error:
        return Exit("raised", sentence_of(error), traceback.format_exc())
    return Exit("returned")


def sentence_of(error: BaseException) -> str:
    """Return an error as one sentence: our own say it already, others get their type in front."""
    text = str(error).strip()
    if isinstance(error, LorafleetError):
        return text
    first_line = text.splitlines()[0] if text else "no message"
    return f"{type(error).__name__}: {first_line}"


def tasks_that_fit(resources: Resources, num_cpus: float, num_gpus: float) -> int:
    """Return how many tasks with these resources fit on a machine with so many processors and accelerators."""
    # A millionth forgives float division: 0.3 / 0.1 is 2.9999999999999996.
    asked = [(num_cpus, resources.num_cpus), (num_gpus, resources.num_gpus)]
    return min((int(there / each + 1e-6) for there, each in asked if each > 0), default=1)
