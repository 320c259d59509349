"""The commands of nights as people and schedulers have them: what they print, their JSON, and their exit codes."""

import json
from pathlib import Path

import pytest

from infra.stores import open_store
from tests.pipelines.command_line import CommandLine, Ended
from tests.pipelines.nightly.conftest import CUSTOMERS, Snips
from tests.pipelines.nightly.poison import NAN_SETTINGS
from tests.pipelines.nightly.running import Town


@pytest.fixture
def command(town: Town, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line in a town that has had its first night."""
    return CommandLine(town.folder, capsys)


def test_night_prints_its_counts_and_where_its_page_is(town: Town, command: CommandLine, snips: Snips) -> None:
    town.send("acme", snips("acme", 60))
    done = command("nightly", "run", "fleet.yaml")
    assert done.code == 0, done.err
    assert "1 promoted" in done.out
    assert "2 skipped (2 unchanged)" in done.out
    [page] = [Path(line.removeprefix("page ")) for line in done.out.splitlines() if line.startswith("page ")]
    assert "<!doctype html>" in page.read_text()
    again = command("nightly", "run", "fleet.yaml")
    assert again.code == 0
    assert "Nothing changed since the night" in again.err


def test_night_as_json_is_its_report(town: Town, command: CommandLine, snips: Snips) -> None:
    town.send("acme", snips("acme", 60))
    report = command("nightly", "run", "fleet.yaml", "--json").json
    assert report["counts"]["promoted"] == 1
    assert report["reasons"]["skipped"] == {"unchanged": 2}
    assert command("nightly", "report", "town", "--json").json["customers"] == report["customers"]
    row = {one["name"]: one for one in report["customers"]}["acme.calls"]
    assert row["generation"] == 2
    assert row["challenger"] < row["champion"] < row["base"]
    assert row["num_new"] > 0
    assert [verdict["gate"] for verdict in row["verdicts"]] == ["better_than_champion", "effect"]
    assert row["num_tokens"] > 0
    assert row["seconds"] > 0
    assert row["cost"] > 0


def test_data_are_read_from_the_s3_server_that_the_settings_name(
    town: Town, command: CommandLine, snips: Snips, s3_bucket: str, moto_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "".join(f"{json.dumps(row)}\n" for row in snips("acme", 60))
    open_store(s3_bucket).put("customers/hooli/rows.jsonl", rows.encode())
    town.set_fleet(customers=[{"discover": f"{s3_bucket}/customers/{{tenant}}/"}])
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("LORAFLEET_S3_ENDPOINT_URL", moto_url)
    report = command("nightly", "run", "fleet.yaml", "--json").json
    assert {row["name"]: row["status"] for row in report["customers"]}["hooli.calls"] == "promoted"


def test_failed_customer_gives_exit_code_1_and_its_way_out(town: Town, command: CommandLine) -> None:
    town.set_fleet(customers=[{"tenant": "acme", "set": dict(NAN_SETTINGS)}])
    done = command("nightly", "run", "fleet.yaml")
    assert done.code == 1
    assert "failed acme.calls:" in done.out
    assert "learning_rate" in done.out
    assert command("nightly", "run", "fleet.yaml").code == 0
    retried = command("nightly", "retry", "fleet.yaml", "--json")
    assert retried.code == 1
    assert retried.json["reasons"]["failed"] == {"non_finite": 1}
    town.set_fleet(customers=[])
    assert command("nightly", "retry", "fleet.yaml", "acme").code == 0


def test_status_and_report_tell_of_the_last_night_from_its_file_or_its_name(town: Town, command: CommandLine) -> None:
    for fleet in ("fleet.yaml", "town"):
        status = command("nightly", "status", fleet)
        assert status.out == "night 2025-06-02 of town: finished; 3 planned, 3 promoted\n"
        body = command("nightly", "status", fleet, "--json").json
        assert (body["night"], body["is_finished"], body["counts"]["promoted"]) == ("2025-06-02", True, 3)
        report = command("nightly", "report", fleet)
        assert "3 promoted" in report.out
        assert report.out.splitlines()[-1].startswith("page ")
    town.night()
    named = command("nightly", "report", "town", "--night", "2025-06-02", "--json").json
    assert named["night"] == "2025-06-02"
    assert {one["status"] for one in named["customers"]} == {"promoted"}
    assert command("nightly", "report", "town", "--json").json["night"] == "2025-06-03"


def test_page_is_fetched_where_this_machine_has_none(town: Town, command: CommandLine) -> None:
    page = town.folder / ".lorafleet" / "nights" / "town" / "2025-06-02.html"
    content = page.read_bytes()
    page.unlink()
    assert command("nightly", "report", "town").out.splitlines()[-1] == f"page {page}"
    assert page.read_bytes() == content


def test_why_tells_the_past_and_what_tonight_does(town: Town, command: CommandLine, snips: Snips) -> None:
    told = command("nightly", "why", "fleet.yaml", "acme").out
    assert "acme.calls has its rows in data/acme/" in told
    assert "Last time on 2025-06-02: promoted" in told
    town.send("acme", snips("acme", 60))
    lines = command("nightly", "why", "fleet.yaml", "acme", "--json").json
    assert any("Tonight: its rows are read" in line for line in lines)


def test_plan_says_what_tonight_would_do_and_cost_and_does_nothing(town: Town, command: CommandLine, snips: Snips) -> None:
    town.night()
    assert "3 customers: 3 unchanged" in command("plan", "fleet.yaml").out
    town.send("acme", snips("acme", 60))
    before = town.listing()
    outlook = command("plan", "fleet.yaml", "--json").json
    assert outlook["totals"]["because"] == {"unchanged": 2, "data": 1}
    assert outlook["totals"]["num_steps"] > 0
    assert outlook["totals"]["seconds"] > 0
    assert town.listing() == before


def test_night_that_is_under_way_is_told_by_its_status(town: Town, command: CommandLine, snips: Snips) -> None:
    town.send("acme", snips("acme", 60))
    seen: list[Ended] = []

    def look(progress: object) -> None:
        if not seen:
            seen.append(command("nightly", "status", "town", "--json"))

    town.night(on_progress=look)
    body = seen[0].json
    assert (body["night"], body["is_finished"], body["num_ended"]) == ("2025-06-03", False, 0)


def test_store_or_ray_that_does_not_answer_gives_exit_code_4(
    town: Town, command: CommandLine, snips: Snips, monkeypatch: pytest.MonkeyPatch
) -> None:
    town.send("acme", snips("acme", 60))
    with monkeypatch.context() as away:
        away.setenv("LORAFLEET_LAUNCHER", "ray")
        away.setenv("LORAFLEET_RAY_ADDRESS", "127.0.0.1:1")
        done = command("nightly", "run", "fleet.yaml")
        assert (done.code, "Ray at 127.0.0.1:1" in done.sentence) == (4, True)
    assert json.loads(command("nightly", "status", "town", "--json").out)["is_finished"] is False
    assert command("nightly", "run", "fleet.yaml").code == 0
    monkeypatch.setenv("LORAFLEET_STORE", "s3://nowhere/x")
    monkeypatch.setenv("LORAFLEET_S3_ENDPOINT_URL", "http://127.0.0.1:1")
    done = command("nightly", "run", "fleet.yaml")
    assert (done.code, "127.0.0.1:1" in done.sentence) == (4, True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nightly", "run", "none.yaml"], "none.yaml"),
        (["nightly", "run", "job.yaml"], "job.yaml is a job, expected a fleet"),
        (["nightly", "run", "wrong.yaml"], "Did you mean"),
        (["nightly", "retry", "fleet.yaml", "nobody"], "no customer 'nobody'"),
        (["nightly", "why", "fleet.yaml", "nobody"], "'nobody' is no customer"),
        (["nightly", "report", "town", "--night", "2020-01-01"], "no finished night '2020-01-01'"),
        (["nightly", "status", "village"], "village has had no night yet"),
        (["nightly", "report", "A Town"], "A Town"),
        (["plan", "job.yaml"], "expected a fleet"),
    ],
)
def test_wrong_words_get_one_sentence_and_exit_code_2(town: Town, command: CommandLine, words: list[str], told: str) -> None:
    (town.folder / "wrong.yaml").write_text(town.fleet.read_text().replace("limits:", "limit:"))
    before = town.listing()
    done = command(*words)
    assert done.code == 2
    assert told in done.sentence
    assert town.listing() == before


def test_everybody_who_was_promoted_serves_by_the_registered_models_alias(town: Town, command: CommandLine) -> None:
    for tenant in CUSTOMERS:
        shown = command("adapters", "show", f"{tenant}.calls@champion", "--json").json
        assert shown["adapter_id"] == town.champion(tenant)
