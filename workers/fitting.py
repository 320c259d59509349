"""Does an adapter fit a base? Asked of a model without weights, so that it costs neither memory nor reading of weights."""

from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from infra.errors import BadInput
from workers.adapter import Adapter, check_against_model
from workers.loading import KINDS, model_class, quiet
from workers.spec import TaskType


def refuse_unfit(adapter: Adapter, path: Path) -> None:
    """Raise BadInput unless the base in `path` has a linear layer of the right shape for every factor, and the adapter acts."""
    check_against_model(adapter, model_without_weights(path, "CAUSAL_LM" if adapter.head_module is None else "SEQ_CLS"))


def model_without_weights(path: Path, task_type: TaskType = "CAUSAL_LM") -> PreTrainedModel:
    """Return the model of a base folder for a task type, its parameters on the meta device. Raises BadInput if there is none."""
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            model: PreTrainedModel = model_class(task_type).from_config(config)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"transformers cannot make {KINDS[task_type]} of the base {path}: {first[:300]}") from error
    return model
