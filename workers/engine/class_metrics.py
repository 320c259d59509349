"""What is measured of a classifier: the loss, and how often and how evenly it is right."""

from collections.abc import Sequence


def class_metrics(loss_sum: float, predicted: Sequence[int], expected: Sequence[int], num_labels: int) -> dict[str, float]:
    """Return eval/loss (nats per row), eval/accuracy and eval/macro_f1 of rows, labels being numbers below `num_labels`.

    macro_f1 is the plain mean of the F1 of the labels that were expected or predicted at least once, as scikit-learn's
    f1_score(average="macro") has it; a label that only one side has counts 0. At least one row is needed.
    """
    hits, seen = [0] * num_labels, [0] * num_labels
    for guess, truth in zip(predicted, expected, strict=True):
        hits[truth] += guess == truth
        seen[guess] += 1
        seen[truth] += 1
    f1_scores = [2 * hit / count for hit, count in zip(hits, seen, strict=True) if count]
    return {
        "eval/loss": loss_sum / len(expected),
        "eval/accuracy": sum(hits) / len(expected),
        "eval/macro_f1": sum(f1_scores) / len(f1_scores),
    }
