"""Classifiers that PEFT trained elsewhere are taken in with their head and labels; data inspect shows labels."""

import json

import pytest

from tests.pipelines.command_line import CommandLine
from tests.workers.tiny_adapters import classify_with_peft
from tests.workers.tiny_bases import make_encoder_base

JOB = """\
tenant: acme
task: intents
base_model: {name_or_path: base}
task_type: SEQ_CLS
data: {train: rows.jsonl}
peft: {r: 2}
"""


@pytest.fixture
def classified(cli: CommandLine) -> CommandLine:
    """A tiny encoder in `base` and a PEFT classifier for it in `theirs`."""
    make_encoder_base(cli.folder / "base")
    classify_with_peft(cli.folder / "theirs", "bert")
    return cli


def test_a_foreign_classifier_is_imported_with_its_head_and_labels(classified: CommandLine) -> None:
    cli = classified
    names = {"0": "no", "1": "yes", "2": "perhaps"}
    (cli.folder / "theirs" / "config.json").write_text(json.dumps({"id2label": names}))
    imported = cli("adapters", "import", "theirs", "--base", "base", "--tenant", "acme", "--json").json
    shown = cli("adapters", "show", imported["adapter_id"], "--json").json
    assert (shown["task_type"], shown["labels"]) == ("SEQ_CLS", ["no", "yes", "perhaps"])
    assert cli("adapters", "verify", "--all").code == 0


def test_a_classifier_of_another_family_is_refused(classified: CommandLine) -> None:
    make_encoder_base(classified.folder / "roberta", "roberta")
    ended = classified("adapters", "import", "theirs", "--base", "roberta", "--tenant", "acme")
    assert (ended.code, "the adapter's head holds classifier.bias 3" in ended.sentence) == (2, True)
    assert classified.listing() == {}


def test_data_inspect_shows_texts_with_their_labels(classified: CommandLine) -> None:
    rows = [{"text": "pay my bill", "label": "pay"}, {"text": "bye", "label": "farewell"}]
    (classified.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (classified.folder / "job.yaml").write_text(JOB)
    out = classified("data", "inspect", "job.yaml").out
    assert "rows.jsonl:1 (5 tokens, label pay)\n[CLS] pay my bill [SEP]" in out
    assert "2 rows, 8 tokens, 2 labels" in out
    inspected = classified("data", "inspect", "job.yaml", "--json").json
    assert [row["label"] for row in inspected["rows"]] == ["pay", "farewell"]
