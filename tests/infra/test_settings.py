"""Where home is, which source of a setting wins, and what each mistake is told."""

from pathlib import Path

import pytest

from infra.errors import BadInput
from infra.settings import load_settings


def test_without_anything_all_is_embedded_below_the_current_folder(tmp_path: Path) -> None:
    settings = load_settings(tmp_path, {})
    assert settings.home == tmp_path / ".lorafleet"
    assert settings.store == str(tmp_path / ".lorafleet" / "store")
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/.lorafleet/mlflow.db"
    assert settings.cache_dir == tmp_path / ".lorafleet" / "cache"
    assert (settings.launcher, settings.ray_address, settings.study_storage) == ("ray", None, None)


@pytest.mark.parametrize("mark", ["lorafleet.toml", ".lorafleet/store"])
def test_the_nearest_parent_with_a_file_or_a_home_wins(tmp_path: Path, mark: str) -> None:
    (tmp_path / ".lorafleet").mkdir()
    project, below = tmp_path / "project", tmp_path / "project" / "a" / "b"
    below.mkdir(parents=True)
    if mark.endswith(".toml"):
        (project / mark).write_text("")
    else:
        (project / mark).mkdir(parents=True)
    assert load_settings(below, {}).home == project / ".lorafleet"


def test_the_environment_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    (tmp_path / "lorafleet.toml").write_text('store = "s3://file/x"\ntracking_uri = "http://file:5000"\nlease_seconds = 3\n')
    settings = load_settings(tmp_path, {"LORAFLEET_STORE": "s3://env/x", "LORAFLEET_ORPHAN_TIMEOUT_SECONDS": "7.5"})
    assert (settings.store, settings.tracking_uri) == ("s3://env/x", "http://file:5000")
    assert (settings.lease_seconds, settings.orphan_timeout_seconds) == (3.0, 7.5)


def test_home_moves_what_is_embedded(tmp_path: Path) -> None:
    (tmp_path / "lorafleet.toml").write_text('home = "elsewhere"\n')
    assert load_settings(tmp_path, {}).store == str(tmp_path / "elsewhere" / "store")
    settings = load_settings(tmp_path, {"LORAFLEET_HOME": "named"})
    assert settings.home == tmp_path / "named"
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/named/mlflow.db"


def test_a_relative_store_is_meant_from_where_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "lorafleet.toml").write_text('store = "artifacts"\n')
    below = tmp_path / "below"
    below.mkdir()
    assert load_settings(below, {}).store == str(tmp_path / "artifacts")
    assert load_settings(below, {"LORAFLEET_STORE": "artifacts"}).store == str(below / "artifacts")


def test_an_empty_variable_counts_as_unset(tmp_path: Path) -> None:
    assert load_settings(tmp_path, {"LORAFLEET_RAY_ADDRESS": ""}).ray_address is None


def test_variables_of_the_tests_are_no_settings(tmp_path: Path) -> None:
    load_settings(tmp_path, {"LORAFLEET_TEST_DATA": "x", "LORAFLEET_CRASHPOINT": "a:1", "LORAFLEET_CRASHPOINT_TRACE": "y"})


@pytest.mark.parametrize(
    ("written", "env", "sentence"),
    [
        ('stor = "x"', {}, r"lorafleet\.toml: unknown key 'stor'. Did you mean 'store'\?"),
        ("lease_seconds = -1", {}, r"lorafleet\.toml: 'lease_seconds': should be greater than 0, got int -1"),
        ('launcher = "spark"', {}, r"lorafleet\.toml: 'launcher': should be 'ray' or 'in-process', got str 'spark'"),
        ("store =\n", {}, r"lorafleet\.toml is not valid TOML: .*line 1"),
        ("", {"LORAFLEET_STOR": "x"}, r"environment variable LORAFLEET_STOR is no setting. Did you mean LORAFLEET_STORE\?"),
        ("", {"LORAFLEET_LEASE_SECONDS": "soon"}, r"environment variable LORAFLEET_LEASE_SECONDS: .*number, got str 'soon'"),
        ("", {"LORAFLEET_LAUNCHER": "spark"}, r"environment variable LORAFLEET_LAUNCHER: .*'in-process'"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(tmp_path: Path, written: str, env: dict[str, str], sentence: str) -> None:
    (tmp_path / "lorafleet.toml").write_text(written)
    with pytest.raises(BadInput, match=sentence) as caught:
        load_settings(tmp_path, env)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "lorafleet.toml").write_bytes(b"store = '\xff\xfe'")
    with pytest.raises(BadInput, match="UTF-8"):
        load_settings(tmp_path, {})


def test_printed_settings_hold_no_passwords(tmp_path: Path) -> None:
    env = {
        "LORAFLEET_TRACKING_URI": "http://user:hunter2hunter2@mlflow:5000",
        "LORAFLEET_STUDY_STORAGE": "postgresql://optuna:correct-horse@db/studies",
    }
    printed = load_settings(tmp_path, env).public()
    assert printed["tracking_uri"] == "http://user:***@mlflow:5000"
    assert printed["study_storage"] == "postgresql://optuna:***@db/studies"
    assert printed["home"] == str(tmp_path / ".lorafleet")


def test_whole_numbers_come_from_the_environment_too_and_others_are_refused(tmp_path: Path) -> None:
    settings = load_settings(tmp_path, {"LORAFLEET_SLOTS_PER_HOST": "4", "LORAFLEET_MEMORY_LIMIT_BYTES": "1000000"})
    assert (settings.slots_per_host, settings.memory_limit_bytes) == (4, 1_000_000)
    assert (load_settings(tmp_path, {}).slots_per_host, load_settings(tmp_path, {}).memory_limit_bytes) == (16, None)
    for value in ("0", "2.5", "many"):
        with pytest.raises(BadInput, match="LORAFLEET_SLOTS_PER_HOST"):
            load_settings(tmp_path, {"LORAFLEET_SLOTS_PER_HOST": value})
