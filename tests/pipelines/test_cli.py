"""The command line answers with words, sentences and exit codes, whatever it is given."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipelines.adapters import base_id_of, put_adapter
from tests.pipelines.command_line import CommandLine

LORAFLEET = Path(sys.executable).with_name("lorafleet")
READING = [
    ("adapters list", "no adapters in this store yet"),
    ("adapters list --tenant acme", "no adapters of this tenant"),
    ("adapters verify --all", "0 adapters read"),
    ("jobs list", "no jobs in this store yet"),
    ("jobs list --status running", "no such jobs"),
    ("base list", "no bases in this store yet"),
    ("sweep status", "no sweeps in this store yet"),
]


@pytest.mark.parametrize(("command", "line"), READING)
def test_listing_an_empty_store_says_how_to_begin_and_makes_no_home(cli: CommandLine, command: str, line: str) -> None:
    ended = cli(*command.split())
    assert ended.code == 0
    assert line in ended.out
    assert not cli.home.exists()


@pytest.mark.parametrize("command", ["adapters list", "jobs list", "base list", "adapters verify --all"])
def test_lists_of_an_empty_store_are_empty_arrays(cli: CommandLine, command: str) -> None:
    assert cli(*command.split(), "--json").json == []


NAMES = ["../x", "Acme", "a" * 200, "", "a/b"]
BAD_NAMES = [
    *(["adapters", "list", "--tenant", name] for name in NAMES),
    *(["adapters", "list", "--task", name] for name in NAMES),
    *(["jobs", "list", "--tenant", name] for name in NAMES),
    *(["promote", "{adapter}", "--task", name] for name in NAMES),
    *(["adapters", "import", "{folder}", "--base", "{base}", "--tenant", name] for name in NAMES),
    *(["rollback", f"acme.{name}"] for name in NAMES),
    *(["history", f"{name}.support"] for name in NAMES),
]
BAD_REFERENCES = [
    (["adapters", "show", "zzzz"], "no adapter of any tenant starts with 'zzzz'"),
    (["adapters", "show", "../../etc"], "names no adapter"),
    (["adapters", "show", "acme.support@chmapion"], "Did you mean 'champion'?"),
    (["adapters", "verify", "zzzz"], "no adapter of any tenant"),
    (["adapters", "import", "nowhere", "--base", "{base}", "--tenant", "acme"], "there is no adapter folder nowhere"),
    (["adapters", "import", "{base}", "--base", "{base}", "--tenant", "acme"], "it holds a base model"),
    (["adapters", "import", "{folder}", "--base", "nowhere", "--tenant", "acme"], "there is no base folder nowhere"),
    (["evaluate", "zzzz"], "no adapter of any tenant"),
    (["evaluate", "{adapter}", "--base", "{other}"], "what differs: weights"),
    (["generate", "{adapter}", "--base", "{other}", "--prompt", "hello"], "what differs: weights"),
    (["generate", "{adapter}", "--prompt", "hello", "--data", "x.jsonl"], "give one of them"),
    (["promote", "zzzz"], "no adapter of any tenant"),
    (["promote", "{adapter}", "--base", "{other}"], "was trained on the base"),
    (["promote", "{adapter}", "--base", "nowhere"], "there is no base folder nowhere"),
    (["promote", "{adapter}", "--tenant", "globex"], "no adapter of tenant 'globex'"),
    (["promote", "{idle}"], "changes nothing"),
    (["rollback", "acme.support"], "has no champion yet"),
    (["rollback", "support"], "is not a registered model"),
    (["history", "acme.support"], "there is no registered model acme.support"),
    (["jobs", "show", "zzzz"], "no job starts with 'zzzz'"),
    (["jobs", "logs", "-1"], "No such option"),
    (["jobs", "cancel", "x"], "names no job"),
    (["jobs", "list", "--status", "runing"], "Did you mean 'running'?"),
    (["base", "show", "zzzz"], "knows no base zzzz"),
    (["base", "show", "no-such-name"], "neither a folder nor a base's id"),
    (["base", "show", "./nowhere"], "there is no base folder nowhere"),
    (["base", "add", "{folder}"], "it holds an adapter"),
    (["base", "verify", "zzzz"], "knows no base zzzz"),
    (["schema", "jobs"], "Did you mean 'job'?"),
    (["adapters", "verify"], "name the adapters to verify, or give --all"),
    (["adapters", "lst"], "No such command"),
]


@pytest.fixture
def places(cli: CommandLine, tiny_base: Path, other_base: Path) -> dict[str, str]:
    """What {names} in commands stand for; the store holds an adapter, and one that does nothing."""
    base_id = base_id_of(tiny_base)
    adapter_id = put_adapter(cli.store, base_id, 1)
    idle = put_adapter(cli.store, base_id, 2, scale=0.0)
    folder = cli.store.root / "tenants" / "acme" / base_id / "adapters" / adapter_id
    cli.home.joinpath("logs").mkdir()
    assert cli("base", "add", tiny_base).code == 0
    return {"adapter": adapter_id, "idle": idle, "base": str(tiny_base), "other": str(other_base), "folder": str(folder)}


@pytest.mark.parametrize("command", BAD_NAMES, ids=" ".join)
def test_what_is_no_name_is_refused_before_it_becomes_a_key(cli: CommandLine, places: dict[str, str], command: list[str]) -> None:
    before = cli.listing()
    ended = cli(*(word.format(**places) for word in command))
    assert ended.code == 2
    assert "is not a" in ended.sentence
    assert cli.listing() == before


@pytest.mark.parametrize(
    ("command", "said"), BAD_REFERENCES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_wrong_input_is_one_sentence_exit_code_2_and_nothing_half_done(
    cli: CommandLine, places: dict[str, str], command: list[str], said: str
) -> None:
    before = cli.listing()
    ended = cli(*(word.format(**places) for word in command))
    assert ended.code == 2
    assert said in " ".join(ended.err.split())
    assert "Traceback" not in ended.err
    assert "defect" not in ended.err
    assert cli.listing() == before


def test_damaged_object_is_told_where_it_is_read(cli: CommandLine, places: dict[str, str]) -> None:
    weights = Path(places["folder"]) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    before = cli.listing()
    for command in (["promote", places["adapter"]], ["evaluate", places["adapter"], "--data", "rows.jsonl"]):
        ended = cli(*command)
        assert ended.code == 2
        assert "adapter_model.safetensors" in ended.sentence
    assert cli.listing() == before


def test_setting_that_is_none_is_a_sentence(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_STORRE", "x")
    ended = cli("adapters", "list")
    assert ended.code == 2
    assert "Did you mean LORAFLEET_STORE?" in ended.sentence


def test_home_that_cannot_be_written_is_a_sentence(cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("LORAFLEET_HOME", str(tmp_path / "taken"))
    ended = cli("train", "job.yaml")
    assert ended.code == 2
    assert f"the home {tmp_path / 'taken'} cannot be written (Not a directory); stand in a folder" in ended.sentence


def test_store_that_does_not_answer_is_exit_code_4(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_STORE", "s3://bucket/prefix")
    monkeypatch.setenv("LORAFLEET_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    ended = cli("adapters", "list", "--json")
    assert ended.code == 4
    assert ended.sentence
    assert ended.out == ""


def test_help_and_lists_load_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pipelines.cli import _run\n"
        "assert _run(['adapters', 'list']) == 0 and _run(['jobs', 'list']) == 0 and _run(['--help']) == 0\n"
        "print([name for name in ('torch', 'transformers', 'ray', 'mlflow', 'optuna', 'boto3') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"


def test_installed_command_answers_as_json_and_by_exit_code(tmp_path: Path) -> None:
    env = {**os.environ, "LORAFLEET_HOME": str(tmp_path / "home")}
    listed = subprocess.run([LORAFLEET, "adapters", "list", "--json"], capture_output=True, text=True, env=env)
    assert (listed.returncode, json.loads(listed.stdout), listed.stderr) == (0, [], "")
    unknown = subprocess.run([LORAFLEET, "adapters", "show", "zzzz"], capture_output=True, text=True, env=env)
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: no adapter of any tenant starts with 'zzzz'")
    assert len(unknown.stderr.splitlines()) == 1
    assert not (tmp_path / "home").exists()


def test_schemas_are_those_of_the_files(cli: CommandLine) -> None:
    job = cli("schema", "job").json
    assert job["properties"]["peft"]["$ref"] == "#/$defs/PeftSpec"
    assert job["additionalProperties"] is False
    assert set(cli("schema").json) == {"job", "sweep", "gates", "fleet", "settings"}
    assert "lease_seconds" in cli("schema", "settings").json["properties"]
    assert "space" in cli("schema", "sweep").json["properties"]
    fleet = cli("schema", "fleet").json
    assert "discover" in fleet["$defs"]["DiscoverSpec"]["properties"]
    assert "default" not in fleet["$defs"]["ListedSpec"]["properties"]["priority"]  # what an entry leaves out, the defaults say
