"""The YAML files people write: read safely, with the meaning they look like, into specs.

YAML is read in the manner of version 1.2: only true and false are booleans (`no`, `on`, `yes` stay text), a number with a
leading zero stays text, `1e-4` is a number, dates stay text. What has no place in a file of settings is refused with line and
column: aliases (a few of them can stand for gigabytes), tags, duplicate keys, several documents.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from infra.errors import BadInput
from infra.strict import parse
from sweeps.spec import SweepSpec
from workers.spec import JobSpec

MAX_BYTES = 1 << 20
MAX_DEPTH = 32

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False} | dict.fromkeys(
    ("", "~", "null", "Null", "NULL")
)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's parser where PyYAML was built with it: twenty times faster. Only its events are used."""


def read_yaml(path: Path) -> Any:
    """Return the plain data of a YAML file (mappings with text keys, lists, scalars); None for an empty one.

    Raises BadInput with one sentence, and line:column where there is one: no such file (with close names), not UTF-8, larger
    than 1 MiB, nested deeper than 32, not YAML, or something that is refused (see the module).
    """
    return parse_yaml(_read_text(path), str(path))


def parse_yaml(text: str, source: str) -> Any:
    """Return the plain data of YAML `text`; mistakes name `source`. Raises BadInput as `read_yaml` does."""
    try:
        return _Builder(text).document()
    except _Refused as error:
        raise BadInput(f"{source}{error}") from None
    except yaml.MarkedYAMLError as error:
        raise BadInput(f"{source}{_position(error.problem_mark)} is not valid YAML: {_problem(error, text)}.") from None
    except yaml.reader.ReaderError as error:
        line = text.partition(chr(error.character))[0].count("\n") + 1
        raise BadInput(f"{source}:{line} holds the control character U+{error.character:04X}; remove it.") from None
    except (ValueError, OverflowError):
        raise BadInput(f"{source} has an escape \\U that stands for no character; correct it.") from None


def load_job(path: Path, overrides: Sequence[str] = ()) -> tuple[JobSpec, Path]:
    """Return the job of a file, with `--set` overrides applied, and the folder that paths in it are relative to."""
    raw = _read_mapping(path, "job")
    if "space" in raw:
        raise BadInput(f"{path} is a sweep, expected a job; run it with 'lorafleet sweep run', or give the file of its job.")
    below_job = next((override for override in overrides if override.startswith("job.")), None)
    if below_job is not None:
        raise BadInput(f"--set {below_job[:80]}: 'job.' is for sweeps; for a job write --set {below_job[4:84]}.")
    raw = set_overrides(raw, overrides)
    return parse(JobSpec, raw, str(path)), path.parent


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> tuple[SweepSpec, JobSpec, Path]:
    """Return the sweep of a file (with its job in it, wherever that was written), that job, and the folder its paths start from.

    That is the folder of the file the job is written in. Overrides reach into the job as "job.training.max_steps=50".
    """
    raw = _read_mapping(path, "sweep")
    if "base_model" in raw:
        raise BadInput(
            f"{path} is a job, expected a sweep; train it with 'lorafleet train', or name it as 'job' in a sweep file."
        )
    source, folder = f"{path} (job)", path.parent
    if isinstance(raw.get("job"), str):
        job_path = path.parent / raw["job"]
        raw["job"] = _read_mapping(job_path, "job")
        source, folder = str(job_path), job_path.parent
    raw = set_overrides(raw, overrides)
    if isinstance(raw.get("job"), dict):
        raw["job"] = parse(JobSpec, raw["job"], source)
    sweep = parse(SweepSpec, raw, str(path))
    if isinstance(sweep.job, str):
        raise BadInput("--set job=... cannot name another file; edit 'job' in the sweep file.")
    return sweep, sweep.job, folder


