"""Neighbours in a pack whose numbers go wrong change nobody else's bits."""

import math

import pytest

from tests.workers.engine.company import Company, Job, base_of, job_of, varied_jobs
from workers.engine.pack import Pack


def poisoned(job: Job, value: float, places: int) -> Job:
    """The job, started from weights of which the first `places` of each factor are `value`."""
    tensors = Pack(base_of("llama")).join(job.peft, job.training, job.train, job.validation).kept_tensors()
    for tensor in tensors.values():
        tensor.view(-1)[:places] = value
    return Job(job.peft, job.training, job.train, job.validation, init=tensors)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("places", [1, 1_000_000])
def test_a_neighbour_with_weights_that_are_no_numbers_changes_nobody(value: float, places: int) -> None:
    jobs, alone = varied_jobs("llama", 8)
    company = Company(base_of("llama"), [*jobs, poisoned(jobs[0], value, places), poisoned(jobs[5], value, places)])
    for number in (8, 2, 5, 9, 0):  # poisoned rows stand between the others
        company.join(number)
    assert company.finish()[:8] == alone
    assert "skipped=True" in company.outcomes[8].steps[0]


@pytest.mark.parametrize("rate", [1e30, 1e300])
def test_a_neighbour_whose_learning_rate_explodes_changes_nobody(rate: float) -> None:
    jobs, alone = varied_jobs("llama", 8)
    wild = [
        job_of(9, data=number, learning_rate=rate, lr_scheduler_type="constant", max_steps=7, weight_decay=0.1, r=r)
        for number, r in enumerate([4, 16])
    ]
    company = Company(base_of("llama"), [wild[0], *jobs, wild[1]])
    assert company.finish()[1:9] == alone
    assert "skipped=True" in company.outcomes[0].steps[-1]


def test_rows_that_a_poisoned_neighbour_leaves_are_clean_for_the_next() -> None:
    jobs, alone = varied_jobs("llama", 8)
    bad = [poisoned(job, math.nan, 1_000_000) for job in jobs]
    company = Company(base_of("llama"), [*jobs, *bad])
    for number in range(8, 16):
        company.join(number)
    company.advance(range(8, 16))
    company.advance(range(8, 12))
    for number in range(8, 16):
        company.preempt(number)
        company.join(number - 8)
    while company.live:
        company.advance(list(company.live))
    assert [company.outcomes[number] for number in range(8)] == alone
