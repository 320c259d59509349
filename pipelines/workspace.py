"""What every command works in: settings, services, and the directory a person stands in."""

import getpass
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from infra.claims import Owner
from infra.errors import BadInput
from infra.logs import set_up_logs
from infra.services import Services
from infra.settings import Settings, load_settings
from infra.storage import Storage
from infra.tracking_log import Shipper, TrackingLog
from pipelines.references import find_reference
from workers.fleet import HostFleet

if TYPE_CHECKING:
    from workers.resolve import Resolver


@dataclass(frozen=True)
class Workspace:
    """Settings as found from where the person stands, and what they open. Nothing is opened before it is used."""

    settings: Settings

    @staticmethod
    def here() -> "Workspace":
        """Find the settings for the current directory; logs go to the home's log file from now on.

        Raises BadInput if the settings are wrong or the home cannot be written.
        """
        settings = load_settings()
        try:
            set_up_logs(settings.home)
        except OSError as error:
            reason = error.strerror or str(error)
            raise BadInput(
                f"the home {settings.home} cannot be written ({reason}); "
                "stand in a folder of your own, or set LORAFLEET_HOME to one that can."
            ) from error
        return Workspace(settings)

    @cached_property
    def services(self) -> Services:
        return Services(self.settings)

    @property
    def store(self) -> Storage:
        return self.services.store

    @property
    def actor(self) -> str:
        """Who acts, for the journal."""
        return getpass.getuser()

    @cached_property
    def owner(self) -> Owner:
        return Owner.here()

    def resolver(self, folder: Path) -> "Resolver":
        """Return what pins job specs whose paths start at `folder`."""
        from workers.resolve import Resolver  # readers of rows and bases, which most commands do without

        def find(tenant: str, reference: str) -> tuple[str, str]:
            found = find_reference(self.store, reference, tenant)
            return found.base_id, found.adapter_id

        return Resolver(self.store, folder, self.services.cache_dir, find, self.services.open_store)

    @contextmanager
    def fleet(self, num_threads: int, max_hosts: int, *, at_once: bool = True) -> Iterator[Callable[[], HostFleet]]:
        """Start the launcher and a fleet in the background; calling what this yields waits for it. Closed at the end.

        Starting Ray takes seconds, in which the caller finds out whether there is anything to train. Without `at_once` it begins
        with the first call, for callers who expect that there is nothing. So it does if hosts are threads of this process: they
        would import transformers while the caller does, and transformers, which puts another module in its own place as it ends
        being imported, fails in the thread that waited.
        """
        at_once = at_once and self.settings.launcher != "in-process"

        def start() -> HostFleet:
            return HostFleet(self.services, self.services.launcher(), num_threads=num_threads, max_hosts=max_hosts)

        with ThreadPoolExecutor(1, "start-fleet") as pool:
            starting = [pool.submit(start)] if at_once else []

            def started() -> HostFleet:
                if not starting:
                    starting.append(pool.submit(start))
                return starting[0].result()

            try:
                yield started
            finally:
                if starting and starting[0].exception() is None:
                    starting[0].result().close(preempt=True)

    def tracking(self, name: str) -> "Tracking":
        """Open the local tracking log `name` and the shipper that replays it."""
        return Tracking(self, name)


class Tracking:
    """A tracking log with its shipper, as a context: what could not be shipped at the end stays for the next time."""

    def __init__(self, workspace: Workspace, name: str) -> None:
        self._workspace = workspace
        self.log = TrackingLog(workspace.settings.home / "tracking" / f"{name}.jsonl")
        self.num_left = 0

    def __enter__(self) -> "Tracking":
        self._shipper = Shipper(self.log, self._workspace.services.tracker())
        return self

    def __exit__(self, *error: object) -> None:
        self.num_left = self._shipper.close(timeout_seconds=30.0)
        self.log.close()

    def drain(self) -> int:
        """Wait until everything logged so far is in the tracker; return the number of events that are not."""
        return self._shipper.drain()
