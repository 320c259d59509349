"""Strict, frozen models for what people write, and the sentence each mistake in them gets.

Unknown keys are refused with their path and a did-you-mean; types are not coerced, except int to float.
"""

import difflib
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
        raise BadInput(f"{source}: {_sentence(model, error)}") from None


def _sentence(model: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"]) or "the document"
    more = f" ({error.error_count() - 1} more mistakes follow.)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = sorted(_fields_at(model, first["loc"][:-1]))
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"Did you mean '{close[0]}'?" if close else f"Known keys here: {', '.join(known)}."
        return f"unknown key '{path}'. {hint}{more}"
    if first["type"] == "missing":
        return f"the key '{path}' is missing; add it.{more}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removesuffix(".")
    lead = "" if first["type"] == "value_error" else "should be "
    came = "" if first["type"] == "value_error" else f", got {_shown(first['input'])}"
    return f"'{path}': {lead}{message}{came}.{more}"


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
