"""Chat templates, rendered: conversation and template text in, rendered text and the places of the trained turns out.

This file is run by its path as a child process with limits of its own (`template.ForeignTemplate`), because a template
that came with a base is a program: Jinja's sandbox keeps it from the machine, not from eating time and memory. So it
imports nothing but Jinja and the standard library. What transformers offers a template is offered here as well
(transformers 5.23, utils/chat_template_utils.py), except the date: `strftime_now` always tells FROZEN_DATE, since what a row is
trained on may not depend on the day.
"""

import datetime
import json
import math
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

FROZEN_DATE = datetime.datetime(2024, 7, 26)
"""The date that Llama 3.2's own template falls back to where it is told none."""


class _GenerationTag(jinja2.ext.Extension):
    """Accepts `{% generation %}`, with which a template may mark what the model says; the marks are not needed here."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict` for templates, without the class behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


def compile_template(text: str) -> jinja2.Template:
    """Compile a chat template as transformers does. Raises jinja2.TemplateError."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = FROZEN_DATE.strftime
    environment.globals["dict"] = _Dict()
    return environment.from_string(text)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def render_conversation(
    template: jinja2.Template,
    variables: Mapping[str, str],
    messages: Sequence[Mapping[str, str]],
    trained: Sequence[int],
    max_chars: int,
) -> dict[str, Any]:
    """Return {"text", "spans"}: the rendered conversation and (start, end) characters of each message numbered in `trained`.

    A turn starts where the prompt for it ends and ends where the conversation up to it ends. Where these prefixes are not
    prefixes of the whole, the answer is {"unnested": the message's number}; where the template fails, {"problem": why}.
    """

    def rendered(upto: int, prompt: bool = False) -> str:
        text = template.render(messages=messages[:upto], add_generation_prompt=prompt, tools=None, documents=None, **variables)
        if len(text) > max_chars:
            raise ValueError(f"it made {len(text)} characters of a conversation, more than {max_chars}")
        return text

    try:
        text = rendered(len(messages))
        spans = []
        for number in trained:
            before, after = rendered(number, prompt=True), rendered(number + 1)
            if not (after.startswith(before) and text.startswith(after)):
                return {"unnested": number}
            if before == after:
                return {"problem": f"it writes nothing for message {number + 1}"}
            spans.append((len(before), len(after)))
    except Exception as error:  # a template may raise anything; it is told to the person whose row it is
        return {"problem": f"{str(error)[:300] or type(error).__name__}"}
    return {"text": text, "spans": spans}


def _allow(seconds: float) -> None:
    """Let this process use `seconds` of CPU from now on; the kernel ends it when they are over."""
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds), resource.RLIM_INFINITY))


def _serve() -> None:
    """Take the template and the limits on the first line, then answer each line of rows with a line for each row."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose pipe ends this process
    start = json.loads(sys.stdin.readline())
    resource.setrlimit(resource.RLIMIT_AS, (start["memory_bytes"], start["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    _allow(start["cpu_seconds"])
    try:
        template = compile_template(start["template"])
    except Exception as error:  # as above: jinja2 raises more than TemplateError on hostile text (RecursionError)
        print(json.dumps({"problem": f"{str(error)[:300] or type(error).__name__}"}), flush=True)  # noqa: T201
        return
    print(json.dumps({}), flush=True)  # noqa: T201
    for line in sys.stdin:
        request = json.loads(line)
        _allow(request["cpu_seconds"])
        for row in request["rows"]:
            answer = render_conversation(template, start["variables"], row["messages"], row["trained"], request["max_chars"])
            # One by one, so that the row which costs this process its life is known: the first without an answer.
            print(json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    _serve()
