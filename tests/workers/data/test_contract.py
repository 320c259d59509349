"""The prompt contract follows what becomes of text, and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from infra.errors import BadInput
from infra.fingerprint import is_id
from workers.data.contract import prompt_contract, read_chat_template
from workers.data.tokenizer import load_tokenizer

BASES = ("talk-5m", "stories260k")


@pytest.fixture(params=BASES)
def folder(request: pytest.FixtureRequest, test_data: Path, tmp_path: Path) -> Path:
    """A copy of a base's tokenizer files."""
    for file in (test_data / "bases" / request.param).glob("*.json"):
        shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_saving_a_tokenizer_again_keeps_the_contract(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    saved = tmp_path_factory.mktemp("saved")
    load_tokenizer(folder).save_pretrained(saved)
    assert is_id(prompt_contract(folder))
    assert prompt_contract(saved) == prompt_contract(folder)
    assert read_chat_template(saved) == read_chat_template(folder)


def test_padding_and_truncation_are_no_part_of_it(folder: Path) -> None:
    before = prompt_contract(folder)
    edit(folder / "tokenizer.json", lambda value: value.update(truncation={"max_length": 8}, padding={"pad_id": 0}))
    edit(folder / "tokenizer_config.json", lambda value: value.update(pad_token="</s>", model_max_length=9))
    assert prompt_contract(folder) == before


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer.json", lambda value: value["model"]["vocab"].update({"a new token": 99999})),
        ("tokenizer.json", lambda value: value["model"]["merges"].pop()),
        ("tokenizer.json", lambda value: value.update(normalizer={"type": "NFC"})),
        ("tokenizer_config.json", lambda value: value.update(chat_template="{{ messages }}")),
        ("tokenizer_config.json", lambda value: value.update(eos_token="<unk>")),
        ("tokenizer_config.json", lambda value: value.update(add_bos_token=False)),
    ],
)
def test_what_changes_ids_changes_the_contract(folder: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    before = prompt_contract(folder)
    edit(folder / file, change)
    assert prompt_contract(folder) != before


def test_the_template_is_read_as_transformers_reads_it(folder: Path) -> None:
    assert read_chat_template(folder) == load_tokenizer(folder).chat_template
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert read_chat_template(folder) == "{{ messages }}" == load_tokenizer(folder).chat_template
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    edit(folder / "tokenizer_config.json", lambda value: value.update(chat_template=named))
    assert read_chat_template(folder) == "a"
    edit(folder / "tokenizer_config.json", lambda value: value.update(chat_template=named[1:]))
    with pytest.raises(BadInput, match="expected one named 'default'"):
        read_chat_template(folder)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    for load in (load_tokenizer, prompt_contract):
        with pytest.raises(BadInput, match="has no tokenizer"):
            load(tmp_path)


def test_a_damaged_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:1000])
    with pytest.raises(BadInput, match="is not valid JSON"):
        prompt_contract(folder)
    with pytest.raises(BadInput, match="cannot be loaded"):
        load_tokenizer(folder)


def test_code_that_came_with_a_base_is_not_run(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    edit(folder / "tokenizer_config.json", lambda value: value.update(auto_map={"AutoTokenizer": [None, "evil.Evil"]}))
    try:
        tokenizer: PreTrainedTokenizerBase | None = load_tokenizer(folder)
    except BadInput:
        tokenizer = None
    assert not (folder / "ran").exists()
    assert tokenizer is None or tokenizer.is_fast
