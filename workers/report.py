"""What hosts tell the driver about jobs and packs, and what it answers. Small frozen values that cross channels."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from workers.job import Job

JobStatus = Literal["queued", "running", "preempted", "succeeded", "stopped", "cancelled", "failed"]


@dataclass(frozen=True)
class Progress:
    """A job is at `step` of `num_steps`; for the live view only."""

    job_id: str
    step: int
    num_steps: int
    loss: float
    """Training loss of the last step, nats per supervised token."""
    tokens_per_second: float
    num_tokens: int
    """Tokens trained on so far in this attempt."""


@dataclass(frozen=True)
class Evaluated:
    """Validation metrics at `step` ("eval/loss", ...). The job waits at this step until it is answered.

    After a kill the last evaluation before the checkpoint is told again, with the same numbers: its answer may have been lost.
    """

    job_id: str
    step: int
    metrics: Mapping[str, float]
    final: bool = False
    """True at the job's last step: no answer is awaited, `Finished` follows."""


@dataclass(frozen=True)
class Checkpointed:
    """Everything up to `step` is safe. `chunk` is the store's key of the metric points since the checkpoint before."""

    job_id: str
    step: int
    epoch: int
    chunk: str


@dataclass(frozen=True)
class Finished:
    """A job has ended and its state.json says so. `metrics` are those of the weights that were kept."""

    job_id: str
    status: JobStatus
    reason: str = ""
    """Why it failed: a word of the vocabulary (non_finite, out_of_memory, bad_input, host_lost, error), a colon, a sentence."""
    adapter_id: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    num_steps: int = 0
    best_step: int = 0
    seconds: float = 0.0
    num_tokens: int = 0
    chunks: tuple[str, ...] = ()
    """Keys of all chunks of metric points, in order; the whole curve of the job, each point once."""
    attempt: int = 0
    """Epoch of the attempt that ended it; 0 if none was made."""
    reused: bool = False
    """True if the job had succeeded before and nothing was trained."""


@dataclass(frozen=True)
class PackState:
    """What a host trains at the moment; told now and then, for the live view and `sweep status` only."""

    host: str
    job_ids: tuple[str, ...]
    """Jobs seated there, whether they wait for an answer or not."""
    budget_tokens: int
    """Tokens that a pass may have."""
    pass_tokens: int
    """Tokens of the last pass."""
    tokens_per_second: float
    """Of all its jobs, since it was told last."""
    num_passes: int
    """Since the host started."""
    told: float
    """When, in seconds since the epoch: an old one tells of a host that is gone or stuck."""
    busy_seconds: float = 0.0
    """Spent in passes, of training and of evaluation, since the base was loaded."""


JobEvent = Progress | Evaluated | Checkpointed | Finished
HostEvent = JobEvent | PackState


@dataclass(frozen=True)
class Decision:
    """The answer to `Evaluated`: go on, or stop now (the job ends with status stopped)."""

    job_id: str
    go: bool


@dataclass(frozen=True)
class Admit:
    """Order to a host: take this job in."""

    job: Job


@dataclass(frozen=True)
class Evict:
    """Order to a host: end a job at its next step; `preempted` checkpoints it first."""

    job_id: str
    status: Literal["preempted", "cancelled"]


@dataclass(frozen=True)
class Shutdown:
    """Order to a host: return. Jobs that are to go on elsewhere are preempted before."""


HostOrder = Admit | Decision | Evict | Shutdown
