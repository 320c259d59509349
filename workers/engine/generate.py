"""Greedy answers of a resident base with whatever adapter is switched in."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workers.engine.attention import padded_attention
from workers.engine.resident import ResidentBase

ROWS_PER_PASS = 16


def generate_answers(
    base: ResidentBase, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """Return the likeliest continuation of each prompt (token ids), decoded without special tokens and stripped.

    Prompts are padded on the left to the longest of their pass; a prompt that leaves no room in the base's context keeps its end.
    """
    room = (base.context_length or 1 << 30) - max_new_tokens
    answers: list[str] = []
    with padded_attention(base.model):
        for start in range(0, len(prompts), ROWS_PER_PASS):
            batch = [list(prompt)[-max(1, room) :] for prompt in prompts[start : start + ROWS_PER_PASS]]
            answers += _generate_pass(base.model, tokenizer, batch, max_new_tokens)
    return answers


@torch.no_grad()
def _generate_pass(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> list[str]:
    width = max(len(prompt) for prompt in prompts)
    pad = _pad_id(model, tokenizer)
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=_end_ids(model, tokenizer),
    )
    return [text.strip() for text in tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)]


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the base's and the tokenizer's end of sequence, and common end-of-turn tokens it knows."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ends = configured if isinstance(configured, list) else [configured, tokenizer.eos_token_id]
    turns = [tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")]
    unknown = tokenizer.unk_token_id
    return sorted({end for end in [*ends, *turns] if isinstance(end, int) and end != unknown})


def _pad_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id, _end_ids(model, tokenizer)[:1]):
        if isinstance(candidate, int):
            return candidate
    return 0
