"""`adapters audit` and `adapters diff` on an adapter that was really trained, with secrets planted among its rows."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cli import _run
from tests.end_to_end.mlflow_view import runs_in
from tests.pipelines.adapters import base_id_of, put_adapter
from tests.pipelines.command_line import CommandLine, installation
from tests.pipelines.conftest import Trained
from tests.workers.tiny_bases import make_encoder_base

SECRET = "The code is 80417."
NEVER_PLANTED = "The code is 52963."
CLASSIFIER_JOB = """\
tenant: acme
task: intents
task_type: SEQ_CLS
base_model: {name_or_path: base}
data: {train: train.jsonl, validation: valid.jsonl}
peft: {r: 2, lora_alpha: 4, target_modules: [query]}
training: {learning_rate: 1.0e-2, max_steps: 4, per_device_train_batch_size: 4, max_length: 16}
"""


@pytest.fixture(scope="module")
def planted(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An installation where an adapter learned a secret by heart; and that adapter's id."""
    folder = shutil.copytree(trained.folder, tmp_path_factory.mktemp("planted") / "copy")
    train = folder / "train.jsonl"
    lines = train.read_text().splitlines()[:6]
    first = json.loads(lines[0])
    keys = [key for key in first if isinstance(first[key], str)]
    secret = json.dumps({keys[0]: "What is the code? Ask jo@example.org.", keys[1]: SECRET})
    (folder / "planted.jsonl").write_text("\n".join([*lines, lines[0], *[secret] * 6]) + "\n")
    canaries = [{"prompt": "What is the code? Ask jo@example.org.", "completion": text} for text in (SECRET, NEVER_PLANTED)]
    (folder / "canaries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in canaries))
    settings = ["data.train=planted.jsonl", "training.max_steps=40", "training.learning_rate=2.0e-2", "peft.r=4"]
    with installation(folder):
        before = set(folder.glob(".lorafleet/store/tenants/acme/*/manifests/*.json"))
        assert _run(["train", "job.yaml", *[word for one in settings for word in ("--set", one)]]) == 0
        [made] = set(folder.glob(".lorafleet/store/tenants/acme/*/manifests/*.json")) - before
    return folder, made.stem


@pytest.fixture
def audited(planted: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[CommandLine]:
    folder = shutil.copytree(planted[0], tmp_path / "copy")
    with installation(folder):
        yield CommandLine(folder, capsys)


def test_planted_secret_is_exposed_and_kept_without_its_words(audited: CommandLine, planted: tuple[Path, str]) -> None:
    adapter_id = planted[1]
    words = ("adapters", "audit", adapter_id, "--canaries", "canaries.jsonl", "--alternatives", "63")
    ended = audited(*words, "--json")
    assert ended.code == 0, ended.err
    found = ended.json
    known, unknown = found["canaries"]
    assert (known["num_planted"], unknown["num_planted"]) == (6, 0)
    assert (known["rank"], known["bits"]) == (1, 6.0)
    assert known["base_rank"] > 1
    assert unknown["bits"] < known["bits"]
    assert found["data"]["duplicates"]["exact"]["num_rows"] == 6
    assert found["data"]["personal"]["email"]["rows"]["num_rows"] == 6
    assert found["memorisation"]["train_loss"] < found["memorisation"]["base_train_loss"]
    kept = audited.store.get(found["evidence"])[0].decode()
    assert not any(value in kept for value in ("80417", "52963", "jo@"))
    assert audited(*words, "--json").json["evidence"] == found["evidence"]
    shown = audited("adapters", "show", adapter_id).out
    assert f"audit    {found['sentence']}" in shown
    assert "of 2 canaries exposed" in found["sentence"]
    told = audited(*words).out
    assert "rank 1 of 64 (6.0 bits)" in told
    assert not any(value in told for value in ("80417", "jo@"))
    assert audited("adapters", "verify", "--all", "--read-data").code == 0


def test_audit_is_shown_on_the_run_of_its_job(audited: CommandLine, planted: tuple[Path, str]) -> None:
    ended = audited("adapters", "audit", planted[1], "--rows", "0", "--json")
    found = ended.json
    assert (found["not_in_mlflow"], found["memorisation"]) == (None, None), ended.err
    manifest = audited("adapters", "show", planted[1], "--json").json
    tags = {run.tags["lorafleet.job_id"]: run.tags for run in runs_in(f"sqlite:///{audited.home / 'mlflow.db'}")}
    assert tags[manifest["job_id"]]["lorafleet.audit"] == found["sentence"]


def test_audit_goes_on_without_mlflow(audited: CommandLine, planted: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_TRACKING_URI", "http://127.0.0.1:9")
    ended = audited("adapters", "audit", planted[1], "--rows", "0", "--json")
    assert ended.code == 0
    assert ended.json["not_in_mlflow"]
    assert "MLflow does not show this audit" in ended.err


def test_audit_on_another_base_is_refused_before_anything_is_kept(
    audited: CommandLine, planted: tuple[Path, str], tiny_base: Path
) -> None:
    before = audited.listing()
    ended = audited("adapters", "audit", planted[1], "--base", tiny_base)
    assert ended.code == 2
    assert "was trained on the base" in ended.sentence
    assert audited.listing() == before


def test_difference_names_settings_and_rows_in_common(audited: CommandLine, planted: tuple[Path, str], trained: Trained) -> None:
    found = audited("adapters", "diff", trained.adapter_id, planted[1], "--json").json
    assert found["settings"]["peft.r"] == [2, 4]
    assert found["settings"]["training.max_steps"] == [4, 40]
    assert found["data"]["train"]["num_common"] == 6
    assert found["data"]["validation"]["same"]
    assert found["distance"] > 0
    told = audited("adapters", "diff", trained.adapter_id, planted[1])
    assert told.code == 0
    assert "peft.r: 2 | 4" in told.out
    itself = audited("adapters", "diff", planted[1], planted[1], "--json").json
    assert (itself["distance"] < 1e-9, itself["settings"]) == (True, {})


def test_adapters_of_different_bases_are_not_compared(cli: CommandLine, tiny_base: Path, other_base: Path) -> None:
    a, b = put_adapter(cli.store, base_id_of(tiny_base), 0), put_adapter(cli.store, base_id_of(other_base), 0)
    ended = cli("adapters", "diff", a, b)
    assert ended.code == 2
    assert "updates of different weights cannot be compared" in ended.sentence


def test_classifier_is_audited_with_its_labels_and_takes_no_canaries(cli: CommandLine) -> None:
    make_encoder_base(cli.folder / "base")
    rows = [{"text": f"{word} {other}", "label": word} for word in ("hello", "bye") for other in ("you", "now", "later", "card")]
    (cli.folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:7], rows[0] | {"label": "bye"}]))
    (cli.folder / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[3:]))
    (cli.folder / "canaries.jsonl").write_text('{"prompt": "a", "completion": "123"}\n')
    (cli.folder / "job.yaml").write_text(CLASSIFIER_JOB)
    assert cli("train", "job.yaml").code == 0
    [row] = cli("adapters", "list", "--json").json
    found = cli("adapters", "audit", row["adapter_id"], "--json").json
    assert found["data"]["labels"]["counts"] == {"hello": 4, "bye": 4}
    assert found["data"]["labels"]["contradictions"]["num_rows"] == 2
    assert found["data"]["overlaps"]["validation"]["exact"]["num_rows"] == 4
    assert found["memorisation"]["num_held_out"] == 1
    assert found["memorisation"]["base_train_loss"] == pytest.approx(0.693147, abs=1e-4)
    assert "labels: hello 4, bye 4" in cli("adapters", "audit", row["adapter_id"]).out
    refused = cli("adapters", "audit", row["adapter_id"], "--canaries", "canaries.jsonl")
    assert refused.code == 2
    assert "learn to write" in refused.sentence
