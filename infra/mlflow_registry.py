"""`ModelRegistry`: registered models, their versions and aliases in MLflow, as a projection of what the store says.

MLflow's aliases have no compare-and-set and no history, and its client may create twins, so nothing here decides anything:
every method says how it should be, may be called again, and mends what differs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlflow.entities.model_registry import RegisteredModel

from infra.mlflow_client import Mlflow, MlflowRefused, all_pages, cut, quoted

# mlflow.utils.validation: MAX_MODEL_REGISTRY_TAG_KEY_LENGTH; values may be longer in 3.x, 5000 is what older servers take.
KEY_LENGTH, VALUE_LENGTH = 250, 5000


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a registered model."""

    version: str
    """MLflow's number, "1" and up."""
    source: str
    """Where its adapter lies."""
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str | None:
        """What the version was created for (an adapter_id); None if lorafleet did not create it."""
        return self.tags.get("lorafleet.key")


class ModelRegistry:
    """Registered models named "<tenant>.<task>" on `sqlite:///<file>` or `http(s)://<server>` (BadInput for any other uri).

    Every method raises ServiceUnavailable if MLflow does not answer, and WorkFailed if it answers that it will not. A server
    refuses sources that are local paths: see `infra.tracking.refuse_server_with_local_store`.
    """

    def __init__(self, tracking_uri: str) -> None:
        self._mlflow = Mlflow(tracking_uri)

    @property
    def uri(self) -> str:
        """Where this MLflow is, without credentials."""
        return self._mlflow.uri

    def check(self) -> None:
        """Return if MLflow answers, within seconds; raise ServiceUnavailable if not."""
        self._mlflow.check()

    def ensure_model(self, name: str, tags: Mapping[str, str]) -> dict[str, str]:
        """Create the registered model unless it exists, and set these tags on it; return the version each alias points at."""
        wanted = cut(dict(tags), KEY_LENGTH, VALUE_LENGTH)
        there = self._model(name)
        if there is None:
            try:
                with self._mlflow.client() as client:
                    client.create_registered_model(name, tags=wanted)
                return {}
            except MlflowRefused as error:
                if error.code != "RESOURCE_ALREADY_EXISTS":
                    raise
            there = self._model(name)  # somebody else created it just now
        assert there is not None, f"the model {name} exists and is not there"
        with self._mlflow.client() as client:
            for key, value in wanted.items():
                if there.tags.get(key) != value:
                    client.set_registered_model_tag(name, key, value)
        return _aliases_of(there)

    def add_version(self, name: str, key: str, source: str, tags: Mapping[str, str], run_id: str | None = None) -> str:
        """Create a version for `key`, of which the caller has seen that there is none; return its number.

        Should another have created one at the same time, there are two: `ensure_version` mends that.
        """
        wanted = cut({**tags, "lorafleet.key": key}, KEY_LENGTH, VALUE_LENGTH)
        with self._mlflow.client() as client:
            return str(client.create_model_version(name, source, run_id=run_id, tags=wanted, await_creation_for=0).version)

    def ensure_version(self, name: str, key: str, source: str, tags: Mapping[str, str], run_id: str | None = None) -> str:
        """Return the version that was created for `key` (an adapter_id), creating it if there is none; its tags are set.

        `source` is where the adapter lies (s3://..., or a path for the embedded MLflow), `run_id` MLflow's id of the run it
        came from.
        """
        wanted = cut({**tags, "lorafleet.key": key}, KEY_LENGTH, VALUE_LENGTH)
        found = self._first_of(name, key)
        if found is None:
            self.add_version(name, key, source, tags, run_id)
            found = self._first_of(name, key)
        assert found is not None, f"version of {name} for {key} was created and is not there"
        self._set_tags(name, found, wanted)
        return found.version

    def set_version_tags(self, name: str, version: str, tags: Mapping[str, str]) -> None:
        """Set tags of a version, whatever stood there."""
        with self._mlflow.client() as client:
            for key, value in cut(dict(tags), KEY_LENGTH, VALUE_LENGTH).items():
                client.set_model_version_tag(name, version, key, value)

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Point an alias at a version, wherever it pointed."""
        with self._mlflow.client() as client:
            client.set_registered_model_alias(name, alias, version)

    def delete_alias(self, name: str, alias: str) -> None:
        """Remove an alias; nothing happens if there is none."""
        with self._mlflow.client() as client:
            client.delete_registered_model_alias(name, alias)

    def aliases(self, name: str) -> dict[str, str]:
        """Return the version each alias points at; nothing if there is no such model."""
        there = self._model(name)
        return {} if there is None else _aliases_of(there)

    def versions(self, name: str) -> list[RegisteredVersion]:
        """Return all versions of a model, oldest first; none if there is no such model."""
        return list(self._search(name, ""))

    def _model(self, name: str) -> RegisteredModel | None:
        try:
            with self._mlflow.client() as client:
                return client.get_registered_model(name)
        except MlflowRefused as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
        return None

    def _first_of(self, name: str, key: str) -> RegisteredVersion | None:
        """Return the oldest version for `key`. Twins (a lost answer, two creators at once) are removed, by everybody alike."""
        found = list(self._search(name, f" and tags.`lorafleet.key` = {quoted(key)}"))
        with self._mlflow.client() as client:
            for twin in found[1:]:
                client.delete_model_version(name, twin.version)
        return found[0] if found else None

    def _set_tags(self, name: str, version: RegisteredVersion, wanted: Mapping[str, str]) -> None:
        self.set_version_tags(name, version.version, {k: v for k, v in wanted.items() if version.tags.get(k) != v})

    def _search(self, name: str, more: str) -> Iterator[RegisteredVersion]:
        with self._mlflow.client() as client:
            condition = f"name = {quoted(name)}{more}"
            pages: Iterator[Any] = all_pages(lambda token: client.search_model_versions(condition, page_token=token))
            found = sorted(pages, key=lambda version: int(version.version))
        for one in found:
            yield RegisteredVersion(str(one.version), str(one.source), dict(one.tags))


def _aliases_of(model: RegisteredModel) -> dict[str, str]:
    return {alias: str(version) for alias, version in model.aliases.items()}
