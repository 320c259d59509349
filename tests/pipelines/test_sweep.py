"""What is wrong with a sweep is found before its first trial."""

from dataclasses import replace
from pathlib import Path

import pytest

from infra.errors import BadInput
from infra.local_storage import LocalStorage
from pipelines.journal import Candidate, register_candidate
from pipelines.sweep import check_measured, reference_to
from sweeps.spec import SweepSpec
from tests.workers.test_attempt import SPEC, a_job


def test_a_sweep_that_could_measure_nothing_is_refused() -> None:
    space = {"peft.r": {"type": "categorical", "choices": [2, 4]}}
    spec = SweepSpec.model_validate({"name": "blind", "job": SPEC.model_dump(mode="json"), "num_trials": 2, "space": space})
    with pytest.raises(BadInput, match=r"data\.validation"):
        check_measured(spec, a_job())


def test_a_best_whose_alias_a_later_sweep_has_taken_is_named_by_its_id(tmp_path: Path) -> None:
    store = LocalStorage(tmp_path)
    offered = Candidate(adapter_id="a" * 32, base_id="c" * 32, job_id=None, sweep="first", metrics={}, registered=1.0)
    register_candidate(store, "acme", "support", offered)
    assert reference_to(store, "acme.support@challenger", "a" * 32) == "acme.support@challenger"
    register_candidate(store, "acme", "support", replace(offered, adapter_id="b" * 32, sweep="second", registered=2.0))
    assert reference_to(store, "acme.support@challenger", "a" * 32) == "a" * 32
    assert reference_to(store, "acme.support@challenger", "b" * 32) == "acme.support@challenger"
