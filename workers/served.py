"""One adapter in every form in which it may be served, each measured on the same rows.

    separate              factors beside the base as the adapter was trained on it: what the other forms are held against
    hot-swapped           the same after other adapters were switched in before and behind it, on one resident base
    merged                W + s B A in the base's own type: no cost at serving, rounded once to that type
    merged and quantised  those weights loaded again in 4 bits, all of them quantised anew

An adapter trained on a 4-bit view of its base learned to make up for that view's rounding. It is therefore merged twice:
into the dequantised training view, which is the same function, and into the original weights, which it has never met.

Merged weights stand in copies, and the base's own are put back after each form: taking s B A away again would not give the
same bits. Axes: O outputs, I inputs, K supervised positions, V vocabulary (or a classifier's labels).
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from infra.errors import WorkFailed
from workers.adapter import Adapter, check_against_model
from workers.data.render import Example, Renderer
from workers.data.rows import Row
from workers.data.tokenizer import load_tokenizer
from workers.engine.batches import make_sequence, make_stream
from workers.engine.lora import Factors, LoraLinear
from workers.engine.resident import ResidentBase, measure
from workers.loading import load_model, quiet
from workers.spec import BaseModelSpec, QuantizationSpec, TaskType

ROWS_PER_PASS = 16
KEPT_LOGITS_BYTES = 256 << 20
"""Of the separate form's logits that are kept to compare with; rows beyond it are measured by their loss only."""
HURTS = 0.01
"""Nats per token from which a form is said to lose quality; seeds of one training differ by about as much."""
SEPARATE, SWAPPED, MERGED, MERGED_QUANTISED = "separate", "hot-swapped", "merged", "merged and quantised"
INTO_VIEW, INTO_ORIGINAL = "merged into its training view", "merged into the original weights"
QUANTISED = ", quantised"

Weights = Mapping[str, Tensor]
"""Merged weights [O, I] by PEFT's module name."""


@dataclass(frozen=True)
class Form:
    """An adapter in one form."""

    name: str
    metrics: Mapping[str, float]
    largest_logit_difference: float
    """To the separate form, over the compared rows' supervised positions."""
    is_identical: bool
    """Whether those logits are the separate form's bit for bit."""


@dataclass(frozen=True)
class Served:
    """What came of all forms."""

    forms: tuple[Form, ...]
    """The separate one first."""
    num_rows: int
    num_rows_compared: int
    """Rows whose logits were compared."""
    base_checksum: str
    """SHA-256 of the base's tensors, the same before anything was merged and after it was taken out again."""
    advice: tuple[str, ...]
    """Sentences: which forms lose quality, and what to do instead."""


def serve_forms(path: Path, spec: BaseModelSpec, adapter: Adapter, rows: Sequence[Row], max_length: int) -> Served:
    """Measure the adapter on the base in `path`, as `spec` held it in training, in every form. Loads the base several times.

    Rows are cut at `max_length` tokens. Raises BadInput if the adapter does not fit the base, WorkFailed if the base is not what
    it was when the merged weights are taken out again.
    """
    torch.set_num_threads(1)  # the form must not depend on how many threads a machine has
    task_type: TaskType = "CAUSAL_LM" if adapter.head_module is None else "SEQ_CLS"
    base = ResidentBase(_checked(load_model(path, spec, task_type=task_type), adapter))
    renderer = Renderer(load_tokenizer(path), max_length, context_length=base.context_length, labels=adapter.labels)
    examples = renderer.render_all(rows)
    judge = _Judge(examples, renderer.target_bytes(examples), adapter)
    forms = [judge.reference(base), judge.form(SWAPPED, base, swapped=True)]
    view = dense_weights(base) if spec.quantization is not None else None
    if view is not None:
        plain = spec.model_copy(update={"quantization": None})
        del base
        base = ResidentBase(load_model(path, plain, task_type=task_type))
    before = checksum(base.model)
    quantised = spec.model_copy(update={"quantization": spec.quantization or QuantizationSpec(load_in_4bit=True)})
    for name, originals in _merges(base, view):
        weights = merged_weights(adapter, originals)
        with replaced(base, weights):
            forms.append(judge.form(name, base, is_merged=True))
        again = ResidentBase(_quantised_anew(path, spec, quantised, weights, task_type))
        forms.append(judge.form(MERGED_QUANTISED if view is None else name + QUANTISED, again, is_merged=True))
        del again
    if checksum(base.model) != before:
        raise WorkFailed("the base's weights changed while an adapter was merged into a copy of them; this is a defect.")
    advice = _advice(forms, quantised.quantization)
    return Served(tuple(forms), len(rows), judge.num_compared, before, advice)


