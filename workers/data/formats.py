"""The forms that rows come in: detected by their keys, checked, and turned into canonical rows.

All rows of a file have one format. Keys that a format does not know are left out and reported; a key that would change
what a message means (tool calls, reasoning) is refused instead.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from infra.errors import BadInput
from workers.data.reading import RawRow
from workers.data.rows import Row

MAX_MESSAGES = 1024
"""Messages of one conversation; rendering compares prefixes, so its cost grows with the square."""

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "assistant": "assistant", "model": "assistant", "tool": "tool", "observation": "tool",
}  # fmt: skip
_NOT_TRAINED_YET = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")

# The two prompts of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, train.py), which published adapters expect.
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA_PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


class _Problem(ValueError):
    """What is wrong with one row, as the end of a sentence that begins with its place."""


@dataclass(frozen=True)
class _Format:
    required: tuple[str, ...]
    optional: tuple[str, ...]
    to_body: Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class ReadRows:
    """The canonical rows of one file."""

    rows: list[Row]
    format: str
    ignored_keys: tuple[str, ...]
    """Keys that stand in the file and were not used."""


def to_rows(raws: Iterable[RawRow], format: str, name: str) -> ReadRows:
    """Turn the rows of the file `name` into canonical ones; `format` is a format's name or auto.

    Raises BadInput if there is no row, or naming the first bad row and how many more there are.
    """
    rows: list[Row] = []
    problems: list[str] = []
    ignored: set[str] = set()
    found = None if format == "auto" else format
    for raw in raws:
        try:
            value = _readable(raw)
            found = found or _detect(value)
            rows.append(Row(_convert(value, found, detecting=format == "auto"), raw.where))
            ignored |= value.keys() - {*FORMATS[found].required, *FORMATS[found].optional}
        except _Problem as problem:
            problems.append(f"{raw.where} {problem}")
    if problems:
        more = f" ({len(problems) - 1} more bad rows follow.)" if len(problems) > 1 else ""
        raise BadInput(f"{problems[0]}.{more}")
    if found is None or not rows:
        raise BadInput(f"{name} has no rows; at least one is needed.")
    return ReadRows(rows, found, tuple(sorted(ignored)))


@dataclass(frozen=True)
class SiftedRow:
    """One row on its own in canonical form."""

    row: Row
    format: str
    ignored_keys: frozenset[str]


def sift_row(raw: RawRow, format: str) -> SiftedRow | str:
    """Turn one row into a canonical one, whatever the rows beside it are; else return what is wrong with it.

    `format` is a format's name or auto. What is wrong is the end of a sentence that begins with the row's place.
    """
    try:
        value = _readable(raw)
        found = _detect(value) if format == "auto" else format
        row = Row(_convert(value, found, detecting=False), raw.where)
    except _Problem as problem:
        return str(problem)
    return SiftedRow(row, found, frozenset(value.keys() - {*FORMATS[found].required, *FORMATS[found].optional}))


def _readable(raw: RawRow) -> dict[str, Any]:
    if raw.problem is not None:
        raise _Problem(raw.problem)
    return {key: value for key, value in raw.value.items() if value is not None}


def _detect(value: Mapping[str, Any]) -> str:
    for name, format in FORMATS.items():
        if value.keys() >= set(format.required):
            return name
    raise _Problem(
        f"has the keys {_listed(value)}, which is none of the known formats ({_known_formats()}); "
        "rename its keys or set data.format"
    )


def _convert(value: Mapping[str, Any], name: str, detecting: bool) -> dict[str, Any]:
    if detecting and (detected := _detect(value)) != name:
        raise _Problem(f"is {detected} while the rows before it are {name}; keep one format per file or set data.format")
    missing = [key for key in FORMATS[name].required if key not in value]
    if missing:
        raise _Problem(f"lacks {_quoted(missing)}, which {name} rows need; it has {_listed(value)}")
    return FORMATS[name].to_body(value)


def _known_formats() -> str:
    return ", ".join(f"{name}: {'+'.join(format.required)}" for name, format in FORMATS.items())


def _quoted(keys: Iterable[str]) -> str:
    return ", ".join(f"'{str(key)[:60]}'" for key in keys)


def _listed(value: Mapping[str, Any]) -> str:
    keys = list(value)
    return (_quoted(keys[:8]) + (", ..." if len(keys) > 8 else "")) or "no keys"


def _string(value: Mapping[str, Any], key: str, what: str = "") -> str:
    """Return the text under `key`; raise _Problem if it is none or cannot be written as UTF-8."""
    text = value.get(key)
    label = what or f"'{key}'"
    if not isinstance(text, str):
        raise _Problem(f"{label} should be text, got {'nothing' if text is None else type(text).__name__}")
    if "\0" in text:
        raise _Problem(f"{label} holds a NUL character; remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Problem(
            f"{label} holds a lone surrogate at character {error.start + 1}, which is no Unicode text; remove it"
        ) from None
    return text


def _filled(value: Mapping[str, Any], key: str, what: str = "") -> str:
    text = _string(value, key, what)
    if not text.strip():
        raise _Problem(f"{what or repr(key)} is empty; nothing could be learned from it")
    return text


def _from_messages(value: Mapping[str, Any]) -> dict[str, Any]:
    messages = _list_of_objects(value, "messages")
    return _conversation([_message(message, number) for number, message in enumerate(messages, 1)])


def _list_of_objects(value: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    items = value[key]
    if isinstance(items, str):
        raise _Problem(f"'{key}' should be a list of objects, got text; CSV cannot hold conversations, use JSONL or Parquet")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise _Problem(f"'{key}' should be a list of objects")
    if not 0 < len(items) <= MAX_MESSAGES:
        raise _Problem(f"'{key}' has {len(items)} messages, expected 1 to {MAX_MESSAGES}; split the conversation")
    return [{name: part for name, part in item.items() if part is not None} for item in items]


def _message(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    role = _string(message, "role", f"the role of message {number}")
    if role not in _ROLES:
        raise _Problem(f"message {number} has the role {role[:40]!r}, expected one of {', '.join(_ROLES)}")
    _refuse_meaning(message, number)
    return _turn(role, message, "content", number)


def _refuse_meaning(message: Mapping[str, Any], number: int) -> None:
    present = [key for key in _NOT_TRAINED_YET if message.get(key)]
    if present:
        raise _Problem(f"message {number} has {_quoted(present)}, which is not trained on; write it into the content as text")


def _turn(role: str, message: Mapping[str, Any], key: str, number: int) -> dict[str, Any]:
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise _Problem(f"the weight of message {number} should be 0 (not trained on) or 1, got {str(weight)[:40]}")
    if role != "assistant":
        return {"role": role, "content": _string(message, key, f"the {key} of message {number}")}
    if weight:
        return {"role": role, "content": _filled(message, key, f"the {key} of message {number}")}
    return {"role": role, "content": _string(message, key, f"the {key} of message {number}"), "weight": 0}


def _conversation(messages: list[dict[str, Any]]) -> dict[str, Any]:
    if not any(is_trained(message) for message in messages):
        raise _Problem("has no assistant message to train on; add the answer that should be learned")
    return {"messages": messages}


def is_trained(message: Mapping[str, Any]) -> bool:
    """Tell whether a canonical message is part of the loss."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def _from_sharegpt(value: Mapping[str, Any]) -> dict[str, Any]:
    turns = _list_of_objects(value, "conversations")
    messages = [_sharegpt_turn(turn, number) for number, turn in enumerate(turns, 1)]
    if isinstance(value.get("system"), str) and value["system"] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _string(value, "system")})
    return _conversation(messages)


