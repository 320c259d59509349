"""The resolved job: a spec whose base, data and initial adapter are pinned by content, and its id.

Plain values, written as spec.json and read back by hosts on other machines.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from infra.fingerprint import id_of_json
from infra.strict import parse
from workers.spec import JobSpec

JOB_FORMAT = "job/1"
NUMERICS_VERSION = 3
"""Raised whenever the engine's arithmetic changes bits; part of every job_id."""


@dataclass(frozen=True)
class DataRef:
    """Rows kept in the store, named by the digest of their canonical form."""

    digest: str
    num_rows: int


@dataclass(frozen=True)
class BaseRef:
    """A base by content, and where it may be found."""

    base_id: str
    training_view: str
    """Id of quantisation and dtypes while training; must match for merging."""
    prompt_contract: str
    """Id of tokenizer and chat template."""
    path: str
    """Local folder on the machine that resolved it; a hint for other nodes, not identity."""


@dataclass(frozen=True)
class Job:
    """One training, fully pinned. Two jobs with one `job_id` give the same adapter."""

    job_id: str
    spec: JobSpec
    base: BaseRef
    train: DataRef
    validation: DataRef | None
    test: DataRef | None
    init_adapter_id: str | None
    labels: tuple[str, ...] = ()
    """What a classifier (SEQ_CLS) tells apart, in the order of its head's rows; none for other jobs."""

    @property
    def tenant(self) -> str:
        return self.spec.tenant

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data, without the format key."""
        return {
            "job_id": self.job_id,
            "spec": self.spec.model_dump(mode="json"),
            "base": asdict(self.base),
            "train": asdict(self.train),
            "validation": self.validation and asdict(self.validation),
            "test": self.test and asdict(self.test),
            "init_adapter_id": self.init_adapter_id,
            "labels": list(self.labels),
        }

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> "Job":
        """Read what `to_json` gave."""
        return Job(
            job_id=body["job_id"],
            spec=parse(JobSpec, body["spec"], "spec.json"),
            base=BaseRef(**body["base"]),
            train=DataRef(**body["train"]),
            validation=DataRef(**body["validation"]) if body["validation"] else None,
            test=DataRef(**body["test"]) if body["test"] else None,
            init_adapter_id=body["init_adapter_id"],
            labels=tuple(body.get("labels", ())),  # jobs from before there were classifiers have no such key
        )


def pin(
    spec: JobSpec,
    base: BaseRef,
    train: DataRef,
    validation: DataRef | None,
    test: DataRef | None,
    init_adapter_id: str | None,
    labels: tuple[str, ...] = (),
) -> Job:
    """Make the job of pinned inputs. Its id covers all that alters the result: not task, names, paths, priority or test data."""
    identity = {
        "numerics": NUMERICS_VERSION,
        "tenant": spec.tenant,
        "base_id": base.base_id,
        "training_view": base.training_view,
        "prompt_contract": base.prompt_contract,
        "task_type": spec.task_type,
        "labels": list(labels),
        "train": train.digest,
        "validation": validation and validation.digest,
        "init_adapter_id": init_adapter_id,
        "peft": spec.peft.model_dump(mode="json", exclude={"init_adapter"}),
        "training": spec.training.model_dump(mode="json"),
        "evaluation": spec.evaluation.model_dump(mode="json"),
        "num_threads": spec.resources.num_threads,
    }
    return Job(id_of_json(identity), spec, base, train, validation, test, init_adapter_id, labels)
