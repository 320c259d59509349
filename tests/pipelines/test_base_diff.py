"""`lorafleet base diff`: which adapters survive a base upgrade, which need evaluation, which training, each with its reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.command_line import CommandLine
from tests.workers.tiny_adapters import train_with_peft
from tests.workers.tiny_bases import copy_with_config, make_base, write_tokenizer

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return spoken(make_base(tmp_path / "base"))


@pytest.fixture
def adapter_id(cli: CommandLine, base: Path, tmp_path: Path) -> str:
    """An adapter of q_proj and down_proj."""
    train_with_peft(tmp_path / "theirs")
    command = ("adapters", "import", tmp_path / "theirs", "--base", base, "--tenant", "acme", "--task", "support", "--json")
    return str(cli(*command).json["adapter_id"])


def spoken(folder: Path) -> Path:
    write_tokenizer(folder, "llama")
    return folder


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def copied(base: Path, name: str) -> Path:
    return Path(shutil.copytree(base, base.with_name(name)))


def same(base: Path) -> Path:
    return copied(base, "same")


def other_weights(base: Path) -> Path:
    return spoken(make_base(base.with_name("weights"), seed=1))


def deeper(base: Path) -> Path:
    return spoken(make_base(base.with_name("deeper"), num_hidden_layers=3))


def shallower(base: Path) -> Path:
    return spoken(make_base(base.with_name("shallower"), num_hidden_layers=1))


def wider(base: Path) -> Path:
    return spoken(make_base(base.with_name("wider"), intermediate_size=64))


def other_family(base: Path) -> Path:
    return spoken(make_base(base.with_name("gpt2"), "gpt2"))


def other_rope(base: Path) -> Path:
    return copy_with_config(base, base.with_name("rope"), lambda raw: raw["rope_parameters"].update(rope_theta=20000.0))


def other_quantisation(base: Path) -> Path:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return copy_with_config(base, base.with_name("quantised"), lambda raw: raw.update(quantization_config=settings))


def other_template(base: Path) -> Path:
    folder = copied(base, "template")
    edit_json(folder / "tokenizer_config.json", lambda raw: raw.update(chat_template=TEMPLATE))
    return folder


def swapped_words(base: Path) -> Path:
    folder = copied(base, "swapped")

    def swap(raw: dict[str, Any]) -> None:
        words = raw["model"]["vocab"]
        words["hello"], words["good"] = words["good"], words["hello"]

    edit_json(folder / "tokenizer.json", swap)
    return folder


def more_words(base: Path) -> Path:
    folder = copied(base, "more")
    edit_json(folder / "tokenizer.json", lambda raw: raw["model"]["vocab"].update(evening=len(raw["model"]["vocab"])))
    return folder


def larger_vocabulary(base: Path) -> Path:
    return spoken(make_base(base.with_name("larger"), vocab_size=96))


CASES: list[tuple[Callable[[Path], Path], str, str, set[str]]] = [
    (same, "survives", "the same base", set()),
    (other_weights, "evaluate", "the same shapes with other weights", {"weights"}),
    (other_rope, "evaluate", "the base computes otherwise: rope.rope_theta", {"architecture"}),
    (other_quantisation, "evaluate", "quantization_config", {"quantisation"}),
    (other_template, "evaluate", "another template", {"template"}),
    (more_words, "evaluate", "another tokenizer", {"tokenizer"}),
    (larger_vocabulary, "evaluate", "other weights", {"weights", "architecture"}),
    (swapped_words, "retrain", "tokens have other numbers", {"tokenizer"}),
    (deeper, "retrain", "num_hidden_layers is 3 instead of 2", {"weights", "architecture"}),
    (shallower, "retrain", "2 of its 4 layers are not there", {"weights", "architecture"}),
    (wider, "retrain", "2 of its 4 layers have another shape (model.layers.0.mlp.down_proj", {"weights", "architecture"}),
    (other_family, "retrain", "model_type is gpt2 instead of llama", {"weights", "architecture"}),
]


@pytest.mark.parametrize(("change", "verdict", "reason", "differences"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_each_kind_of_upgrade_gets_its_verdict(
    cli: CommandLine,
    base: Path,
    adapter_id: str,
    change: Callable[[Path], Path],
    verdict: str,
    reason: str,
    differences: set[str],
) -> None:
    found = cli("base", "diff", base, change(base), "--json").json
    assert {one["what"] for one in found["differences"]} == differences
    assert found["identical"] == (not differences)
    [judged] = found["adapters"]
    assert (judged["adapter_id"], judged["tenant"], judged["task"]) == (adapter_id, "acme", "support")
    assert (judged["verdict"], found["counts"][verdict]) == (verdict, 1)
    assert any(reason in one for one in judged["reasons"]), judged["reasons"]


def test_other_module_that_is_not_adapted_is_no_reason_to_train_again(cli: CommandLine, tmp_path: Path) -> None:
    base, wide = spoken(make_base(tmp_path / "base")), spoken(make_base(tmp_path / "wide", intermediate_size=64))
    train_with_peft(tmp_path / "attention", target_modules=["q_proj"])
    cli("adapters", "import", tmp_path / "attention", "--base", base, "--tenant", "acme")
    [judged] = cli("base", "diff", base, wide, "--json").json["adapters"]
    assert judged["verdict"] == "evaluate"


def test_bases_may_be_named_by_id_and_adapters_picked_by_tenant(cli: CommandLine, base: Path, adapter_id: str) -> None:
    after = other_weights(base)
    a = cli("base", "show", base, "--json").json["base_id"]
    b = cli("base", "add", after, "--upload", "--json").json["base_id"]
    by_folder = cli("base", "diff", base, after, "--json").json
    by_id = cli("base", "diff", a[:8], b, "--json").json
    assert (by_id["a"], by_id["b"]) == (a, b)
    assert [one["verdict"] for one in by_id["adapters"]] == [one["verdict"] for one in by_folder["adapters"]] == ["evaluate"]
    assert {"what": "unknown"}.items() <= by_id["differences"][-1].items(), "the first is known by its record alone"
    assert cli("base", "diff", base, after, "--tenant", "globex", "--json").json["adapters"] == []
    text = cli("base", "diff", base, after).out
    assert "adapters that load, and need evaluation on the new base: 1" in text
    assert adapter_id in text


def test_what_is_no_base_is_one_sentence(cli: CommandLine, base: Path, adapter_id: str) -> None:
    for wrong in ("./nothing", "zzzzzzzz", "!"):
        ended = cli("base", "diff", base, wrong)
        assert ended.code == 2
        assert ended.sentence
