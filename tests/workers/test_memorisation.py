"""What losses say of rows learned by heart: gains of training rows against unseen ones, and the rank of planted secrets."""

import math

import pytest

from infra.errors import BadInput
from workers.data.rows import Row
from workers.memorisation import alternatives_of, canary_rows, exposure, probe, rank_of
from workers.scores import RowScores


def scores(*losses: float) -> RowScores:
    return RowScores(losses, (2,) * len(losses), (0,) * len(losses), (4,) * len(losses))


def canary(prompt: str, completion: str) -> Row:
    return Row({"prompt": prompt, "completion": completion}, "canaries:1")


def test_rows_learned_by_heart_gain_more_than_unseen_ones() -> None:
    found = probe((scores(0.1, 0.2, 0.1), scores(4.0, 4.0, 5.0)), (scores(3.9, 5.0), scores(4.0, 5.0)))
    assert found.auc == 1.0
    assert (found.num_train, found.num_held_out) == (3, 2)
    assert found.train_loss == pytest.approx(0.4 / 6)
    assert found.base_held_out_loss == pytest.approx(9.0 / 4)


def test_rows_that_were_easy_before_do_not_count_as_learned() -> None:
    found = probe((scores(1.0, 2.0), scores(2.0, 3.0)), (scores(7.0, 9.0), scores(8.0, 10.0)))
    assert found.train_loss < found.held_out_loss
    assert found.auc == 0.5
    assert found.auc_error == pytest.approx(math.sqrt(5 / 48))


def test_loss_that_is_no_number_gained_nothing() -> None:
    assert probe((scores(math.nan, 1.0), scores(2.0, 2.0)), (scores(1.5), scores(2.0))).auc == 0.5


def test_alternatives_keep_the_form_of_a_secret_and_are_the_same_every_time() -> None:
    found = alternatives_of("The PIN is 4711-X.", 50, "here")
    assert len(set(found)) == 50
    assert all(one.startswith("The PIN is ") and one.endswith("-X.") and one[11:15].isdecimal() for one in found)
    assert found == alternatives_of("The PIN is 4711-X.", 50, "here")
    assert all(one[0].isupper() and one[1:].islower() for one in alternatives_of("Secret", 9, "here"))


def test_secret_with_few_forms_is_compared_with_all_of_them_and_one_without_any_is_refused() -> None:
    assert set(alternatives_of("7", 255, "here")) == set("012345689")
    with pytest.raises(BadInput, match="canaries:1: .* random secret"):
        canary_rows(canary("a", "…"), 20, "messages")


def test_canary_takes_the_form_of_the_rows_the_adapter_was_trained_on() -> None:
    own = canary("who? ", "7")
    assert canary_rows(own, 9, "messages")[0].body["messages"][1] == {"role": "assistant", "content": "7"}
    assert canary_rows(own, 9, "text")[0].body == {"text": "who? 7"}
    assert len(canary_rows(own, 9, "prompt_completion")) == 10
    with pytest.raises(BadInput, match="classification"):
        canary_rows(own, 9, "classification")


def test_exposure_is_the_rank_in_bits() -> None:
    others = [2.0 + number for number in range(7)]
    found = exposure(canary("a", "7"), 3, [1.0, *others], [4.5, *others])
    assert (found.rank, found.bits) == (1, 3.0)
    assert (found.base_rank, found.base_bits) == (4, 1.0)
    assert "7" not in str(found.where)


def test_equal_losses_and_losses_that_are_no_numbers_do_not_count_as_exposed() -> None:
    assert rank_of([1.0, 1.0, 2.0]) == 2
    assert rank_of([math.nan, 1.0, 2.0]) == 3
