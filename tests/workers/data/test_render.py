"""What is trained on is exactly the answers, and what is generated from is what was trained behind."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from infra.errors import BadInput
from tests.workers.data.test_template import CHATML, FORGETS, conversation
from workers.data.render import Example, Renderer
from workers.data.rows import Row
from workers.data.splits import load_splits
from workers.spec import DataSpec

TALK_WITH_MARKS = (  # talk-5m's own template, with the marks that transformers needs to find the answers
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}<|end|>"
    "{% else %}<|assistant|>{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
words = st.text("ab Z.\né漢😀", min_size=1, max_size=12).filter(str.strip)


def pair(prompt: str, completion: str, where: str = "x.jsonl:1") -> Row:
    return Row({"prompt": prompt, "completion": completion}, where)


def trained_text(renderer: Renderer, example: Example) -> str:
    return "".join(text for text, supervised in renderer.segments(example) if supervised)


def test_masks_of_real_dialogues_are_those_of_transformers(talk: PreTrainedTokenizerBase, test_data: Path) -> None:
    rows = load_splits(DataSpec(train="sgd/customers/events-1"), test_data / "sets").train[:40]
    examples = Renderer(talk, 4096).render_all(rows)
    expected: Any = talk.apply_chat_template(
        [row.body["messages"] for row in rows],
        chat_template=TALK_WITH_MARKS,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    assert [example.input_ids for example in examples] == expected["input_ids"]
    assert [list(map(int, example.supervised)) for example in examples] == expected["assistant_masks"]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(words, min_size=2, max_size=5))
def test_the_mask_covers_exactly_the_answers(
    talk: PreTrainedTokenizerBase, stories: PreTrainedTokenizerBase, contents: list[str]
) -> None:
    row = conversation(*contents)
    answers = contents[1::2]
    chat, plain = _renderer_of(talk), _renderer_of(stories)
    assert trained_text(chat, chat.render(row)) == "".join(f"{answer}<|end|>" for answer in answers)
    assert trained_text(plain, plain.render(row)) == "".join(f" {answer}</s>" for answer in answers)


_renderers: dict[int, Renderer] = {}


def _renderer_of(tokenizer: PreTrainedTokenizerBase) -> Renderer:
    return _renderers.setdefault(id(tokenizer), Renderer(tokenizer, 4096))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text("ab Z.\né", max_size=12), completion=words)
def test_the_prompt_of_a_row_is_a_prefix_of_what_it_trained_on(
    talk: PreTrainedTokenizerBase, stories: PreTrainedTokenizerBase, prompt: str, completion: str
) -> None:
    for row in (pair(prompt, completion), conversation(prompt, completion)):
        for renderer in (_renderer_of(talk), _renderer_of(stories)):
            example, ids = renderer.render(row), renderer.prompt_ids(row)
            assert example.input_ids[: len(ids)] == ids
            assert example.supervised.index(True) == len(ids)
            assert renderer.answer_text(example.input_ids[len(ids) :]) == renderer.reference(row).strip()


def test_the_plain_form_is_spelled_out(talk: PreTrainedTokenizerBase, stories: PreTrainedTokenizerBase) -> None:
    for tokenizer in (talk, stories):
        renderer = Renderer(tokenizer, 64)
        ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Say:\n", "Say: ", "yes")}
        for written, joined in (("Say:", "Say:\n"), ("Say: ", "Say: ")):
            example = renderer.render(pair(written, "yes"))
            head = [tokenizer.bos_token_id, *ids[joined]]
            assert example.input_ids == [*head, *ids["yes"], tokenizer.eos_token_id]
            assert example.supervised == [False] * len(head) + [True] * (len(ids["yes"]) + 1)
        text = renderer.render(Row({"text": "yes"}, "x:1"))
        assert text.input_ids == [tokenizer.bos_token_id, *ids["yes"], tokenizer.eos_token_id]
        assert text.supervised == [False] + [True] * (len(ids["yes"]) + 1)


def test_an_eos_that_doubles_as_padding_stays_in_the_loss(test_data: Path) -> None:
    from workers.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(test_data / "bases" / "stories260k")
    tokenizer.pad_token = tokenizer.eos_token
    example = Renderer(tokenizer, 64).render(pair("a", "b"))
    assert example.input_ids[-1] == tokenizer.pad_token_id
    assert example.supervised[-1]


def test_rows_are_cut_at_the_shorter_of_length_and_context(talk: PreTrainedTokenizerBase) -> None:
    row = pair("a", "b " * 100)
    for renderer in (Renderer(talk, 16), Renderer(talk, 1024, context_length=16)):
        example = renderer.render(row)
        assert len(example.input_ids) == len(example.supervised) == 16
        assert example.was_cut
    assert not Renderer(talk, 1024).render(row).was_cut


def test_rows_whose_answer_is_cut_away_are_refused(talk: PreTrainedTokenizerBase) -> None:
    rows = [pair("a", "b"), pair("long " * 50, "b", "x.jsonl:2"), conversation("a", "b")]
    with pytest.raises(BadInput) as caught:
        Renderer(talk, 32).render_all([*rows[:2], pair("long " * 60, "b", "x.jsonl:3")])
    assert str(caught.value).startswith(
        "2 of 3 rows have no supervised token within max_length 32 (first: x.jsonl:2); raise training.max_length"
    )


def test_white_space_behind_the_end_of_a_turn_is_not_trained_on(talk: PreTrainedTokenizerBase) -> None:
    template = CHATML.replace("<|im_start|>", "<|user|>").replace("<|im_end|>", "<|end|>")
    renderer = Renderer(talk, 512, template)
    assert trained_text(renderer, renderer.render(conversation("Hi", "Yes", "And?", "No"))) == "Yes<|end|>No<|end|>"


def test_messages_of_weight_zero_are_context_only(talk: PreTrainedTokenizerBase) -> None:
    row = conversation("Hi", "Yes", "And?", "No")
    row.body["messages"][1]["weight"] = 0
    renderer = Renderer(talk, 512)
    assert trained_text(renderer, renderer.render(row)) == "No<|end|>"


def test_generated_answers_end_at_the_turn_and_lose_what_the_template_adds(talk: PreTrainedTokenizerBase) -> None:
    assert Renderer(talk, 512).stop_ids == {talk.eos_token_id, talk.convert_tokens_to_ids("<|end|>")}
    thinking = Renderer(talk, 512, FORGETS.replace("|{% endfor %}", "<|end|>{% endfor %}"))
    row = conversation("Hi", "Yes")
    turn = thinking.render(row).input_ids[len(thinking.prompt_ids(row)) :]
    assert talk.decode(turn) == "<think></think>Yes<|end|>"
    assert thinking.answer_text([*turn, 50, 51]) == "Yes" == thinking.reference(row)


def test_a_base_without_template_ends_turns_with_its_eos(stories: PreTrainedTokenizerBase) -> None:
    assert Renderer(stories, 512).stop_ids == {stories.eos_token_id}


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference training .DPO. is not there"),
        ({"text": "a", "label": "b"}, "write the text as 'prompt' and the label as 'completion'"),
    ],
)
def test_kinds_that_a_causal_lm_does_not_train_on_are_refused(
    talk: PreTrainedTokenizerBase, body: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadInput, match=sentence):
        Renderer(talk, 64).render(Row(body, "x:1"))


def test_plain_text_has_nothing_to_generate_from(talk: PreTrainedTokenizerBase) -> None:
    with pytest.raises(BadInput, match="set evaluation.generate: 0"):
        Renderer(talk, 64).prompt_ids(Row({"text": "a"}, "x:1"))


def test_target_bytes_count_the_answers_alone(talk: PreTrainedTokenizerBase) -> None:
    renderer = Renderer(talk, 512)
    examples = renderer.render_all([conversation("Hi", "Yes", "And?", "é漢")])
    assert renderer.target_bytes(examples) == len("Yesé漢".encode())


REAL_SETS = {
    "snips/customers/get-weather": "messages",
    "sgd/customers/events-1": "messages",
    "e2e-nlg": "prompt_completion",
    "seed-tasks-alpaca": "prompt_completion",
    "tinyshakespeare": "text",
    "banking77": "classification",
    "clinc150/customers/travel": "classification",
}


@pytest.mark.parametrize("name", REAL_SETS)
def test_real_sets_are_detected_and_rendered(
    talk: PreTrainedTokenizerBase, stories: PreTrainedTokenizerBase, test_data: Path, name: str
) -> None:
    splits = load_splits(DataSpec(train=name), test_data / "sets")
    assert splits.validation
    assert splits.test
    assert {row.kind for row in splits.train} == {REAL_SETS[name]}
    if REAL_SETS[name] != "classification":
        for tokenizer in (talk, stories):
            examples = Renderer(tokenizer, 4096).render_all(splits.validation)
            assert [example.where for example in examples] == [row.where for row in splits.validation]


def test_every_customer_has_one_format(test_data: Path) -> None:
    kinds = set()
    for folder in sorted((test_data / "sets").glob("*/customers/*")):
        splits = load_splits(DataSpec(train=str(folder)), folder)
        kinds |= {row.kind for row in [*splits.train, *(splits.validation or []), *(splits.test or [])]}
    assert kinds == {"messages", "classification"}


KINDS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": "Yes"}]} for n in range(4)
    ],
    "prompt_completion": [{"prompt": f"Hi {n}", "completion": "Yes"} for n in range(4)],
    "text": [{"text": f"Hi {n}"} for n in range(4)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_row_by_row_the_same_is_rendered_and_what_is_wrong_stands_in_its_place(talk: PreTrainedTokenizerBase, kind: str) -> None:
    rows = [Row(body, f"x:{number}") for number, body in enumerate(KINDS[kind])]
    renderer = Renderer(talk, 24)
    assert list(renderer.render_each(rows)) == renderer.render_all(rows)
    if kind != "text":
        key = next(iter(KINDS[kind][0]))
        long = KINDS[kind][0] | (
            {"prompt": "so " * 50}
            if key == "prompt"
            else {"messages": [{"role": "user", "content": "so " * 50}, rows[0].body["messages"][1]]}
        )
        found = list(renderer.render_each([rows[0], Row(long, "x:9"), rows[1]]))
        assert [found[0], found[2]] == renderer.render_all(rows[:2])
        assert str(found[1]).startswith("has no supervised token within max_length 24")


def test_row_by_row_labels_that_are_not_learned_are_named(talk: PreTrainedTokenizerBase) -> None:
    rows = [Row({"text": "Hi", "label": label}, f"x:{label}") for label in ("a", "b", "c")]
    found = list(Renderer(talk, 24, labels=("a", "b")).render_each(rows))
    assert found[:2] == Renderer(talk, 24, labels=("a", "b")).render_all(rows[:2])
    assert str(found[2]).startswith("has the label 'c', which is none of the 2 labels")


def test_renderers_of_jobs_share_one_child_and_keep_their_own_lengths(talk: PreTrainedTokenizerBase) -> None:
    row = Row(KINDS["messages"][0], "x:1")
    whole = Renderer(talk, 100, context_length=50)
    one, other = whole.for_job(7), whole.for_job(1000)
    assert (one.max_length, other.max_length, whole.max_length) == (7, 50, 50)
    assert other.render(row) == whole.render(row)
    assert len(one.render_unchecked([row])[0].input_ids) == 7
    assert one._template is other._template is whole._template
