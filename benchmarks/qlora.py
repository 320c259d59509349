"""QLoRA in packs: what one step of one adapter costs on a 4-bit base when N train together, against PEFT's QLoRA alone.

    python benchmarks/qlora.py [--hidden 64 256 512] [--adapters 1 4 16] [--tokens 96] [--quant-type nf4] [--json]

A base with random weights is saved, and loaded in 4 bits with double quantisation as jobs load it. Compared per
adapter-step, on one compute thread:
  (a) transformers' Trainer and PEFT on that base, one adapter alone: each linear is dequantised twice for each adapter-step;
  (b) our own engine with one adapter.
Widths are multiples of 64, the block of the format: with others bitsandbytes 0.50.2 computes something else on CPUs with
AVX-512. Each figure is the median of rounds in which all take turns. Losses of (a) and ours after the same steps
must agree within 1e-4 or the comparison is void (exit code 1).
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: its thread pool is made then

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.common import facts
from benchmarks.contenders import CLOCKS, STEPS, Contender, Packed, mean_of_medians, measure, random_rows, twin
from benchmarks.engine import CHECKED_STEPS, RANKS, Peer
from workers.data.render import Example
from workers.engine.resident import ResidentBase
from workers.loading import load_model, quiet
from workers.spec import BaseModelSpec, QuantizationSpec

MAX_LOSS_DIFFERENCE = 1e-4
BLOCK = 64


def quantized_llama(hidden: int, quant_type: str, folder: Path) -> PreTrainedModel:
    """Save a small Llama with random weights, and load it in 4 bits as a job does."""
    heads = max(4, hidden // 64)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=6,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        vocab_size=512 if hidden == 64 else 4096,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with quiet():
        LlamaForCausalLM(config).save_pretrained(folder)
    form = QuantizationSpec.model_validate({"load_in_4bit": True, "bnb_4bit_quant_type": quant_type})
    return load_model(folder, BaseModelSpec(name_or_path=str(folder), quantization=form))


def compare(hidden: int, tokens: int, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Measure one width and size of steps for all numbers of adapters."""
    model = quantized_llama(hidden, options.quant_type, folder / f"base-{hidden}")
    rows = [random_rows(tokens, model.config.vocab_size, seed) for seed in range(max(options.adapters))]
    ranks = [RANKS[number % len(RANKS)] for number in range(len(rows))]
    first = {r: rows[ranks.index(r)] for r in dict.fromkeys(ranks)}
    checked = check_losses(model, ranks[0], rows[0], tokens, folder)
    base, clock = ResidentBase(twin(model)), CLOCKS[options.clock]
    contenders: dict[tuple[str, int], Contender] = {("peer", r): Peer(model, r, own, folder, clock) for r, own in first.items()}
    contenders |= {("own", r): Packed(base, [r], tokens, [own], clock=clock) for r, own in first.items()}
    for number in options.adapters:
        contenders["pack", number] = Packed(base, ranks[:number], tokens, rows[:number], clock=clock)
    samples = measure(contenders, options.rounds, options.seconds)
    exact = sum(len(row.input_ids) for row in rows[0]) / STEPS
    return [_row(hidden, exact, ranks[:number], samples) | checked for number in options.adapters]


