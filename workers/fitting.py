"""Does an adapter fit a base? Asked of a model without weights, so that it costs neither memory nor reading of weights."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from infra.errors import BadInput
from workers.adapter import Adapter, check_against_model
from workers.loading import quiet


def refuse_unfit(adapter: Adapter, path: Path) -> None:
    """Raise BadInput unless the base in `path` has a linear layer of the right shape for every factor, and the adapter acts."""
    check_against_model(adapter, model_without_weights(path))


def model_without_weights(path: Path) -> PreTrainedModel:
    """Return the causal language model of a base folder, its parameters on the meta device. Raises BadInput if there is none."""
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"transformers cannot make a causal language model of the base {path}: {first[:300]}") from error
    return model
