"""What the end of a job means for its trial: a pure function."""

import math
from collections.abc import Sequence
from dataclasses import replace

from sweeps.spec import ObjectiveSpec
from sweeps.trial import Outcome
from workers.report import Finished

INFEASIBLE_WORDS = ("out_of_memory", "bad_input")
"""Failures that tell of the point, not of the training: the sampler learns to keep away."""


def outcome_of_job(event: Finished, objectives: Sequence[ObjectiveSpec], *, condemned: bool = False) -> Outcome:
    """Return how a trial ended whose job ended so.

    `condemned`: the trial's last report said prune, so it counts as pruned even if the job was through before it heard of it.
    """
    outcome = Outcome(
        "failed",
        metrics=dict(event.metrics),
        adapter_id=event.adapter_id,
        num_steps=event.num_steps,
        best_step=event.best_step,
        num_tokens=event.num_tokens,
        seconds=event.seconds,
        chunks=event.chunks,
    )
    if event.status == "stopped" or (event.status == "succeeded" and condemned):
        return replace(outcome, status="pruned")
    if event.status != "succeeded":
        reason = event.reason or event.status
        is_infeasible = reason.partition(":")[0] in INFEASIBLE_WORDS
        return replace(outcome, status="infeasible" if is_infeasible else "failed", reason=reason)
    return _measured(outcome, objectives)


def _measured(outcome: Outcome, objectives: Sequence[ObjectiveSpec]) -> Outcome:
    """The outcome of a job that succeeded: complete if it measured every objective as a number."""
    missing = [objective.metric for objective in objectives if objective.metric not in outcome.metrics]
    if missing:
        known = ", ".join(sorted(outcome.metrics)) or "none"
        reason = f"no_metric: the job measured no {', '.join(missing)}; known metrics: {known}"
        return replace(outcome, reason=reason)
    values = tuple(float(outcome.metrics[objective.metric]) for objective in objectives)
    if not all(math.isfinite(value) for value in values):
        return replace(outcome, reason=f"non_finite: the objective is {', '.join(map(str, values))}")
    return replace(outcome, status="complete", values=values)
