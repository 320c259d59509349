"""A tenant that is forgotten: nothing of it is left in store, home and MLflow, and nothing is made for it any more."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from infra.claims import Owner, claim
from pipelines.cli import _run
from pipelines.nightly.ledger import CLAIM_FORMAT, FleetLedger
from tests.end_to_end.mlflow_view import runs_in
from tests.pipelines.command_line import CommandLine
from tests.pipelines.nightly.running import Town
from workers import layout
from workers.job_state import FRESH, STATE_FORMAT

REPOSITORY = Path(__file__).parents[3]
SWEEP = """\
name: first
job:
  tenant: acme
  task: calls
  base_model: {{name_or_path: {base}}}
  data: {{train: data/acme, validation_split: 0.2}}
  peft: {{r: 2}}
  training: {{max_steps: 2, per_device_train_batch_size: 4, max_length: 96}}
num_trials: 2
space: {{training.learning_rate: {{type: float, low: 1.0e-3, high: 1.0e-2}}}}
register: {{alias: challenger}}
"""
POINTS = ("tenant-page-retold", "tenant-object-deleted:7", "tenant-mlflow-retold")


@pytest.fixture(scope="module")
def swept(first_night: Town, test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Town:
    """A town in which a sweep was run for one customer, too."""
    town = first_night.copy(tmp_path_factory.mktemp("swept"))
    (town.folder / "sweep.yaml").write_text(SWEEP.format(base=test_data / "bases" / "stories260k"))
    with town.standing():
        assert _run(["sweep", "run", "sweep.yaml"]) == 0
    return town


@pytest.fixture
def town(swept: Town, tmp_path: Path) -> Town:
    return swept.copy(tmp_path / "town")


@pytest.fixture
def cli(town: Town, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(town.folder, capsys)


def traces(town: Town, name: str) -> list[str]:
    """Return every file of the home that names a tenant, in its path or its bytes, but for log files."""
    home = town.folder / ".lorafleet"
    files = [path for path in home.rglob("*") if path.is_file() and path.parent.name != "logs"]
    files = [path for path in files if path.name != "acme.json~"]  # the store's digest of the tombstone
    told = [path.relative_to(home) for path in files]
    return sorted(
        str(path) for path, file in zip(told, files, strict=True) if name in str(path) or name.encode() in file.read_bytes()
    )


def of_others(town: Town) -> dict[str, str]:
    """Key -> etag of what the store keeps of the other tenants, and of bases."""
    return {key: etag for key, etag in town.listing().items() if key.startswith(("tenants/globex", "tenants/initech", "bases/"))}


def runs_of(town: Town) -> set[str]:
    """Return the keys of all runs in MLflow."""
    return {run.tags["lorafleet.key"] for run in runs_in(f"sqlite:///{town.folder}/.lorafleet/mlflow.db")}


def test_nothing_is_left_of_a_forgotten_tenant_and_the_others_are_as_they_were(town: Town, cli: CommandLine) -> None:
    assert {"reports/acme-first.html", "tracking/sweep-acme-first.jsonl"} <= set(traces(town, "acme"))
    others, listing, runs = of_others(town), town.listing(), runs_of(town)
    report = FleetLedger(town.store, "town").report(town.nights()[0])
    with town.standing():
        seen = cli("tenant", "forget", "acme", "--json")
        assert town.listing() == listing
        assert (seen.code, seen.json["removed"]) == (0, False)
        assert {key for key in listing if key.startswith("tenants/acme/")} <= set(seen.json["keys"])
        assert seen.json["counts"]["registered models in MLflow"] == 1

        ended = cli("tenant", "forget", "acme", "--yes")
        assert (ended.code, "acme is forgotten" in ended.out) == (0, True), ended.err
        assert traces(town, "acme") == ["store/forgotten/acme.json"]
        assert of_others(town) == others
        assert runs_of(town) == {key for key in runs if "acme" not in key}
        after = FleetLedger(town.store, "town").report(town.nights()[0])
        assert after["customers"] == [one for one in report["customers"] if one["tenant"] != "acme"]
        assert (after["counts"]["promoted"], after["started"], after["ended"]) == (2, report["started"], report["ended"])
        page = town.folder / ".lorafleet" / "nights" / "town" / f"{town.nights()[0]}.html"
        assert page.read_bytes() == FleetLedger(town.store, "town").page(town.nights()[0])
        assert "globex.calls" in page.read_text()

        assert cli("tenant", "forget", "acme").out == "nothing is left of acme, which was forgotten\n"
        assert cli("nightly", "report", "town").code == 0
        assert cli("reconcile").code == 0
        town.send("globex", [])
        assert town.night().ends == {
            "acme": ("skipped", "forgotten"),
            "globex": ("held", "collapsed"),
            "initech": ("skipped", "unchanged"),
        }
        assert not list(town.store.list("tenants/acme/"))


def test_nothing_is_made_for_a_forgotten_tenant_until_that_is_undone(town: Town, cli: CommandLine, test_data: Path) -> None:
    base = test_data / "bases" / "stories260k"
    adapter = town.folder / "adapter"
    shutil.copytree(town.folder / ".lorafleet" / "store" / _files_of_champion(town, "acme"), adapter)
    job = SWEEP.format(base=base).partition("job:\n")[2].partition("num_trials")[0]
    (town.folder / "job.yaml").write_text("\n".join(line[2:] for line in job.splitlines()))
    with town.standing():
        assert cli("tenant", "forget", "acme", "--yes").code == 0
        for command in (
            ["train", "job.yaml"],
            ["sweep", "run", "sweep.yaml"],
            ["adapters", "import", adapter, "--base", base, "--tenant", "acme"],
        ):
            refused = cli(*command)
            assert refused.code == 2
            assert refused.sentence.startswith("error: the tenant 'acme' was forgotten on 20")
            assert refused.sentence.endswith("lorafleet tenant forget acme --undo")
        assert not list(town.store.list("tenants/acme/"))
        assert cli("tenant", "forget", "acme", "--undo").code == 0
        assert cli("train", "job.yaml").code == 0
        assert "not forgotten" in cli("tenant", "forget", "acme", "--undo").sentence
        assert "did you mean 'globex'?" in cli("tenant", "forget", "globx", "--yes").sentence


def _files_of_champion(town: Town, tenant: str) -> str:
    head = town.journal(tenant)[-1]
    return layout.adapter(tenant, head.base_id, head.adapter_id)


@pytest.mark.faults
def test_forgetting_that_is_killed_anywhere_is_ended_by_the_same_command(town: Town, tmp_path: Path) -> None:
    (tmp_path / "spent").mkdir()
    armed = {"LORAFLEET_CRASHPOINT": ",".join(POINTS), "LORAFLEET_CRASHPOINT_SPENT": str(tmp_path / "spent")}
    home = {"LORAFLEET_HOME": str(town.folder / ".lorafleet"), "PYTHONPATH": str(REPOSITORY), "LORAFLEET_LEASE_SECONDS": "3"}
    command = [sys.executable, "-m", "pipelines.cli", "tenant", "forget", "acme", "--yes"]
    others, codes = of_others(town), []
    while not codes or codes[-1] == -9:
        ended = subprocess.run(command, cwd=town.folder, env=os.environ | armed | home, capture_output=True, text=True)
        codes.append(ended.returncode)
        if codes[-1] == -9:
            assert town.store.head(layout.forgotten("acme")) is not None
    assert codes == [-9] * len(POINTS) + [0], ended.stderr
    assert traces(town, "acme") == ["store/forgotten/acme.json"]
    assert of_others(town) == others


@pytest.mark.parametrize("whose", ["job", "fleet"])
def test_a_tenant_for_whom_somebody_works_is_not_forgotten(town: Town, cli: CommandLine, whose: str) -> None:
    state = next(key for key in town.listing() if layout.parts_of_job_state(key) is not None and key.startswith("tenants/acme/"))
    key, format, body = (state, STATE_FORMAT, FRESH) if whose == "job" else (layout.fleet_claim("town"), CLAIM_FORMAT, {})
    with town.standing():
        lease = claim(town.store, key, format, body, owner=Owner.here(), lease_seconds=3.0)
        listing = {key: etag for key, etag in town.listing().items() if not key.endswith("state.json")}
        with lease.keep_alive():
            refused = cli("tenant", "forget", "acme", "--yes")
        assert refused.code == 1
        assert ("works on its job" if whose == "job" else "a night of the fleet town is being run") in refused.sentence
        assert {key: etag for key, etag in town.listing().items() if not key.endswith("state.json")} == listing
        lease.release()
        assert cli("tenant", "forget", "acme", "--yes").code == 0


def test_mlflow_that_is_away_is_made_up_for_by_the_same_command(
    town: Town, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with town.standing():
        with monkeypatch.context() as away:
            away.setenv("LORAFLEET_TRACKING_URI", f"http://127.0.0.1:{port}")
            ended = cli("tenant", "forget", "acme", "--yes")
        assert ended.code == 4
        assert "all else is done, and the same command does the rest" in ended.err.replace("\n", " ")
        assert not list(town.store.list("tenants/acme/"))
        assert any("acme" in key for key in runs_of(town))
        assert cli("tenant", "forget", "acme", "--yes").code == 0
    assert traces(town, "acme") == ["store/forgotten/acme.json"]
