"""What a customer's night depends on, as one id: equal to last time's means that there is nothing to do.

Neither the champion nor the adapter a training starts from belong to it: a promotion alone is no reason to train again.
"""

from typing import Any

from infra.fingerprint import id_of_json
from pipelines.gates import Gates
from workers.job import NUMERICS_VERSION
from workers.spec import JobSpec

RULES = "night/1"
"""Raised whenever the way a holdout is chosen or rows are cleaned changes what is trained on."""


def recipe_digest(job: JobSpec) -> str:
    """Name everything in a spec that alters the adapter beside base, data and tenant."""
    dumped: dict[str, Any] = job.model_dump(mode="json", include={"task_type", "training", "evaluation"})
    peft = job.peft.model_dump(mode="json", exclude={"init_adapter"})
    held = job.base_model.model_dump(mode="json", include={"dtype", "quantization"})
    splits = job.data.model_dump(mode="json", include={"format", "validation_split"})
    threads = job.resources.num_threads
    return id_of_json({**dumped, "peft": peft, "held": held, "splits": splits, "threads": threads, "numerics": NUMERICS_VERSION})


def gates_digest(gates: Gates | None) -> str:
    """Name the gates of a file; None: the ones that hold without a file."""
    return id_of_json([]) if gates is None else gates.digest


def state_key(tenant: str, task: str, base_id: str, recipe: str, data: str, holdout: float, gates: str) -> str:
    """Return the id of a customer's state.

    Args:
        recipe: See `recipe_digest`.
        data: Digest of all good rows, whatever their order.
        holdout: Share of the rows that is held out.
        gates: See `gates_digest`.
    """
    return id_of_json(
        {
            "rules": RULES,
            "tenant": tenant,
            "task": task,
            "base_id": base_id,
            "recipe": recipe,
            "data": data,
            "holdout": holdout,
            "gates": gates,
        }
    )
