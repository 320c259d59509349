"""What jobs must have in common to share a host: light, since the fleet asks it and loads no torch."""

from dataclasses import dataclass

from workers.job import Job


@dataclass(frozen=True)
class Residency:
    """What a host holds while it trains a pack."""

    base_id: str
    training_view: str
    """Type and quantisation of the base."""
    prompt_contract: str
    task_type: str
    num_threads: int
    """A process computes with one number of threads at a time."""


def residency_of(job: Job) -> Residency:
    """Return what a host must hold to train `job`."""
    base = job.base
    return Residency(base.base_id, base.training_view, base.prompt_contract, job.spec.task_type, job.spec.resources.num_threads)
