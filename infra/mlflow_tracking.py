"""`MlflowTracker`: our runs in MLflow, embedded or a server.

Only the client API is used, one batch per call. Runs are found by the tag lorafleet.key, searched for before one is created.
MLflow's metrics table is keyed by all of (run, metric, time, step, value), so points that come twice stand there once. It has
no infinities: they become the largest finite numbers (NaN stays NaN).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlflow.entities import Metric, Param, Run, RunTag

from infra.errors import BadInput, WorkFailed
from infra.mlflow_client import Mlflow, MlflowRefused, all_pages, cut, quoted
from infra.tracking import OPEN_STATUSES, Point, RunStart, split_status, status_tags

MLFLOW_STATUS = {
    "queued": "SCHEDULED",
    "preempted": "SCHEDULED",
    "running": "RUNNING",
    "succeeded": "FINISHED",
    "complete": "FINISHED",
    "stopped": "KILLED",
    "pruned": "KILLED",
    "cancelled": "KILLED",
    "failed": "FAILED",
    "infeasible": "FAILED",
}
"""MLflow's status for each status of a job or trial. A preempted one waits for its next attempt."""

# mlflow.utils.validation: MAX_METRICS_PER_BATCH, MAX_PARAMS_TAGS_PER_BATCH, MAX_ENTITY_KEY_LENGTH, MAX_PARAM_VAL_LENGTH;
# tags may be 8000 long in 3.x, 5000 on older servers.
METRICS_PER_BATCH, PARAMS_PER_BATCH, TAGS_PER_BATCH = 1000, 100, 100
KEY_LENGTH, PARAM_LENGTH, TAG_LENGTH, EXPERIMENT_LENGTH = 250, 6000, 5000, 500
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")


