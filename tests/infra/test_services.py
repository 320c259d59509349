"""Which implementation stands behind each protocol, and that only settings travel."""

import pickle
from pathlib import Path

import pytest

from infra.errors import BadInput, ServiceUnavailable
from infra.local_launch import ThreadLauncher
from infra.services import Services
from infra.settings import Settings, load_settings
from infra.stores import probe
from tests.contracts.storage_servers import S3Server


def test_embedded_services_are_fit_to_start_from_nothing(tmp_path: Path) -> None:
    services = Services(load_settings(tmp_path, {}))
    services.check_at_start()
    services.store.put("a/b", b"content")
    assert (tmp_path / ".lorafleet" / "store").is_dir()
    assert (tmp_path / ".lorafleet" / "mlflow.db").is_file()


def test_services_rebuilt_elsewhere_open_the_same_store(tmp_path: Path) -> None:
    services = Services(load_settings(tmp_path, {}))
    services.store.put("a/b", b"content")
    rebuilt = pickle.loads(pickle.dumps(services))  # noqa: S301
    assert rebuilt.settings == services.settings
    assert rebuilt.store.get("a/b")[0] == b"content"
    assert services.store is services.store


def test_s3_settings_open_an_s3_store(tmp_path: Path, moto: S3Server) -> None:
    bucket = moto.new_bucket()
    services = Services(load_settings(tmp_path, {"LORAFLEET_STORE": f"s3://{bucket}/p", "LORAFLEET_S3_ENDPOINT_URL": moto.url}))
    probe(services.store)
    assert services.store.uri == f"s3://{bucket}/p"


def test_a_server_is_refused_with_a_local_store(tmp_path: Path) -> None:
    settings = load_settings(tmp_path, {"LORAFLEET_TRACKING_URI": "http://127.0.0.1:9"})
    with pytest.raises(BadInput, match="server"):
        Services(settings).check_at_start()


def test_a_ray_that_does_not_answer_is_told_when_the_launcher_starts(tmp_path: Path) -> None:
    settings = load_settings(tmp_path, {"LORAFLEET_RAY_ADDRESS": "127.0.0.1:9"})
    with pytest.raises(ServiceUnavailable, match="Ray at 127.0.0.1:9 does not answer"):
        Services(settings).launcher()


def test_threads_are_launched_where_the_settings_say_so(tmp_path: Path) -> None:
    launcher = Services(Settings(home=tmp_path, launcher="in-process")).launcher()
    assert isinstance(launcher, ThreadLauncher)
    launcher.close()
