"""The composition root: which implementation stands behind each protocol, as the settings say.

It stands this low so that a host on another node can rebuild its services: only the settings travel. This is the one place of
`infra` with imports inside functions, since reading settings must load none of Ray, MLflow and boto3.
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.launch import Launcher
from infra.settings import Settings
from infra.storage import Storage

if TYPE_CHECKING:
    from infra.mlflow_purge import MlflowPurge
    from infra.mlflow_registry import ModelRegistry
    from infra.mlflow_tracking import MlflowTracker


class Services:
    """Opens what the settings name, when it is first asked for. Picklable: it travels as its settings."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __reduce__(self) -> tuple[Any, ...]:
        return Services, (self.settings,)

    @cached_property
    def store(self) -> Storage:
        """The store, not probed; one per process. Raises BadInput or ServiceUnavailable if it cannot be opened."""
        return self.open_store(self.settings.store)

    def open_store(self, uri: str) -> Storage:
        """Open another store, or a place of data, on the same S3 server (`infra.stores.open_store` says how)."""
        from infra.stores import open_store

        return open_store(uri, endpoint_url=self.settings.s3_endpoint_url)

    @property
    def cache_dir(self) -> Path:
        """Where this node keeps what it fetched, by hash."""
        return self.settings.cache_dir

    def tracker(self) -> "MlflowTracker":
        """Return a new tracker on MLflow; it is not asked yet whether it answers."""
        from infra.mlflow_tracking import MlflowTracker

        return MlflowTracker(self.settings.tracking_uri)

    def registry(self) -> "ModelRegistry":
        """Return a new view of MLflow's registered models."""
        from infra.mlflow_registry import ModelRegistry

        return ModelRegistry(self.settings.tracking_uri)

    def purge(self) -> "MlflowPurge":
        """Return what takes things out of MLflow for good."""
        from infra.mlflow_purge import MlflowPurge

        return MlflowPurge(self.settings.tracking_uri)

    def launcher(self) -> Launcher:
        """Start a launcher; the caller closes it. Raises ServiceUnavailable if Ray does not answer or start."""
        if self.settings.launcher == "in-process":
            from infra.local_launch import ThreadLauncher

            return ThreadLauncher()
        from infra.ray_launch import RayLauncher

        return RayLauncher(self.settings.ray_address)

    def check_at_start(self) -> None:
        """Make sure that long work can begin: the store keeps its promises, MLflow answers, and the two fit together.

        Raises BadInput or ServiceUnavailable with one sentence.
        """
        from infra.stores import probe
        from infra.tracking import refuse_server_with_local_store

        refuse_server_with_local_store(self.settings.tracking_uri, self.settings.store)
        probe(self.store)
        self.tracker().check()
