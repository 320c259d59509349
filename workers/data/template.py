"""Conversations to text by a chat template: the base's own in a child process with limits, or our default one.

A foreign template may loop for ever or build gigabytes; it then costs its child process and becomes one BadInput, or what is
wrong with the one row on which it did. The next rows get another child.
The default, for bases without a template, is named: its name stands for it in the prompt contract.
"""

import contextlib
import itertools
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from infra.errors import BadInput
from workers.data import template_child
from workers.data.formats import is_trained
from workers.data.rows import Row

DEFAULT_TEMPLATE_NAME = "lorafleet-chat-v1"
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""Plain words, so that a base that never saw control tokens can read it. The space after `Assistant:` belongs to the
answer: most tokenizers join it with the first word."""

_MAX_TEMPLATE_CHARS = 256 * 1024
_MEMORY_BYTES = 1 << 30
_MAX_LOST_CHILDREN = 2
"""Of one reading row by row: rows on which the template did not end. What follows them is not tried any more."""
_BATCH_CHARS = 4 << 20
_BATCH_ROWS = 1000
_MESSAGES_PER_CPU_SECOND = 2000
"""A guess, low on purpose: a batch is allowed its messages over this rate, in CPU seconds, on top of a fixed share."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """(start, end) characters of each turn that is trained on, end-of-turn mark included."""


@dataclass(frozen=True)
class TemplateLimits:
    """What a foreign template may use."""

    cpu_seconds: float = 5.0
    """Beside the time that a batch's number of messages allows."""
    memory_bytes: int = _MEMORY_BYTES


class ChatTemplate(Protocol):
    """Renders conversations. Implementations may be used from several threads."""

    def render(self, rows: Sequence[Row]) -> list[Rendered]:
        """Render `rows` of kind messages. Raises BadInput, naming the first row that the template refuses or does not nest."""
        ...

    def render_each(self, rows: Sequence[Row]) -> list[Rendered | str]:
        """Render `rows` of kind messages; in place of one that cannot be rendered stands what is wrong with it."""
        ...


class DefaultTemplate:
    """Our own template, trusted, rendered in this process."""

    def __init__(self, bos_token: str, eos_token: str) -> None:
        """`bos_token` is empty for a tokenizer that adds none."""
        self._template = template_child.compile_template(DEFAULT_TEMPLATE)
        self._variables = {"bos_token": bos_token, "eos_token": eos_token}

    def render(self, rows: Sequence[Row]) -> list[Rendered]:
        """Render `rows`."""
        return _checked(rows, self._results(rows))

    def render_each(self, rows: Sequence[Row]) -> list[Rendered | str]:
        """Render `rows`, each on its own."""
        return [_rendered_or_problem(result) for result in self._results(rows)]

    def _results(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [
            template_child.render_conversation(
                self._template, self._variables, row.body["messages"], _trained(row), max_chars=1 << 40
            )
            for row in rows
        ]


class ForeignTemplate:
    """A base's template, rendered in a child process of bounded CPU time and memory.

    The child lives as long as this object; one that was lost to a row is replaced when the next rows come.
    """

    def __init__(self, template: str, variables: Mapping[str, str], limits: TemplateLimits | None = None) -> None:
        """`variables` are the tokenizer's special tokens by name. Raises BadInput if the text is no template."""
        if len(template) > _MAX_TEMPLATE_CHARS:
            raise BadInput(f"the base's chat template has {len(template)} characters, expected at most {_MAX_TEMPLATE_CHARS}.")
        self._limits = limits or TemplateLimits()
        self._lock = threading.Lock()
        self._start = {
            "template": template,
            "variables": dict(variables),
            "memory_bytes": self._limits.memory_bytes,
            "cpu_seconds": self._limits.cpu_seconds,
        }
        self._begin()

    def render(self, rows: Sequence[Row]) -> list[Rendered]:
        """Render `rows`, in batches."""
        results: list[dict[str, Any]] = []
        with self._lock:
            for batch in _batches(rows):
                answers, seconds = self._answers(batch)
                if len(answers) < len(batch):
                    raise BadInput(f"the base's chat template {self._unended(seconds)}; use another template.")
                results += answers
        return _checked(rows, results)

    def render_each(self, rows: Sequence[Row]) -> list[Rendered | str]:
        """Render `rows`, in batches; a row on which the template does not end is bad, and after a few so are all that follow."""
        results: list[dict[str, Any]] = []
        num_lost = 0
        with self._lock:
            for batch in _batches(rows):
                left = batch
                while left and num_lost < _MAX_LOST_CHILDREN:
                    answers, seconds = self._answers(left)
                    results += answers
                    left = left[len(answers) :]
                    if left:
                        num_lost += 1
                        results.append({"problem": f"it {self._unended(seconds)}"})
                        left = left[1:]
                results += [{"problem": "it did not end on earlier rows, so this one was not tried"}] * len(left)
        return [_rendered_or_problem(result) for result in results]

    def close(self) -> None:
        """End the child process."""
        self._stop()

    def _begin(self) -> None:
        """Start a child and hand it the template. Raises BadInput if the text is no template."""
        self._child = _start_child()
        self._stop = weakref.finalize(self, _stop_child, self._child)
        answers = self._ask(self._start, 1)
        if not answers or "problem" in answers[0]:
            self.close()
            problem = answers[0]["problem"] if answers else f"it {self._unended(self._limits.cpu_seconds)}"
            raise BadInput(
                f"the base's chat template cannot be read ({problem}); correct it or remove it from the base's folder."
            )

    def _answers(self, rows: Sequence[Row]) -> tuple[list[dict[str, Any]], float]:
        """Return what the child answers, one for each row up to that on which it ended, and the CPU seconds it was allowed."""
        if not self._stop.alive:
            self._begin()
        conversations = [{"messages": row.body["messages"], "trained": _trained(row)} for row in rows]
        seconds = self._limits.cpu_seconds + sum(map(_num_renderings, conversations)) / _MESSAGES_PER_CPU_SECOND
        chars = max(map(_num_chars, conversations))
        request = {"rows": conversations, "max_chars": 16 * chars + 65536, "cpu_seconds": seconds}
        return self._ask(request, len(rows)), seconds

    def _ask(self, request: Mapping[str, Any], num_answers: int) -> list[Any]:
        """Return as many answers, fewer if the child ended; it is put away then."""
        stdin, stdout = self._child.stdin, self._child.stdout
        assert stdin is not None
        assert stdout is not None
        lines: list[bytes] = []
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            lines = list(itertools.islice(stdout, num_answers))
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        if len(lines) < num_answers:
            self.close()
        return [json.loads(line) for line in lines]

    def _unended(self, seconds: float) -> str:
        return f"did not end within {seconds:.0f} s of CPU time and {self._limits.memory_bytes >> 20} MiB of memory"


def _start_child() -> "subprocess.Popen[bytes]":
    # Isolated (-I): the folder of the script is not searched for modules; the environment is empty, so it holds no secrets.
    command = [sys.executable, "-I", "-X", "utf8", str(Path(template_child.__file__))]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={"LANG": "C.UTF-8"}
    )


