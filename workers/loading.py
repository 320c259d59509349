"""Loading a base model for training: frozen, quiet, nothing from the network, and checked against its files."""

import contextlib
import logging
import threading
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel

from infra.errors import BadInput
from workers.engine.frozen import keep_training_layout
from workers.engine.head_shapes import head_of
from workers.spec import BaseModelSpec, QuantizationSpec, TaskType
from workers.targets import NOT_ADAPTED
from workers.weight_files import find_weights

NUM_CHECKED_TENSORS = 4
MAX_CHECKED_ELEMENTS = 1 << 20
"""Of each checked tensor, so many elements are compared at most."""
KINDS: Mapping[TaskType, str] = {"CAUSAL_LM": "a causal language model", "SEQ_CLS": "a model for classification"}
"""What transformers makes of a base, for people."""
_ONE_AT_A_TIME = threading.Lock()
"""transformers switches global state while it loads: of two threads that load (in-process hosts), both miss tied weights."""


def load_model(path: Path, spec: BaseModelSpec, *, task_type: TaskType = "CAUSAL_LM", device: str = "cpu") -> PreTrainedModel:
    """Load the base in `path` in the dtype of `spec`: frozen, in eval mode, nothing from the network, never a pickle.

    With `spec.quantization` the linears that an adapter may touch are held in 4 bits and compute in that dtype; heads,
    embeddings and norms stay as they are, and the same files give the same packed bytes on every load.

    For SEQ_CLS the head that the model has is not to be used, since each adapter has its own: its weights may be missing.

    Raises BadInput if the folder cannot make a model of this kind, if weights are missing for it (they would be random),
    if a sample of loaded tensors is not what the files hold, or if bitsandbytes is needed and cannot be imported.
    """
    weights = find_weights(path)
    with _ONE_AT_A_TIME, quiet():
        model, report = _from_pretrained(path, spec, task_type, device)
    missing = sorted(name for name in report["missing_keys"] if not _is_unused(name, model, task_type))
    if missing:
        raise BadInput(
            f"the base {path} has no weights for {missing[0]} ({len(missing)} such tensors); it does not make {KINDS[task_type]}."
        )
    _check_sample(model, weights)
    keep_training_layout(model)
    model.eval()
    model.requires_grad_(False)
    return model.to(device)  # type: ignore[arg-type]


def model_class(task_type: TaskType) -> Any:
    """Return the class of transformers that makes a model for a task type."""
    return AutoModelForSequenceClassification if task_type == "SEQ_CLS" else AutoModelForCausalLM


def _is_unused(name: str, model: PreTrainedModel, task_type: TaskType) -> bool:
    return task_type == "SEQ_CLS" and name.startswith(f"{head_of(model).module}.")


def _from_pretrained(
    path: Path, spec: BaseModelSpec, task_type: TaskType, device: str
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    quantized = {} if spec.quantization is None else _quantized(spec.quantization, spec.dtype, device)
    try:
        loaded = model_class(task_type).from_pretrained(
            path,
            dtype=getattr(torch, spec.dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
            **quantized,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"transformers cannot load the base {path} as {KINDS[task_type]}: {first[:300]}") from error
    return cast(tuple[PreTrainedModel, Mapping[str, Any]], loaded)


def _quantized(quantization: QuantizationSpec, dtype: str, device: str) -> dict[str, Any]:
    """Return what makes transformers quantise while it loads: on `device`, every linear that an adapter may touch."""
    _import_bitsandbytes()
    config = BitsAndBytesConfig(
        **quantization.model_dump(),
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=[rf"(?:.*\.)?{name}" for name in NOT_ADAPTED],  # read for 4 bits, too
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _import_bitsandbytes() -> None:
    """Import bitsandbytes without its advice to install further kernels. Raises BadInput with the way out if it cannot be."""
    advice = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = advice.level
    advice.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise BadInput(
            f"4-bit bases need the package bitsandbytes, which cannot be imported ({error}); install it, "
            "or set base_model.quantization to null."
        ) from error
    finally:
        advice.setLevel(level)


def _check_sample(model: PreTrainedModel, weights: tuple[Path, ...]) -> None:
    """Compare a few tensors, spread over the files, with what the files hold: loaders have re-initialised weights silently.

    See DeepSpeed issue 7848. Tensors that a model family stores under other names than it loads them are left out, and
    those that are held in 4 bits.
    """
    loaded = {name: one for name, one in model.named_parameters() if one.is_floating_point()}
    for path in {weights[0], weights[-1]}:
        with safe_open(path, framework="pt") as file:
            names = [name for name in sorted(file.keys()) if _loaded_name(model, loaded, name) in loaded]
            for name in names[:: max(1, len(names) // NUM_CHECKED_TENSORS)]:
                parameter = loaded[_loaded_name(model, loaded, name)].detach()
                _check_equal(path, name, file.get_slice(name), parameter)


def _loaded_name(model: PreTrainedModel, parameters: Container[str], name: str) -> str:
    prefix = f"{model.base_model_prefix}."
    return name if name in parameters or name.startswith(prefix) else prefix + name


def _check_equal(path: Path, name: str, stored: Any, loaded: torch.Tensor) -> None:
    shape = stored.get_shape()
    if list(loaded.shape) != shape or not shape:
        return
    num_rows = max(1, min(shape[0], MAX_CHECKED_ELEMENTS * shape[0] // max(1, loaded.numel())))
    expected = stored[:num_rows].to(loaded.dtype)
    if not torch.equal(expected.contiguous().view(torch.uint8), loaded[:num_rows].contiguous().view(torch.uint8)):
        raise BadInput(
            f"after loading, the tensor {name} is not what {path} holds; install the tested versions of torch and transformers."
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and advice of transformers off the terminal while this is open."""
    logs = transformers.utils.logging
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()
