"""What the fleet decides about jobs whose hosts or attempts end before them."""

import pytest

from workers.fleet import MAX_LOSSES_IN_A_ROW, after_failure, after_loss


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("held: tenants/a/state.json is held by process 7 on node-1", "wait"),
        ("claim_lost: it was taken over", "wait"),
        ("store: s3://bucket does not answer", "count"),
        ("non_finite: loss was not finite", "tell"),
        ("bad_input: the store is not meant here", "tell"),
        ("", "tell"),
    ],
)
def test_failure_of_the_surroundings_is_not_the_end_of_the_job(reason: str, expected: str) -> None:
    assert after_failure(reason) == expected


def test_job_that_loses_every_host_is_given_up() -> None:
    verdicts = [after_loss(losses) for losses in range(1, MAX_LOSSES_IN_A_ROW + 1)]
    assert verdicts == ["retry"] * (MAX_LOSSES_IN_A_ROW - 1) + ["give_up"]