def set_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `raw` with each "path.to.key=value" set, the value read as YAML. Missing mappings on the way are made."""
    result: dict[str, Any] = dict(raw)
    for override in overrides:
        path, equals, text = override.partition("=")
        path = path.strip()
        if not equals or not all(path.split(".")):
            raise BadInput(f"--set {override[:80]!r} is not of the form key=value; write for example training.max_steps=50.")
        result = _with(result, path, parse_yaml(text, f"--set {path}"), path)
    return result


def _with(mapping: Mapping[str, Any], path: str, value: Any, whole: str) -> dict[str, Any]:
    """Return a copy of `mapping` in which `path` is `value`. Keys that hold dots ("peft.r" of a space) are found first.

    Where some do, a new key is taken whole: a further dimension of a space can be set.
    """
    parts = path.split(".")
    heads = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    new = path if any("." in key for key in mapping) else parts[0]
    key = next((head for head in heads if head in mapping), new)
    rest = path[len(key) + 1 :]
    if not rest:
        return {**mapping, key: value}
    below = mapping.get(key)
    if below is not None and not isinstance(below, dict):
        raise BadInput(f"--set {whole}: '{key}' holds {type(below).__name__} and has no keys below it; set '{key}' as a whole.")
    return {**mapping, key: _with(below or {}, rest, value, whole)}


def _read_mapping(path: Path, what: str) -> dict[str, Any]:
    raw = read_yaml(path)
    if raw is None:
        raise BadInput(f"{path} is empty; expected a {what}, see 'lorafleet schema {what}'.")
    if not isinstance(raw, dict):
        raise BadInput(f"{path} holds {_kind(raw)}; expected a {what} as 'key: value' lines, see 'lorafleet schema {what}'.")
    if "customers" in raw:
        raise BadInput(f"{path} is a fleet, expected a {what}; run it with 'lorafleet nightly run'.")
    return raw


def _kind(raw: Any) -> str:
    return "a list" if isinstance(raw, list) else f"only the value {str(raw)[:60]!r}"


def _read_text(path: Path) -> str:
    try:
        if not path.exists():
            raise BadInput(_missing(path))
        if not path.is_file():
            raise BadInput(f"{path} is not a file; give the path of a YAML file.")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BadInput(f"{str(path)[:200]} cannot be read ({reason}); check the path and its permissions.") from None
    if len(data) > MAX_BYTES:
        raise BadInput(f"{path} is larger than 1 MiB, too large for a file that a person writes; check that it is the right one.")
    return _decode(data, path)


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path}:{line} is not UTF-8 text (byte 0x{data[error.start]:02x}); save it as UTF-8.") from None


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no file {path}: the folder {path.parent} does not exist."
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
    close = difflib.get_close_matches(path.name, names, n=1) or [name for name in names if Path(name).stem == path.stem][:1]
    yamls = [name for name in names if name.endswith((".yaml", ".yml"))]
    if close:
        return f"there is no file {path}. Did you mean '{path.parent / close[0]}'?"
    there = f"the YAML files there: {', '.join(yamls[:10])}" if yamls else "that folder holds no YAML file"
    return f"there is no file {path}; {there}."


class _Refused(Exception):
    """Something that YAML allows and we do not; the text follows the name of the source."""


class _Builder:
    """Plain data from the parser's events, which come lazily: what is refused is refused before the rest is read."""

    def __init__(self, text: str) -> None:
        self._events: Iterator[yaml.Event] = yaml.parse(text, Loader=_LOADER)
        self._depth = 0

    def document(self) -> Any:
        """Return the value of the one document, None if there is none."""
        next(self._events)  # stream start
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        value = self._value(next(self._events))
        next(self._events)  # document end
        after = next(self._events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise _refused(after, "begins a second document; keep one document per file")
        return value

    def _value(self, event: yaml.Event) -> Any:
        _refuse_extras(event)
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event)
        if self._depth == MAX_DEPTH:
            raise _refused(event, f"is nested deeper than {MAX_DEPTH} levels; flatten it")
        self._depth += 1
        value = self._mapping() if isinstance(event, yaml.MappingStartEvent) else self._list()
        self._depth -= 1
        return value

    def _list(self) -> list[Any]:
        return [self._value(event) for event in self._until(yaml.SequenceEndEvent)]

    def _mapping(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for event in self._until(yaml.MappingEndEvent):
            _refuse_extras(event)
            key = _scalar(event) if isinstance(event, yaml.ScalarEvent) else None
            if not isinstance(key, str):
                raise _refused(event, "has a key that is not text; write it in quotes")
            if key in found:
                raise _refused(event, f"has the key '{key[:80]}' a second time; keep one of them")
            found[key] = self._value(next(self._events))
        return found

    def _until(self, end: type[yaml.Event]) -> Iterator[yaml.Event]:
        while not isinstance(event := next(self._events), end):
            yield event


def _refuse_extras(event: yaml.Event) -> None:
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
        raise _refused(event, "uses an alias or anchor (* or &), which is not taken; write the value out, or quote it")
    tag = getattr(event, "tag", None)
    if tag is not None:
        raise _refused(event, f"uses the tag {tag[:80]!r}, which is not taken; leave it out, or quote the text")


def _scalar(event: yaml.ScalarEvent) -> Any:
    """Return what a scalar stands for; only plain (unquoted) text can be anything but text."""
    text: str = event.value
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text):
        raise _refused(event, "holds a character that no text can hold (NUL or half a surrogate pair); remove it")
    if event.style:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return _integer(event)
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan")) if _FLOAT.fullmatch(text) else text


def _integer(event: yaml.ScalarEvent) -> int:
    try:
        return int(event.value)
    except ValueError:  # Python reads no more than 4300 digits
        raise _refused(event, f"has a number of {len(event.value)} digits; shorten it, or quote it if it is text") from None


def _refused(event: yaml.Event, sentence: str) -> _Refused:
    return _Refused(f"{_position(event.start_mark)} {sentence}.")


def _position(mark: Any) -> str:
    return "" if mark is None else f":{mark.line + 1}:{mark.column + 1}"


def _problem(error: yaml.MarkedYAMLError, text: str) -> str:
    mark: Any = error.problem_mark
    line = text.split("\n")[mark.line : mark.line + 1] if mark else []
    if line and line[0][mark.column : mark.column + 1] == "\t":
        return "a tab stands where YAML takes only spaces; indent with spaces"
    began: Any = error.context_mark
    context = f" {error.context} (line {began.line + 1})" if error.context and began else ""
    return f"{error.problem or 'it cannot be read'}{context}"
