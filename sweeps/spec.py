"""What people write to ask for a sweep: the sweep spec.

Pydantic only: reading a sweep loads neither Optuna nor torch. What can be told from the file alone is checked here, while the
person still knows what they typed; what needs the base model (a rank larger than a layer) turns up as an infeasible trial.
"""

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from infra.errors import BadInput
from infra.strict import StrictModel
from workers.spec import JobSpec, ModuleName, Name, PeftSpec, Positive, TrainingSpec

ALPHA_OVER_R = "alpha_over_r"
"""Dimension that is no path of a job: lora_alpha = alpha_over_r * r."""
TARGET_MODULES = "peft.target_modules"
_SWEPT_SECTIONS: dict[str, type[StrictModel]] = {"peft": PeftSpec, "training": TrainingSpec}
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

Scalar = None | bool | int | float | str
Choice = Scalar | list[ModuleName]
When = Annotated[
    dict[str, list[Choice]],
    Field(description="Only where these categorical dimensions have one of these values; empty: always."),
]


def encode_choice(value: Any) -> Scalar:
    """Return a choice as Optuna and the ledger keep it: a list of module names becomes its JSON text."""
    return json.dumps(value) if isinstance(value, list) else value


def decode_choice(path: str, value: Scalar) -> Any:
    """Return what stands in a job for an encoded choice."""
    is_list = path == TARGET_MODULES and isinstance(value, str) and value.startswith("[")
    return json.loads(value) if is_list else value  # type: ignore[arg-type]


class CategoricalSpec(StrictModel):
    """One of several values, without an order."""

    type: Literal["categorical"] = Field(description="Kind of dimension.")
    choices: list[Choice] = Field(description="The values; for peft.target_modules presets or lists of module names.")
    when: When = Field(default_factory=dict)

    @field_validator("choices")
    @classmethod
    def _some_and_no_twins(cls, choices: list[Choice]) -> list[Choice]:
        if not choices:
            raise ValueError("the list is empty; give at least one choice")
        for index, choice in enumerate(choices):
            if choice in choices[:index]:
                raise ValueError(f"the choice {choice!r} stands twice (or equals an earlier one); remove one")
        return choices


class FloatSpec(StrictModel):
    """A real number in [low, high]."""

    type: Literal["float"] = Field(description="Kind of dimension.")
    low: float = Field(description="Smallest value.")
    high: float = Field(description="Largest value.")
    log: bool = Field(False, description="Search on a logarithmic scale.")
    step: Annotated[float, Field(gt=0)] | None = Field(None, description="Distance of allowed values from low on; None: any.")
    when: When = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_range(self) -> "FloatSpec":
        _check_range(self)
        return self


class IntSpec(StrictModel):
    """A whole number in [low, high]."""

    type: Literal["int"] = Field(description="Kind of dimension.")
    low: int = Field(description="Smallest value.")
    high: int = Field(description="Largest value.")
    log: bool = Field(False, description="Search on a logarithmic scale.")
    step: Positive = Field(1, description="Distance of allowed values from low on.")
    when: When = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_range(self) -> "IntSpec":
        _check_range(self)
        return self


DimensionSpec = Annotated[CategoricalSpec | FloatSpec | IntSpec, Field(discriminator="type")]


class ObjectiveSpec(StrictModel):
    """What makes one trial better than another."""

    metric: str = Field(min_length=1, description="Path of a metric of the kept weights, such as eval/loss.")
    direction: Literal["minimize", "maximize"] = Field("minimize", description="Which way is better.")