class MlflowTracker:
    """Tracker (see `infra.tracking.Tracker`) on `sqlite:///<file>` or `http(s)://<server>`; BadInput for any other uri.

    Embedded, files of runs lie in `mlartifacts/` beside the database; a server puts them where it was told to.
    """

    def __init__(self, tracking_uri: str) -> None:
        self._mlflow = Mlflow(tracking_uri)
        self._run_ids: dict[str, str] = {}
        self._experiment_ids: dict[str, str] = {}
        self._fresh: set[str] = set()
        """Runs that were created here, and have the status they were created with."""

    @property
    def uri(self) -> str:
        return self._mlflow.uri

    def check(self) -> None:
        self._mlflow.check()

    def ensure_run(self, run: RunStart) -> str:
        tags = {"lorafleet.key": run.key, "lorafleet.status": "running", **run.tags}
        if run.parent is not None:
            tags["mlflow.parentRunId"] = self._run_id(run.parent)
        found = self._find(run.key)
        if found is None:
            found = self._create(run, tags)
            self._fresh.add(run.key)
        missing_tags = {key: value for key, value in tags.items() if key[:KEY_LENGTH] not in found.data.tags}
        missing_params = {key: value for key, value in run.params.items() if _name(key) not in found.data.params}
        self._log(found.info.run_id, tags=missing_tags, params=missing_params)
        self._run_ids[run.key] = found.info.run_id
        return str(found.info.run_id)

    def log_points(self, key: str, points: Sequence[Point]) -> None:
        metrics = [Metric(_name(point.metric), float(point.value), point.time_ms, point.step) for point in points]
        run_id = self._run_id(key)
        with self._mlflow.client() as client:
            for start in range(0, len(metrics), METRICS_PER_BATCH):
                client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH])

    def set_tags(self, key: str, tags: Mapping[str, str]) -> None:
        self._log(self._run_id(key), tags=tags)

    def log_file(self, key: str, path: Path, folder: str) -> None:
        run_id = self._run_id(key)
        if not path.is_file():
            raise FileNotFoundError(2, "No such file", str(path))
        with self._mlflow.client() as client:
            client.log_artifact(run_id, str(path), folder or None)

    def end_run(self, key: str, status: str, time_ms: int | None = None) -> None:
        target = mlflow_status(status)
        if status == "running" and key in self._fresh:
            return
        self._fresh.discard(key)
        run_id = self._run_id(key)
        self._log(run_id, tags=status_tags(status))
        with self._mlflow.client() as client:
            if split_status(status)[0] in OPEN_STATUSES:
                client.update_run(run_id, status=target)
            elif time_ms is not None or self._known(key).info.status != target:
                client.set_terminated(run_id, target, end_time=time_ms)

    def open_runs(self, sweep: str) -> list[str]:
        runs = self._search(f"tags.`lorafleet.sweep` = {quoted(sweep)}")
        return sorted({run.data.tags["lorafleet.key"] for run in runs if run.info.status in ("RUNNING", "SCHEDULED")})

    def open_statuses(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for mlflows, ours in (("SCHEDULED", "preempted"), ("RUNNING", "running")):
            for run in self._search(f"attributes.status = {quoted(mlflows)}"):
                if "lorafleet.key" in run.data.tags:
                    found[run.data.tags["lorafleet.key"]] = ours
        return found

    def _create(self, run: RunStart, tags: Mapping[str, str]) -> Run:
        experiment_id = self._experiment_id(run.experiment)
        with self._mlflow.client() as client:
            return client.create_run(
                experiment_id,
                start_time=run.time_ms,
                tags=cut(dict(tags), KEY_LENGTH, TAG_LENGTH),
                run_name=run.name[:KEY_LENGTH],
            )

    def _log(self, run_id: str, tags: Mapping[str, str] | None = None, params: Mapping[str, str] | None = None) -> None:
        run_tags = [RunTag(key, value) for key, value in cut(dict(tags or {}), KEY_LENGTH, TAG_LENGTH).items()]
        run_params = [Param(_name(key), str(value)[:PARAM_LENGTH]) for key, value in (params or {}).items()]
        with self._mlflow.client() as client:
            for start in range(0, len(run_tags), TAGS_PER_BATCH):
                client.log_batch(run_id, tags=run_tags[start : start + TAGS_PER_BATCH])
            for start in range(0, len(run_params), PARAMS_PER_BATCH):
                client.log_batch(run_id, params=run_params[start : start + PARAMS_PER_BATCH])

    def run_id(self, key: str) -> str | None:
        """Return MLflow's own id of a run, None if it has none with this key."""
        run = self._find(key)
        return None if run is None else str(run.info.run_id)

    def _run_id(self, key: str) -> str:
        if key not in self._run_ids:
            self._run_ids[key] = self._known(key).info.run_id
        return self._run_ids[key]

    def _known(self, key: str) -> Run:
        run = self._find(key)
        if run is None:
            raise WorkFailed(f"MLflow at {self.uri} has no run {key!r}; start it before its points.")
        return run

    def _find(self, key: str) -> Run | None:
        """Return the run of `key`. Twins (a request timed out here and was carried out there) are removed, the first stays."""
        runs = sorted(
            self._search(f"tags.`lorafleet.key` = {quoted(key[:TAG_LENGTH])}"),
            key=lambda run: (run.info.start_time, run.info.run_id),
        )
        with self._mlflow.client() as client:
            for twin in runs[1:]:
                client.delete_run(twin.info.run_id)
        return runs[0] if runs else None

    def _search(self, condition: str) -> Iterator[Run]:
        with self._mlflow.client() as client:
            experiments: Iterator[Any] = all_pages(lambda token: client.search_experiments(page_token=token))
            ids = [experiment.experiment_id for experiment in experiments]
            yield from all_pages(lambda token: client.search_runs(ids, condition, page_token=token))

    def _experiment_id(self, name: str) -> str:
        if name not in self._experiment_ids:
            self._experiment_ids[name] = self._ensure_experiment(name[:EXPERIMENT_LENGTH])
        return self._experiment_ids[name]

    def _ensure_experiment(self, name: str) -> str:
        with self._mlflow.client() as client:
            found = client.get_experiment_by_name(name)
            if found is not None:
                if found.lifecycle_stage == "deleted":
                    client.restore_experiment(found.experiment_id)
                return str(found.experiment_id)
        try:
            with self._mlflow.client() as client:
                return str(client.create_experiment(name, artifact_location=self._artifact_location(name)))
        except MlflowRefused as error:
            if error.code != "RESOURCE_ALREADY_EXISTS":
                raise
        return self._ensure_experiment(name)  # somebody else created it just now

    def _artifact_location(self, name: str) -> str | None:
        if self._mlflow.database is None:
            return None
        return (self._mlflow.database.parent / "mlartifacts" / quote(name, safe="")).as_uri()


def mlflow_status(status: str) -> str:
    """Return MLflow's status for one of ours, with or without a reason; raise BadInput if there is no such status."""
    word, _ = split_status(status)
    if word not in MLFLOW_STATUS:
        raise BadInput(f"{status!r} is no status of a job or trial; use one of {', '.join(MLFLOW_STATUS)}.")
    return MLFLOW_STATUS[word]


def _name(key: str) -> str:
    """A metric's or param's name as MLflow takes it: other characters become "_", and it is cut."""
    return _NOT_IN_NAMES.sub("_", str(key))[:KEY_LENGTH]