def _checked(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    check_against_model(adapter, model)
    return model


def _merges(base: ResidentBase, view: Weights | None) -> list[tuple[str, Weights]]:
    """Return what is merged into, by the name of the form: the base's own weights, and the dequantised ones if there are any."""
    if view is None:
        return [(MERGED, dense_weights(base))]
    return [(INTO_VIEW, view), (INTO_ORIGINAL, dense_weights(base))]


@torch.no_grad()
def dense_weights(base: ResidentBase) -> dict[str, Tensor]:
    """Return the weights [O, I] of all layers that an adapter may touch, as they compute: those in 4 bits dequantised.

    Copies for Linear4bit and Conv1D, the layers' own for Linear.
    """
    return {name: _dense_weight(layer) for name, layer in base.layers.items()}


def _dense_weight(layer: LoraLinear) -> Tensor:
    weight = _weight(layer)
    if isinstance(layer.base, Conv1D):
        return weight.t().contiguous()
    if weight.is_floating_point():
        return weight
    dtype = getattr(layer.base, "compute_dtype", None) or torch.float32
    eye_OO = torch.eye(layer.out_features, dtype=dtype, device=weight.device)
    return layer.frozen.input_gradient(eye_OO)  # 1 W: exact, each sum has one term that is not 0


def _weight(layer: LoraLinear) -> nn.Parameter:
    weight = layer.base.weight
    assert isinstance(weight, nn.Parameter)
    return weight


@torch.no_grad()
def merged_weights(adapter: Adapter, originals: Weights) -> dict[str, Tensor]:
    """Return W + s B A of the adapted layers, added in float64 and rounded once to W's type, and the others as they are."""
    merged = dict(originals)
    for module in adapter.modules:
        a_RI, b_OR = (factor.to(originals[module].device, torch.float64) for factor in adapter.factors(module))
        update_OI = (b_OR @ a_RI) * adapter.scale(module)
        merged[module] = (originals[module].double() + update_OI).to(originals[module].dtype)
    return merged


@contextmanager
def replaced(base: ResidentBase, weights: Weights) -> Iterator[None]:
    """Let other weights [O, I] stand in the base's layers while this is open; its own are untouched, and then put back."""
    own = {name: _weight(base.layers[name]) for name in weights}
    for name, weight in weights.items():
        _put(base.layers[name].base, weight)
    try:
        yield
    finally:
        for name, parameter in own.items():
            base.layers[name].base.weight = parameter


def _put(module: nn.Module, weight_OI: Tensor) -> None:
    turned = weight_OI.t().contiguous() if isinstance(module, Conv1D) else weight_OI
    module.weight = nn.Parameter(turned, requires_grad=False)


def checksum(model: nn.Module) -> str:
    """Return the SHA-256 over names and bytes of all of a model's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _quantised_anew(
    path: Path, spec: BaseModelSpec, quantised: BaseModelSpec, weights: Weights, task_type: TaskType
) -> PreTrainedModel:
    """Save the base with merged weights to a temporary folder and load that in 4 bits, as a serving engine would."""
    model = load_model(path, spec.model_copy(update={"quantization": None}), task_type=task_type)
    for name, weight in weights.items():
        _put(model.get_submodule(name), weight)
    model.generation_config = GenerationConfig()  # a base's own may hold settings that transformers refuses to save
    with tempfile.TemporaryDirectory(prefix="lorafleet-merged-") as temporary:
        folder = Path(temporary)
        with quiet():
            model.save_pretrained(folder)
        for code in path.glob("*.py"):
            shutil.copy(code, folder)
        return load_model(folder, quantised, task_type=task_type)


class _Judge:
    """Measures forms on the same rows; keeps the separate one's logits."""

    def __init__(self, examples: Sequence[Example], num_bytes: int, adapter: Adapter) -> None:
        self._examples, self._num_bytes, self._adapter = examples, num_bytes, adapter
        self._factors = {module: Factors(*adapter.factors(module), adapter.scale(module)) for module in adapter.modules}
        self._logits: list[Tensor] = []
        self.num_compared = 0

    def reference(self, base: ResidentBase) -> Form:
        """Measure the separate form, by which the others are judged."""
        self._wear(base)
        kept_bytes = 0
        for logits_KV in self._passes(base):
            self._logits.append(logits_KV)
            kept_bytes += logits_KV.numel() * logits_KV.element_size()
            if kept_bytes >= KEPT_LOGITS_BYTES:
                break
        self.num_compared = min(len(self._examples), len(self._logits) * ROWS_PER_PASS)
        return Form(SEPARATE, self._metrics(base), 0.0, True)

    def form(self, name: str, base: ResidentBase, *, is_merged: bool = False, swapped: bool = False) -> Form:
        """Measure a form: beside the base, behind and before others (`swapped`), or with its layers merged already."""
        if swapped:
            self._pass_others(base)
        self._wear(base, is_merged=is_merged)
        largest, identical = 0.0, True
        for expected, found in zip(self._logits, self._passes(base), strict=False):  # rows beyond the kept ones are not compared
            largest = max(largest, float((found.double() - expected.double()).abs().max()))
            identical = identical and torch.equal(found, expected)
        return Form(name, self._metrics(base), largest, identical)

    def _wear(self, base: ResidentBase, *, is_merged: bool = False) -> None:
        base.switch({} if is_merged else self._factors, self._adapter.head)

    def _pass_others(self, base: ResidentBase) -> None:
        """Use the base with one other adapter, with this one, and with another again; they are made up, on all layers."""
        for seed in (1, 2):
            base.switch(_made_up(base, seed), self._adapter.head)
            next(self._passes(base))
            self._wear(base)
            next(self._passes(base))
        base.switch(_made_up(base, 3), self._adapter.head)
        next(self._passes(base))

    def _metrics(self, base: ResidentBase) -> dict[str, float]:
        return measure(base, self._examples, ROWS_PER_PASS).metrics(self._num_bytes)

    def _passes(self, base: ResidentBase) -> Iterator[Tensor]:
        """Yield logits at the supervised positions, some rows at a time."""
        for start in range(0, len(self._examples), ROWS_PER_PASS):
            part = self._examples[start : start + ROWS_PER_PASS]
            rows = [make_sequence(example, start + number, base.pooling) for number, example in enumerate(part)]
            yield base.logits(make_stream([rows], base.device, base.first_position)).cpu()


def _made_up(base: ResidentBase, seed: int) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factors(
            torch.randn(seed, layer.in_features, generator=generator).to(base.device),
            torch.randn(layer.out_features, seed, generator=generator).to(base.device),
            0.1,
        )
        for name, layer in base.layers.items()
    }


