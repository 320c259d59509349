import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from mlflow import MlflowClient

from infra.errors import BadInput, ServiceUnavailable, WorkFailed
from infra.mlflow_registry import ModelRegistry
from tests.contracts.mlflow_server import mlflow_server  # noqa: F401

# MLflow 3.17 sets up its tables with a loader that SQLAlchemy 2.1 deprecates; here tests open databases themselves.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture(scope="module")
def embedded_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('home')}/mlflow.db"


@pytest.fixture(params=["sqlite", "server"])
def uri(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("embedded_uri") if request.param == "sqlite" else request.getfixturevalue("mlflow_server").uri


@pytest.fixture
def registry(uri: str) -> ModelRegistry:
    return ModelRegistry(uri)


@pytest.fixture
def source(uri: str, tmp_path: Path) -> str:
    return f"{tmp_path}/adapters/a b" if uri.startswith("sqlite") else "s3://bucket/adapters/a"


@pytest.fixture
def name() -> str:
    return f"acme.support-{uuid.uuid4().hex[:8]}"


def test_a_version_asked_for_twice_is_one_version(registry, name, source):
    registry.ensure_model(name, {"lorafleet.tenant": "acme"})
    first = registry.ensure_version(name, "adapter-a", source, {"lorafleet.base_id": "b"})
    assert registry.ensure_version(name, "adapter-a", source, {"lorafleet.base_id": "b"}) == first
    second = registry.ensure_version(name, "adapter-b", source, {})
    versions = registry.versions(name)
    assert [(one.version, one.key, one.source) for one in versions] == [
        (first, "adapter-a", source),
        (second, "adapter-b", source),
    ]
    assert versions[0].tags == {"lorafleet.base_id": "b", "lorafleet.key": "adapter-a"}


def test_tags_that_differ_are_mended(registry, name, source):
    registry.ensure_model(name, {"lorafleet.tenant": "acme"})
    registry.ensure_model(name, {"lorafleet.tenant": "globex"})
    version = registry.ensure_version(name, "adapter-a", source, {"lorafleet.status": "registered"})
    registry.ensure_version(name, "adapter-a", source, {"lorafleet.status": "accepted"})
    assert registry.versions(name)[0].tags["lorafleet.status"] == "accepted"
    registry.set_version_tags(name, version, {"lorafleet.status": "champion", "long": "v" * 200_000})
    assert registry.versions(name)[0].tags["lorafleet.status"] == "champion"
    assert MlflowClient(registry.uri).get_registered_model(name).tags == {"lorafleet.tenant": "globex"}


def test_aliases_move_and_go(registry, name, source):
    registry.ensure_model(name, {})
    first, second = (registry.ensure_version(name, key, source, {}) for key in ("a", "b"))
    registry.set_alias(name, "champion", first)
    registry.set_alias(name, "champion", second)
    registry.set_alias(name, "previous", first)
    assert registry.aliases(name) == {"champion": second, "previous": first}
    registry.delete_alias(name, "previous")
    registry.delete_alias(name, "previous")
    assert registry.aliases(name) == {"champion": second}


def test_a_model_that_does_not_exist_has_nothing(registry, name):
    assert registry.aliases(name) == {}
    assert registry.versions(name) == []
    with pytest.raises(WorkFailed, match=name):
        registry.set_alias(name, "champion", "1")


def test_a_twin_that_a_lost_answer_left_is_removed(registry, name, source):
    registry.ensure_model(name, {})
    first = registry.ensure_version(name, "a", source, {})
    MlflowClient(registry.uri).create_model_version(name, source, tags={"lorafleet.key": "a"})
    assert registry.ensure_version(name, "a", source, {}) == first
    assert [one.version for one in registry.versions(name)] == [first]


def test_versions_of_other_people_are_left_alone(registry, name, source):
    registry.ensure_model(name, {})
    MlflowClient(registry.uri).create_model_version(name, source)
    version = registry.ensure_version(name, "a", source, {})
    assert [(one.version, one.key) for one in registry.versions(name)] == [("1", None), (version, "a")]


CREATOR = """
import sys
from infra.mlflow_registry import ModelRegistry
registry = ModelRegistry(sys.argv[1])
registry.check()
for number in range(8):
    registry.ensure_model(sys.argv[2], {})
    registry.ensure_version(sys.argv[2], f"adapter-{number}", "/adapters", {})
"""


def test_two_processes_register_the_same_adapters_once(embedded_uri, name):
    command = [sys.executable, "-c", CREATOR, embedded_uri, name]
    creators = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    assert [creator.communicate(timeout=120)[1] for creator in creators] == [b"", b""]
    keys = [one.key for one in ModelRegistry(embedded_uri).versions(name)]
    assert sorted(keys) == sorted(f"adapter-{number}" for number in range(8))


def test_a_server_refuses_a_local_source_with_a_sentence(mlflow_server, name):  # noqa: F811
    registry = ModelRegistry(mlflow_server.uri)
    registry.ensure_model(name, {})
    with pytest.raises(WorkFailed, match=r"^MLflow at http://127.0.0.1:\d+ refused this: Invalid model version source"):
        registry.ensure_version(name, "a", "/adapters/a", {})
    assert registry.versions(name) == []


def test_a_registry_that_is_not_there_says_so():
    with pytest.raises(ServiceUnavailable, match="does not answer"):
        ModelRegistry("http://127.0.0.1:9").aliases("acme.support")


def test_names_that_would_leave_the_search_are_refused(embedded_uri):
    with pytest.raises(BadInput, match="leave out quotes"):
        ModelRegistry(embedded_uri).versions("x' or name like '%")
