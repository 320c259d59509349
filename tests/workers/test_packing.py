"""Fair shares and the size of passes: nobody starves, nobody waits without bound, and the knee is found."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.packing import MAX_WAIT_PASSES, SAMPLES, Candidate, Share, TokenBudget, choose

JOBS = st.lists(
    st.builds(
        Candidate,
        job_id=st.uuids().map(str),
        tokens=st.integers(1, 3000),
        priority=st.sampled_from([0, 50, 100]),
        alone=st.sampled_from([False, False, False, True]),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda one: one.job_id,
)


def passes_of(candidates: list[Candidate], budget: int, count: int) -> list[tuple[str, ...]]:
    """Choose so many passes, one after the other."""
    shares: dict[str, Share] = {}
    chosen = []
    for _ in range(count):
        choice = choose(candidates, shares, budget)
        shares = dict(choice.shares)
        chosen.append(choice.job_ids)
    return chosen


@given(candidates=JOBS, budget=st.integers(1, 6000))
def test_a_pass_holds_what_fits_or_one_job_and_a_job_that_wants_nobody_beside_it_has_nobody(
    candidates: list[Candidate], budget: int
) -> None:
    by_id = {one.job_id: one for one in candidates}
    for job_ids in passes_of(candidates, budget, 20):
        assert job_ids
        assert len(set(job_ids)) == len(job_ids)
        assert len(job_ids) == 1 or sum(by_id[job_id].tokens for job_id in job_ids) <= budget
        assert len(job_ids) == 1 or not any(by_id[job_id].alone for job_id in job_ids)


@given(candidates=JOBS, budget=st.integers(1, 6000))
def test_every_job_takes_part_in_a_bounded_number_of_passes_whatever_its_priority(
    candidates: list[Candidate], budget: int
) -> None:
    bound = MAX_WAIT_PASSES + len(candidates)
    waited = Counter({one.job_id: 0 for one in candidates})
    for job_ids in passes_of(candidates, budget, 4 * bound):
        for job_id in waited:
            waited[job_id] = 0 if job_id in job_ids else waited[job_id] + 1
        assert max(waited.values()) <= bound


@given(tokens=st.lists(st.integers(50, 1000), min_size=2, max_size=8), budget=st.integers(1000, 2000))
def test_jobs_that_find_no_room_for_all_get_equal_tokens_or_every_second_turn(tokens: list[int], budget: int) -> None:
    candidates = [Candidate(str(index), count) for index, count in enumerate(tokens)]
    served: Counter[str] = Counter()
    num_passes = 400
    for job_ids in passes_of(candidates, budget, num_passes):
        for job_id in job_ids:
            served[job_id] += candidates[int(job_id)].tokens
    fair = served.total() / len(tokens)
    for one in candidates:
        every_second_turn = num_passes * one.tokens / 2
        assert served[one.job_id] >= 0.6 * min(fair, 1.5 * every_second_turn), (one, served)


def test_two_long_jobs_and_many_short_ones_each_have_their_share() -> None:
    candidates = [Candidate(f"long-{index}", 1800) for index in range(2)] + [
        Candidate(f"short-{index}", 100) for index in range(8)
    ]
    turns = Counter(job_id for job_ids in passes_of(candidates, 2000, 200) for job_id in job_ids)
    assert min(turns[f"short-{index}"] for index in range(8)) >= 60
    assert min(turns[f"long-{index}"] for index in range(2)) >= 20


def test_all_take_part_in_every_pass_that_holds_all() -> None:
    candidates = [Candidate(str(index), 100 * (index + 1)) for index in range(4)]
    assert all(len(job_ids) == 4 for job_ids in passes_of(candidates, 1000, 10))


def test_a_higher_priority_goes_first_and_the_lower_one_gets_its_turn() -> None:
    candidates = [Candidate("night", 900, priority=10), Candidate("urgent", 900, priority=90)]
    turns = [job_ids for (job_ids,) in zip(passes_of(candidates, 1000, 3 * MAX_WAIT_PASSES), strict=True)]
    assert turns[:MAX_WAIT_PASSES] == [("urgent",)] * MAX_WAIT_PASSES
    assert turns[MAX_WAIT_PASSES] == ("night",)
    assert turns[MAX_WAIT_PASSES + 1] == ("urgent",)


def test_a_job_that_waits_for_a_decision_earns_nothing() -> None:
    first = choose([Candidate("a", 900), Candidate("b", 900)], {}, 1000)
    (left_out,) = {"a", "b"} - set(first.job_ids)
    owed = first.shares[left_out]
    later = choose([Candidate(first.job_ids[0], 900)], first.shares, 1000)
    assert later.shares[left_out] == owed


def test_nobody_to_choose_from_is_an_empty_pass() -> None:
    assert choose([], {}, 1000).job_ids == ()


def learnt(budget: TokenBudget, knee: int, passes: int = 100) -> TokenBudget:
    """Run filled passes on a machine whose tokens per second rise up to the knee and no further."""
    for _ in range(passes):
        tokens = budget.in_force()
        seconds = tokens / min(tokens, knee)
        budget = budget.after_pass(tokens, seconds, left_out=True)
    return budget


@pytest.mark.parametrize("knee", [1024, 4096, 32768])
def test_the_budget_stops_at_the_knee(knee: int) -> None:
    found = learnt(TokenBudget(1024), knee)
    assert found.is_settled
    assert knee <= found.in_force() <= 2 * knee


def test_a_pass_that_held_everybody_does_not_enlarge_the_budget() -> None:
    budget = TokenBudget(1024)
    for _ in range(10 * SAMPLES):
        budget = budget.after_pass(1024, 0.001, left_out=False)
    assert budget.in_force() == 1024


def test_the_budget_is_halved_when_memory_ran_out_and_grows_back_slowly() -> None:
    budget = TokenBudget(8192, is_settled=True).after_out_of_memory(8000)
    assert budget.in_force() == 4000
    assert budget.after_out_of_memory(3000).in_force() == 1500
    after_one = budget.after_pass(4000, 1.0, left_out=True)
    assert 4000 < after_one.in_force() < 4200
    for _ in range(200):
        budget = budget.after_pass(budget.in_force(), 1.0, left_out=True)
    assert budget.in_force() == 8192


def test_the_memory_model_bounds_the_budget_and_a_bounded_pass_says_nothing_of_the_knee() -> None:
    budget = TokenBudget(4096)
    assert budget.in_force(1000) == 1000
    for _ in range(10 * SAMPLES):
        budget = budget.after_pass(1000, 1.0, left_out=True, limit=1000)
    assert budget == TokenBudget(4096)


def test_a_budget_is_never_nothing() -> None:
    assert TokenBudget(1).after_out_of_memory(1).in_force(0) == 1
