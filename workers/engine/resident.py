"""A base that stays in memory: the frozen model with its LoRA layers, and the passes over a stream."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from infra.errors import BadInput
from workers.data.render import Example
from workers.engine.attention import install_attention
from workers.engine.batches import TILE, Pooling, Stream, make_sequence, make_stream
from workers.engine.class_head import ClassHead, Classified
from workers.engine.head_shapes import HeadShape, first_position
from workers.engine.lm_head import LanguageHead, Losses
from workers.engine.lora import Factors, Group, LoraLinear, Share, Watch, install, switch
from workers.engine.plan import Plan

PROBE_TOKENS = 8


Measured = Losses | Classified


@dataclass(frozen=True)
class Guest:
    """An adapter on its part of a stream that several share, in a pass without gradients."""

    tokens: slice
    num_predictions: int
    """Positions of its part that the head reads."""
    factors: Mapping[str, Factors]
    head: Mapping[str, Tensor]
    """Of a classifier, as in `ResidentBase.switch`."""


class ResidentBase:
    """A frozen model, ready for adapters to be switched in or packed. Holds no adapter's weights itself.

    A causal language model, or one that transformers made for sequence classification, whose own head is not used.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises BadInput if a layer mixes tokens otherwise than by attention, or if the head is one that is not known here."""
        self.classifies = type(model).__name__.endswith("ForSequenceClassification")
        _refuse_other_mixers(model)
        self.model = model
        self.layers: dict[str, LoraLinear] = install(model)
        self.device = model.device
        self.first_position = first_position(model)
        model.requires_grad_(False)
        self._attention = install_attention(model)
        model.config.use_cache = False
        model.generation_config = (
            GenerationConfig()
        )  # a base's own may penalise repetition: its answers would not be the likeliest
        model.eval()
        _silence_dropout(model)
        self.head: LanguageHead | ClassHead = ClassHead(model) if self.classifies else LanguageHead(model)
        self._own_head: Mapping[str, Tensor] = {}
        self._guests: Sequence[Guest] = ()
        self._plan: Plan | None = None
        self.groups: list[Group] = self._find_groups()

    @property
    def context_length(self) -> int | None:
        """Tokens that a sequence may have, None if the base does not say."""
        length = getattr(self.model.config, "max_position_embeddings", None)
        return None if length is None else int(length) - self.first_position

    @property
    def head_shape(self) -> HeadShape:
        """The form of a classification head on this base. Raises BadInput if the base was not loaded to classify."""
        if not isinstance(self.head, ClassHead):
            raise BadInput("the base was loaded as a language model, which has no classification head; set task_type: SEQ_CLS.")
        return self.head.shape

    @property
    def pooling(self) -> Pooling:
        """Which position of a row its classification head reads."""
        return self.head.shape.pooling if isinstance(self.head, ClassHead) else "last"

    def switch(self, factors: Mapping[str, Factors], head: Mapping[str, Tensor] | None = None) -> None:
        """Put an adapter's factors beside the base's layers, and its classification head (tensors named relative to the head's
        module) behind them; an empty mapping leaves the plain base."""
        switch(self.layers, factors)
        self._own_head = head or {}

    @contextmanager
    def shared(self, guests: Sequence[Guest]) -> Iterator[None]:
        """Let adapters stand beside the base's layers while this is open, each for its own tokens; for passes without gradients.

        Guests are in the order of their tokens, which are multiples of TILE: products with an adapter's factors, and its head,
        see the shapes they have where it is alone.
        """
        self.switch({})
        self._guests = guests
        for name, layer in self.layers.items():
            layer.shares = [Share(guest.tokens, guest.factors[name]) for guest in guests if name in guest.factors]
        try:
            yield
        finally:
            self._guests = ()
            for layer in self.layers.values():
                layer.shares = ()

    @contextmanager
    def packed(self, plan: Plan) -> Iterator[None]:
        """Let the adapters of a plan stand beside the base's layers while this is open, in forward and backward."""
        self._plan = plan
        for group in self.groups:
            group.plan = plan
        try:
            yield
        finally:
            self._plan = None
            for group in self.groups:
                group.release()

    @contextmanager
    def recomputing(self, on: bool) -> Iterator[None]:
        """Recompute each block's activations in the backward pass while this is open, if `on`."""
        if on:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
            self.model.disable_input_require_grads()  # enabling hooks itself to the embeddings, each time once more, for good
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
        with self._attention.sequences(stream.lengths):
            hidden_TD = self._hidden(stream)
            picked_KD = hidden_TD.index_select(0, stream.predicting_K)
            dtype = torch.promote_types(picked_KD.dtype, torch.float32)
            losses_K, gradient_KD = self._losses_and_gradient(picked_KD.detach(), stream, weights[stream.owners_K].to(dtype))
            picked_KD.backward(gradient_KD)
        return _sums(losses_K.double(), stream)

    def _losses_and_gradient(self, hidden_KD: Tensor, stream: Stream, weights_K: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.head, LanguageHead):
            return self.head.losses_and_gradient(hidden_KD, stream.targets_K, weights_K)
        assert self._plan is not None
        return self.head.losses_and_gradient(hidden_KD, stream.targets_K, weights_K, stream.targets, self._plan.heads)

    @torch.no_grad()
    def measure_stream(self, stream: Stream) -> list[Measured]:
        """Measure each adapter of a stream, with whatever is packed or switched in."""
        hidden_KD = self._picked(stream)
        if isinstance(self.head, ClassHead):
            return self._classified(self.head, hidden_KD, stream)
        losses_K, predicted_K = self.head.losses_and_predictions(hidden_KD, stream.targets_K)
        sums, hits = _sums(losses_K, stream), _sums((predicted_K == stream.targets_K).double(), stream)
        return [Losses(*found) for found in zip(sums, stream.targets, map(int, hits), strict=True)]

    def _classified(self, head: ClassHead, hidden_KD: Tensor, stream: Stream) -> list[Measured]:
        if self._plan is not None:
            losses_K, predicted_K = head.losses_and_predictions(hidden_KD, stream.targets_K, stream.targets, self._plan.heads)
            labels = {member: part.bank.num_labels for part in self._plan.heads for member in part.members}
        else:
            logits_KL = self._class_logits(head, hidden_KD)
            losses_K = nn.functional.cross_entropy(logits_KL, stream.targets_K, reduction="none").double()
            predicted_K, labels = logits_KL.argmax(-1), dict.fromkeys(range(len(stream.targets)), logits_KL.shape[1])
        sums = _sums(losses_K, stream)
        ends = list(itertools.accumulate(stream.targets))
        predicted, expected = predicted_K.tolist(), stream.targets_K.tolist()
        return [
            Classified(sums[place], tuple(predicted[end - count : end]), tuple(expected[end - count : end]), labels[place])
            for place, (end, count) in enumerate(zip(ends, stream.targets, strict=True))
        ]

    @torch.no_grad()
    def logits(self, stream: Stream) -> Tensor:
        """Return logits, in float32 at least, at the stream's predicting positions: [K, V], or [K, L] of a classifier."""
        hidden_KD = self._picked(stream)
        if isinstance(self.head, ClassHead):
            return self._class_logits(self.head, hidden_KD)[: stream.num_targets]
        return self.head.logits(hidden_KD)[: stream.num_targets]

    def _class_logits(self, head: ClassHead, hidden_KD: Tensor) -> Tensor:
        """Return logits [K, L] of the head that is switched in, or of each guest's own at its positions."""
        if not self._guests:
            return head.logits_of_one(hidden_KD, self._own_head)
        counts = [guest.num_predictions for guest in self._guests]
        parts = hidden_KD[: sum(counts)].split(counts)
        logits = [
            head.logits_of_one(nn.functional.pad(part, (0, 0, 0, -len(part) % TILE)), guest.head)[: len(part)]
            for part, guest in zip(parts, self._guests, strict=True)
        ]
        return nn.functional.pad(torch.cat(logits), (0, 0, 0, len(hidden_KD) - sum(counts)))

    def _picked(self, stream: Stream) -> Tensor:
        with self._attention.sequences(stream.lengths):
            return self._hidden(stream).index_select(0, stream.predicting_K)

    def _hidden(self, stream: Stream) -> Tensor:
        """Return the last hidden states [T, D]."""
        return self._body(stream.input_ids_T, stream.position_ids_T)

    def _body(self, input_ids_T: Tensor, position_ids_T: Tensor) -> Tensor:
        own = {} if self.classifies and self.pooling == "first" else {"use_cache": False}  # encoders know no cache
        output = self.model.base_model(input_ids=input_ids_T[None], position_ids=position_ids_T[None], **own)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    @torch.no_grad()
    def _find_groups(self) -> list[Group]:
        """Watch one forward to learn which linears share an input, and check that the head's logits are the model's own."""
        ids_T = torch.arange(PROBE_TOKENS, device=self.device) % max(2, int(self.model.config.get_text_config().vocab_size))
        positions_T = torch.arange(PROBE_TOKENS, device=self.device) + self.first_position
        with self._attention.sequences([PROBE_TOKENS]), Watch(self.layers) as watch:
            hidden_TD = self._body(ids_T, positions_T)
        if isinstance(self.head, LanguageHead):
            with self._attention.sequences([PROBE_TOKENS]):
                expected = self.model(input_ids=ids_T[None], position_ids=positions_T[None], use_cache=False).logits[0]
            if not torch.allclose(self.head.logits(hidden_TD).double(), expected.double(), rtol=1e-3, atol=1e-3):
                raise BadInput(
                    f"the base ({self.model.config.model_type}) turns hidden states into logits in a way that is not known; "
                    "use a base of the families named in the README."
                )
        return watch.groups()


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
def measure(base: ResidentBase, examples: Sequence[Example], rows_per_pass: int) -> Measured:
    """Measure the base, with whatever adapter is switched in, on `examples`."""
    total: Any = None
    for start in range(0, len(examples), rows_per_pass):
        part = examples[start : start + rows_per_pass]
        rows = [make_sequence(example, start + number, base.pooling) for number, example in enumerate(part)]
        measured = base.measure_stream(make_stream([rows], base.device, base.first_position))[0]
        total = measured if total is None else total + measured
    return total


@torch.no_grad()
def has_effect(
    base: ResidentBase, factors: Mapping[str, Factors], example: Example, head: Mapping[str, Tensor] | None = None
) -> bool:
    """Tell whether the adapter moves the base's logits on `example`, to finite values (the effect test).

    A classifier is held against its own head on the plain base.
    """
    stream = make_stream([[make_sequence(example, 0, base.pooling)]], base.device, base.first_position)
    base.switch({}, head)
    plain = base.logits(stream)
    base.switch(factors, head)
    moved = base.logits(stream)
    base.switch({})
    return bool(torch.isfinite(moved).all()) and not torch.equal(plain, moved)
