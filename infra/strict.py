"""Strict, frozen models for what people write, and the sentence each mistake in them gets.

Unknown keys are refused with their path and a did-you-mean; types are not coerced, except int to float.
"""

import difflib
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from infra.errors import BadInput

Model = TypeVar("Model", bound=BaseModel)


class StrictModel(BaseModel):
    """Base of every spec: frozen, unknown keys refused, no silent coercion, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def parse(model: type[Model], raw: Any, source: str) -> Model:
    """Build `model` from plain data read from `source` (a file name); raise BadInput with one sentence if it is wrong."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise BadInput(f"{source}: {_sentence(model, raw, error)}") from None


def _sentence(model: type[BaseModel], raw: Any, error: ValidationError) -> str:
    mistakes = error.errors()
    paths = [_path(raw, mistake) for mistake in mistakes]
    place = _most_telling(mistakes, paths)
    told, path = mistakes[place], paths[place] or "the document"
    num_more = len({other for other in paths if not _is_within(paths[place], other)})
    more = f" ({num_more} more {'mistakes follow' if num_more > 1 else 'mistake follows'}.)" if num_more else ""
    if told["type"] == "extra_forbidden":
        known = sorted(_fields_at(model, told["loc"][:-1]))
        close = difflib.get_close_matches(str(told["loc"][-1]), known, n=1)
        hint = f"Did you mean '{close[0]}'?" if close else f"Known keys here: {', '.join(known)}."
        return f"unknown key '{path}'. {hint}{more}"
    if told["type"] in ("missing", "union_tag_not_found"):
        return f"the key '{path}' is missing; add it.{more}"
    return f"'{path}': {_complaint(told)}.{more}"


def _complaint(mistake: Any) -> str:
    message = mistake["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removesuffix(".")
    if mistake["type"] == "value_error":
        return message
    if mistake["type"] == "union_tag_invalid":
        return f"should be one of {mistake['ctx']['expected_tags']}, got '{mistake['ctx']['tag']}'"
    return f"should be {message}, got {_shown(mistake['input'])}"


def _path(raw: Any, mistake: Any) -> str:
    """Return where a mistake is, as a person wrote it: pydantic's own names for the members of a union are left out."""
    parts, current = [], raw
    for part in mistake["loc"]:
        if part in current if isinstance(current, dict) else isinstance(current, list) and isinstance(part, int):
            current = current[part]
            parts.append(str(part))
    if mistake["type"] == "missing":
        parts.append(str(mistake["loc"][-1]))
    if mistake["type"].startswith("union_tag"):
        parts.append(mistake["ctx"]["discriminator"].strip("'"))
    return ".".join(parts)


def _most_telling(mistakes: Sequence[Any], paths: Sequence[str]) -> int:
    """Return the place of the mistake to tell: a misspelt key before the key that it leaves missing, otherwise the first.

    Where all members of a union refuse a value, it is the one that looked deepest into it.
    """
    unknown = [place for place, mistake in enumerate(mistakes) if mistake["type"] == "extra_forbidden"]
    first = unknown[0] if unknown else 0
    return max((place for place, path in enumerate(paths) if _is_within(path, paths[first])), key=lambda place: len(paths[place]))


def _is_within(path: str, above: str) -> bool:
    return path == above or path.startswith(f"{above}.")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'…' if len(text) > 60 else ''}"


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> set[str]:
    """Names of the fields that may stand at the path `loc` below `model`."""
    current: list[Any] = [model]
    for part in loc:
        step: list[Any] = []
        for candidate in current:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel) and part in candidate.model_fields:
                step += _models_in(candidate.model_fields[str(part)].annotation)
        current = step or current
    return {name for candidate in current for name in candidate.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models_in(argument)]
