"""Rows to token ids, with a mask of what is trained on.

Conversations are rendered to text by the chat template and tokenised as a whole, so the ids are those a serving engine makes;
a token is a target if it holds a character of a trained turn, found by comparing rendered prefixes. The loss covers the
end-of-turn token, but no white space that the template puts behind it.

Plain rows have the form `plain-v1`: [BOS] prompt completion EOS. A prompt that does not end in white space gets a line end,
which depends on the prompt alone, so whoever generates can do the same. Prompt and completion are tokenised apart:
tokenised together, the last token of the prompt could swallow the first letters of the answer, and the model would be asked at
generation to continue from ids it was never trained behind. BOS stands there if the tokenizer itself puts it there.
Plain `text` is [BOS] text EOS, all of it trained on.

Rows that are classified are a text in the tokenizer's own frame, with the number of their label; see `classification`.

Rows are never padded, so an EOS that doubles as padding keeps its place in the loss.
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from infra.errors import BadInput
from workers.data.classification import fit_in_frame, frame_of, label_numbers, refuse_unlabelled
from workers.data.contract import default_template_of
from workers.data.formats import is_trained
from workers.data.rows import Row, refuse_untrainable
from workers.data.template import ChatTemplate, DefaultTemplate, ForeignTemplate, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_AT_A_TIME = 32
_SAMPLE = Row({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}, "a sample row")


@dataclass(frozen=True)
class Example:
    """One row as token ids."""

    input_ids: list[int]
    supervised: list[bool]
    """True where this token is a target: predicted from those before it, and part of the loss. Never at position 0."""
    where: str
    """File and line, for people."""
    was_cut: bool = False
    """Whether tokens beyond the maximal length were left out."""
    label: int | None = None
    """Place of the row's label among the job's labels; None unless rows are classified (then no token is supervised)."""

    @property
    def num_supervised(self) -> int:
        return sum(self.supervised)


class Renderer:
    """Renders rows for one base. Keeps a child process while conversations are rendered by the base's own template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        template: str | None = None,
        context_length: int | None = None,
        labels: Sequence[str] = (),
    ) -> None:
        """Rows are cut on the right at `max_length` tokens, or at the base's `context_length` if that is less.

        `template` is the text of a chat template; None takes the tokenizer's own, and our default one if it has none. With
        `labels`, those of a classifier in their order, rows are text to classify; without, text to learn to write.
        """
        self.tokenizer = tokenizer
        self.max_length = min(max_length, context_length or max_length)
        self._context_length = context_length
        self._template_text = template or default_template_of(tokenizer.chat_template, "the base's tokenizer")
        self._made_template: list[ChatTemplate] = []  # one at most, made when conversations come; shared by `for_job`
        self._leading, self._trailing = frame_of(tokenizer)
        self.labels = tuple(labels)

    def render(self, row: Row) -> Example:
        """Render one row. Raises BadInput as `render_all` does."""
        return self.render_all([row])[0]

    def render_all(self, rows: Sequence[Row]) -> list[Example]:
        """Render rows of one kind, in order.

        Raises BadInput if such a job cannot be trained on this kind, if the chat template refuses a row or does not nest, if
        rows have no target left after the cut (the first of them is named, with how many there are), or a label is unknown.
        """
        examples = self.render_unchecked(rows)
        empty = [example for example in examples if example.label is None and not example.num_supervised]
        if empty:
            raise BadInput(
                f"{len(empty)} of {len(examples)} rows have no supervised token within max_length {self.max_length} "
                f"(first: {empty[0].where}); raise training.max_length up to the base's context, or shorten or drop them."
            )
        return examples

    def render_unchecked(self, rows: Sequence[Row]) -> list[Example]:
        """Render as `render_all`, but let rows pass whose targets were all cut away."""
        if self.labels:
            return self._classified_examples(rows)
        refuse_untrainable(rows)
        match rows[0].kind:
            case "messages":
                return self._render_conversations(rows)
            case "prompt_completion":
                prompts = self._tokenise([_prompt_text(row) for row in rows])
                return self._plain_examples(rows, prompts, self._tokenise([row.body["completion"] for row in rows]))
            case _:
                return self._plain_examples(rows, [[]] * len(rows), self._tokenise([row.body["text"] for row in rows]))

    def render_each(self, rows: Sequence[Row]) -> Iterator[Example | str]:
        """Yield rows of one kind rendered, in order; in place of one that cannot be trained on comes what is wrong with it.

        That is the end of a sentence that begins with the row's place. Tokens of few rows are held at a time. Raises BadInput
        only for what is wrong with all of them: such a job cannot be trained on this kind, or the chat template is none.
        """
        if self.labels:
            refuse_unlabelled(rows)
            yield from map(self._classified_or_problem, rows)
            return
        refuse_untrainable(rows)
        texts = self._template.render_each(rows) if rows[0].kind == "messages" else []
        for start in range(0, len(rows), _ROWS_AT_A_TIME):
            some = slice(start, start + _ROWS_AT_A_TIME)
            yield from self._conversations_or_problems(rows[some], texts[some]) if texts else self._plain_or_problems(rows[some])

    def for_job(self, max_length: int, labels: Sequence[str] = ()) -> Renderer:
        """Return a renderer that differs in these only: it shares the tokenizer, and the template's child process."""
        _ = self._control_tokens  # a cached property is copied once it has been read
        other = copy.copy(self)
        other.max_length = min(max_length, self._context_length or max_length)
        other.labels = tuple(labels)
        return other

    def prompt_ids(self, row: Row) -> list[int]:
        """Return the ids that the row's last trained answer is generated from: a prefix of its training ids, uncut.

        For a chat template this is the conversation before that answer with the generation prompt. Raises BadInput for text rows
        and for a classifier's.
        """
        if self.labels:
            raise BadInput(f"{row.where} is a text to classify, which nothing is generated for; set evaluation.generate: 0.")
        refuse_untrainable([row])
        match row.kind:
            case "messages":
                rendered = self._template.render([row])[0]
                return self._tokenise([rendered.text[: rendered.spans[-1][0]]])[0]
            case "prompt_completion":
                return self._leading + self._tokenise([_prompt_text(row)])[0]
            case _:
                raise BadInput(f"{row.where} is plain text and has no prompt to generate from; set evaluation.generate: 0.")

    def reference(self, row: Row) -> str:
        """Return the answer that should be generated from `prompt_ids`, as it stands in the row."""
        if row.kind == "messages":
            return str([message for message in row.body["messages"] if is_trained(message)][-1]["content"])
        return str(row.body["completion" if row.kind == "prompt_completion" else "text"])

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's EOS, and what the chat template writes at the end of a turn."""
        _, ending = self._turn_frame
        found = [number for number in self._tokenise([ending])[0] if number in self._control_ids]
        eos = self.tokenizer.eos_token_id
        return frozenset(found[:1] + ([eos] if isinstance(eos, int) else []))

    def answer_text(self, generated_ids: Sequence[int]) -> str:
        """Return generated ids as an answer to compare with `reference(row).strip()`: cut at the first stop token, without
        special tokens, without what the template itself writes before an answer (an empty thinking block), stripped."""
        end = next((place for place, number in enumerate(generated_ids) if number in self.stop_ids), len(generated_ids))
        preamble, _ = self._turn_frame
        text = self._decode(generated_ids[:end], skip_special_tokens=True).strip()
        return text.removeprefix(preamble.strip()).strip()

    def target_bytes(self, examples: Sequence[Example]) -> int:
        """Count the UTF-8 bytes of the targets' text, special tokens left out: the denominator of bits per byte."""
        return sum(
            len(self._decode([ids[place] for place in range(len(ids)) if mask[place]], skip_special_tokens=True).encode())
            for ids, mask in ((example.input_ids, example.supervised) for example in examples)
        )

    def segments(self, example: Example) -> Iterator[tuple[str, bool]]:
        """Yield the text of an example in runs of (text, whether it is trained on), special tokens spelled out."""
        ids, mask = example.input_ids, example.supervised
        ends = [place for place in range(1, len(ids)) if mask[place] != mask[place - 1]] + [len(ids)]
        start = 0
        for end in ends:
            # Decoded with what stands before: some tokenizers drop the first space of whatever they decode.
            before, whole = self._decode(ids[:start]), self._decode(ids[:end])
            yield (whole[len(before) :] if whole.startswith(before) else self._decode(ids[start:end])), mask[end - 1]
            start = end

    def holds_control_tokens(self, row: Row) -> bool:
        """Tell whether the row's own text spells one of the tokenizer's special tokens, which will be read as that token."""
        parts = row.body.get("messages") or [{"content": value} for value in row.body.values()]
        return any(token in part["content"] for part in parts for token in self._control_tokens)

    @property
    def _template(self) -> ChatTemplate:
        if not self._made_template:
            self._made_template.append(self._make_template())
        return self._made_template[0]

    def _make_template(self) -> ChatTemplate:
        tokens = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items() if isinstance(token, str)}
        if self._template_text is not None:
            return ForeignTemplate(self._template_text, tokens)
        self._eos_id()
        return DefaultTemplate(tokens.get("bos_token", "") if self._leading else "", tokens["eos_token"])

    @cached_property
    def _control_tokens(self) -> dict[str, int]:
        return {
            token.content: number
            for number, token in self.tokenizer.added_tokens_decoder.items()
            if token.special and token.content
        }

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self._control_tokens.values())

    @cached_property
    def _turn_frame(self) -> tuple[str, str]:
        """What the chat template writes before and behind the content of an answer."""
        try:
            rendered = self._template.render([_SAMPLE])[0]
        except BadInput:  # a template may insist on another first role; such a base keeps its EOS alone
            return "", ""
        turn = rendered.text[slice(*rendered.spans[-1])]
        before, _, behind = turn.rpartition(_SAMPLE.body["messages"][-1]["content"])
        return before, behind

    def _eos_id(self) -> int:
        eos = self.tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise BadInput("the base's tokenizer names no eos_token, which ends an answer; add it to tokenizer_config.json.")
        return eos

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        return self._encode(texts, offsets=False)["input_ids"] if texts else []

    def _encode(self, texts: list[str], offsets: bool) -> Mapping[str, Any]:
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return str(text)

    def _plain_examples(self, rows: Sequence[Row], prompts: list[list[int]], answers: list[list[int]]) -> list[Example]:
        eos = self._eos_id()
        examples = []
        for row, prompt, answer in zip(rows, prompts, answers, strict=True):
            head, tail = self._leading + prompt, [*answer, eos]
            examples.append(self._cut(head + tail, [False] * len(head) + [True] * len(tail), row.where))
        return examples

    def _classified_examples(self, rows: Sequence[Row]) -> list[Example]:
        numbers = label_numbers(rows, self.labels)
        texts = self._tokenise([row.body["text"] for row in rows])
        examples = []
        for row, number, text in zip(rows, numbers, texts, strict=True):
            if not text:
                raise BadInput(f"{row.where} has a text without any token for this tokenizer; drop the row.")
            ids, was_cut = fit_in_frame(text, (self._leading, self._trailing), self.max_length)
            examples.append(Example(ids, [False] * len(ids), row.where, was_cut, number))
        return examples

    def _classified_or_problem(self, row: Row) -> Example | str:
        try:
            return self._classified_examples([row])[0]
        except BadInput as error:
            return str(error).removeprefix(row.where).strip().removesuffix(".")

    def _plain_or_problems(self, rows: Sequence[Row]) -> Iterator[Example | str]:
        return map(self._with_target, self.render_unchecked(rows))

    def _conversations_or_problems(self, rows: Sequence[Row], texts: Sequence[Rendered | str]) -> Iterator[Example | str]:
        good = [(row, text) for row, text in zip(rows, texts, strict=True) if isinstance(text, Rendered)]
        examples = iter(self._conversation_examples([row for row, _ in good], [text for _, text in good]))
        return (text if isinstance(text, str) else self._with_target(next(examples)) for text in texts)

    def _with_target(self, example: Example) -> Example | str:
        if example.num_supervised:
            return example
        return f"has no supervised token within max_length {self.max_length}; shorten it, or raise training.max_length"

    def _render_conversations(self, rows: Sequence[Row]) -> list[Example]:
        return self._conversation_examples(rows, self._template.render(rows))

    def _conversation_examples(self, rows: Sequence[Row], conversations: Sequence[Rendered]) -> list[Example]:
        if not rows:
            return []
        encoded = self._encode([conversation.text for conversation in conversations], offsets=True)
        return [
            self._cut(ids, _mask(offsets, self._trimmed_spans(conversation)), row.where)
            for row, conversation, ids, offsets in zip(
                rows, conversations, encoded["input_ids"], encoded["offset_mapping"], strict=True
            )
        ]

    def _trimmed_spans(self, conversation: Rendered) -> list[tuple[int, int]]:
        """Leave out white space behind an end-of-turn token: generation has stopped before it."""
        spans = []
        for start, end in conversation.spans:
            turn = conversation.text[start:end].rstrip()
            closed = turn.endswith(tuple(self._control_tokens))
            spans.append((start, start + len(turn) if closed else end))
        return spans

    def _cut(self, ids: list[int], mask: list[bool], where: str) -> Example:
        mask = [False, *mask[1 : self.max_length]] if ids else []
        return Example(list(ids[: self.max_length]), mask, where, was_cut=len(ids) > self.max_length)


def _prompt_text(row: Row) -> str:
    """Return the prompt of a plain row with its separator (see the top of the module)."""
    prompt = str(row.body["prompt"])
    return prompt if not prompt or prompt[-1].isspace() else f"{prompt}\n"


def _mask(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Mark the tokens (by their first and last + 1 character) that hold a character of one of the sorted, disjoint spans."""
    starts = [start for start, _ in spans]
    marks = []
    for start, end in offsets:
        place = bisect.bisect_right(starts, max(start, end - 1)) - 1
        marks.append(place >= 0 and start < spans[place][1] and end > spans[place][0])
    return marks
