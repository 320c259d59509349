"""From a space to a job: suggest values, enumerate a grid, put values into a job.

Works on anything with Optuna's three `suggest_*` methods, so it needs no Optuna itself.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from infra.fingerprint import id_of_json
from infra.strict import parse
from sweeps.spec import (
    ALPHA_OVER_R,
    CategoricalSpec,
    DimensionSpec,
    FloatSpec,
    Scalar,
    decode_choice,
    encode_choice,
    in_order,
    is_active,
)
from workers.spec import JobSpec

Params = dict[str, Scalar]
"""Values of the active dimensions by path, as the ledger and Optuna keep them (lists as JSON text)."""


class Suggests(Protocol):
    """What a trial offers to a space (optuna.Trial does)."""

    def suggest_categorical(self, name: str, choices: Any, /) -> Any: ...

    def suggest_float(self, name: str, low: float, high: float, /, *, step: float | None, log: bool) -> float: ...

    def suggest_int(self, name: str, low: int, high: int, /, *, step: int, log: bool) -> int: ...


def suggest(trial: Suggests, space: Mapping[str, DimensionSpec]) -> Params:
    """Ask the trial for a value of every dimension whose conditions hold, in the order of `in_order`."""
    params: Params = {}
    for path in in_order(space):
        if is_active(space[path], params):
            params[path] = _suggest_one(trial, path, space[path])
    return params


def grid(space: Mapping[str, DimensionSpec]) -> Iterator[Params]:
    """Yield every point of a finite space once, the last dimension changing fastest."""
    yield from _grid_from(in_order(space), space, {})


def grid_size(space: Mapping[str, DimensionSpec]) -> int:
    """Return how many points `grid` yields."""
    return sum(1 for _ in grid(space))


def apply(job: JobSpec, params: Mapping[str, Scalar]) -> JobSpec:
    """Return a copy of `job` with a trial's values in it, checked anew. Raises BadInput if they do not go together."""
    body = job.model_dump(mode="json")
    for path, value in params.items():
        if path != ALPHA_OVER_R:
            section, field = path.split(".")
            body[section][field] = decode_choice(path, value)
    if ALPHA_OVER_R in params:
        body["peft"]["lora_alpha"] = params[ALPHA_OVER_R] * body["peft"]["r"]
    return parse(JobSpec, body, "trial")


def space_digest(space: Mapping[str, DimensionSpec]) -> str:
    """Return the id of a space; the order in which its dimensions are written does not matter."""
    return id_of_json({path: dimension.model_dump(mode="json") for path, dimension in space.items()})


def _suggest_one(trial: Suggests, path: str, dimension: DimensionSpec) -> Scalar:
    if isinstance(dimension, CategoricalSpec):
        return trial.suggest_categorical(path, [encode_choice(choice) for choice in dimension.choices])
    if isinstance(dimension, FloatSpec):
        return trial.suggest_float(path, dimension.low, dimension.high, step=dimension.step, log=dimension.log)
    return trial.suggest_int(path, dimension.low, dimension.high, step=dimension.step, log=dimension.log)


def _grid_from(paths: list[str], space: Mapping[str, DimensionSpec], chosen: Params) -> Iterator[Params]:
    if not paths:
        yield dict(chosen)
        return
    path, rest = paths[0], paths[1:]
    if not is_active(space[path], chosen):
        yield from _grid_from(rest, space, chosen)
        return
    for value in _values(space[path]):
        yield from _grid_from(rest, space, {**chosen, path: value})


def _values(dimension: DimensionSpec) -> list[Any]:
    if isinstance(dimension, CategoricalSpec):
        return [encode_choice(choice) for choice in dimension.choices]
    assert dimension.step is not None, "a grid of a float without a step is refused by the spec"
    num_steps = int((dimension.high - dimension.low) / dimension.step + 1e-8)
    # Multiplied, not added up, so that rounding does not accumulate.
    return [dimension.low + index * dimension.step for index in range(num_steps + 1)]
