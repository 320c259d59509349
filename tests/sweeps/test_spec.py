"""A sweep file that cannot mean anything is refused in one sentence; every other is understood."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import BadInput
from infra.strict import parse
from sweeps.space import apply, grid, grid_size, space_digest, suggest
from sweeps.spec import SweepSpec, in_order, is_active, parse_duration
from tests.sweeps.curves import JOB, SPACE, sweep

RATE = {"type": "float", "low": 1e-5, "high": 1e-2, "log": True}


def sentence(**changes: Any) -> str:
    """What a person reads who wrote a sweep with these changes."""
    with pytest.raises(BadInput) as caught:
        parse(SweepSpec, {"name": "a", "job": JOB, "num_trials": 3, "space": SPACE, **changes}, "sweep.yaml")
    return str(caught.value)


def test_documented_sweep_is_understood() -> None:
    spec = parse(
        SweepSpec,
        {
            "name": "acme-support",
            "job": "job.yaml",
            "objective": {"metric": "eval/loss", "direction": "minimize"},
            "sampler": {"type": "tpe", "seed": 0},
            "pruner": {"type": "asha", "min_resource": 20, "reduction_factor": 3},
            "num_trials": 32,
            "max_concurrent": 16,
            "max_failures": 8,
            "time_budget": None,
            "enqueue": [{"peft.r": 16, "alpha_over_r": 2, "peft.target_modules": "all-linear", "training.learning_rate": 2e-4}],
            "space": {**SPACE, "peft.r": {"type": "categorical", "choices": [4, 8, 16, 32, 64]}},
            "register": {"task": "support", "alias": "challenger"},
        },
        "sweep.yaml",
    )
    assert spec.register_best is not None
    assert spec.register_best.alias == "challenger"
    with pytest.raises(BadInput, match="names its job by the path 'job.yaml'"):
        spec.base_job  # noqa: B018


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"space": {}}, "'space': the space is empty; name at least one dimension, such as peft.r."),
        ({"space": {"peft.rr": {"type": "int", "low": 1, "high": 2}}}, "unknown path 'peft.rr'; did you mean 'peft.r'?"),
        (
            {"space": {"data.train": {"type": "int", "low": 1, "high": 2}}},
            "unknown path 'data.train'; a sweep varies alpha_over_r and",
        ),
        ({"space": {"peft.r": {"type": "int", "low": 4, "high": 4}}}, "low (4) must be smaller than high (4)"),
        ({"space": {"training.weight_decay": {**RATE, "low": 0.0}}}, "a logarithmic scale needs low above 0, got 0.0"),
        ({"space": {"peft.r": {"type": "int", "low": 2, "high": 8, "log": True, "step": 2}}}, "takes no step, got 2"),
        ({"space": {"peft.r": {"type": "categorical", "choices": []}}}, "the list is empty; give at least one choice"),
        ({"space": {"peft.r": {"type": "categorical", "choices": [4, 4]}}}, "the choice 4 stands twice"),
        ({"space": {"peft.use_rslora": {"type": "categorical", "choices": [True, 1]}}}, "the choice 1 stands twice"),
        (
            {"space": {"peft.r": {"type": "categorical", "choices": [4, "x"]}}},
            "peft.r: 'x' cannot stand there: it should be a valid integer",
        ),
        ({"space": {"peft.r": {"type": "categorical", "choices": [{"a": 1}]}}}, "'space.peft.r.choices.0': "),
        ({"space": {"training.lr_scheduler_type": {"type": "categorical", "choices": ["cosin"]}}}, "it should be 'constant', "),
        (
            {"space": {"training.learning_rate": {"type": "float", "low": -1.0, "high": 1.0}}},
            "-1.0 cannot stand there: it should be greater",
        ),
        ({"space": {"alpha_over_r": {"type": "categorical", "choices": [0, 1]}}}, "alpha_over_r: 0 is not a ratio"),
        (
            {
                "space": {
                    "alpha_over_r": {"type": "int", "low": 1, "high": 2},
                    "peft.lora_alpha": {"type": "int", "low": 1, "high": 2},
                }
            },
            "alpha_over_r and peft.lora_alpha both set lora_alpha; keep one of them",
        ),
        ({"space": {"peft.r": {"type": "categorical"}}}, "the key 'space.peft.r.choices' is missing; add it."),
        (
            {"space": {"peft.r": {"type": "categorical", "choises": [1]}}},
            "unknown key 'space.peft.r.choises'. Did you mean 'choices'? (1 more mistake follows.)",
        ),
        ({"space": {"peft.r": {"choices": [1]}}}, "the key 'space.peft.r.type' is missing; add it."),
        (
            {"space": {"peft.r": {"type": "choice", "choices": [1]}}},
            "'space.peft.r.type': should be one of 'categorical', 'float', 'int', got 'choice'.",
        ),
        (
            {"space": {"peft": {"r": {"type": "int", "low": 1, "high": 2}}}},
            "'space': 'peft' is no dimension; write the whole path as one key, as in 'peft.r: {type: ...}'.",
        ),
        ({"space": {"training": None}}, "as in 'training.learning_rate: {type: ...}'."),
        (
            {"space": {"training.learning_rate": {**RATE, "when": {"peft.r": [8]}}}},
            "'when' names 'peft.r', which is not another categorical",
        ),
        (
            {"space": {**SPACE, "training.learning_rate": {**RATE, "when": {"peft.r": [5]}}}},
            "'when' names 5, which is not among the choices of peft.r ([4, 8, 16, 64])",
        ),
        (
            {
                "space": {
                    "peft.r": {"type": "categorical", "choices": [4, 8], "when": {"alpha_over_r": [1]}},
                    "alpha_over_r": {"type": "categorical", "choices": [1, 2], "when": {"peft.r": [4]}},
                }
            },
            "the conditions of alpha_over_r, peft.r depend on one another; remove one 'when'",
        ),
        ({"enqueue": [{"peft.rank": 4}]}, "point 0 names 'peft.rank', which is not in the space; did you mean 'peft.r'?"),
        ({"enqueue": [{}, {"peft.r": 5}]}, "point 1: peft.r = 5 lies outside the space ([4, 8, 16, 64])"),
        ({"enqueue": [{"training.learning_rate": 1.0}]}, "training.learning_rate = 1.0 lies outside the space (1e-05 to 0.01)"),
        (
            {"enqueue": [{"peft.target_modules": "attention", "peft.lora_dropout": 0.0}]},
            "has no effect where peft.target_modules is 'attention'; leave it out",
        ),
        ({"sampler": {"type": "grid"}}, "a grid needs a finite number of values; give training.learning_rate a step or choices"),
        ({"objective": []}, "'objective': needs one or more different metrics"),
        ({"objective": {"metrik": "a"}}, "unknown key 'objective.metrik'. Did you mean 'metric'?"),
        (
            {"objective": [{"metric": "a"}, {"metric": "b"}], "pruner": {"type": "asha"}},
            "trials cannot be pruned by several objectives",
        ),
        ({"time_budget": "6 hours"}, "'time_budget': '6 hours' is not a duration; write a number and one of s, m, h, d"),
        ({"num_trials": 0}, "'num_trials': should be greater than 0, got int 0"),
        ({"name": "../x"}, "'../x' is not a name"),
        ({"register": {"alias": "latest"}}, "'latest' is reserved by the registry"),
        ({"job": {**JOB, "tennant": "x"}}, "unknown key 'job.tennant'. Did you mean 'tenant'?"),
        (
            {"job": {**JOB, "peft": {"target_modules": "attn"}}},
            "'job.peft.target_modules': should be 'attention', 'mlp' or 'all-linear', got str 'attn'.",
        ),
        ({"job": {**JOB, "peft": {"target_modules": ["q.*"]}}}, "'job.peft.target_modules.0': 'q.*' is not a module name; list"),
        ({"num_trails": 3}, "unknown key 'num_trails'. Did you mean 'num_trials'?"),
    ],
)
def test_mistake_gets_its_sentence(changes: dict[str, Any], expected: str) -> None:
    assert expected.lower() in sentence(**changes).lower()


def test_durations_are_read_in_their_units() -> None:
    assert [parse_duration(text) for text in ("90s", "30m", "6h", "1.5d")] == [90.0, 1800.0, 21600.0, 129600.0]


def test_asha_brings_its_evaluations_unless_the_job_has_its_own() -> None:
    asha = {"type": "asha", "min_resource": 7}
    assert sweep().base_job.training.eval_steps is None
    assert sweep(pruner=asha).base_job.training.eval_steps == 7
    assert sweep(pruner=asha, job={**JOB, "training": {"eval_steps": 3}}).base_job.training.eval_steps == 3


def test_values_are_put_into_the_job() -> None:
    job = apply(sweep().base_job, {"peft.r": 8, "alpha_over_r": 2, "peft.target_modules": '["q_proj", "v_proj"]'})
    assert (job.peft.r, job.peft.lora_alpha, job.peft.target_modules) == (8, 16, ["q_proj", "v_proj"])
    assert apply(sweep().base_job, {"alpha_over_r": 0.5}).peft.lora_alpha == 8.0
    with pytest.raises(BadInput, match="trial: 'peft.r'"):
        apply(sweep().base_job, {"peft.r": 0})


def test_grid_has_each_point_once_and_no_inactive_values() -> None:
    space = {
        "peft.target_modules": {"type": "categorical", "choices": ["attention", "mlp"]},
        "peft.lora_dropout": {"type": "float", "low": 0.0, "high": 0.2, "step": 0.1, "when": {"peft.target_modules": ["mlp"]}},
        "peft.r": {"type": "int", "low": 4, "high": 12, "step": 4},
    }
    spec = sweep(space=space, sampler={"type": "grid"})
    points = list(grid(spec.space))
    assert len(points) == grid_size(spec.space) == 3 + 3 * 3
    assert len({tuple(sorted(point.items())) for point in points}) == len(points)
    assert all(("peft.lora_dropout" in point) == (point["peft.target_modules"] == "mlp") for point in points)
    assert sorted({point["peft.r"] for point in points}) == [4, 8, 12]


class LowestOrFirst:
    """Answers every suggestion with the low end."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return choices[0]

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        return low

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        return low


