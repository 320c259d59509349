"""A base that stays in memory: the frozen model with its LoRA layers, and one forward over a stream."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from infra.errors import BadInput
from workers.data.render import Example
from workers.engine.attention import STREAM_ATTENTION, sequences_of
from workers.engine.batches import Stream, make_stream
from workers.engine.lora import Factors, LoraLinear, install, switch


class ResidentBase:
    """A frozen causal language model, ready for adapters to be switched in. Holds no adapter's weights itself."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises BadInput if a layer mixes tokens otherwise than by attention: rows laid end to end would then see each other."""
        _refuse_other_mixers(model)
        self.model = model
        self.layers: dict[str, LoraLinear] = install(model)
        self.device = model.device
        model.requires_grad_(False)
        model.set_attn_implementation(STREAM_ATTENTION)
        model.config.use_cache = False
        model.generation_config = (
            GenerationConfig()
        )  # a base's own may penalise repetition: its answers would not be the likeliest
        model.eval()
        _silence_dropout(model)

    @property
    def context_length(self) -> int | None:
        """Tokens that a sequence may have, None if the base does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def switch(self, factors: Mapping[str, Factors]) -> None:
        """Put an adapter's factors beside the base's layers; an empty mapping leaves the plain base."""
        switch(self.layers, factors)

    @contextmanager
    def recomputing(self, on: bool) -> Iterator[None]:
        """Recompute each block's activations in the backward pass while this is open, if `on`."""
        if on:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
            self.model.train()  # transformers recomputes in training mode only
        try:
            yield
        finally:
            if on:
                self.model.activation_checkpointing_disable()
                self.model.eval()

    def logits(self, stream: Stream) -> Tensor:
        """Return logits [K, V], in float32 at least, at the stream's predicting positions; call inside `sequences_of`."""
        output = self.model(
            input_ids=stream.input_ids_T[None],
            position_ids=stream.position_ids_T[None],
            logits_to_keep=stream.predicting_K,
            use_cache=False,
        )
        return output.logits[0].to(torch.promote_types(output.logits.dtype, torch.float32))

    def loss_sum(self, stream: Stream) -> Tensor:
        """Return the sum of the cross-entropies [nats] of the stream's supervised tokens; call inside `sequences_of`."""
        return torch.nn.functional.cross_entropy(self.logits(stream), stream.targets_K, reduction="sum")


def _refuse_other_mixers(model: PreTrainedModel) -> None:
    others = sorted({*(getattr(model.config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"})
    if others:
        raise BadInput(
            f"the base has layers of the kind {', '.join(others)}; use one whose layers are all full or sliding-window attention."
        )


def _silence_dropout(model: PreTrainedModel) -> None:
    """Set the base's own dropouts to 0: the frozen branch is exact, also while activations are recomputed."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


@dataclass(frozen=True)
class Losses:
    """What a no-grad pass over rows measured."""

    loss_sum: float
    """Nats over all supervised tokens."""
    num_targets: int
    num_correct: int
    """Supervised tokens whose likeliest prediction was right."""

    def metrics(self, num_bytes: int) -> dict[str, float]:
        """Return eval/loss (nats per token), perplexity, token accuracy, and bits per byte over `num_bytes` of target text."""
        loss = self.loss_sum / self.num_targets
        return {
            "eval/loss": loss,
            "eval/perplexity": math.exp(loss) if loss < 700.0 else math.inf,  # exp overflows at 709.8
            "eval/bits_per_byte": self.loss_sum / math.log(2.0) / max(1, num_bytes),
            "eval/token_accuracy": self.num_correct / self.num_targets,
        }


@torch.no_grad()
def measure(base: ResidentBase, examples: Sequence[Example], rows_per_pass: int) -> Losses:
    """Measure the base, with whatever adapter is switched in, on `examples`."""
    loss_sum, num_targets, num_correct = 0.0, 0, 0
    for start in range(0, len(examples), rows_per_pass):
        stream = make_stream(examples[start : start + rows_per_pass], base.device)
        with sequences_of(stream.lengths):
            logits_KV = base.logits(stream)
        loss_sum += float(torch.nn.functional.cross_entropy(logits_KV, stream.targets_K, reduction="sum"))
        num_correct += int((logits_KV.argmax(-1) == stream.targets_K).sum())
        num_targets += stream.num_targets
    return Losses(loss_sum, num_targets, num_correct)


@torch.no_grad()
def has_effect(base: ResidentBase, factors: Mapping[str, Factors], example: Example) -> bool:
    """Tell whether the adapter moves the base's logits on `example`, to finite values (the effect test)."""
    stream = make_stream([example], base.device)
    with sequences_of(stream.lengths):
        base.switch({})
        plain = base.logits(stream)
        base.switch(factors)
        moved = base.logits(stream)
    base.switch({})
    return bool(torch.isfinite(moved).all()) and not torch.equal(plain, moved)