def _sharegpt_turn(turn: Mapping[str, Any], number: int) -> dict[str, Any]:
    speaker = _string(turn, "from", f"the 'from' of turn {number}")
    if speaker not in _SHAREGPT_ROLES:
        raise _Problem(f"turn {number} is from {speaker[:40]!r}, expected one of {', '.join(_SHAREGPT_ROLES)}")
    return _turn(_SHAREGPT_ROLES[speaker], turn, "value", number)


def _from_prompt_completion(value: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": _string(value, "prompt"), "completion": _filled(value, "completion")}


def _from_alpaca(value: Mapping[str, Any]) -> dict[str, Any]:
    instruction, output = _filled(value, "instruction"), _filled(value, "output")
    given = _string(value, "input") if "input" in value else ""
    # Replaced in one pass over the template, so that braces in the data stay as they are.
    template = _ALPACA_WITH_INPUT if given.strip() else _ALPACA_PLAIN
    return {"prompt": template.format_map({"instruction": instruction, "input": given}), "completion": output}


def _from_preference(value: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": _string(value, "prompt"), "chosen": _filled(value, "chosen"), "rejected": _string(value, "rejected")}


def _from_classification(value: Mapping[str, Any]) -> dict[str, Any]:
    label = value["label"]
    if isinstance(label, int) and not isinstance(label, bool):
        return {"text": _filled(value, "text"), "label": str(label)}
    return {"text": _filled(value, "text"), "label": _filled(value, "label")}


FORMATS: dict[str, _Format] = {
    "messages": _Format(("messages",), (), _from_messages),
    "sharegpt": _Format(("conversations",), ("system",), _from_sharegpt),
    "preference": _Format(("prompt", "chosen", "rejected"), (), _from_preference),
    "prompt_completion": _Format(("prompt", "completion"), (), _from_prompt_completion),
    "alpaca": _Format(("instruction", "output"), ("input",), _from_alpaca),
    "classification": _Format(("text", "label"), (), _from_classification),
    "text": _Format(("text",), (), lambda value: {"text": _filled(value, "text")}),
}
"""In the order they are tried: a format stands before those whose keys are part of its own."""