@st.composite
def spaces(draw: st.DrawFn) -> dict[str, Any]:
    """Spaces as a person may write them, with conditions on categorical dimensions drawn before."""
    space: dict[str, Any] = {}
    for path, kind in draw(st.permutations(list(DIMENSIONS.items()))):
        parents = [name for name, dimension in space.items() if dimension["type"] == "categorical"]
        dimension = dict(draw(kind))
        if parents and draw(st.booleans()):
            parent = draw(st.sampled_from(parents))
            dimension["when"] = {parent: draw(st.lists(st.sampled_from(space[parent]["choices"]), min_size=1, max_size=2))}
        space[path] = dimension
    return dict(draw(st.permutations(list(space.items()))))


DIMENSIONS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "peft.r": st.lists(st.integers(1, 512), min_size=1, max_size=4, unique=True).map(
        lambda c: {"type": "categorical", "choices": c}
    ),
    "peft.use_rslora": st.just({"type": "categorical", "choices": [False, True]}),
    "training.lr_scheduler_type": st.just({"type": "categorical", "choices": ["cosine", "linear"]}),
    "training.max_length": st.tuples(st.integers(1, 50), st.integers(51, 99)).map(
        lambda b: {"type": "int", "low": b[0], "high": b[1]}
    ),
    "training.weight_decay": st.floats(0.001, 0.5).map(lambda low: {"type": "float", "low": low, "high": low + 1, "log": True}),
}


@given(space=spaces())
def test_every_sound_space_is_accepted_and_suggests_values_that_make_a_job(space: dict[str, Any]) -> None:
    spec = sweep(space=space)
    params = suggest(LowestOrFirst(), spec.space)
    for path, dimension in spec.space.items():
        assert (path in params) == is_active(dimension, {name: params[name] for name in params if name != path})
    apply(spec.base_job, params)
    positions = {path: index for index, path in enumerate(in_order(spec.space))}
    assert all(positions[other] < positions[path] for path, dimension in spec.space.items() for other in dimension.when)


@given(space=spaces(), order=st.randoms(use_true_random=False))
def test_order_of_the_file_alters_nothing(space: dict[str, Any], order: Any) -> None:
    items = list(space.items())
    order.shuffle(items)
    one, other = sweep(space=space), sweep(space=dict(items))
    assert in_order(one.space) == in_order(other.space)
    assert space_digest(one.space) == space_digest(other.space)