def check_losses(model: PreTrainedModel, r: int, rows: Sequence[Example], tokens: int, folder: Path) -> dict[str, float]:
    """Train one adapter both ways from the same start; return its losses per token on its own rows, before and after."""
    ours = Packed(ResidentBase(twin(model)), [r], tokens, [rows])
    peer = Peer(model, r, rows, folder, time.perf_counter)
    start = peer.loss()
    peer.train(1, CHECKED_STEPS - 1)
    ours.sample(CHECKED_STEPS // STEPS)
    training = ours.passes[0][0]
    return {"loss_before": start, "loss_peer": peer.loss(), "loss_ours": ours.pack.evaluate([training])[training]["eval/loss"]}


def _row(hidden: int, tokens: float, ranks: Sequence[int], samples: Mapping[tuple[str, int], Sequence[float]]) -> dict[str, Any]:
    peer, own = (
        mean_of_medians({r: rounds for (kind, r), rounds in samples.items() if kind == name}, ranks) for name in ("peer", "own")
    )
    ours = statistics.median(samples["pack", len(ranks)])
    return {
        "hidden": hidden,
        "adapters": len(ranks),
        "ranks": sorted(set(ranks)),
        "tokens_per_adapter_step": tokens,
        "ms_ours": 1e3 * ours,
        "ms_trainer_peft": 1e3 * peer,
        "ms_own_alone": 1e3 * own,
        "ratio_trainer_peft": peer / ours,
        "ratio_own_alone": own / ours,
        "rounds_ms_ours": [1e3 * value for value in samples["pack", len(ranks)]],
    }


def main() -> int:
    """Measure all, print a table, and return 1 if the losses do not agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 256, 512], help="multiples of 64")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[96], help="tokens of one adapter-step")
    parser.add_argument("--quant-type", choices=["nf4", "fp4"], default="nf4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="that each contender is timed for in a round, about")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu leaves out time in which others had the core")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if any(hidden % BLOCK for hidden in options.hidden):
        parser.error(f"--hidden takes multiples of {BLOCK}")
    torch.set_num_threads(1)
    load_before, started = os.getloadavg()[0], time.time()
    rows = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        for hidden in options.hidden:
            for tokens in options.tokens:
                rows += compare(hidden, tokens, options, Path(folder))
    difference = max(abs(row["loss_ours"] - row["loss_peer"]) for row in rows)
    result = {
        "facts": facts("torch", "transformers", "peft", "bitsandbytes", "lorafleet"),
        "setting": f"Llama shapes with random weights in {options.quant_type} with double quantisation, float32 compute, "
        f"{torch.get_num_threads()} thread, LoRA on all linears, ranks {', '.join(map(str, RANKS))} in turn, AdamW, clip 1; "
        f"median of {options.rounds} rounds of about {options.seconds:g} s, {options.clock} time",
        "load": [load_before, os.getloadavg()[0]],
        "seconds": time.time() - started,
        "rows": rows,
        "largest_loss_difference": difference,
    }
    print(json.dumps(result, indent=2) if options.json else _table(result))
    return 0 if difference <= MAX_LOSS_DIFFERENCE else 1


def _table(result: Mapping[str, Any]) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in result["facts"].items()), result["setting"]]
    lines += ["load of the machine before {:.1f}, after {:.1f}; {:.0f} s".format(*result["load"], result["seconds"]), ""]
    lines.append(f"{'':>20}{'tokens per':>13}{'ms per adapter-step':^33}{'ours against':^16}")
    lines.append(
        f"{'hidden':>8}{'adapters':>12}{'adapter-step':>13}{'ours':>10}{'(a) Trainer':>12}{'(b) alone':>11}{'(a)':>8}{'(b)':>8}"
    )
    for row in result["rows"]:
        lines.append(
            f"{row['hidden']:>8}{row['adapters']:>12}{row['tokens_per_adapter_step']:>13.0f}{row['ms_ours']:>10.2f}"
            f"{row['ms_trainer_peft']:>12.2f}{row['ms_own_alone']:>11.2f}"
            f"{row['ratio_trainer_peft']:>7.2f}x{row['ratio_own_alone']:>7.2f}x"
        )
    losses = ", ".join(dict.fromkeys(f"{row['loss_before']:.3f} to {row['loss_ours']:.3f}" for row in result["rows"]))
    lines += ["", f"largest difference of losses {result['largest_loss_difference']:.1e} (allowed {MAX_LOSS_DIFFERENCE}) after"]
    lines[-1] += f" {CHECKED_STEPS} steps of rank {RANKS[0]}: {losses}"
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
