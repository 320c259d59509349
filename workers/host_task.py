"""What a launched host runs: orders in, events out, passes between, until it is told to shut down or its driver is gone.

Light on purpose: the driver imports this module to launch it, and must not load torch for that.
"""

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infra.launch import Channel
from infra.services import Services
from workers.report import Admit, Decision, Evict, HostOrder, Shutdown

if TYPE_CHECKING:
    from workers.host import Host

IDLE_SECONDS = 0.5


@dataclass(frozen=True)
class HostTask:
    """A picklable task that runs one host over the services it rebuilds where it lands."""

    services: Services
    name: str = "host"
    device: str = "cpu"
    """Where torch computes: "cpu", or "cuda" if the launcher gives the task a GPU."""
    max_tokens: int | None = None
    """Tokens of a pass at most; None leaves it to what the host measures."""

    def __call__(self, channel: Channel) -> None:
        settings = self.services.settings
        engine_host = importlib.import_module("workers.host").EngineHost  # torch is loaded here, in the host's process
        host: Host = engine_host(
            self.services.store,
            self.services.cache_dir,
            lease_seconds=settings.lease_seconds,
            device=self.device,
            slots=settings.slots_per_host,
            name=self.name,
            memory_limit_bytes=settings.memory_limit_bytes,
            max_tokens=self.max_tokens,
        )
        try:
            _serve(channel, host)
        finally:
            host.close()


def _serve(channel: Channel, host: "Host") -> None:
    busy = False
    while not channel.closed:
        orders = channel.receive(0.0 if busy else IDLE_SECONDS)
        if not carry_out(orders, host):
            _send(channel, host)
            return
        busy = host.step()
        _send(channel, host)


def carry_out(orders: Iterable[HostOrder], host: "Host") -> bool:
    """Pass orders to the host, in order; False once it was told to shut down."""
    for order in orders:
        match order:
            case Admit(job):
                host.admit(job)
            case Decision(job_id, go):
                host.decide(job_id, go)
            case Evict(job_id, status):
                host.evict(job_id, status)
            case Shutdown():
                return False
    return True


def _send(channel: Channel, host: "Host") -> None:
    for event in host.report():
        channel.send(event)
