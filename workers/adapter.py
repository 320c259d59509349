"""An adapter as a value: its configuration in PEFT's words, its tensors under PEFT's names, and its content id.

Everything that reads or makes an adapter passes through `make_adapter`, which holds it to one form: pairs of
two-dimensional finite float32 factors, ranks and scales that agree with the configuration, targets as an explicit sorted
list; for a classifier (task_type SEQ_CLS) one whole head and a name for each of its labels, elsewhere neither. Files are
`adapter_files`' subject, the store `adapter_store`'s.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from infra.errors import BadInput
from infra.fingerprint import id_of_json
from workers.engine.head_shapes import head_of
from workers.engine.lora import LoraLinear, scale_of
from workers.spec import PeftSpec
from workers.targets import alphas_of, can_be_adapted, ranks_of

ADAPTER_VERSION = 1
PREFIX = "base_model.model."
A_SUFFIX = ".lora_A.weight"
B_SUFFIX = ".lora_B.weight"
HEAD_MODULES = ("classifier", "score")
"""Names of classification heads; PEFT lists both in modules_to_save, whichever the model has."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter. Made by `make_adapter` only, so that what its docstring promises holds."""

    config: dict[str, Any]
    """What PEFT reads as adapter_config.json."""
    tensors: dict[str, Tensor]
    """A [r, in] and B [out, r] of each module, and a head's tensors; float32 on the CPU, contiguous, in the order of their
    names."""
    labels: tuple[str, ...] = ()
    """What a classifier's logits stand for, in their order; empty for other adapters."""

    @property
    def head_module(self) -> str | None:
        """Name of the head's module ("score", "classifier"), None for an adapter without one."""
        names = self.config["modules_to_save"]
        return str(names[0]) if names else None

    @property
    def head(self) -> dict[str, Tensor]:
        """The head's tensors by their names relative to its module ("weight", "dense.bias"); empty without one."""
        return {} if self.head_module is None else head_tensors(self.head_module, self.tensors)

    @property
    def modules(self) -> list[str]:
        """Full names of the adapted modules, sorted."""
        return [name.removeprefix(PREFIX).removesuffix(A_SUFFIX) for name in self.tensors if name.endswith(A_SUFFIX)]

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """Return A and B of a module."""
        return self.tensors[f"{PREFIX}{module}{A_SUFFIX}"], self.tensors[f"{PREFIX}{module}{B_SUFFIX}"]

    def scale(self, module: str) -> float:
        """Return the true factor of B A of a module, patterns and rsLoRA applied, in float64."""
        return scale_of(alpha_of(self.config, module), self.factors(module)[0].shape[0], self.config["use_rslora"])


