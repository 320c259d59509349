"""The doctor finds what is wrong and says what to do, and makes nothing."""

import pytest

from infra.services import Services
from infra.settings import Settings
from pipelines.doctor import Check, examine, exit_code
from tests.pipelines.command_line import CommandLine


def found(cli: CommandLine) -> dict[str, dict[str, object]]:
    return {check["name"]: check for check in cli("doctor", "--json").json}


def test_healthy_machine_is_all_ok_and_untouched(cli: CommandLine) -> None:
    ended = cli("doctor")
    assert ended.code == 0, ended.out
    assert "PROBLEM" not in ended.out
    assert not cli.home.exists()
    checks = found(cli)
    assert {"python", "torch", "ray", "home", "disk", "store", "MLflow", "Ray", "hardware"} <= checks.keys()
    assert all(check["ok"] for check in checks.values())


def test_home_that_cannot_be_is_a_problem_with_a_way_out(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    (cli.folder / "file").write_text("")
    monkeypatch.setenv("LORAFLEET_HOME", str(cli.folder / "file" / "home"))
    ended = cli("doctor")
    assert ended.code == 1
    assert "is no folder" in ended.out
    assert "set LORAFLEET_HOME" in ended.out


def test_services_that_do_not_answer_are_exit_code_4(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_STORE", "s3://bucket/prefix")
    monkeypatch.setenv("LORAFLEET_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("LORAFLEET_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("LORAFLEET_LAUNCHER", "ray")
    monkeypatch.setenv("LORAFLEET_RAY_ADDRESS", "127.0.0.1:9")
    ended = cli("doctor", "--json")
    assert ended.code == 4
    problems = {check["name"]: check["way_out"] for check in ended.json if not check["ok"]}
    assert problems.keys() == {"store", "MLflow", "Ray"}
    assert all(problems.values())


def test_server_with_a_local_store_is_a_problem(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_TRACKING_URI", "http://127.0.0.1:9")
    assert cli("doctor").code == 1
    assert not found(cli)["MLflow"]["ok"]


def test_store_that_ignores_conditions_is_a_problem(cli: CommandLine, rclone) -> None:
    bucket = rclone.new_bucket()
    settings = Settings(home=cli.home, store=f"s3://{bucket}", s3_endpoint_url=rclone.url, launcher="in-process")
    checks = {check.name: check for check in examine(Services(settings))}
    assert not checks["store"].ok
    assert "ignores" in checks["store"].found


def test_exit_code_of_a_service_goes_before_that_of_this_machine() -> None:
    disk, store = Check("disk", False, "full"), Check("store", False, "away", is_service=True)
    assert [exit_code(checks) for checks in ([], [disk], [store], [disk, store])] == [0, 1, 4, 4]
