"""Customers whose data is poison, one of every kind, written as folders beside healthy ones.

Each kind says how its row should end: held with a reason, or trained (an empty reason) with the bad rows put aside.
"""

import gzip
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOSTILE_NAMES = (
    "..", "a b", "A", "-a", "a" * 200, "a.b", "ü", "a\nb", "a\u202eb", "<script>alert(1)</script>", "'; drop table", "$(reboot)",
    "{{ 7 * 7 }}", "con.", "a%2fb", "~root", "*", "a\x1b[31m",
)  # fmt: skip
"""Names of folders that are no names of tenants; `..` is for lists only."""
NAN_SETTINGS: Mapping[str, Any] = {"training.learning_rate": 1e30, "training.max_grad_norm": 0.0}
"""Overrides under which healthy rows train to what is no number."""
BOMB = "detonate"
BOMB_TEMPLATE = (
    "{% for m in messages %}{% if '" + BOMB + "' in m.content %}{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}{% endif %}[{{ m.role }}]{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""A chat template that does not end on a row that holds the word BOMB, and renders all others."""


@dataclass(frozen=True)
class Poison:
    """One kind of bad data."""

    write: Callable[[Path, Sequence[str]], None]
    """Writes into an existing folder, given the lines of a healthy customer's JSONL."""
    reason: str
    """Under which the customer is held; empty if it is trained without its bad rows."""
    num_bad: int | None = None
    """Rows that are put aside; None: as many as there are."""


def write_poisoned(folder: Path, lines: Sequence[str], huge_bytes: int = 1 << 30) -> dict[str, Poison]:
    """Write `folder`/poison-<kind>/ for every kind, and return the kinds by folder name. `lines` are at least 40 healthy rows."""
    kinds = {f"poison-{name}": poison for name, poison in poisons(huge_bytes).items()}
    for name, poison in kinds.items():
        (folder / name).mkdir(parents=True)
        poison.write(folder / name, lines)
    return kinds


def write_base_with_bomb(base: Path, target: Path) -> None:
    """Copy a base to `target`, with BOMB_TEMPLATE for its chat template: only "template-bomb" has rows that set it off."""
    shutil.copytree(base, target)
    (target / "chat_template.jinja").unlink(missing_ok=True)  # it would have its way before the other file
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": BOMB_TEMPLATE}))


def poisons(huge_bytes: int = 1 << 30) -> dict[str, Poison]:
    """Return every kind by its name; the longest line has `huge_bytes`."""
    return {
        "nan": Poison(_all(lambda line: line[:-1] + ', "score": NaN}'), "too_many_bad_rows"),
        "duplicate-keys": Poison(_all(lambda line: line[:-1] + ", " + line[1:]), "too_many_bad_rows"),
        "deep": Poison(_some("[" * 100_000, '{"a": ' * 50_000), "", 2),
        "surrogates": Poison(_some(_row("a \ud800 b")), "", 1),
        "nul": Poison(_some(_row("a \0 b")), "", 1),
        "empty-answers": Poison(_all(lambda line: _row("  ")), "too_many_bad_rows"),
        "prompts-only": Poison(_all(_prompt_only), "too_many_bad_rows"),
        "other-form": Poison(_some('{"text": "No conversation."}', '["a"]', "7", "null", "{}"), "", 5),
        "garbage": Poison(_bytes(lambda lines: random.Random(0).randbytes(100_000)), "too_many_bad_rows"),
        "huge-line": Poison(lambda folder, lines: _write_huge(folder, lines, huge_bytes), "", 1),
        "huge-csv": Poison(lambda folder, lines: _write_huge_csv(folder, huge_bytes), "", 1),
        "latin1": Poison(_bytes(lambda lines: "\n".join(_row("é") for _ in lines).encode("latin-1")), "too_many_bad_rows"),
        "utf16": Poison(_bytes(lambda lines: "\n".join(lines).encode("utf-16")), "unreadable", 0),
        "gzip": Poison(_bytes(lambda lines: gzip.compress("\n".join(lines).encode())), "unreadable", 0),
        "torn": Poison(_bytes(lambda lines: "\n".join(lines).encode()[:-20]), "", 1),
        "parquet": Poison(lambda folder, lines: _write(folder / "train.parquet", b"PAR1" + b"\0" * 100), "unreadable", 0),
        "open-quote": Poison(lambda folder, lines: _write(folder / "train.csv", _OPEN_QUOTE), "unreadable", 0),
        "empty": Poison(_bytes(lambda lines: b""), "too_few_rows", 0),
        "no-file": Poison(lambda folder, lines: None, "unreadable", 0),
        "two-files": Poison(lambda folder, lines: _write_two(folder, lines), "unreadable", 0),
        "few": Poison(_bytes(lambda lines: "\n".join(lines[:3]).encode()), "too_few_rows", 0),
        "one-answer": Poison(lambda folder, lines: _write(folder / "train.jsonl", _one_answer(len(lines))), "one_answer", 0),
        "template-text": Poison(_some(_row("{{ 'a' * 10 ** 10 }}{% for a in range(10 ** 9) %}{% endfor %}")), "", 0),
        "template-bomb": Poison(_some(_row("Boom.", f"Please {BOMB}.")), ""),
    }


_OPEN_QUOTE = b'prompt,completion\na,b\nc,"d\n' + b"e,f\n" * 100_000


def _row(answer: str, question: str = "What is it?") -> str:
    # ASCII where needed, so that a lone surrogate stands there as its escape.
    body = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    return json.dumps(body, ensure_ascii=not answer.isprintable() or "\ud800" in answer)


def _all(spoil: Callable[[str], str]) -> Callable[[Path, Sequence[str]], None]:
    return _bytes(lambda lines: "\n".join(map(spoil, lines)).encode())


def _some(*bad: str) -> Callable[[Path, Sequence[str]], None]:
    """Put bad lines among the healthy ones."""
    return _bytes(lambda lines: "\n".join([*lines[:5], *bad, *lines[5:]]).encode())


def _bytes(content: Callable[[Sequence[str]], bytes]) -> Callable[[Path, Sequence[str]], None]:
    return lambda folder, lines: _write(folder / "train.jsonl", content(lines))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _write_huge(folder: Path, lines: Sequence[str], num_bytes: int) -> None:
    """Write a line of zeros among the others; on most file systems it takes no room on the disk."""
    with (folder / "train.jsonl").open("wb") as file:
        file.write("\n".join(lines[:5]).encode() + b"\n")
        file.truncate(file.tell() + num_bytes)
        file.seek(0, 2)
        file.write(b"\n" + "\n".join(lines[5:]).encode())


def _write_huge_csv(folder: Path, num_bytes: int) -> None:
    with (folder / "train.csv").open("wb") as file:
        file.write(b"prompt,completion\n" + b"".join(b"What is %d?,It is %d.\n" % (number, number) for number in range(100)))
        file.truncate(file.tell() + num_bytes)
        file.seek(0, 2)
        file.write(b"\nc,d\n")


def _write_two(folder: Path, lines: Sequence[str]) -> None:
    for name in ("train.jsonl", "train.csv"):
        _write(folder / name, "\n".join(lines).encode())


def _one_answer(num_rows: int) -> bytes:
    return "\n".join(_row("Yes.", f"Is {number} a number?") for number in range(num_rows)).encode()


def _prompt_only(line: str) -> str:
    messages = [message for message in json.loads(line)["messages"] if message["role"] != "assistant"]
    return json.dumps({"messages": messages})