def _advice(forms: Sequence[Form], quantization: QuantizationSpec | None) -> tuple[str, ...]:
    """Say which forms lose against the separate one, and of a QLoRA adapter what merging into the original weights does."""
    loss = {form.name: form.metrics["eval/loss"] for form in forms}
    difference = {form.name: form.largest_logit_difference for form in forms}
    sentences = [
        f"{one.name}: the logits are not those of the separate form; this is a defect."
        for one in forms
        if one.name == SWAPPED and not one.is_identical
    ]
    for form in forms[1:]:
        worse = loss[form.name] - loss[SEPARATE]
        if worse > HURTS:
            sentences.append(
                f"{form.name}: eval/loss rises by {worse:.4f} ({loss[SEPARATE]:.4f} -> {loss[form.name]:.4f}), and the largest "
                f"logit difference is {form.largest_logit_difference:.3g}; serve it separate."
            )
    if INTO_ORIGINAL in loss:
        change = loss[INTO_ORIGINAL] - loss[INTO_VIEW]
        verdict = "hurts" if change > HURTS else "helps" if change < -HURTS else "makes no difference that counts"
        sentences.append(
            f"merging into the original weights, not the {quantization.bnb_4bit_quant_type if quantization else '4-bit'} view it "
            f"was trained on, {verdict}: eval/loss {change:+.4f}, largest logit difference {difference[INTO_ORIGINAL]:.3g} "
            f"against {difference[INTO_VIEW]:.3g}."
        )
    return tuple(sentences)
