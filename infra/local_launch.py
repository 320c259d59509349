"""Tasks in this process, one thread each: `ThreadLauncher`, for tests, small machines and debuggers.

A thread cannot be killed and has no resources of its own. `kill` closes the task's channel, and a task that looks at
`channel.closed` ends soon after; until it does, it runs and `poll` says so. All tasks share the threads setting of
this process: `Resources.num_threads` has no effect, set OMP_NUM_THREADS before the process starts.
"""

import logging
import os
import socket
import threading
import time

from infra.launch import Channel, Exit, Handle, Place, Resources, Task, ended_by, tasks_that_fit
from infra.mailbox import Mailbox, MailboxChannel

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0
"""How long `ThreadLauncher.close` waits for tasks that were asked to stop."""


class ThreadHandle:
    """A task in a thread of this process."""

    def __init__(self, task: Task, name: str) -> None:
        self.name = name
        self._to_task, self._to_driver = Mailbox(), Mailbox()
        self._exit: Exit | None = None
        self._thread = threading.Thread(target=self._run, args=(task,), name=f"task {name}", daemon=True)
        self._thread.start()

    @property
    def channel(self) -> Channel:
        return MailboxChannel(inbox=self._to_driver, outbox=self._to_task)

    @property
    def place(self) -> Place:
        return Place(node=socket.gethostname(), pid=os.getpid())

    def poll(self) -> Exit | None:
        return self._exit

    def kill(self) -> None:
        if self._exit is None:
            self._to_task.close(discard=True)
            self._to_driver.close(discard=True)

    def join(self, timeout_seconds: float) -> bool:
        """Wait for the thread; tell whether it has ended."""
        self._thread.join(max(timeout_seconds, 0.0))
        return not self._thread.is_alive()

    def _run(self, task: Task) -> None:
        ended = ended_by(task, MailboxChannel(inbox=self._to_task, outbox=self._to_driver))
        if ended.details:
            logger.debug("Task %s raised:\n%s", self.name, ended.details)
        # In this order: who sees the exit must find every message, and nobody waits for a task that is gone.
        self._exit = ended
        self._to_task.close(discard=True)
        self._to_driver.close(discard=False)


class ThreadLauncher:
    """Launches tasks as threads. `num_cpus` and `num_gpus` say how many may run at a time; they are not enforced."""

    def __init__(self, num_cpus: float | None = None, num_gpus: float = 0.0) -> None:
        self._num_cpus = num_cpus or os.cpu_count() or 1
        self._num_gpus = num_gpus
        self._handles: list[ThreadHandle] = []

    def launch(self, task: Task, name: str, resources: Resources) -> Handle:
        self._handles = [handle for handle in self._handles if handle.poll() is None]
        if any(handle.name == name for handle in self._handles):
            raise ValueError(f"a task named {name!r} is running already")
        handle = ThreadHandle(task, name)
        self._handles.append(handle)
        return handle

    def capacity(self, resources: Resources) -> int:
        return max(1, tasks_that_fit(resources, self._num_cpus, self._num_gpus))

    @property
    def num_gpus(self) -> int:
        return int(self._num_gpus)

    def close(self) -> None:
        """Ask what still runs to stop and wait up to `CLOSE_SECONDS` for it; what does not listen is left behind, and logged."""
        for handle in self._handles:
            handle.kill()
        deadline = time.monotonic() + CLOSE_SECONDS
        stuck = [handle.name for handle in self._handles if not handle.join(deadline - time.monotonic())]
        if stuck:
            logger.warning("These tasks did not stop when asked and end with this process: %s.", ", ".join(stuck))
