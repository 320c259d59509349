"""That an export computes what the stored adapter does: logits by PEFT against logits by the consumer's own rule.

The reference is PEFT with the adapter's own two files. Beside it stands what the consumer would compute from the files it is
given, by its rule for the scale and nothing of ours: y = W x + s' B' (A' x), added by hooks on the plain model; or, for a
merged folder, the model that transformers loads from it. Both run over fixed probe prompts and fixed random tokens, in float32
as engines compute, and in float64, where what rounding hides cannot hide. In float64 the places in which models fall back to
float32 on purpose (norms, softmax, rotary angles) are raised to float64 as well, or their rounding would be all that is seen.
"""

import gc
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from infra.errors import WorkFailed
from infra.fingerprint import canonical_json, sha256_hex
from workers.adapter import Adapter
from workers.adapter_files import CONFIG_NAME, WEIGHTS_NAME, adapter_files
from workers.consumers import Consumer
from workers.data.contract import has_tokenizer
from workers.data.tokenizer import load_tokenizer
from workers.engine.lora import Factors
from workers.export import Layers, served_factors
from workers.loading import load_model, quiet
from workers.spec import BaseModelSpec

PROBE_PROMPTS = (
    "Question: What is the capital of France? Answer:",
    "Please book a table for two at seven o'clock tomorrow evening.",
    'def add(a, b):\n    return a + b\n\nprint(json.dumps({"total": add(2, 3)}))',
    "Es war einmal ein König; 1 234,56 € — naïve façade.",
)
NUM_RANDOM_ROWS, NUM_RANDOM_TOKENS = 4, 24
MAX_PROBE_TOKENS = 64
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest difference, as a share of the largest logit, that needs no further look."""
NOISE_FACTOR = 8.0
"""A scale folded into B is rounded to float32 once, so the difference is of the size of what float32 arithmetic costs the stored
adapter itself; a model that amplifies rounding amplifies both."""
ROUNDING_FACTOR = 64.0
"""For merged weights: times the epsilon of the type they are stored in."""
MAX_FLOAT64_PARAMETERS = 2_000_000_000
"""Bases above it (16 GB in float64) are compared in float32 only."""

Logits = list[Tensor]


@dataclass(frozen=True)
class Probes:
    """Rows of token ids that logits are compared on."""

    rows: tuple[tuple[int, ...], ...]

    @property
    def sha256(self) -> str:
        """Digest of the token ids."""
        return sha256_hex(canonical_json(self.rows))


def probes_of(base: Path, vocab_size: int, context_length: int | None) -> Probes:
    """Return the probe prompts as the base's tokenizer writes them, where it has one, and rows of random tokens."""
    length = min(MAX_PROBE_TOKENS, context_length or MAX_PROBE_TOKENS)
    texts: list[list[int]] = []
    if has_tokenizer(base):
        tokenizer = load_tokenizer(base)
        texts = [tokenizer(prompt)["input_ids"][:length] for prompt in PROBE_PROMPTS]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, vocab_size, (NUM_RANDOM_ROWS, min(NUM_RANDOM_TOKENS, length)), generator=generator)
    return Probes(tuple(tuple(row) for row in [*texts, *drawn.tolist()] if row and max(row) < vocab_size))


