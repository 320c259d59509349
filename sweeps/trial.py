"""One trial as the ledger keeps it: plain values, and their JSON.

Events bear numbers that count through the whole sweep, so that a study can be rebuilt by playing them again in the order in
which they happened.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from sweeps.space import Params
from sweeps.spec import ObjectiveSpec

TRIAL_FORMAT = "trial/1"
TrialStatus = Literal["running", "complete", "pruned", "infeasible", "failed"]
EventKind = Literal["ask", "report", "copy", "tell"]


@dataclass(frozen=True)
class Event:
    """Something the study was told.

    `copy` is a report that prunes nobody: taken over from the trial this one repeats, or made at its job's last step.
    """

    seq: int
    """Position among all events of the sweep, from 0."""
    kind: EventKind
    step: int | None = None
    """Optimiser step of a report or copy."""
    value: float | None = None
    """Value of the objective at that step."""


@dataclass(frozen=True)
class Trial:
    """One point of the space, and what came of it."""

    number: int
    params: Params
    status: TrialStatus
    events: tuple[Event, ...]
    epoch: int
    """Epoch of the sweep's claim under which it was last written."""
    job_id: str | None = None
    """None where the values make no job."""
    reason: str = ""
    """Why it is infeasible or failed: a word, a colon, a sentence."""
    values: tuple[float, ...] = ()
    """One per objective, if complete."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """All metrics of the weights that were kept."""
    adapter_id: str | None = None
    num_steps: int = 0
    best_step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    """Training time of all attempts."""
    started: float = 0.0
    """Seconds since the epoch."""
    ended: float | None = None
    duplicate_of: int | None = None
    """Number of the trial with the same job; this one then ran nothing."""
    chunks: tuple[str, ...] = ()
    """Keys of the job's metric points in the store."""

    @property
    def is_live(self) -> bool:
        """True until its end is recorded."""
        return self.status == "running"

    @property
    def reports(self) -> dict[int, float]:
        """Values of the objective by step, as reported while it trained (or taken over)."""
        return {event.step: event.value for event in self.events if event.step is not None and event.value is not None}

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data, without the format key."""
        body = asdict(self)
        body["events"] = [_event_to_json(event) for event in self.events]
        body["values"] = [_encode(value) for value in self.values]
        body["metrics"] = {name: _encode(value) for name, value in self.metrics.items()}
        body["chunks"] = list(self.chunks)
        return body

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> "Trial":
        """Read what `to_json` gave."""
        return Trial(
            **{
                **body,
                "events": tuple(_event_from_json(event) for event in body["events"]),
                "values": tuple(float(value) for value in body["values"]),
                "metrics": {name: float(value) for name, value in body["metrics"].items()},
                "chunks": tuple(body["chunks"]),
            }
        )


@dataclass(frozen=True)
class Outcome:
    """How a trial ended, before it is recorded. Fields mean what they mean in `Trial`."""

    status: TrialStatus
    reason: str = ""
    values: tuple[float, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    adapter_id: str | None = None
    num_steps: int = 0
    best_step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    chunks: tuple[str, ...] = ()


def outcome_of(trial: Trial) -> Outcome:
    """Return the outcome of an ended trial, for one that repeats it: the same result, for which nothing was trained."""
    assert not trial.is_live, "a live trial has no outcome"
    return Outcome(
        trial.status,
        trial.reason,
        trial.values,
        trial.metrics,
        trial.adapter_id,
        trial.num_steps,
        trial.best_step,
        num_tokens=0,
        seconds=0.0,
        chunks=trial.chunks,
    )


def ended_as(trial: Trial, outcome: Outcome, events: Sequence[Event], now: float) -> Trial:
    """Return the trial with its end recorded."""
    fields = {name: getattr(outcome, name) for name in Outcome.__dataclass_fields__}
    return replace(trial, **fields, events=(*trial.events, *events), ended=now)


def pareto_front(trials: Sequence[Trial], objectives: Sequence[ObjectiveSpec]) -> list[Trial]:
    """Return the complete trials that no other beats in every objective, best in the first objective first.

    With one objective: the best trial, alone. Among equals the earliest counts.
    """
    if len(objectives) == 1:
        return [best for best in [best_of(trials, objectives)] if best is not None]
    complete = sorted((trial for trial in trials if trial.status == "complete"), key=lambda trial: trial.number)
    scores = [_losses(trial, objectives) for trial in complete]
    front = [
        trial
        for index, trial in enumerate(complete)
        if not any(_beats(other, scores[index]) or (other == scores[index] and j < index) for j, other in enumerate(scores))
    ]
    return sorted(front, key=lambda trial: (_losses(trial, objectives), trial.number))


def best_of(trials: Sequence[Trial], objectives: Sequence[ObjectiveSpec]) -> Trial | None:
    """Return the best complete trial (of several objectives: the front's best in the first), None if there is none."""
    complete = [trial for trial in trials if trial.status == "complete"]
    return min(complete, key=lambda trial: (_losses(trial, objectives), trial.number), default=None)


def count_by_status(trials: Sequence[Trial]) -> dict[str, int]:
    """Return how many trials have each status that occurs."""
    counts: dict[str, int] = {}
    for trial in trials:
        counts[trial.status] = counts.get(trial.status, 0) + 1
    return counts


def _losses(trial: Trial, objectives: Sequence[ObjectiveSpec]) -> tuple[float, ...]:
    return tuple(
        value if objective.direction == "minimize" else -value for value, objective in zip(trial.values, objectives, strict=True)
    )


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _encode(value: float) -> float | str:
    """JSON has no word for NaN and the infinities; float() reads them back from text."""
    return value if math.isfinite(value) else str(value)


def _event_to_json(event: Event) -> dict[str, Any]:
    body: dict[str, Any] = {"seq": event.seq, "kind": event.kind}
    if event.step is not None and event.value is not None:
        body |= {"step": event.step, "value": _encode(event.value)}
    return body


def _event_from_json(body: Mapping[str, Any]) -> Event:
    value = body.get("value")
    return Event(body["seq"], body["kind"], body.get("step"), None if value is None else float(value))
