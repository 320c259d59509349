"""By how much one adapter is better than another on the same rows, and how sure that is: a paired bootstrap over rows.

Rows are drawn with replacement, the same rows for both sides, and the difference of their metrics is looked at over many such
draws (Koehn, "Statistical significance tests for machine translation evaluation", EMNLP 2004; scipy.stats.bootstrap does it).
"""

from dataclasses import dataclass
from typing import Any

import numpy
from scipy.stats import bootstrap

from infra.errors import BadInput
from workers.scores import LOWER_IS_BETTER, MIN_ROWS_COMPARED, Parts

NUM_RESAMPLES = 9999
"""scipy's default: the bound of a 95 % interval then varies by about one hundredth of its distance to the mean."""
BATCH_NUMBERS = 1 << 22
"""Row numbers drawn at a time, which bounds memory to some 200 MB."""


@dataclass(frozen=True)
class Improvement:
    """How much better the challenger is, in the metric's unit: positive is better, whichever way the metric points."""

    challenger: float
    other: float
    gain: float
    lower: float
    """The lower end of the one-sided interval: with the asked confidence the gain is at least this."""


def improvement(challenger: Parts, other: Parts, metric: str, confidence: float, seed: int) -> Improvement:
    """Compare two sides on the same rows. The same seed gives the same bounds.

    Raises BadInput on fewer than MIN_ROWS_COMPARED rows.
    """
    num_rows = len(challenger.above)
    if num_rows < MIN_ROWS_COMPARED:
        needed = f"at least {MIN_ROWS_COMPARED} are needed"
        raise BadInput(f"{num_rows} row to compare on is too few, {needed}; name more rows for the gate.")
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0

    def gain(above: Any, below: Any, other_above: Any, other_below: Any, axis: int = -1) -> Any:
        with numpy.errstate(invalid="ignore", divide="ignore"):  # a draw of rows none of which has a byte of text
            return sign * (_ratio(above, below, axis) - _ratio(other_above, other_below, axis))

    a, b, c, d = map(numpy.asarray, (challenger.above, challenger.below, other.above, other.below))
    drawn = bootstrap(
        (a, b, c, d),
        gain,
        paired=True,
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, BATCH_NUMBERS // num_rows),
        confidence_level=confidence,
        alternative="greater",
        method="percentile",
        rng=numpy.random.default_rng(seed),
    )
    return Improvement(challenger.value, other.value, float(gain(a, b, c, d)), float(drawn.confidence_interval.low))


def _ratio(above: Any, below: Any, axis: int) -> Any:
    return above.sum(axis=axis) / below.sum(axis=axis)
