"""`MlflowPurge`: taking out of MLflow, for good, all runs and registered models that bear a tag, and mending files of others.

MLflow's client only marks runs and experiments as deleted; `mlflow gc` removes them, and works on the database behind a server.
So the embedded database is purged here, as that command does it but for these runs alone, and compacted, since SQLite leaves what
was deleted in its file. Of a server it is told what remains to be purged there.
"""

import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mlflow.entities import Run, ViewType

from infra.mlflow_client import Mlflow, MlflowRefused, all_pages, quoted

VACUUM_TIMEOUT_SECONDS = 20.0
"""For which other users of the embedded database are waited for before it is compacted."""

Rewrite = Callable[[Path], list[Path]]
"""Takes a file of a run; returns files to put in its place (and beside it), none if it may stay as it is."""


@dataclass(frozen=True)
class Held:
    """What MLflow holds under a tag."""

    models: tuple[str, ...]
    """Names of registered models."""
    runs: tuple[str, ...]
    """MLflow's ids, those that are marked as deleted included."""
    experiments: tuple[str, ...]
    """Ids of experiments in which there is nothing else."""

    @property
    def count(self) -> int:
        return len(self.models) + len(self.runs) + len(self.experiments)


class MlflowPurge:
    """Works on `sqlite:///<file>` or `http(s)://<server>` (BadInput for any other uri).

    Everything may be repeated. Methods raise ServiceUnavailable if MLflow does not answer, and WorkFailed if it answers that it
    will not.
    """

    def __init__(self, tracking_uri: str) -> None:
        self._mlflow = Mlflow(tracking_uri)

    @property
    def is_there(self) -> bool:
        """Whether there may be anything: an embedded database that nobody made yet holds nothing, and is not made to look."""
        return self._mlflow.database is None or self._mlflow.database.exists()

    def held(self, tag: str, value: str, experiment: str) -> Held:
        """Return the models and runs whose `tag` is `value`, and the experiment of this name unless others have runs in it."""
        condition = f"tags.`{tag}` = {quoted(value)}"
        with self._mlflow.client() as client:
            models: Iterator[Any] = all_pages(
                lambda token: client.search_registered_models(filter_string=condition, page_token=token)
            )
            names = tuple(sorted(model.name for model in models))
        experiments = self._experiments()
        runs = tuple(str(run.info.run_id) for run in self._runs(list(experiments), condition))
        named = [id_ for id_, name in experiments.items() if name in (experiment, _aside(id_))]
        return Held(names, runs, tuple(id_ for id_ in named if self._is_all_of(id_, runs)))

    def remove(self, held: Held) -> str | None:
        """Remove what is held; return a sentence on what remains, and how it goes, None if nothing does."""
        for name in held.models:
            _unless_gone(partial(self._delete_model, name))
        for run_id in held.runs:
            _unless_gone(partial(self._delete_run, run_id))
        for id_ in held.experiments:
            _unless_gone(partial(self._set_aside, id_))
        if self._mlflow.database is not None:
            return self._purge(held, self._mlflow.database)
        if not (held.runs or held.experiments):
            return None
        return (
            f"MLflow at {self._mlflow.uri} shows none of it any more, but keeps {len(held.runs)} deleted runs until they are "
            "purged there: mlflow gc --backend-store-uri <its database>."
        )

    def rewrite_files(self, tag: str, but_not: str, folder: str, rewrite: Rewrite) -> int:
        """Have `rewrite` look at the files in `folder` of all runs with `tag` and without `but_not`; return how many changed."""
        num_changed = 0
        for run in self._runs(list(self._experiments()), f"tags.`{tag}` LIKE '%'"):
            if but_not not in run.data.tags and run.info.lifecycle_stage == "active":
                num_changed += self._rewrite(str(run.info.run_id), folder, rewrite)
        return num_changed

    def _rewrite(self, run_id: str, folder: str, rewrite: Rewrite) -> int:
        num_changed = 0
        with tempfile.TemporaryDirectory(prefix="lorafleet-") as place, self._mlflow.client() as client:
            for one in client.list_artifacts(run_id, folder):
                if not one.is_dir:
                    changed = rewrite(Path(client.download_artifacts(run_id, one.path, place)))
                    for path in changed:
                        client.log_artifact(run_id, str(path), folder)
                    num_changed += len(changed)
        return num_changed

    def _experiments(self) -> dict[str, str]:
        """Return the names of all experiments by id, deleted ones too."""
        with self._mlflow.client() as client:
            found: Iterator[Any] = all_pages(lambda token: client.search_experiments(view_type=ViewType.ALL, page_token=token))
            return {str(one.experiment_id): str(one.name) for one in found}

    def _runs(self, experiments: list[str], condition: str) -> Iterator[Run]:
        with self._mlflow.client() as client:
            yield from all_pages(
                lambda token: client.search_runs(experiments, condition, run_view_type=ViewType.ALL, page_token=token)
            )

    def _is_all_of(self, experiment: str, runs: tuple[str, ...]) -> bool:
        known = set(runs)
        return all(run.info.run_id in known for run in self._runs([experiment], ""))

    def _delete_model(self, name: str) -> None:
        with self._mlflow.client() as client:
            client.delete_registered_model(name)

    def _delete_run(self, run_id: str) -> None:
        with self._mlflow.client() as client:
            if client.get_run(run_id).info.lifecycle_stage == "active":
                client.delete_run(run_id)

    def _set_aside(self, experiment: str) -> None:
        """Mark an experiment as deleted under another name: one of the old name would be restored, and its runs with it."""
        with self._mlflow.client() as client:
            if client.get_experiment(experiment).lifecycle_stage == "deleted":
                if client.get_experiment(experiment).name == _aside(experiment):
                    return
                client.restore_experiment(experiment)
            client.rename_experiment(experiment, _aside(experiment))
            client.delete_experiment(experiment)

    def _purge(self, held: Held, database: Path) -> str | None:
        with self._mlflow.client() as client:
            store: Any = client._tracking_client.store  # what `mlflow gc` works on; the public client removes nothing for good
            for run_id in held.runs:
                _unless_gone(partial(self._purge_run, run_id, store))
            for id_ in held.experiments:
                _unless_gone(partial(self._purge_experiment, id_, store))
        return _compacted(database)

    def _purge_run(self, run_id: str, store: Any) -> None:
        """Remove a run's files, then the run."""
        with self._mlflow.client() as client:
            location = _folder_of(client.get_run(run_id).info.artifact_uri)
            _remove(location.parent if location is not None and location.parent.name == run_id else location)
            store._hard_delete_run(run_id)

    def _purge_experiment(self, experiment: str, store: Any) -> None:
        with self._mlflow.client() as client:
            _remove(_folder_of(client.get_experiment(experiment).artifact_location))
            store._hard_delete_experiment(experiment)


def _aside(experiment: str) -> str:
    return f"forgotten-{experiment}"


def _folder_of(uri: str) -> Path | None:
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") and parts.path else None


def _remove(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _unless_gone(remove: Callable[[], None]) -> None:
    """Remove something; somebody else may have done so."""
    try:
        remove()
    except MlflowRefused as error:
        if error.code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _compacted(database: Path) -> str | None:
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=VACUUM_TIMEOUT_SECONDS)) as connection:
            connection.execute("VACUUM")
    except sqlite3.Error as error:
        return (
            f"MLflow shows none of it any more, but the file {database} could not be compacted ({error}) and may hold bytes of "
            "it; run the same command again when nobody uses it."
        )
    return None
