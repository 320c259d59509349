"""The packed engine on a GPU: tokens per second, use of the device's peak, memory against its prediction, joining and leaving.

    python benchmarks/gpu_engine.py [--shape qwen2.5-0.5b] [--tokens 256] [--adapters 32] [--dtype bfloat16] [--json]

Needs torch, transformers, peft and pydantic only. Without --shape the settings of AIMS are run. Bases have random weights in the
shapes of public models; `tiny` is for a CPU. Every token but a row's first is supervised, with the whole vocabulary. The peer is
PEFT alone in a plain loop: padded rows, cross-entropy, clip, fused AdamW. A GPU is used by one program at a time, therefore
contenders are timed one after the other: the pack (whose peak memory is read then), one adapter in our engine, the peer.

Model FLOP utilisation is what the model needs per token, whatever is computed for it, over the device's peak (Chowdhery et al.
2022, arXiv:2204.02311, appendix B, which counts 6 N + 12 L H Q T; forward alone is a third of that). Frozen weights have no
gradient of their own, so that they count 4 N rather than 6 N; attention sees the half of a sequence that is before a token:

    4 N + 6 N_lora + 6 L H Q T       N weights of linears and head, L layers of H heads of Q values, T tokens of a row
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: its thread pool is made then

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from benchmarks.common import facts
from benchmarks.contenders import (
    STEPS,
    Contender,
    Packed,
    batch_size,
    join,
    padded,
    peft_model,
    random_rows,
    synchronise,
    training_spec,
    twin,
)
from workers.data.render import Example
from workers.engine.batches import rows_of_step
from workers.engine.resident import ResidentBase
from workers.memory import bank_bytes, is_out_of_memory, shape_of

PEAKS = {"H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bfloat16 FLOP/s of NVIDIA's data sheets (half of those quoted with sparsity), by what the device's name contains."""
JOINS = 5


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    shape: str
    tokens: int
    """Of an adapter-step."""
    adapters: int
    aim: str = ""


AIMS = (
    Setting("qwen2.5-0.5b", 256, 32, "20x of PEFT alone"),
    Setting("qwen2.5-1.5b", 256, 32, "10x of PEFT alone"),
    Setting("qwen2.5-7b", 1024, 4),
    Setting("llama-3.1-8b", 1024, 4, "16,000 tokens/s; join and leave under 250 ms"),
)