def _stop_child(child: "subprocess.Popen[bytes]") -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                continue  # what was left to send has no reader any more


def _trained(row: Row) -> list[int]:
    return [number for number, message in enumerate(row.body["messages"]) if is_trained(message)]


def _num_renderings(conversation: Mapping[str, Any]) -> int:
    """Messages that are rendered for a conversation, counting each prefix anew."""
    return len(conversation["messages"]) + 2 * sum(number + 1 for number in conversation["trained"])


def _num_chars(conversation: Mapping[str, Any]) -> int:
    return sum(len(message["content"]) for message in conversation["messages"])


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    chars = 0
    for row in rows:
        batch.append(row)
        chars += _num_chars(row.body)
        if len(batch) >= _BATCH_ROWS or chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _checked(rows: Sequence[Row], results: Sequence[Mapping[str, Any]]) -> list[Rendered]:
    """Turn answers into values; raise BadInput for the first that is none, with the number of those that follow."""
    bad = [(row, result) for row, result in zip(rows, results, strict=True) if "text" not in result]
    if bad:
        row, result = bad[0]
        more = f" ({len(bad) - 1} more such rows follow.)" if len(bad) > 1 else ""
        raise BadInput(_refusal(row, result) + more)
    return [_rendered(result) for result in results]


def _rendered_or_problem(result: Mapping[str, Any]) -> Rendered | str:
    return _rendered(result) if "text" in result else _problem(result)


def _rendered(result: Mapping[str, Any]) -> Rendered:
    return Rendered(result["text"], tuple((start, end) for start, end in result["spans"]))


def _refusal(row: Row, result: Mapping[str, Any]) -> str:
    return f"{row.where}{'' if 'problem' in result else ':'} {_problem(result)}."


def _problem(result: Mapping[str, Any]) -> str:
    if "problem" in result:
        return f"is refused by the base's chat template: {result['problem']}"
    number = result["unnested"] + 1
    return (
        f"the base's chat template writes message {number} differently once more messages follow, so what the "
        f'model answers there is not what it would be trained on; give that message "weight": 0 to train on later turns only'
    )
