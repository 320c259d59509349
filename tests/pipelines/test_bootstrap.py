"""The paired bootstrap: what is sure, what is not, and the same answer for the same seed."""

import math
import random

import pytest

from infra.errors import BadInput
from pipelines.bootstrap import improvement
from workers.scores import Parts, RowScores, parts_of


def sides(gain: float, noise: float, num_rows: int) -> tuple[Parts, Parts]:
    """Losses of two adapters on rows of one token that differ much among each other and little between the adapters."""
    draw = random.Random(0)
    hard = [draw.uniform(1, 9) for _ in range(num_rows)]
    mine = [value - gain + draw.gauss(0, noise) for value in hard]
    return Parts(tuple(mine), (1.0,) * num_rows), Parts(tuple(hard), (1.0,) * num_rows)


def test_lower_bound_is_that_of_the_paired_differences() -> None:
    mine, other = sides(0.1, 0.2, 400)
    found = improvement(mine, other, "eval/loss", 0.95, 0)
    differences = [b - a for a, b in zip(mine.above, other.above, strict=True)]
    mean = math.fsum(differences) / 400
    error = math.sqrt(math.fsum((one - mean) ** 2 for one in differences)) / 400
    assert found.gain == pytest.approx(mean)
    assert found.lower == pytest.approx(mean - 1.645 * error, abs=0.1 * error)
    assert improvement(other, mine, "eval/loss", 0.95, 0).gain == pytest.approx(-mean)
    assert improvement(mine, other, "eval/accuracy", 0.95, 0).gain == pytest.approx(-mean), "more is better there"


def test_same_seed_gives_the_same_bound() -> None:
    mine, other = sides(0.1, 0.5, 30)
    found = improvement(mine, other, "eval/loss", 0.9, 7)
    assert improvement(mine, other, "eval/loss", 0.9, 7) == found
    assert improvement(mine, other, "eval/loss", 0.9, 8).lower != found.lower
    assert improvement(mine, other, "eval/loss", 0.99, 7).lower < found.lower


def test_equal_sides_gain_nothing() -> None:
    mine, _ = sides(0.0, 0.0, 20)
    found = improvement(mine, mine, "eval/loss", 0.95, 0)
    assert (found.gain, found.lower) == (0.0, 0.0)


def test_one_row_is_too_few() -> None:
    with pytest.raises(BadInput, match="at least 2 are needed"):
        improvement(*sides(0.1, 0.1, 1), "eval/loss", 0.95, 0)


def test_metrics_weigh_rows_as_the_whole_set_does() -> None:
    scores = RowScores((2.0, 6.0), (1, 3), (1, 0), (4, 8), exact_match=(True, False))
    assert parts_of(scores, "eval/loss").value == 2.0
    assert parts_of(scores, "eval/token_accuracy").value == 0.25
    assert parts_of(scores, "eval/bits_per_byte").value == pytest.approx(8 / math.log(2) / 12)
    assert parts_of(scores, "eval/exact_match").value == 0.5
    with pytest.raises(BadInput, match="cannot be measured"):
        parts_of(scores, "eval/format_validity")
    assert RowScores.from_json(scores.to_json()) == scores
    odd = RowScores((math.inf, math.nan), (1, 1), (0, 0), (1, 1))
    assert [str(one) for one in RowScores.from_json(odd.to_json()).loss] == ["inf", "nan"]
    assert not parts_of(odd, "eval/loss").is_finite
