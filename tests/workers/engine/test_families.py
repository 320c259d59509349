"""A stream through each family's model equals the model's own forward, sequence by sequence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from workers.engine.attention import install_attention, padded_attention
from workers.engine.head_shapes import first_position

SHARED: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = SHARED | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ENCODER = {key: value for key, value in WIDE.items() if key != "num_key_value_heads"} | {"type_vocab_size": 2}
LAYERS = ["sliding_attention", "full_attention"]

DECODERS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**WIDE),
    "llama-tied-one-key-head": lambda: LlamaConfig(**WIDE | {"num_key_value_heads": 1}, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**WIDE, tie_word_embeddings=True),
    "qwen2-sliding": lambda: Qwen2Config(**WIDE, use_sliding_window=True, sliding_window=20, layer_types=LAYERS),
    "qwen3": lambda: Qwen3Config(**WIDE, head_dim=16),
    "mistral-sliding": lambda: MistralConfig(**WIDE, sliding_window=5),
    "gemma": lambda: GemmaConfig(**WIDE, head_dim=8),
    "gemma2-capped-sliding": lambda: Gemma2Config(
        **WIDE, head_dim=8, sliding_window=20, attn_logit_softcapping=2.0, query_pre_attn_scalar=8, layer_types=LAYERS
    ),
    "gemma3": lambda: Gemma3TextConfig(**WIDE, head_dim=8, sliding_window=20, query_pre_attn_scalar=8, layer_types=LAYERS),
    "phi-partial-rotary": lambda: PhiConfig(**WIDE | {"partial_rotary_factor": 0.5}),
    "phi3-sliding": lambda: Phi3Config(**WIDE, sliding_window=20),
    "gpt2": lambda: GPT2Config(**SHARED, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "gpt2-scaled-by-layer": lambda: GPT2Config(
        **SHARED, n_embd=32, n_layer=2, n_head=4, n_positions=128, scale_attn_by_inverse_layer_idx=True
    ),
}
ENCODERS: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: BertConfig(**ENCODER),
    "roberta": lambda: RobertaConfig(**ENCODER | {"pad_token_id": 1, "bos_token_id": 0}),
}
CONFIGS = DECODERS | ENCODERS
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
LENGTHS = [7, 33, 1, 64, 33, 100]
TAIL = 18


def make_model(family: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    make: Any = AutoModelForCausalLM if family in DECODERS else AutoModelForSequenceClassification
    model: PreTrainedModel = make.from_config(CONFIGS[family]()).eval().to(dtype)
    for parameter in model.parameters():  # biases and norms start as 0 and 1, which would hide that one is left out
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model


def attend_as_made(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """Let the model attend by its own code; return how near that comes to exact: eager attention takes its softmax in float32."""
    caps = getattr(model.config, "attn_logit_softcapping", None) is not None
    model.set_attn_implementation("eager" if caps else "sdpa")  # sdpa leaves the cap out
    return max(TOLERANCE[dtype], 1e-5 if caps else 0.0)


def make_sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (length,), generator=generator) for length in LENGTHS]


def hidden_states(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    hidden: torch.Tensor = model.base_model(input_ids=ids[None], use_cache=False, **options).last_hidden_state[0]
    return hidden


def stream_positions(model: PreTrainedModel) -> torch.Tensor:
    first = first_position(model)
    return torch.cat([torch.arange(first, first + length) for length in [*LENGTHS, TAIL]])


@torch.no_grad()
def through_stream(model: PreTrainedModel) -> list[torch.Tensor]:
    ids = torch.cat([*make_sequences(), torch.full((TAIL,), 3)])
    plan = install_attention(model)
    with plan.sequences(LENGTHS, len(ids)):
        hidden = hidden_states(model, ids, position_ids=stream_positions(model)[None])
    return list(hidden.split([*LENGTHS, TAIL]))[:-1]


def output_of(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Return what stands behind the body: logits of a language model, or of a class from a sequence's first token."""
    head = model.get_output_embeddings()
    if head is not None:
        return head(hidden)
    if getattr(model.base_model, "pooler", None) is not None:
        return model.classifier(model.base_model.pooler(hidden[None]))[0]  # type: ignore[operator]
    return model.classifier(hidden[None])[0]  # type: ignore[operator]


def final(model: PreTrainedModel, logits: torch.Tensor) -> torch.Tensor:
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_logits_of_a_stream_are_those_of_each_sequence_alone(family: str, dtype: torch.dtype) -> None:
    model = make_model(family, dtype)
    tolerance = attend_as_made(model, dtype)
    alone = [model(input_ids=ids[None]).logits[0] for ids in make_sequences()]
    packed = [final(model, output_of(model, hidden)) for hidden in through_stream(model)]
    for own, found in zip(alone, packed, strict=True):
        torch.testing.assert_close(found, own, rtol=tolerance, atol=tolerance * float(own.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gemma2-capped-sliding", "gpt2", "bert"])
def test_gradients_of_a_stream_are_those_of_each_sequence_alone_also_when_activations_are_recomputed(family: str) -> None:
    model = make_model(family, torch.float64)
    tolerance = attend_as_made(model, torch.float64)
    for ids in make_sequences():
        probe(hidden_states(model, ids)).backward()
    alone = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    ids = torch.cat(make_sequences())
    positions = stream_positions(model)[: len(ids)]
    plan = install_attention(model)
    for recomputes in (False, True):
        model.zero_grad()
        if recomputes:
            silence_dropout(model)
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()
        with plan.sequences(LENGTHS):
            probe(hidden_states(model, ids, position_ids=positions[None])).backward()
        for name, weight in model.named_parameters():
            if name in alone:
                torch.testing.assert_close(
                    weight.grad, alone[name], rtol=tolerance, atol=tolerance * (1.0 + float(alone[name].abs().max()))
                )


def probe(hidden: torch.Tensor) -> torch.Tensor:
    """Return a sum that no norm makes constant."""
    return (hidden * torch.linspace(-1.0, 1.0, hidden.shape[-1], dtype=hidden.dtype)).sum()


def silence_dropout(model: PreTrainedModel) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("family", ["llama", "gemma2-capped-sliding", "gpt2"])
@torch.no_grad()
def test_a_model_that_generates_computes_what_its_streams_compute(family: str) -> None:
    model = make_model(family, torch.float32)
    packed = through_stream(model)
    with padded_attention(model):
        alone = [hidden_states(model, ids) for ids in make_sequences()]
    for own, found in zip(alone, packed, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5 * float(own.abs().max()))
