"""What is wrong with a sweep is found before its first trial."""

import pytest

from infra.errors import BadInput
from pipelines.sweep import _check_measured
from sweeps.spec import SweepSpec
from tests.workers.test_attempt import SPEC, a_job


def test_a_sweep_that_could_measure_nothing_is_refused() -> None:
    space = {"peft.r": {"type": "categorical", "choices": [2, 4]}}
    spec = SweepSpec.model_validate({"name": "blind", "job": SPEC.model_dump(mode="json"), "num_trials": 2, "space": space})
    with pytest.raises(BadInput, match=r"data\.validation"):
        _check_measured(spec, a_job())
