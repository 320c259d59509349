"""Accuracy and macro F1 of labels."""

import pytest

from workers.engine.class_metrics import class_metrics


def test_metrics_of_a_known_confusion() -> None:
    # label 0: 2 right of 3, once wrongly guessed; label 1: 1 right of 2, once wrongly guessed; label 2 never seen
    metrics = class_metrics(5.0, [0, 0, 1, 1, 0], [0, 0, 0, 1, 1], 3)
    f1_of_0, f1_of_1 = 2 * 2 / (3 + 3), 2 * 1 / (2 + 2)
    assert metrics == pytest.approx({"eval/loss": 1.0, "eval/accuracy": 0.6, "eval/macro_f1": (f1_of_0 + f1_of_1) / 2})


def test_a_label_that_was_only_guessed_counts_as_nothing_right() -> None:
    assert class_metrics(0.0, [2, 0], [0, 0], 3)["eval/macro_f1"] == pytest.approx((2 / 3 + 0.0) / 2)


def test_all_right_is_one() -> None:
    assert class_metrics(0.0, [0, 1, 2], [0, 1, 2], 5) == {"eval/loss": 0.0, "eval/accuracy": 1.0, "eval/macro_f1": 1.0}
