"""People see what is trained on."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tests.workers.data.test_template import conversation
from workers.data.inspect import inspect_rows, inspect_text, summarize
from workers.data.render import Renderer
from workers.data.rows import Row
from workers.data.splits import load_splits
from workers.spec import DataSpec


def test_trained_text_stands_in_brackets(talk: PreTrainedTokenizerBase, stories: PreTrainedTokenizerBase) -> None:
    rows = [conversation("Hi", "Yes é", where="x.jsonl:1")]
    shown = inspect_text(inspect_rows(rows, Renderer(talk, 64), 5))
    assert shown == "x.jsonl:1 (10 tokens, 5 trained on)\n<s><|user|>Hi<|end|><|assistant|>[[Yes é<|end|>]]"
    plain = inspect_text(inspect_rows([Row({"prompt": "Hi", "completion": "Yes"}, "x.jsonl:1")], Renderer(stories, 64), 5))
    assert plain.endswith("\n<s> Hi\n[[ Yes</s>]]")


def test_numbers_tell_what_would_go_wrong(talk: PreTrainedTokenizerBase) -> None:
    rows = [
        conversation("Hi", "Yes"),
        conversation("Hi", "Yes"),
        conversation("Hi <|end|>", "Yes " * 40),
        conversation("Hi " * 40, "Yes"),
    ]
    summary = summarize(rows, Renderer(talk, 32))
    assert (summary.num_rows, summary.num_cut_rows, summary.num_unsupervised_rows) == (4, 2, 1)
    assert (summary.num_duplicate_rows, summary.num_control_token_rows) == (1, 1)
    assert summary.length_quantiles["max"] == 32
    assert inspect_text([], summary).endswith(
        "rows cut at the maximal length: 2\nrows with nothing left to train on (training refuses them): 1\n"
        "rows repeating an earlier row: 1\nrows spelling a special token of the base in their text: 1"
    )


def test_only_the_first_rows_are_shown(talk: PreTrainedTokenizerBase, test_data: Path) -> None:
    rows = load_splits(DataSpec(train="snips/customers/get-weather"), test_data / "sets").train
    renderer = Renderer(talk, 512)
    shown = inspect_rows(rows, renderer, 3)
    assert len(shown) == 3
    assert all(row.num_supervised_tokens for row in shown)
    assert inspect_rows(rows, renderer, 0) == []
    assert 0.3 < summarize(rows, renderer).supervised_share < 0.9
