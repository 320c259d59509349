"""An empty installation for each test, and one in which an adapter was really trained, for all."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.cli import _run
from tests.pipelines.command_line import CommandLine, installation
from tests.workers.tiny_bases import make_base

JOB = """\
tenant: acme
task: menus
base_model: {{name_or_path: {base}}}
data: {{train: {data}/train.jsonl, validation: {data}/valid.jsonl}}
peft: {{r: 2, lora_alpha: 4, target_modules: attention}}
training: {{learning_rate: 5.0e-3, max_steps: 4, per_device_train_batch_size: 4, eval_steps: 2, max_length: 96}}
evaluation: {{generate: 1, max_new_tokens: 4, format_pattern: '.*'}}
"""


@dataclass(frozen=True)
class Trained:
    """An installation after `lorafleet train job.yaml`."""

    folder: Path
    base: Path
    job_id: str
    adapter_id: str
    base_id: str


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[CommandLine]:
    """The command line in an empty folder."""
    with installation(tmp_path):
        yield CommandLine(tmp_path, capsys)


@pytest.fixture(scope="session")
def trained(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """An adapter on the small real base, by the command line; tests that use it change nothing of it."""
    folder, base = tmp_path_factory.mktemp("trained"), test_data / "bases" / "stories260k"
    for split, count in (("train", 16), ("valid", 4)):
        lines = (test_data / "sets" / "e2e-nlg" / f"{split}.jsonl").read_text().splitlines(keepends=True)[: 2 * count : 2]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    (folder / "job.yaml").write_text(JOB.format(base=base, data=folder))
    with installation(folder):
        assert _run(["train", "job.yaml"]) == 0
    [manifest] = folder.glob(".lorafleet/store/tenants/acme/*/manifests/*.json")
    body = json.loads(manifest.read_text())
    return Trained(folder, base, body["job_id"], body["adapter_id"], body["base_id"])


@pytest.fixture
def used(trained: Trained, capsys: pytest.CaptureFixture[str]) -> Iterator[CommandLine]:
    """The command line where an adapter was trained."""
    with installation(trained.folder):
        yield CommandLine(trained.folder, capsys)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of width 32, without a tokenizer."""
    return make_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_base`, with other weights."""
    return make_base(tmp_path_factory.mktemp("bases") / "other", seed=1)
