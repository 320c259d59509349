"""Tasks in processes of their own, placed by Ray: `RayLauncher`.

A task runs in a thread of an actor, whose other threads serve its channel: the driver delivers messages with one call and
fetches messages by a call that waits in the actor until there are some. An actor that dies is not restarted; who launched
it decides what happens next. Actors end with their driver, however it ends. On an external cluster every node must have the same
lorafleet installed, which is checked when a task starts; nodes bring their own credentials.
"""

import importlib.metadata
import logging
import os
import socket
import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray import cloudpickle

from infra.errors import BadInput, LorafleetError
from infra.launch import Channel, Exit, Handle, Place, Resources, Task, ended_by, sentence_of, tasks_that_fit
from infra.mailbox import Mailbox, MailboxChannel
from infra.ray_cluster import connect, start_local

logger = logging.getLogger(__name__)

FETCH_SECONDS = 30.0
"""How long a call for messages waits in the actor. Only a bound: it returns as soon as there is one."""

CLOSE_SECONDS = 10.0
"""How long `RayLauncher.close` waits for Ray to confirm the end of the tasks it killed."""


class Runner:
    """The actor: runs one task in a thread and serves its channel from others. Importing this module loads no torch,
    so that `start` can set the environment before the task's own imports read it."""

    def __init__(self) -> None:
        self._to_task, self._to_driver = Mailbox(), Mailbox()
        self._exit: Exit | None = None

    def start(self, task: bytes, name: str, environment: Mapping[str, str], version: str) -> Place:
        """Start the task and say where. Raises BadInput if this node has another lorafleet than the driver's `version`."""
        installed = importlib.metadata.version("lorafleet")
        if installed != version:
            raise BadInput(
                f"Node {socket.gethostname()} has lorafleet {installed}, the driver has {version}; install the same on all nodes."
            )
        os.environ.update(environment)
        threading.Thread(target=self._run, args=(task,), name=f"task {name}", daemon=True).start()
        return Place(node=socket.gethostname(), pid=os.getpid())

    def deliver(self, messages: list[bytes]) -> None:
        """Put messages of the driver into the task's inbox."""
        for message in messages:
            self._to_task.put(message)

    def fetch(self) -> tuple[list[bytes], Exit | None]:
        """Wait for messages of the task and take them; with the last ones comes how it ended."""
        messages = self._to_driver.take(FETCH_SECONDS)
        # The mailbox closes after `_exit` is set and before the last look, so no message can follow the exit.
        if self._to_driver.closed:
            return messages + self._to_driver.take(0), self._exit
        return messages, None

    def _run(self, task: bytes) -> None:
        channel = MailboxChannel(inbox=self._to_task, outbox=self._to_driver)
        self._exit = ended_by(lambda end: cloudpickle.loads(task)(end), channel)
        self._to_driver.close(discard=False)


class RayHandle:
    """The driver's side of one actor: one thread that sends, one that fetches, both asleep while nothing happens."""

    def __init__(self, task: Task, name: str, resources: Resources) -> None:
        self.name = name
        self._to_task, self._to_driver = Mailbox(), Mailbox()
        self._exit: Exit | None = None
        self._place: Place | None = None
        self._lock = threading.Lock()
        self._actor = _create_actor(resources)
        arguments = (cloudpickle.dumps(task), name, _environment(resources), importlib.metadata.version("lorafleet"))
        self._fetcher = threading.Thread(target=self._follow, args=arguments, name=f"fetch {name}", daemon=True)
        self._fetcher.start()

    @property
    def channel(self) -> Channel:
        return MailboxChannel(inbox=self._to_driver, outbox=self._to_task)

    @property
    def place(self) -> Place | None:
        return self._place

    def poll(self) -> Exit | None:
        with self._lock:  # who sees the exit finds the channel closed, and the other way round
            return self._exit

    def kill(self) -> None:
        if self._exit is None:
            self._to_driver.close(discard=True)
            self._end(Exit("lost", f"Task {self.name} was killed by its driver."))

    def join(self, timeout_seconds: float) -> None:
        """Wait until Ray has confirmed the end of the actor."""
        self._fetcher.join(timeout_seconds)

    def _follow(self, *arguments: Any) -> None:
        """Start the task, then fetch its messages until it ends."""
        try:
            self._place = ray.get(self._actor.start.remote(*arguments))
            threading.Thread(target=self._send, name=f"send {self.name}", daemon=True).start()
            ended: Exit | None = None
            while ended is None:
                messages, ended = ray.get(self._actor.fetch.remote())
                for message in messages:
                    self._to_driver.put(message)
            self._end(ended)
        except ray.exceptions.RayError as error:
            self._end(_exit_of(error, self.name))

    def _send(self) -> None:
        """Hand on what the driver sends, in order: the next call starts when the one before has been answered."""
        try:
            while not self._to_task.closed:
                if messages := self._to_task.take(None):
                    ray.get(self._actor.deliver.remote(messages))
        except ray.exceptions.RayError as error:
            self._end(_exit_of(error, self.name))

    def _end(self, ended: Exit) -> None:
        """Settle how the task ended (the first to say so is right) and free the actor's resources."""
        with self._lock:
            if self._exit is not None:
                return
            self._exit = ended
            self._to_task.close(discard=True)
            self._to_driver.close(discard=False)
        logger.debug("Task %s ended: %s %s\n%s", self.name, ended.kind, ended.reason, ended.details)
        ray.kill(self._actor, no_restart=True)


