"""What of a config.json alters the forward pass: the architecture half of a base's identity.

Read from the raw file, because transformers adds and renames keys when it loads one. Only listed keys count; aliases
of model families get one name, implicit values that transformers writes out on saving are made equal to their
explicit form. A file that was saved again by another version therefore describes the same architecture, while
a changed `rope_theta` or `rms_norm_eps` does not. Any change to the rules here raises ARCHITECTURE_VERSION.
"""

from collections.abc import Mapping
from typing import Any

ARCHITECTURE_VERSION = 1

ALIASES = {
    "n_embd": "hidden_size",
    "d_model": "hidden_size",
    "n_head": "num_attention_heads",
    "n_heads": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_layers": "num_hidden_layers",
    "n_inner": "intermediate_size",
    "ffn_dim": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "max_seq_len": "max_position_embeddings",
    "num_kv_heads": "num_key_value_heads",
    "activation_function": "hidden_act",
    "hidden_activation": "hidden_act",
    "layer_norm_epsilon": "layer_norm_eps",
    "norm_epsilon": "layer_norm_eps",
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
    "_sliding_window_pattern": "sliding_window_pattern",
    "num_local_experts": "num_experts",
    "n_routed_experts": "num_experts",
}
"""Names of model families (transformers' `attribute_map` and older files) and the one name used here."""

# fmt: off
KEYS = frozenset([
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "type_vocab_size", "embedding_size", "word_embed_proj_dim", "hidden_act", "is_decoder",
    "add_cross_attention",
    # norms and the order of the parts of a layer
    "rms_norm_eps", "layer_norm_eps", "norm_eps", "do_layer_norm_before", "_remove_final_layer_norm",
    "layer_norm_elementwise_affine", "use_qk_norm", "qk_norm", "qk_layernorm", "use_parallel_residual", "parallel_attn",
    "new_decoder_architecture", "apply_residual_connection_post_layernorm", "normalize_embedding",
    # biases
    "attention_bias", "mlp_bias", "qkv_bias", "use_bias", "bias", "attention_out_bias", "enable_bias",
    # attention and positions
    "position_embedding_type", "alibi", "multi_query", "rotary_dim", "clip_qkv", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "attn_logit_softcapping", "query_pre_attn_scalar",
    "use_bidirectional_attention", "no_rope_layers", "no_rope_layer_interval", "attention_chunk_size",
    "attn_temperature_tuning", "floor_scale", "attn_scale", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim",
    "qk_nope_head_dim", "v_head_dim", "rope_interleave",
    # multipliers
    "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "logit_scale",
    "scale_embedding", "final_logit_softcapping", "swiglu_limit",
    # experts
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "n_shared_experts",
    "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "topk_method", "scoring_func",
    "first_k_dense_replace", "moe_layer_freq", "decoder_sparse_step", "mlp_only_layers",
    # state space layers
    "state_size", "conv_kernel", "expand", "time_step_rank",
])
# fmt: on
"""The allow-list. Sliding windows, rotary embeddings, tying and nested configurations have rules of their own below."""

# fmt: off
_TEN_THOUSAND = (
    "llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "phi", "phi3", "gpt_neox", "stablelm",
    "starcoder2", "cohere", "olmo", "olmo2",
)
# fmt: on
ROPE_THETA = dict.fromkeys(_TEN_THOUSAND, 10_000.0) | {"mixtral": 1_000_000.0, "gemma3_text": 1_000_000.0}
"""Base frequency of families whose file may leave it out (transformers 5.23, `default_theta`)."""

PARTIAL_ROTARY_FACTOR = {"gpt_neox": 0.25, "phi": 0.5, "nemotron": 0.5, "glm": 0.5, "stablelm": 0.25, "qwen3_next": 0.25}
"""Share of a head that is rotated where the file leaves it out; 1 elsewhere."""

SLIDING_WINDOW_PATTERN = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4, "olmo3": 4}
"""Every n-th layer attends to everything, the others within the window, where no `layer_types` are given."""

TRUE_BY_DEFAULT = frozenset(
    ["scale_attn_weights", "use_parallel_residual", "enable_bias", "do_layer_norm_before", "layer_norm_elementwise_affine"]
)
TRUE_BY_FAMILY = {"gpt_neox": frozenset({"attention_bias"})}
"""Switches that are on unless a file turns them off; all others are off."""

ROBERTAS = ("camembert", "roberta", "xlm-roberta")
"""Families whose first token stands at position pad_token_id + 1 (1 where it is not given): so many positions are never used."""

LENGTH_DEPENDENT_ROPE = ("dynamic", "yarn", "longrope", "llama3", "su")
"""Rotary types whose frequencies depend on the original and the maximal length."""