class SamplerSpec(StrictModel):
    """How the next point is chosen."""

    type: Literal["tpe", "random", "grid"] = Field("tpe", description="Optuna's TPE, uniform random, or every point in order.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="Seed of the suggestions.")


class PrunerSpec(StrictModel):
    """Which trials end early."""

    type: Literal["asha", "none"] = Field("none", description="Asynchronous successive halving, or none.")
    min_resource: Positive = Field(20, description="Optimiser steps before the first rung.")
    reduction_factor: Annotated[int, Field(ge=2)] = Field(3, description="One of so many trials passes a rung.")


class RegisterSpec(StrictModel):
    """Where the best adapter is registered."""

    task: Name | None = Field(None, description="Task of the registered model; None: the job's task.")
    alias: Name = Field("challenger", description="Alias that the best adapter gets.")

    @field_validator("alias")
    @classmethod
    def _is_free(cls, alias: str) -> str:
        if alias in ("champion", "previous"):
            raise ValueError(f"{alias!r} is moved by promote and rollback only; use 'challenger'")
        if alias == "latest" or re.fullmatch(r"v\d+", alias):
            raise ValueError(f"{alias!r} is reserved by the registry; use 'challenger'")
        return alias


def _kind_of_job(value: Any) -> str:
    return "path" if isinstance(value, str) else "inline"


def _kind_of_objective(value: Any) -> str:
    return "several" if isinstance(value, list) else "one"


class SweepSpec(StrictModel):
    """A search over adapters of one base and one customer's data."""

    name: Name = Field(description="Name of the sweep within its tenant; the same name continues it.")
    job: Annotated[Annotated[JobSpec, Tag("inline")] | Annotated[str, Tag("path")], Discriminator(_kind_of_job)] = Field(
        description="The job that trials vary: inline, or the path of its file."
    )
    objective: Annotated[
        Annotated[ObjectiveSpec, Tag("one")] | Annotated[list[ObjectiveSpec], Tag("several")],
        Discriminator(_kind_of_objective),
    ] = Field(ObjectiveSpec(metric="eval/loss", direction="minimize"), description="One objective, or a list of several.")
    space: dict[str, DimensionSpec] = Field(description="What is varied: path in the job, or alpha_over_r.")
    sampler: SamplerSpec = Field(SamplerSpec(type="tpe", seed=0), description="How the next point is chosen.")
    pruner: PrunerSpec = Field(
        PrunerSpec(type="none", min_resource=20, reduction_factor=3), description="Which trials end early."
    )
    num_trials: Positive = Field(description="Trials in total, also after a resume; infeasible and failed ones count.")
    max_concurrent: Positive = Field(1, description="Trials that live at the same time, at most.")
    max_failures: Annotated[int, Field(ge=0)] = Field(
        8, description="With more failed trials than this no further one is asked for."
    )
    time_budget: str | None = Field(
        None,
        description="Running time, summed over resumes, after which no trial is asked for any more (90s, 6h); None: unlimited.",
    )
    enqueue: list[dict[str, Choice]] = Field(
        default_factory=list, description="Points to try first; what they leave open is sampled."
    )
    # Not the attribute's name: a class of pydantic has a method called register.
    register_best: RegisterSpec | None = Field(
        None, alias="register", description="Where the best adapter is registered; None: nowhere."
    )

    @property
    def objectives(self) -> list[ObjectiveSpec]:
        """The objectives as a list, also if there is one."""
        return self.objective if isinstance(self.objective, list) else [self.objective]

    @property
    def time_budget_seconds(self) -> float | None:
        """The time budget in seconds, None if unlimited."""
        return None if self.time_budget is None else parse_duration(self.time_budget)

    @property
    def base_job(self) -> JobSpec:
        """The job before any trial's values. With ASHA it is evaluated every `min_resource` steps unless it says otherwise.

        Raises BadInput while `job` is still a path: whoever read the sweep file reads that one too.
        """
        if isinstance(self.job, str):
            raise BadInput(f"The sweep '{self.name}' still names its job by the path {self.job!r}; read that file first.")
        if self.pruner.type == "none" or self.job.training.eval_steps is not None:
            return self.job
        training = self.job.training.model_copy(update={"eval_steps": self.pruner.min_resource})
        return self.job.model_copy(update={"training": training})

    @field_validator("objective")
    @classmethod
    def _names_objectives(cls, objective: ObjectiveSpec | list[ObjectiveSpec]) -> ObjectiveSpec | list[ObjectiveSpec]:
        metrics = [one.metric for one in objective] if isinstance(objective, list) else [objective.metric]
        if not metrics or len(set(metrics)) < len(metrics):
            raise ValueError(
                f"needs one or more different metrics, got {metrics}; write {{metric: eval/loss, direction: minimize}}"
            )
        return objective

    @field_validator("space", mode="before")
    @classmethod
    def _paths_are_whole(cls, space: Any) -> Any:
        written = space if isinstance(space, dict) else {}
        for section, model in _SWEPT_SECTIONS.items():
            if section in written:
                below = written[section] if isinstance(written[section], dict) else {}
                example = f"{section}.{next(iter(below or model.model_fields))}"
                raise ValueError(
                    f"'{section}' is no dimension; write the whole path as one key, as in '{example}: {{type: ...}}'"
                )
        return space

    @field_validator("space")
    @classmethod
    def _space_is_sound(cls, space: dict[str, DimensionSpec]) -> dict[str, DimensionSpec]:
        if not space:
            raise ValueError("the space is empty; name at least one dimension, such as peft.r")
        for path, dimension in space.items():
            _check_path(path)
            _check_values(path, dimension)
            _check_conditions(path, dimension, space)
        if ALPHA_OVER_R in space and "peft.lora_alpha" in space:
            raise ValueError("alpha_over_r and peft.lora_alpha both set lora_alpha; keep one of them")
        in_order(space)
        return space

    @field_validator("sampler")
    @classmethod
    def _grid_is_finite(cls, sampler: SamplerSpec, info: ValidationInfo) -> SamplerSpec:
        if sampler.type == "grid":
            for path, dimension in info.data.get("space", {}).items():
                _check_countable(path, dimension)
        return sampler

    @field_validator("pruner")
    @classmethod
    def _prunes_one_objective(cls, pruner: PrunerSpec, info: ValidationInfo) -> PrunerSpec:
        if pruner.type != "none" and isinstance(info.data.get("objective"), list) and len(info.data["objective"]) > 1:
            raise ValueError("trials cannot be pruned by several objectives; set pruner to {type: none} or name one objective")
        return pruner

    @field_validator("time_budget")
    @classmethod
    def _is_duration(cls, text: str | None) -> str | None:
        if text is not None:
            parse_duration(text)
        return text

    @field_validator("enqueue")
    @classmethod
    def _points_lie_in_space(cls, points: list[dict[str, Choice]], info: ValidationInfo) -> list[dict[str, Choice]]:
        space = info.data.get("space", {})
        for number, point in enumerate(points):
            for path, value in point.items():
                _check_enqueued(number, path, value, space)
            _check_activity(number, point, space)
        return points


def parse_duration(text: str) -> float:
    """Return the seconds of a text such as 90s, 30m, 6h or 1.5d. Raises ValueError with the rule."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{text!r} is not a duration; write a number and one of s, m, h, d, such as 90s or 6h")
    return float(match[1]) * _SECONDS[match[2]]


def in_order(space: Mapping[str, DimensionSpec]) -> list[str]:
    """Return the paths so that each comes after those it depends on, by name otherwise: the order of suggestions.

    It does not depend on the order in the file, so that re-ordering the file changes nothing. Raises ValueError on a cycle.
    """
    ordered: list[str] = []
    open_paths = sorted(space)
    while open_paths:
        ready = next((path for path in open_paths if set(space[path].when) <= set(ordered)), None)
        if ready is None:
            raise ValueError(f"the conditions of {', '.join(open_paths)} depend on one another; remove one 'when'")
        ordered.append(ready)
        open_paths.remove(ready)
    return ordered


def is_active(dimension: DimensionSpec, chosen: Mapping[str, Scalar]) -> bool:
    """Tell whether a dimension's conditions hold, given the values chosen for those before it (inactive ones absent)."""
    return all(
        path in chosen and chosen[path] in [encode_choice(value) for value in values] for path, values in dimension.when.items()
    )


def sweepable_paths() -> dict[str, FieldInfo]:
    """Return the dotted paths of a job that a sweep may vary, with their fields."""
    return {
        f"{section}.{name}": field for section, model in _SWEPT_SECTIONS.items() for name, field in model.model_fields.items()
    }


def _check_range(dimension: FloatSpec | IntSpec) -> None:
    if dimension.low >= dimension.high:
        raise ValueError(f"low ({dimension.low}) must be smaller than high ({dimension.high})")
    if dimension.log and dimension.low <= 0:
        raise ValueError(f"a logarithmic scale needs low above 0, got {dimension.low}")
    if dimension.log and dimension.step not in (None, 1):
        raise ValueError(f"a logarithmic scale takes no step, got {dimension.step}; drop log or step")


def _check_path(path: str) -> None:
    known = [*sweepable_paths(), ALPHA_OVER_R]
    if path in known:
        return
    close = difflib.get_close_matches(path, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"a sweep varies alpha_over_r and {', '.join(sorted(sweepable_paths()))}"
    raise ValueError(f"unknown path '{path}'; {hint}")


def _check_values(path: str, dimension: DimensionSpec) -> None:
    values: Sequence[Any] = dimension.choices if isinstance(dimension, CategoricalSpec) else [dimension.low, dimension.high]
    for value in values:
        _check_value(path, value)


def _check_value(path: str, value: Any) -> None:
    if path == ALPHA_OVER_R:
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{path}: {value!r} is not a ratio; use numbers above 0")
        return
    field = sweepable_paths()[path]
    try:
        # The field's own type with its bounds, so that the rule stands in the job spec alone.
        adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, *field.metadata, Field()])  # type: ignore[arg-type]
        adapter.validate_python(value, strict=True)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ").removeprefix("Input ")
        raise ValueError(f"{path}: {value!r} cannot stand there: it {message}") from None


