"""Fixtures for all tests: credentials that open nothing real, servers on loopback, stores, and the real input."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local_storage import LocalStorage
from tests.contracts.storage_servers import (
    ACCESS_KEY,
    SECRET_KEY,
    S3Server,
    ministack_server,
    missing,
    moto_server,
    rclone_server,
)

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest files begin first, so that no process is left with one of them when the others have ended."""
    items.sort(key=lambda item: "/end_to_end/" not in item.path.as_posix())


@pytest.fixture(scope="session", autouse=True)
def interrupts_arrive() -> None:
    """Let commands that tests start be interrupted, also where this process was started in the background, which ignores it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def dummy_credentials() -> Iterator[None]:
    """Keep every S3 client, here and in child processes, from the person's own credentials and endpoints."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        yield


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with moto_server(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with ministack_server(tmp_path_factory.mktemp("ministack")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with rclone_server(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def moto_url(moto: S3Server) -> str:
    """URL of a server for S3 that keeps conditions; child processes find it when it is put into AWS_ENDPOINT_URL."""
    return moto.url


@pytest.fixture
def s3_bucket(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://...` of a fresh bucket; AWS_ENDPOINT_URL names its server, here and in child processes."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.url)
    return f"s3://{moto.new_bucket()}"


@pytest.fixture
def local_store(tmp_path: Path) -> LocalStorage:
    """A fresh store in a folder."""
    return LocalStorage(tmp_path / "store")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real bases and data sets (LORAFLEET_TEST_DATA, else shared/data beside the repository)."""
    folder = Path(os.environ.get("LORAFLEET_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        missing(f"no real test data in {folder}; name its folder in LORAFLEET_TEST_DATA")
    return folder