def qwen(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "tiny": lambda: qwen(64, 128, 2, 4, 2, 256, True),
    "qwen2.5-0.5b": lambda: qwen(896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": lambda: qwen(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": lambda: qwen(3584, 18944, 28, 28, 4, 152064, False),
    "llama-3.1-8b": lambda: LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}
"""Sides as the config.json of each model on the hub has them."""


class PlainPeft:
    """PEFT alone, one adapter in a plain loop."""

    adapter_steps = STEPS

    def __init__(self, model: PreTrainedModel, r: int, tokens: int, rows: Sequence[Example], checkpointing: bool) -> None:
        self._model = peft_model(model, r).train()
        if checkpointing:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        self._device, self._rows, self._spec, self._step = model.device, rows, training_spec(tokens), 0
        self._parameters = [one for one in self._model.parameters() if one.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=self._spec.learning_rate, weight_decay=0.0, fused=True)

    def sample(self, num_epochs: int) -> float:
        """Run so many epochs; return the seconds of one step."""
        synchronise(self._device)
        started = time.perf_counter()
        for _ in range(num_epochs * STEPS):
            self._advance()
        synchronise(self._device)
        return (time.perf_counter() - started) / (num_epochs * STEPS)

    def _advance(self) -> None:
        (numbers,) = rows_of_step(self._spec, len(self._rows), self._step)
        self._step += 1
        batch = padded([self._rows[number] for number in numbers])
        self._model(**{name: values.to(self._device) for name, values in batch.items()}).loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._spec.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()


def measure_setting(setting: Setting, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure one setting; what did not fit into memory is None."""
    model = random_model(SHAPES[setting.shape](), getattr(torch, options.dtype), device)
    rows = [random_rows(setting.tokens, model.config.vocab_size, seed) for seed in range(setting.adapters)]
    tokens = sum(len(row.input_ids) for row in rows[0]) / STEPS
    memory, flops = predicted_bytes(model, setting, options), flops_per_token(model, setting, options.rank)
    bare = twin(model)  # before the base is wrapped for packs
    base = ResidentBase(model)
    checkpointing = options.checkpointing
    packing = {"tokens_per_pass": options.tokens_per_pass, "checkpointing": checkpointing}
    result = {"aim": setting.aim, "shape": setting.shape, "adapters": setting.adapters, "tokens_per_adapter_step": tokens}
    pack = attempt(
        lambda: measure_pack(
            Packed(base, [options.rank] * setting.adapters, setting.tokens, rows, **packing), rows[0], setting, options
        )
    )
    own = attempt(lambda: median_of(Packed(base, [options.rank], setting.tokens, rows[:1], **packing), options))
    peer = attempt(lambda: median_of(PlainPeft(bare, options.rank, setting.tokens, rows[0], checkpointing), options))
    seconds = pack and pack.pop("seconds")
    rate = seconds and tokens / seconds
    peak = peak_of(device) if options.dtype == "bfloat16" else None
    return result | {
        "ms_pack": seconds and 1e3 * seconds,
        "ms_own_alone": own and 1e3 * own,
        "ms_peft_alone": peer and 1e3 * peer,
        "ratio_own_alone": seconds and own and own / seconds,
        "ratio_peft_alone": seconds and peer and peer / seconds,
        "tokens_per_second": rate,
        "model_flop_utilisation": rate and peak and rate * flops / peak,
        "predicted_bytes": memory,
        **(pack or dict.fromkeys(("peak_bytes", "join_ms", "slowest_join_ms", "leave_ms", "slowest_leave_ms"))),
    }


def random_model(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return a model with random weights on `device`."""
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False).eval()


def predicted_bytes(model: PreTrainedModel, setting: Setting, options: argparse.Namespace) -> int:
    """Return what the host's memory model says a pass needs."""
    shape = shape_of(model)
    together = min(setting.adapters * setting.tokens, max(setting.tokens, options.tokens_per_pass))
    banks = setting.adapters * bank_bytes(lora_parameters(model, options.rank))
    return shape.num_bytes + banks + shape.head_bytes + together * shape.bytes_per_token(checkpointing=options.checkpointing)


def linears_of(model: PreTrainedModel) -> list[torch.nn.Linear]:
    """Return the linears that have adapters."""
    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]


def lora_parameters(model: PreTrainedModel, rank: int) -> int:
    return sum(rank * (linear.in_features + linear.out_features) for linear in linears_of(model))


def flops_per_token(model: PreTrainedModel, setting: Setting, rank: int) -> float:
    """Return what one token needs in forward and backward; see the module for the formula."""
    config = model.config
    weights = sum(linear.weight.numel() for linear in linears_of(model)) + config.hidden_size * config.vocab_size
    attention = 6 * config.num_hidden_layers * config.hidden_size * setting.tokens // batch_size(setting.tokens)
    return 4.0 * weights + 6.0 * lora_parameters(model, rank) + attention


