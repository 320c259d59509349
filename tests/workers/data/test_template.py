"""Foreign chat templates render as transformers renders them, and cannot take the machine with them."""

import gc
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from infra.errors import BadInput
from workers.data.rows import Row
from workers.data.template import DefaultTemplate, ForeignTemplate, TemplateLimits

LIMITS = TemplateLimits(cpu_seconds=1.0, memory_bytes=256 << 20)
CHATML = (
    "{%- if messages[0].role != 'system' %}\n    {{- '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}\n{%- endif %}\n"
    "{% for message in messages %}\n"
    "    {%- set content = message.content | trim %}\n"
    "    {%- if message.role == 'nobody' %}{% continue %}{% endif %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' }}{% generation %}{{ content }}{% endgeneration %}{{ '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- set ns = namespace(found=false) %}{%- set ns.found = true %}\n"
    "{%- if add_generation_prompt and ns.found %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | tojson }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant speak here') }}{% endif %}{% endfor %}"
)
FORGETS = (  # as Qwen3: what was thought in earlier turns is dropped
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}|{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def conversation(*contents: str, where: str = "x.jsonl:1", **last: Any) -> Row:
    roles = ("user", "assistant")
    messages: list[dict[str, Any]] = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    messages[-1] |= last
    return Row({"messages": messages}, where)


def refusal(template: str, *rows: Row) -> str:
    with pytest.raises(BadInput) as caught:
        ForeignTemplate(template, {}, LIMITS).render(rows or [conversation("Hi", "Yes")])
    return str(caught.value)


@pytest.mark.parametrize("template", [CHATML, BRACKETS])
def test_text_is_that_of_transformers(talk: PreTrainedTokenizerBase, template: str) -> None:
    rows = [conversation("Hi <b>'é'</b>", ' Yes "quoted"\n', "And?", "漢😀"), conversation("Hi", "Yes")]
    tokens = {"bos_token": str(talk.bos_token), "eos_token": str(talk.eos_token)}
    for row, rendered in zip(rows, ForeignTemplate(template, tokens).render(rows), strict=True):
        expected = talk.apply_chat_template(row.body["messages"], chat_template=template, tokenize=False)
        assert rendered.text == expected
        prompt = talk.apply_chat_template(
            row.body["messages"][:-1], chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert rendered.text[: rendered.spans[-1][0]] == prompt


def test_the_default_template_nests_and_marks_the_answers() -> None:
    (rendered,) = DefaultTemplate("<s>", "</s>").render([conversation("Hi", "Yes", "And?", "No")])
    assert rendered.text == "<s>User: Hi\nAssistant: Yes</s>User: And?\nAssistant: No</s>"
    assert [rendered.text[start:end] for start, end in rendered.spans] == [" Yes</s>", " No</s>"]


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_way_out() -> None:
    row = conversation("Hi", "Yes", "And?", "No", where="acme.jsonl:7")
    said = refusal(FORGETS, conversation("Hi", "Yes"), row)
    assert said.startswith("acme.jsonl:7: the base's chat template writes message 2 differently once more messages follow")
    assert 'give that message "weight": 0' in said
    row.body["messages"][1]["weight"] = 0
    (rendered,) = ForeignTemplate(FORGETS, {}).render([row])
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["<think></think>No|"]


def test_what_a_template_raises_is_told_with_the_row() -> None:
    system = Row({"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]}, "x.jsonl:9")
    said = refusal(BRACKETS, conversation("Hi", "Yes"), system, system)
    assert said.startswith("x.jsonl:9 is refused by the base's chat template: Only user and assistant speak here.")
    assert said.endswith("(1 more such rows follow.)")


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for m in messages %}{{ 9 ** (9 ** (9 ** messages | length)) }}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'the same for all' }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ ('a' * (10 ** 8 + messages | length)) }}",
        "{{ (messages | length * 10 ** 9) * 'a' }}",
        "{{ '%9999999999d' % (messages | length) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ " + "(" * 50_000,
        "{{ messages",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__()[0] }}",
        "{{ namespace(__class__=1).__class__.__init__.__globals__ }}",
        "{{ undefined_name.attribute }}",
        "{% include '/etc/hostname' %}",
        "x" * (1 << 20),
    ],
    ids=lambda template: template[:40],
)
def test_hostile_templates_become_one_sentence(template: str) -> None:
    assert "chat template" in refusal(template)


def test_the_date_is_the_same_on_every_day() -> None:
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert ForeignTemplate(template, {}).render([conversation("Hi", "Yes")])[0].text == "26 Jul 2024HiYes"


def test_the_child_sees_no_environment_and_ends_with_its_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "s3cret")
    template = ForeignTemplate(CHATML, {})
    template.render([conversation("Hi", "Yes")])
    child = template._child
    with open(f"/proc/{child.pid}/environ", "rb") as file:
        assert b"s3cret" not in file.read()
    del template
    gc.collect()
    assert child.poll() is not None


def test_the_child_ends_when_its_parent_is_killed() -> None:
    script = (
        "import os, signal\nfrom workers.data.template import ForeignTemplate\n"
        "template = ForeignTemplate('{{ messages }}', {})\nprint(template._child.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    child = Path("/proc", done.stdout.strip(), "stat")
    patience = time.monotonic() + 60
    while _is_alive(child) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not _is_alive(child)


def _is_alive(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_many_rows_pass_through_one_child() -> None:
    rows = [conversation("Hi " * 200, "Yes", "And?" * 200, "No", where=f"x:{n}") for n in range(3000)]
    rendered = ForeignTemplate(CHATML, {}).render(rows)
    assert len(rendered) == 3000
    assert {text.text for text in rendered} == {rendered[0].text}


ENDLESS = (
    "{% for m in messages %}{% if m.content == 'bomb' %}{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}{% endif %}[{{ m.role }}]{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_row_by_row_the_row_is_known_on_which_the_template_does_not_end() -> None:
    template = ForeignTemplate(ENDLESS, {}, TemplateLimits(cpu_seconds=0.5, memory_bytes=256 << 20))
    good = [conversation("Hi", str(number)) for number in range(3)]
    expected = template.render(good)
    bomb = conversation("bomb", "Yes")
    each = template.render_each([good[0], good[1], bomb, good[2], bomb, good[0]])
    assert [each[0], each[1], each[3]] == expected
    assert each[2] == "is refused by the base's chat template: it did not end within 1 s of CPU time and 256 MiB of memory"
    assert each[5] == "is refused by the base's chat template: it did not end on earlier rows, so this one was not tried"
    assert template.render(good) == expected


def test_row_by_row_what_a_template_refuses_or_rewrites_is_told_of_each_row() -> None:
    system = Row({"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]}, "x.jsonl:9")
    refused, rendered = ForeignTemplate(BRACKETS, {}).render_each([system, conversation("Hi", "Yes")])
    assert refused == "is refused by the base's chat template: Only user and assistant speak here"
    assert rendered == ForeignTemplate(BRACKETS, {}).render([conversation("Hi", "Yes")])[0]
    (rewritten,) = ForeignTemplate(FORGETS, {}).render_each([conversation("Hi", "Yes", "And?", "No")])
    assert "differently once more messages follow" in str(rewritten)