class RayLauncher:
    """Launches tasks as Ray actors, on the cluster at `address` or, if that is None, on a Ray started on this machine.

    Where this process is connected to Ray already, that connection is used and left standing by `close`.
    Raises ServiceUnavailable within seconds if Ray does not answer, BadInput if the address is none.
    """

    def __init__(self, address: str | None = None, num_cpus: int | None = None) -> None:
        self._owns_connection = not ray.is_initialized()
        self._handles: list[RayHandle] = []
        if self._owns_connection and address is None:
            start_local(num_cpus or os.cpu_count() or 1)
        elif self._owns_connection and address is not None:
            connect(address)

    def launch(self, task: Task, name: str, resources: Resources) -> Handle:
        self._handles = [handle for handle in self._handles if handle.poll() is None]
        if any(handle.name == name for handle in self._handles):
            raise ValueError(f"a task named {name!r} is running already")
        handle = RayHandle(task, name, resources)
        self._handles.append(handle)
        return handle

    def capacity(self, resources: Resources) -> int:
        """How many such tasks fit on the nodes that live, whatever else runs there; at least 1."""
        return max(1, sum(tasks_that_fit(resources, node.get("CPU", 0), node.get("GPU", 0)) for node in _live_nodes()))

    @property
    def num_gpus(self) -> int:
        return sum(int(node.get("GPU", 0)) for node in _live_nodes())

    def close(self) -> None:
        for handle in self._handles:
            handle.kill()
        for handle in self._handles:
            handle.join(CLOSE_SECONDS)
        if self._owns_connection:
            ray.shutdown()


def _live_nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _create_actor(resources: Resources) -> Any:
    # Two threads serve the channel, one is left for `start`. The task has a thread of its own.
    options = {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus, "max_concurrency": 3}
    return ray.remote(Runner).options(**options, max_restarts=0, max_task_retries=0).remote()


def _environment(resources: Resources) -> dict[str, str]:
    """What a task's process must find in its environment before it imports torch. Never secrets: they do not cross Ray."""
    threads = str(resources.num_threads)
    environment = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if resources.num_gpus == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # Ray no longer hides accelerators from tasks that asked for none.
    return environment | {name: value for name, value in os.environ.items() if name.startswith("LORAFLEET_CRASHPOINT")}


def _exit_of(error: Exception, name: str) -> Exit:
    """Translate Ray's error for an actor that could not start the task, or is gone."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, LorafleetError):
        return Exit("raised", sentence_of(cause), str(error))
    if "ModuleNotFoundError" in str(error):
        return Exit("raised", "A Ray node cannot import lorafleet; install the driver's version of it on every node.", str(error))
    if isinstance(error, ray.exceptions.OutOfMemoryError) or "NODE_OUT_OF_MEMORY" in str(error):
        return Exit("lost", f"The process of task {name} was killed because its node ran out of memory.", str(error))
    return Exit("lost", f"The process of task {name} is gone.", str(error))