def lora_config(
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    use_rslora: bool,
    target_modules: Iterable[str],
    base_model_name_or_path: str | None,
    task_type: str | None = "CAUSAL_LM",
    fan_in_fan_out: bool = False,
    modules_to_save: Sequence[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the adapter_config.json that PEFT and serving engines read; the arguments are PEFT's."""
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "revision": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _whole(lora_alpha),
        "lora_dropout": lora_dropout,
        "use_rslora": use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "modules_to_save": list(modules_to_save) if modules_to_save else None,
        "target_modules": sorted(set(target_modules)),
        "rank_pattern": dict(sorted((rank_pattern or {}).items())),
        "alpha_pattern": {name: _whole(alpha) for name, alpha in sorted((alpha_pattern or {}).items())},
    }


def _whole(number: float) -> float:
    """PEFT declares lora_alpha an int; engines that serve adapters parse it as one."""
    return int(number) if float(number).is_integer() else number


def build_adapter(
    peft: PeftSpec, model: PreTrainedModel, tensors: Mapping[str, Tensor], name_or_path: str, labels: Sequence[str] = ()
) -> Adapter:
    """Return the adapter that training on `model` gave: `tensors` under PEFT's names, described as `peft` asked for it.

    A classifier's have its head among them, and `labels` are its labels.
    """
    modules = modules_of(tensors)
    config = lora_config(
        r=peft.r,
        lora_alpha=peft.lora_alpha,
        lora_dropout=peft.lora_dropout,
        use_rslora=peft.use_rslora,
        target_modules=canonical_targets(modules, (name for name, _ in model.named_modules())),
        base_model_name_or_path=name_or_path,
        task_type="SEQ_CLS" if labels else "CAUSAL_LM",
        modules_to_save=[head_of(model).module] if labels else None,
        fan_in_fan_out=any(_is_conv1d(model.get_submodule(name)) for name in modules),
        rank_pattern={name: r for name, r in ranks_of(peft, modules).items() if r != peft.r},
        alpha_pattern={name: alpha for name, alpha in alphas_of(peft, modules).items() if alpha != peft.lora_alpha},
    )
    return make_adapter(config, tensors, "the trained adapter", labels)


def canonical_targets(modules: Iterable[str], candidates: Iterable[str] = ()) -> list[str]:
    """Return the shortest names that match exactly `modules` among `candidates` (all module names of the base), sorted.

    A name matches a module that equals it or ends with "." + it, as in PEFT. Without candidates: the full names.
    """
    wanted, known = set(modules), set(candidates)
    if not known:
        return sorted(wanted)
    suffixes: dict[str, set[str]] = {}
    for module in known | wanted:
        for suffix in _suffixes(module):
            suffixes.setdefault(suffix, set()).add(module)
    return sorted({next(suffix for suffix in _suffixes(module) if suffixes[suffix] <= wanted) for module in wanted})


def _suffixes(module: str) -> list[str]:
    """Return "c", "b.c", "a.b.c" for "a.b.c"."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def modules_of(tensors: Iterable[str]) -> list[str]:
    """Return the modules that PEFT's names of LoRA factors speak of, sorted; names of a classifier's head are passed over.

    Raises BadInput, naming it, at a name that is neither.
    """
    modules = set()
    for name in tensors:
        if head_module_of(name) is not None:
            continue
        suffix = next((suffix for suffix in (A_SUFFIX, B_SUFFIX) if name.endswith(suffix)), None)
        if suffix is None or not name.startswith(PREFIX):
            raise BadInput(
                f"the tensor {name[:120]!r} is not a LoRA factor of a linear layer ({PREFIX}<module>{A_SUFFIX} or {B_SUFFIX}); "
                "lorafleet takes plain LoRA: no DoRA, adapted embeddings or biases, no modules_to_save but a classifier's head."
            )
        modules.add(name.removeprefix(PREFIX).removesuffix(suffix))
    return sorted(modules)


def head_module_of(name: str) -> str | None:
    """Return the head module ("score", "classifier") that a tensor's name speaks of as its own, None for any other tensor."""
    module = name.removeprefix(PREFIX).partition(".")[0]
    is_own = name.startswith(PREFIX) and module in HEAD_MODULES and not name.endswith((A_SUFFIX, B_SUFFIX))
    return module if is_own else None


def make_adapter(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str, labels: Sequence[str] = ()) -> Adapter:
    """Return the adapter of a configuration as `lora_config` gives it and PEFT's tensors; `where` names them in errors.

    Raises BadInput if a pair is incomplete, shapes or ranks disagree, a value is not finite, targets and tensors differ, or
    task type, head and labels do not belong together.
    """
    modules = modules_of(tensors)
    if not modules:
        raise BadInput(f"{where} has no tensors; expected the factors of at least one layer.")
    odd = [name for name in tensors if not tensors[name].is_floating_point()]
    if odd:
        raise BadInput(
            f"{where}: the tensor {odd[0]} is of type {tensors[odd[0]].dtype}, expected floating point; save it unquantised."
        )
    held = {name: tensors[name].detach().to("cpu", torch.float32).contiguous() for name in sorted(tensors)}
    for module in modules:
        _check_pair(config, module, held, where)
    _check_targets(config["target_modules"], modules, where)
    adapter = Adapter(dict(config), held, tuple(labels))
    _check_head(adapter, where)
    return adapter


def _check_head(adapter: Adapter, where: str) -> None:
    """Raise BadInput unless there is one whole head with a label for each row of its last layer, or no trace of one."""
    strays = [name for name in adapter.tensors if head_module_of(name) not in (None, adapter.head_module)]
    if strays or (adapter.head_module is not None) != (adapter.config["task_type"] == "SEQ_CLS"):
        stray = f" and the tensor {strays[0]}" if strays else ""
        raise BadInput(
            f"{where} is of task_type {adapter.config['task_type']} with modules_to_save {adapter.config['modules_to_save']}"
            f"{stray}; a classifier is SEQ_CLS and saves its one head, others save none."
        )
    if adapter.head_module is None:
        return
    rows = num_outputs(adapter.head) or 0
    if rows < 2 or rows != len(adapter.labels) or len(set(adapter.labels)) != rows:
        raise BadInput(
            f"{where} has a head of {rows} outputs and {len(set(adapter.labels))} different labels "
            f"({', '.join(adapter.labels)[:80]}); a classifier has two outputs or more, each with a label of its own."
        )
    if not all(torch.isfinite(tensor).all() for tensor in adapter.head.values()):
        raise BadInput(f"{where}: the head holds NaN or infinity; the training diverged, use an earlier checkpoint.")


def head_tensors(module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a head among those of PEFT's names, by their names relative to its module."""
    start = f"{PREFIX}{module}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def num_outputs(head: Mapping[str, Tensor]) -> int | None:
    """Return how many logits a head gives: the rows of its last layer, which is alone or called out_proj."""
    last = head.get("out_proj.weight", head.get("weight"))
    return last.shape[0] if last is not None and last.dim() == 2 else None


def _check_pair(config: Mapping[str, Any], module: str, tensors: Mapping[str, Tensor], where: str) -> None:
    pair = [tensors.get(f"{PREFIX}{module}{suffix}") for suffix in (A_SUFFIX, B_SUFFIX)]
    if pair[0] is None or pair[1] is None:
        missing = "lora_A" if pair[0] is None else "lora_B"
        raise BadInput(f"{where} has no {missing} for {module}; the file is incomplete, save the adapter again.")
    a, b = pair[0], pair[1]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise BadInput(
            f"{where}: the factors of {module} have shapes {tuple(a.shape)} and {tuple(b.shape)}, not [r, in] and [out, r]."
        )
    r = rank_of(config, module)
    if a.shape[0] != r:
        raise BadInput(
            f"{where}: the factors of {module} have rank {a.shape[0]}, adapter_config.json says {r}; they do not belong together."
        )
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise BadInput(
            f"{where}: the factors of {module} hold NaN or infinity; the training diverged, use an earlier checkpoint."
        )


def _check_targets(targets: Iterable[str], modules: Iterable[str], where: str) -> None:
    unused = [target for target in targets if not any(_matches(target, module) for module in modules)]
    if unused:
        raise BadInput(
            f"{where}: adapter_config.json targets {unused[0]!r}, but there are no tensors for it; save the adapter again."
        )
    stray = [module for module in modules if not any(_matches(target, module) for target in targets)]
    if stray:
        raise BadInput(
            f"{where}: there are tensors for {stray[0]}, which adapter_config.json does not target; save the adapter again."
        )


def _matches(target: str, module: str) -> bool:
    return module == target or module.endswith(f".{target}")


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """Return the rank a configuration gives a module."""
    return int(by_pattern(config["rank_pattern"], module, config["r"]))


def alpha_of(config: Mapping[str, Any], module: str) -> float:
    """Return the lora_alpha a configuration gives a module."""
    return float(by_pattern(config["alpha_pattern"], module, config["lora_alpha"]))


def by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return what the first pattern gives that matches the end of a module's name: PEFT's rule (`get_pattern_key`)."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), default)


def adapter_id(base_id: str, adapter: Adapter) -> str:
    """Return the id of what the adapter computes: base, method, and per module its name, rank, scale and factors' bytes.

    Of a classifier also the head's name and bytes, and the labels in the order of its logits.
    """
    rows = [
        [module, adapter.factors(module)[0].shape[0], adapter.scale(module).hex(), *map(_digest, adapter.factors(module))]
        for module in adapter.modules
    ]
    identity = {"version": ADAPTER_VERSION, "base_id": base_id, "method": "LORA", "modules": rows}
    if adapter.head_module is not None:
        head = [[name, *_digest(tensor)] for name, tensor in adapter.head.items()]
        identity |= {"head": [adapter.head_module, head], "labels": list(adapter.labels)}
    return id_of_json(identity)


def _digest(tensor: Tensor) -> list[Any]:
    return [list(tensor.shape), hashlib.sha256(tensor.numpy().astype("<f4", copy=False).tobytes()).hexdigest()]


def check_against_model(adapter: Adapter, model: PreTrainedModel) -> None:
    """Raise BadInput unless `model` has a linear layer of fitting shape for every factor, and every layer targeted has factors.

    A classifier's head must be the one of the model's family. Also if every B is zero: such an adapter does nothing (the half
    of the effect test that needs no forward pass).
    """
    if adapter.head_module is not None:
        _check_head_fits(adapter, model)
    for module in adapter.modules:
        _check_fits(adapter, module, model)
    known = set(adapter.modules)
    for name, layer in model.named_modules():
        targeted = any(_matches(target, name) for target in adapter.config["target_modules"])
        if targeted and name not in known and isinstance(layer, nn.Linear | Conv1D | LoraLinear):
            raise BadInput(f"the adapter targets {name} but has no factors for it; it was trained on a base with fewer layers.")
    if not any(adapter.factors(module)[1].any() for module in adapter.modules):
        raise BadInput("every lora_B of the adapter is zero, so it changes nothing; it was saved before its training.")


def _check_head_fits(adapter: Adapter, model: PreTrainedModel) -> None:
    shape = head_of(model)
    expected = {shape.peft_name(name): size for name, size in shape.tensor_shapes(len(adapter.labels)).items()}
    found = {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items() if head_module_of(name) is not None}
    if found != expected:
        raise BadInput(
            f"the adapter's head holds {_listed(found)}, and one for this base holds {_listed(expected)}; "
            "it was trained on another one."
        )


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name.removeprefix(PREFIX)} {'x'.join(map(str, size))}" for name, size in sorted(shapes.items()))


def _check_fits(adapter: Adapter, module: str, model: PreTrainedModel) -> None:
    if not can_be_adapted(module):
        raise BadInput(
            f"the adapter has factors for {module}, a head, an embedding or a pooler, which lorafleet leaves as they are; "
            "train it with other target_modules."
        )
    try:
        layer = _linear(model.get_submodule(module))
    except AttributeError:
        raise BadInput(
            f"the adapter has factors for {module}, which this base does not have; it was trained on another one."
        ) from None
    a, b = adapter.factors(module)
    expected = (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else _conv1d_shape(layer, module)
    if (a.shape[1], b.shape[0]) != expected:
        raise BadInput(
            f"the adapter's factors for {module} map {a.shape[1]} to {b.shape[0]} features, this base maps {expected[0]} to "
            f"{expected[1]}; it was trained on another one."
        )


def _linear(module: nn.Module) -> nn.Module:
    """Return the frozen layer under the engine's wrapper, if it is wrapped."""
    return module.base if isinstance(module, LoraLinear) else module


def _is_conv1d(module: nn.Module) -> bool:
    """Tell a Conv1D, also one that transformers replaced by a 4-bit layer."""
    layer = _linear(module)
    return issubclass(getattr(layer, "source_cls", type(layer)), Conv1D)


def _conv1d_shape(layer: nn.Module, module: str) -> tuple[int, int]:
    if not isinstance(layer, Conv1D):
        raise BadInput(
            f"the adapter has factors for {module}, which is no linear layer in this base; it was trained on another one."
        )
    rows, columns = layer.weight.shape
    return rows, columns