def prove(
    adapter: Adapter,
    consumer: Consumer,
    base: Path,
    layers: Layers,
    *,
    files: Mapping[str, bytes] | None = None,
    merged: Path | None = None,
    rounding: float = 0.0,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compare what a consumer computes from `files` (or the `merged` folder) with PEFT on the adapter's stored files.

    `rounding` is the epsilon of the type that merged weights are stored in. Returns the body of proof.json: "float64" and
    "float32" with `largest_difference` of a logit and the same as a share of the largest logit, `largest_effect` (what the
    adapter changes), `float32_noise` (what float32 arithmetic costs the stored adapter) and `if_read_as_stored` (the difference
    if the consumer were given the adapter as it is stored).

    Raises WorkFailed if the export computes something else.
    """
    spec = BaseModelSpec(name_or_path=str(base), trust_remote_code=trust_remote_code)
    model = load_model(base, spec)
    probes = probes_of(base, int(model.config.vocab_size), getattr(model.config, "max_position_embeddings", None))
    types = _types(model)
    plain = _by_rule(model, probes, types[-1:], {})
    naive = _by_rule(model, probes, types[-1:], _factors(adapter, consumer, adapter_files(adapter), layers))
    served = _by_rule(model, probes, types, _factors(adapter, consumer, files, layers)) if files is not None else {}
    reference = _by_peft(model, probes, types, adapter)
    del model
    gc.collect()
    if merged is not None:
        served = _by_rule(load_model(merged, spec), probes, types, {})
    best = types[-1]
    proof = _described(adapter, consumer, probes, rule="W + s B A, stored" if files is None else consumer.rule)
    proof |= {_name(dtype): _difference(reference[dtype], served[dtype]) for dtype in types}
    noise = _difference(reference[best], reference[torch.float32])
    proof["float32_noise"] = noise["largest_difference"]
    proof["largest_effect"] = _difference(reference[best], plain[best])["largest_difference"]
    proof["if_read_as_stored"] = _difference(reference[best], naive[best])["largest_difference"] if files is not None else None
    allowed = max(TOLERANCE[best], NOISE_FACTOR * noise["share_of_largest_logit"], ROUNDING_FACTOR * rounding)
    _judge(proof, best, allowed, consumer)
    return proof


def _types(model: PreTrainedModel) -> list[torch.dtype]:
    """Return the types to compare in, the finest last."""
    is_small = sum(parameter.numel() for parameter in model.parameters()) <= MAX_FLOAT64_PARAMETERS
    return [torch.float32, torch.float64] if is_small else [torch.float32]


def _described(adapter: Adapter, consumer: Consumer, probes: Probes, rule: str) -> dict[str, Any]:
    return {
        "consumer": consumer.name,
        "reference": f"PEFT {version('peft')} with the files of the store",
        "rule": rule,
        "probe_rows": len(probes.rows),
        "probe_tokens": sum(map(len, probes.rows)),
        "probe_sha256": probes.sha256,
        "num_layers": len(adapter.modules),
        "float64": None,
        "float32": None,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _difference(expected: Logits, found: Logits) -> dict[str, float]:
    largest = max(float((one.double() - other.double()).abs().max()) for one, other in zip(expected, found, strict=True))
    scale = max(float(one.double().abs().max()) for one in expected)
    return {"largest_difference": largest, "share_of_largest_logit": largest / scale if scale else largest}


def _judge(proof: Mapping[str, Any], best: torch.dtype, tolerance: float, consumer: Consumer) -> None:
    share = proof[_name(best)]["share_of_largest_logit"]
    if not share <= tolerance:  # also where it is NaN
        raise WorkFailed(
            f"the export for {consumer.title} does not compute what the adapter does: logits differ by {share:.2e} of the "
            f"largest ({_name(best)}; allowed {tolerance:.0e}); nothing was written; report it, with versions of torch and PEFT."
        )


def _factors(adapter: Adapter, consumer: Consumer, files: Mapping[str, bytes] | None, layers: Layers) -> dict[str, Factors]:
    """Return what the consumer multiplies by. PEFT's own rule is stood in for by our separate form."""
    if consumer.reads_patterns:
        return {name: Factors(*adapter.factors(name), adapter.scale(name)) for name in adapter.modules}
    assert files is not None, "only a merged folder has no adapter files"
    return served_factors(json.loads(files[CONFIG_NAME]), safetensors.torch.load(files[WEIGHTS_NAME]), consumer, layers)


def _by_rule(
    model: PreTrainedModel, probes: Probes, types: Sequence[torch.dtype], factors: Mapping[str, Factors]
) -> dict[torch.dtype, Logits]:
    """Return logits by type with the updates added by hooks. The model is float32 afterwards, as it was."""
    found = {}
    for dtype in types:
        model.to(dtype)  # type: ignore[arg-type]
        with _updated(model, factors, dtype):
            found[dtype] = _logits(model, probes, dtype)
    model.to(torch.float32)  # type: ignore[arg-type]
    return found


@contextmanager
def _updated(model: PreTrainedModel, factors: Mapping[str, Factors], dtype: torch.dtype) -> Iterator[None]:
    with ExitStack() as hooks:
        for name, one in factors.items():
            handle = model.get_submodule(name).register_forward_hook(_adding(one, dtype))
            hooks.callback(handle.remove)
        yield


def _adding(factors: Factors, dtype: torch.dtype) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    a, b = factors.a.to(dtype), factors.b.to(dtype)

    def add(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + nn.functional.linear(nn.functional.linear(inputs[0], a), b) * factors.scale

    return add


def _by_peft(model: PreTrainedModel, probes: Probes, types: Sequence[torch.dtype], adapter: Adapter) -> dict[torch.dtype, Logits]:
    """Return logits by type with PEFT in the model, which stays in it."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        for name, data in adapter_files(adapter).items():
            (Path(folder) / name).write_bytes(data)
        wrapped = peft.PeftModel.from_pretrained(model, folder).eval()
    found = {}
    for dtype in types:
        wrapped.to(dtype)
        found[dtype] = _logits(wrapped, probes, dtype)
    return found


class _RaisedToFloat64(TorchFunctionMode):
    """Every float32 that is asked for by name is float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        raised = tuple(torch.float64 if one is torch.float32 else one for one in args)
        named = {key: torch.float64 if one is torch.float32 else one for key, one in (kwargs or {}).items()}
        return func(*raised, **named)


@torch.no_grad()
def _logits(model: Any, probes: Probes, dtype: torch.dtype) -> Logits:
    with _RaisedToFloat64() if dtype is torch.float64 else nullcontext():
        rows = [torch.tensor([row]) for row in probes.rows]
        return [model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0] for row in rows]
