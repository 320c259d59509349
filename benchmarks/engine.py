"""The packed engine against training one at a time: what one step of one adapter costs when N train together.

    python benchmarks/engine.py [--hidden 64 128 256] [--adapters 1 4 8 16 32] [--tokens 96 720] [--json]

Compared with N adapters in a pack, per adapter-step, on one compute thread:
  (a) transformers' Trainer and PEFT, one adapter alone: its own loop and padding, the same rows and ranks; the time of a step
      is taken inside one `train`, its first steps left out;
  (b) our own engine with one adapter;
  (c) the limit: the frozen base's forward and input gradient alone, on the same streams, with the same head and loss.
Bases have random weights: hidden 64 is stories260k's shape, wider ones have talk-5m's proportions. Each figure is the median of
rounds in which all take turns. Losses of (a) and ours after the same steps must agree within 1e-3 or the comparison is void
(exit code 1).
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from benchmarks.common import facts
from benchmarks.contenders import (
    CLOCKS,
    LEARNING_RATE,
    STEPS,
    Contender,
    Packed,
    mean_of_medians,
    measure,
    padded,
    peft_model,
    random_rows,
    training_spec,
    twin,
)
from workers.data.render import Example
from workers.engine.batches import Stream, make_sequence, make_stream, rows_of_step
from workers.engine.resident import ResidentBase

RANKS = (16, 8, 32)
"""Of the adapters of a pack, in turn."""
MAX_LOSS_DIFFERENCE = 1e-3
CHECKED_STEPS = 2 * STEPS
AIMS = {64: 6.0, 128: 3.0}
"""Of (a) over ours at 16 adapters, by hidden size."""
AIM_WIDER, AIM_OWN, AIM_TAX = 1.5, 3.0, 0.15


def llama(hidden: int) -> PreTrainedModel:
    """Return a Llama with random weights: stories260k's shape at 64, talk-5m's proportions beyond."""
    heads = 8 if hidden == 64 else max(4, hidden // 64)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=172 if hidden == 64 else hidden * 43 // 16,
        num_hidden_layers=5 if hidden == 64 else 6,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        vocab_size=512 if hidden == 64 else 4096,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


class Limit:
    """The frozen base alone, forward and input gradient, on the streams of N adapters."""

    def __init__(self, model: PreTrainedModel, streams: Sequence[Stream], clock: Callable[[], float]) -> None:
        """`model` is taken over: its linears are its own again, and the embeddings' output has a gradient."""
        self._base = ResidentBase(model)
        for name, layer in self._base.layers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.base)
        model.enable_input_require_grads()
        self._streams, self._clock = streams, clock
        self.adapter_steps = sum(len(stream.tokens) for stream in streams)

    def sample(self, num_epochs: int) -> float:
        started = self._clock()
        for _ in range(num_epochs):
            for stream in self._streams:
                self._base.backward_stream(stream, stream.targets)
        return (self._clock() - started) / (num_epochs * self.adapter_steps)


class Peer:
    """transformers' Trainer and PEFT with one adapter, on the rows and in the row order of ours."""

    adapter_steps = STEPS

    def __init__(self, model: PreTrainedModel, r: int, rows: Sequence[Example], folder: Path, clock: Callable[[], float]) -> None:
        self.model, self._rows, self._folder, self._clock = peft_model(model, r), rows, folder, clock

    def sample(self, num_epochs: int) -> float:
        return self.train(STEPS, num_epochs * STEPS)

    def train(self, warm_up: int, num_steps: int) -> float:
        """Train for both together; return the seconds of one of the latter steps."""
        ends = _Ends(self._clock)
        trainer = _SameOrder(
            model=self.model,
            args=_arguments(self._folder, warm_up + num_steps, batch_size_of(self._rows)),
            train_dataset=self._rows,
            data_collator=padded,
            callbacks=[ends],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return (ends.times[-1] - ends.times[warm_up - 1]) / num_steps

    @torch.no_grad()
    def loss(self) -> float:
        """Return nats per supervised token over the rows."""
        total = count = 0.0
        for row in self._rows:
            logits = self.model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(row.input_ids[1:]), reduction="none")
            total, count = total + float(losses.sum()), count + len(losses)
        return total / count


class _Ends(TrainerCallback):
    """Notes when steps end."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.times: list[float] = []
        self._clock = clock

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(self._clock())


class _SameOrder(Trainer):
    """Trainer with the row order of ours: all its steps are one epoch to it."""

    def _get_train_sampler(self, *args: Any) -> Any:
        spec = training_spec(1).model_copy(update={"per_device_train_batch_size": self.args.per_device_train_batch_size})
        return [
            row
            for step in range(self.args.max_steps)
            for rows in rows_of_step(spec, len(self.train_dataset), step)  # type: ignore[arg-type]
            for row in rows
        ]


def _arguments(folder: Path, num_steps: int, batch: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=batch,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        average_tokens_across_devices=False,
    )


def batch_size_of(rows: Sequence[Example]) -> int:
    """Return the rows of a step of an epoch of these rows."""
    return len(rows) // STEPS


def streams_of(rows: Sequence[Sequence[Example]], tokens: int) -> list[Stream]:
    """Return what passes of N adapters compute on, for one epoch."""
    spec = training_spec(tokens)
    return [
        make_stream(
            [[make_sequence(own[row], row) for row in rows_of_step(spec, len(own), step)[0]] for own in rows],
        )
        for step in range(STEPS)
    ]


def compare(hidden: int, tokens: int, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Measure one width and size of steps for all numbers of adapters."""
    model = llama(hidden)
    most = max(options.adapters)
    rows = [random_rows(tokens, model.config.vocab_size, seed) for seed in range(most)]
    ranks = [RANKS[number % len(RANKS)] for number in range(most)]
    used = list(dict.fromkeys(ranks))
    checked = check_losses(model, used[0], rows[0], tokens, folder)
    base, clock = ResidentBase(twin(model)), CLOCKS[options.clock]
    contenders: dict[tuple[str, int], Contender] = {
        ("peer", r): Peer(model, r, rows[ranks.index(r)], folder, clock) for r in used
    }
    contenders |= {("own", r): Packed(base, [r], tokens, [rows[ranks.index(r)]], clock=clock) for r in used}
    for number in options.adapters:
        if number > 1:
            contenders["pack", number] = Packed(base, ranks[:number], tokens, rows[:number], clock=clock)
        contenders["limit", number] = Limit(twin(model), streams_of(rows[:number], tokens), clock)
    samples = measure(contenders, options.rounds, options.seconds)
    if 1 in options.adapters:
        samples["pack", 1] = samples["own", ranks[0]]
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