def _check_conditions(path: str, dimension: DimensionSpec, space: Mapping[str, DimensionSpec]) -> None:
    for other, values in dimension.when.items():
        parent = space.get(other)
        if not isinstance(parent, CategoricalSpec) or other == path:
            raise ValueError(f"{path}: 'when' names '{other}', which is not another categorical dimension of this space")
        for value in values:
            if value not in parent.choices:
                raise ValueError(f"{path}: 'when' names {value!r}, which is not among the choices of {other} ({parent.choices})")


def _check_countable(path: str, dimension: DimensionSpec) -> None:
    if isinstance(dimension, FloatSpec) and dimension.step is None:
        raise ValueError(f"a grid needs a finite number of values; give {path} a step or choices")
    if isinstance(dimension, IntSpec) and dimension.log:
        raise ValueError(f"a grid has no logarithmic scale; give {path} choices instead")


def _check_enqueued(number: int, path: str, value: Any, space: Mapping[str, DimensionSpec]) -> None:
    dimension = space.get(path)
    if dimension is None:
        close = difflib.get_close_matches(path, space, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(space)}"
        raise ValueError(f"point {number} names '{path}', which is not in the space; {hint}")
    if not _contains(dimension, value):
        allowed = dimension.choices if isinstance(dimension, CategoricalSpec) else f"{dimension.low} to {dimension.high}"
        raise ValueError(f"point {number}: {path} = {value!r} lies outside the space ({allowed})")


def _check_activity(number: int, point: Mapping[str, Any], space: Mapping[str, DimensionSpec]) -> None:
    for path in point:
        for other, values in space[path].when.items():
            if other in point and point[other] not in values:
                raise ValueError(
                    f"point {number} names '{path}', which has no effect where {other} is {point[other]!r}; leave it out"
                )


def _contains(dimension: DimensionSpec, value: Any) -> bool:
    if isinstance(dimension, CategoricalSpec):
        return any(value == choice and type(value) is type(choice) for choice in dimension.choices)
    if isinstance(value, bool) or not isinstance(value, int if isinstance(dimension, IntSpec) else int | float):
        return False
    if not dimension.low <= value <= dimension.high:
        return False
    steps = 0.0 if dimension.step is None else (value - dimension.low) / dimension.step
    return math.isclose(steps, round(steps), abs_tol=1e-8)