def peak_of(device: torch.device) -> float | None:
    """Return the device's dense bfloat16 FLOP/s, None if it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)  # the longer names come first


def attempt(measure: Callable[[], Any]) -> Any:
    """Return what was measured, None if memory ran out; afterwards nothing of it is held."""
    try:
        return measure()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"out of memory: {error}", file=sys.stderr)
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def median_of(contender: Contender, options: argparse.Namespace) -> float:
    """Return the seconds of an adapter-step: after a warm-up, the median of rounds."""
    warm = min(contender.sample(1) for _ in range(2))
    epochs = max(1, round(options.seconds / (warm * contender.adapter_steps)))
    return statistics.median(contender.sample(epochs) for _ in range(options.rounds))


def measure_pack(packed: Packed, rows: Sequence[Example], setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Time a pack, read its peak memory, then let further adapters join and leave."""
    device = packed.pack.base.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = median_of(packed, options)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    joins, leaves = [], []
    for _ in range(JOINS):
        started = time.perf_counter()
        newcomer = join(packed.pack, options.rank, setting.tokens, rows)
        synchronise(device)
        joined = time.perf_counter()
        packed.pack.leave(newcomer)
        synchronise(device)
        joins.append(1e3 * (joined - started))
        leaves.append(1e3 * (time.perf_counter() - joined))
    found = {"join_ms": statistics.median(joins), "slowest_join_ms": max(joins)}
    found |= {"leave_ms": statistics.median(leaves), "slowest_leave_ms": max(leaves)}
    return {"seconds": seconds, "peak_bytes": peak, **found}


def main() -> int:
    """Measure all settings and print a table."""
    options = parse()
    on_gpu = torch.cuda.is_available()
    settings = [Setting(*one) for one in product(options)] if options.shape else list(AIMS)
    if not on_gpu and any(setting.shape != "tiny" for setting in settings):
        sys.exit("this benchmark needs a GPU that torch can use, and there is none here: on a CPU only --shape tiny is measured.")
    torch.set_num_threads(1)
    device = torch.device("cuda" if on_gpu else "cpu")
    with contextlib.redirect_stdout(sys.stderr):
        rows = [measure_setting(setting, options, device) for setting in settings]
    result = {
        "facts": {"device": torch.cuda.get_device_name(device) if on_gpu else "cpu", **facts("torch", "transformers", "peft")},
        "setting": f"random {options.dtype} weights, LoRA of rank {options.rank} on all linears, AdamW, clip 1, passes of "
        f"{options.tokens_per_pass} tokens at most, {'with' if options.checkpointing else 'no'} checkpointing; median of "
        f"{options.rounds} rounds of about {options.seconds:g} s",
        "rows": rows,
    }
    print(json.dumps(result, indent=2) if options.json else _table(result))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), help="without it the issue's aims are measured")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256], help="tokens of one adapter-step, 64 to 4096")
    parser.add_argument("--adapters", type=int, nargs="+", default=[32])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base")
    parser.add_argument("--tokens-per-pass", type=int, default=8192, help="adapters take turns beyond that")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="that each contender is timed for in a round, about")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def product(options: argparse.Namespace) -> list[tuple[str, int, int]]:
    return [(shape, tokens, number) for shape in options.shape for tokens in options.tokens for number in options.adapters]


COLUMNS = {
    "shape": ("shape", "{}"),
    "tokens_per_adapter_step": ("tokens", "{:.0f}"),
    "adapters": ("adapters", "{}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "model_flop_utilisation": ("MFU", "{:.1%}"),
    "peak_bytes": ("peak bytes", "{:.3g}"),
    "predicted_bytes": ("predicted", "{:.3g}"),
    "ms_pack": ("ms/ad.-step", "{:.2f}"),
    "ratio_peft_alone": ("PEFT alone", "{:.2f}x"),
    "ratio_own_alone": ("own alone", "{:.2f}x"),
    "slowest_join_ms": ("join ms", "{:.1f}"),
    "slowest_leave_ms": ("leave ms", "{:.1f}"),
}


def _table(result: dict[str, Any]) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in result["facts"].items()), result["setting"], ""]
    lines.append("".join(f"{title:>14}" for title, _ in COLUMNS.values()) + "  aim")
    for row in result["rows"]:
        cells = ["-" if row[key] is None else form.format(row[key]) for key, (_, form) in COLUMNS.items()]
        lines.append("".join(f"{cell:>14}" for cell in cells) + f"  {row['aim']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
