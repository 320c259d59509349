"""A base that stays in memory: the frozen model with its LoRA layers, and the passes over a stream."""

from __future__ import annotations

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
from workers.engine.batches import Stream, make_sequence, make_stream
from workers.engine.lm_head import LanguageHead
from workers.engine.lora import Factors, Group, LoraLinear, Watch, install, switch
from workers.engine.plan import Plan

PROBE_TOKENS = 8


@dataclass(frozen=True)
class Losses:
    """What a no-grad pass over rows measured."""

    loss_sum: float
    """Nats over all supervised tokens."""
    num_targets: int
    num_correct: int
    """Supervised tokens whose likeliest prediction was right."""

    def __add__(self, other: Losses) -> Losses:
        return Losses(self.loss_sum + other.loss_sum, self.num_targets + other.num_targets, self.num_correct + other.num_correct)

    def metrics(self, num_bytes: int) -> dict[str, float]:
        """Return eval/loss (nats per token), perplexity, token accuracy, and bits per byte over `num_bytes` of target text."""
        loss = self.loss_sum / self.num_targets
        return {
            "eval/loss": loss,
            "eval/perplexity": math.exp(loss) if loss < 700.0 else math.inf,  # exp overflows at 709.8
            "eval/bits_per_byte": self.loss_sum / math.log(2.0) / max(1, num_bytes),
            "eval/token_accuracy": self.num_correct / self.num_targets,
        }


class ResidentBase:
    """A frozen causal language model, ready for adapters to be switched in or packed. Holds no adapter's weights itself."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises BadInput if a layer mixes tokens otherwise than by attention, or if the head is one that is not known here."""
        _refuse_other_mixers(model)
        self.model = model
        self.layers: dict[str, LoraLinear] = install(model)
        self.device = model.device
        self.first_position = 0
        model.requires_grad_(False)
        model.set_attn_implementation(STREAM_ATTENTION)
        model.config.use_cache = False
        model.generation_config = (
            GenerationConfig()
        )  # a base's own may penalise repetition: its answers would not be the likeliest
        model.eval()
        _silence_dropout(model)
        self.head = LanguageHead(model)
        self.groups: list[Group] = self._find_groups()

    @property
    def context_length(self) -> int | None:
        """Tokens that a sequence may have, None if the base does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def switch(self, factors: Mapping[str, Factors]) -> None:
        """Put an adapter's factors beside the base's layers; an empty mapping leaves the plain base."""
        switch(self.layers, factors)

    @contextmanager
    def packed(self, plan: Plan) -> Iterator[None]:
        """Let the adapters of a plan stand beside the base's layers while this is open, in forward and backward."""
        for group in self.groups:
            group.plan = plan
        try:
            yield
        finally:
            for group in self.groups:
                group.release()

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

    def backward_stream(self, stream: Stream, denominators: Sequence[int]) -> list[float]:
        """Run a packed pass forward and backward; return the sum of each adapter's losses [nats].

        The gradient that the plan's banks receive is that of each adapter's sum over its own denominator.
        """
        weights = torch.tensor([*(1.0 / number for number in denominators), 0.0], dtype=torch.float64, device=self.device)
        with sequences_of(_with_tail(stream)):
            hidden_TD = self._hidden(stream)
            picked_KD = hidden_TD.index_select(0, stream.predicting_K)
            dtype = torch.promote_types(picked_KD.dtype, torch.float32)
            losses_K, gradient_KD = self.head.losses_and_gradient(
                picked_KD.detach(), stream.targets_K, weights[stream.owners_K].to(dtype)
            )
            picked_KD.backward(gradient_KD)
        return _sums(losses_K.double(), stream)

    @torch.no_grad()
    def measure_stream(self, stream: Stream) -> list[Losses]:
        """Measure each adapter of a stream, with whatever is packed or switched in."""
        with sequences_of(_with_tail(stream)):
            hidden_KD = self._hidden(stream).index_select(0, stream.predicting_K)
        losses_K, hits_K = self.head.losses_and_hits(hidden_KD, stream.targets_K)
        sums, hits = _sums(losses_K, stream), _sums(hits_K.double(), stream)
        return [Losses(*found) for found in zip(sums, stream.targets, map(int, hits), strict=True)]

    @torch.no_grad()
    def logits(self, stream: Stream) -> Tensor:
        """Return logits [K, V], in float32 at least, at the stream's predicting positions."""
        with sequences_of(_with_tail(stream)):
            hidden_TD = self._hidden(stream)
        return self.head.logits(hidden_TD.index_select(0, stream.predicting_K))[: stream.num_targets]

    def _hidden(self, stream: Stream) -> Tensor:
        """Return the last hidden states [T, D]."""
        output = self.model.base_model(
            input_ids=stream.input_ids_T[None], position_ids=stream.position_ids_T[None], use_cache=False
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    @torch.no_grad()
    def _find_groups(self) -> list[Group]:
        """Watch one forward to learn which linears share an input, and check that the head's logits are the model's own."""
        ids = torch.arange(PROBE_TOKENS, device=self.device) % max(2, int(self.model.config.get_text_config().vocab_size))
        positions = torch.arange(PROBE_TOKENS, device=self.device) + self.first_position
        with sequences_of([PROBE_TOKENS]), Watch(self.layers) as watch:
            hidden = self.model.base_model(input_ids=ids[None], position_ids=positions[None], use_cache=False).last_hidden_state
        with sequences_of([PROBE_TOKENS]):
            expected = self.model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
        if not torch.allclose(self.head.logits(hidden[0]).double(), expected.double(), rtol=1e-3, atol=1e-3):
            raise BadInput(
                f"the base ({self.model.config.model_type}) turns hidden states into logits in a way that is not known; "
                "use a base of the families named in the README."
            )
        return watch.groups()


def _with_tail(stream: Stream) -> list[int]:
    tail = len(stream.input_ids_T) - stream.num_tokens
    return [*stream.lengths, tail] if tail else list(stream.lengths)


def _sums(values_K: Tensor, stream: Stream) -> list[float]:
    """Sum values by adapter, from the first to the last: in the same order whoever else is in the stream."""
    sums = torch.zeros(len(stream.targets) + 1, dtype=values_K.dtype, device=values_K.device)
    found: list[float] = sums.index_add_(0, stream.owners_K, values_K)[:-1].tolist()
    return found


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


@torch.no_grad()
def measure(base: ResidentBase, examples: Sequence[Example], rows_per_pass: int) -> Losses:
    """Measure the base, with whatever adapter is switched in, on `examples`."""
    total = Losses(0.0, 0, 0)
    for start in range(0, len(examples), rows_per_pass):
        rows = [make_sequence(example, start + number) for number, example in enumerate(examples[start : start + rows_per_pass])]
        total += base.measure_stream(make_stream([rows], base.device, base.first_position))[0]
    return total


@torch.no_grad()
def has_effect(base: ResidentBase, factors: Mapping[str, Factors], example: Example) -> bool:
    """Tell whether the adapter moves the base's logits on `example`, to finite values (the effect test)."""
    stream = make_stream([[make_sequence(example, 0)]], base.device, base.first_position)
    base.switch({})
    plain = base.logits(stream)
    base.switch(factors)
    moved = base.logits(stream)
    base.switch({})
    return bool(torch.isfinite(moved).all()) and not torch.equal(plain, moved)