def architecture_of(raw: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """Return the architecture of a raw config.json; `tied` is used where the file does not say whether the head is tied."""
    own = _renamed(raw)
    family = str(own.get("model_type", ""))
    found = {key: own[key] for key in KEYS if key in own}
    found["tie_word_embeddings"] = bool(own["tie_word_embeddings"]) if own.get("tie_word_embeddings") is not None else tied
    found |= _attention_window(own, family) | _rotary(own, family)
    for key, value in own.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            found[key] = _quantization(value) if key == "quantization_config" else architecture_of(value, tied=tied)
    return {key: _plain(value) for key, value in sorted(found.items()) if not _is_implied(key, value, own, family)}


def context_length_of(raw: Mapping[str, Any]) -> int | None:
    """Return how many tokens a sequence may have, None if the configuration does not say."""
    text = raw.get("text_config")
    own = _renamed(text if isinstance(text, Mapping) else raw)
    length = own.get("max_position_embeddings")
    if not isinstance(length, int):
        return None
    return length - int(own.get("pad_token_id", 1)) - 1 if own.get("model_type") in ROBERTAS else length


def _renamed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Give aliases their one name; an alias that contradicts the name it stands for is kept beside it."""
    own = {key: value for key, value in raw.items() if key not in ALIASES}
    for alias, name in ALIASES.items():
        value = raw.get(alias)
        if value is not None:
            own[name if own.get(name) in (None, value) else alias] = value
    return own


def _is_implied(key: str, value: Any, own: Mapping[str, Any], family: str) -> bool:
    """Tell whether leaving `key` out would mean the same."""
    if value is None or value == {} or value == []:
        return True
    if key == "num_key_value_heads":
        return value == own.get("num_attention_heads")
    if key == "head_dim":
        heads, width = own.get("num_attention_heads"), own.get("hidden_size")
        return bool(heads and width and value * heads == width)
    if isinstance(value, bool) and key != "tie_word_embeddings":
        return value == (key in TRUE_BY_DEFAULT or key in TRUE_BY_FAMILY.get(family, ()))
    return False


def _attention_window(own: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Return window and kinds of layers where some layers do not attend to everything."""
    num_layers = int(own.get("num_hidden_layers") or 0)
    window = own.get("sliding_window")
    kinds = own.get("layer_types")
    uses_window = window is not None and own.get("use_sliding_window", True)
    if kinds is None and uses_window:
        kinds = _implicit_layer_types(own, family, num_layers)
    if kinds is not None and set(kinds) <= {"full_attention"}:
        kinds, uses_window = None, False
    return {"sliding_window": window if uses_window else None, "layer_types": kinds}


def _implicit_layer_types(own: Mapping[str, Any], family: str, num_layers: int) -> list[str] | None:
    if "use_sliding_window" in own and own.get("max_window_layers") is not None:
        first = int(own["max_window_layers"])
        return ["full_attention" if layer < first else "sliding_attention" for layer in range(num_layers)]
    pattern = own.get("sliding_window_pattern") or SLIDING_WINDOW_PATTERN.get(family)
    if pattern is None:
        return None
    return ["sliding_attention" if (layer + 1) % int(pattern) else "full_attention" for layer in range(num_layers)]


def _rotary(own: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Return {"rope": ...}: base frequency, type, scaling, share of the head; by kind of layer where they differ."""
    given = own.get("rope_parameters") or own.get("rope_scaling") or {}
    nested = {kind: value for kind, value in given.items() if isinstance(value, Mapping)}
    theta = own.get("rope_theta", ROPE_THETA.get(family))
    if nested:
        return {"rope": {kind: _one_rotary(value, theta, own, family) for kind, value in nested.items()}}
    if not given and theta is None:
        return {}
    rope = _one_rotary(given, theta, own, family)
    local = own.get("rope_local_base_freq", 10_000.0 if family == "gemma3_text" else None)
    if local is not None:
        return {"rope": {"full_attention": rope, "sliding_attention": _one_rotary({}, local, own, family)}}
    return {"rope": rope}


def _one_rotary(given: Mapping[str, Any], theta: float | None, own: Mapping[str, Any], family: str) -> dict[str, Any]:
    rope = {key: value for key, value in given.items() if key != "type"}
    rope["rope_type"] = rope.get("rope_type") or given.get("type") or "default"
    rope.setdefault("rope_theta", theta)
    rope.setdefault("partial_rotary_factor", own.get("partial_rotary_factor") or PARTIAL_ROTARY_FACTOR.get(family, 1.0))
    if rope["rope_type"] in LENGTH_DEPENDENT_ROPE:
        original = own.get("original_max_position_embeddings") or own.get("max_position_embeddings")
        rope.setdefault("original_max_position_embeddings", original)
        rope["max_position_embeddings"] = own.get("max_position_embeddings")
    if rope["partial_rotary_factor"] == 1.0:
        del rope["partial_rotary_factor"]
    return {key: value for key, value in rope.items() if value is not None}


def _quantization(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return how stored weights are to be read, without what versions of transformers add for themselves."""
    return {key: value for key, value in given.items() if not key.startswith("_") and value is not None}


def _plain(value: Any) -> Any:
    """Write 10000 and 10000.0 the same way, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