def _row(hidden: int, tokens: float, ranks: Sequence[int], samples: dict[tuple[str, int], list[float]]) -> dict[str, Any]:
    number = len(ranks)
    peer, own = (
        mean_of_medians({r: rounds for (kind, r), rounds in samples.items() if kind == name}, ranks) for name in ("peer", "own")
    )
    ours, limit = (statistics.median(samples[name, number]) for name in ("pack", "limit"))
    return {
        "hidden": hidden,
        "adapters": number,
        "ranks": sorted(set(ranks)),
        "tokens_per_adapter_step": tokens,
        "ms_ours": 1e3 * ours,
        "ms_trainer_peft": 1e3 * peer,
        "ms_own_alone": 1e3 * own,
        "ms_limit": 1e3 * limit,
        "ratio_trainer_peft": peer / ours,
        "ratio_own_alone": own / ours,
        "tax_over_limit": ours / limit - 1.0,
        "rounds_ms_ours": [1e3 * value for value in samples["pack", number]],
        "rounds_ms_limit": [1e3 * value for value in samples["limit", number]],
    }


def main() -> int:
    """Measure all, print a table, and return 1 if the losses do not agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 128, 256], help="64, or multiples of 64 from 128 up")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[96, 720], help="tokens of one adapter-step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="that each contender is timed for in a round, about")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu leaves out time in which others had the core")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load_before, started = os.getloadavg()[0], time.time()
    rows = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        for hidden in options.hidden:
            for tokens in options.tokens:
                rows += compare(hidden, tokens, options, Path(folder))
                print(f"hidden {hidden}, {tokens} tokens: done after {time.time() - started:.0f} s", file=sys.stderr)
    difference = max(abs(row["loss_ours"] - row["loss_peer"]) for row in rows)
    result = {
        "facts": facts("torch", "transformers", "peft", "accelerate", "lorafleet"),
        "setting": f"Llama shapes with random float32 weights, {torch.get_num_threads()} thread, LoRA on all linears, ranks "
        f"{', '.join(map(str, RANKS))} in turn, AdamW, clip 1; median of {options.rounds} rounds of about {options.seconds:g} s, "
        f"{options.clock} time",
        "load": [load_before, os.getloadavg()[0]],
        "seconds": time.time() - started,
        "rows": rows,
        "largest_loss_difference": difference,
    }
    print(json.dumps(result, indent=2) if options.json else _table(result))
    return 0 if difference <= MAX_LOSS_DIFFERENCE else 1


def _table(result: dict[str, Any]) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in result["facts"].items()), result["setting"]]
    lines += ["load of the machine before {:.1f}, after {:.1f}; {:.0f} s".format(*result["load"], result["seconds"]), ""]
    lines.append(f"{'':>20}{'tokens per':>13}{'ms per adapter-step':^44}{'ours against':^24}")
    lines.append(
        f"{'hidden':>8}{'adapters':>12}{'adapter-step':>13}{'ours':>10}{'(a) Trainer':>12}{'(b) alone':>11}{'(c) limit':>11}"
        f"{'(a)':>8}{'(b)':>8}{'(c)':>8}  aims"
    )
    for row in result["rows"]:
        lines.append(
            f"{row['hidden']:>8}{row['adapters']:>12}{row['tokens_per_adapter_step']:>13.0f}{row['ms_ours']:>10.2f}"
            f"{row['ms_trainer_peft']:>12.2f}{row['ms_own_alone']:>11.2f}{row['ms_limit']:>11.2f}"
            f"{row['ratio_trainer_peft']:>7.2f}x{row['ratio_own_alone']:>7.2f}x{row['tax_over_limit']:>8.0%}  {_aims(row)}"
        )
    lines += ["", f"largest difference of losses {result['largest_loss_difference']:.1e} (allowed {MAX_LOSS_DIFFERENCE}) after"]
    lines[-1] += f" {CHECKED_STEPS} steps of rank {RANKS[0]}: " + ", ".join(
        dict.fromkeys(f"{row['loss_before']:.3f} to {row['loss_ours']:.3f}" for row in result["rows"])
    )
    return "\n".join(lines)


def _aims(row: dict[str, Any]) -> str:
    if row["adapters"] == 16:
        own = f", {AIM_OWN:g}x of (b)" if row["hidden"] == 64 else ""
        return f"{AIMS.get(row['hidden'], AIM_WIDER):g}x of (a){own}"
    return f"tax of {AIM_TAX:.0%}" if row["adapters"] == 32 else ""


if __name__ == "__main__":
    sys.exit(main())
