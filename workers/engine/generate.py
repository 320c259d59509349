"""Greedy answers of a resident base with whatever adapter is switched in."""

from collections.abc import Collection, Sequence

import torch
from transformers import PreTrainedModel

from workers.engine.attention import padded_attention
from workers.engine.resident import ResidentBase

ROWS_PER_PASS = 16


def generate_answers(
    base: ResidentBase, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Collection[int]
) -> list[list[int]]:
    """Return the likeliest continuation of each prompt, as token ids, a stop token and what may follow it included.

    Prompts are padded on the left to the longest of their pass; one that leaves no room in the base's context keeps its end.
    """
    room = (base.context_length or 1 << 30) - max_new_tokens
    answers: list[list[int]] = []
    with padded_attention(base.model):
        for start in range(0, len(prompts), ROWS_PER_PASS):
            batch = [list(prompt)[-max(1, room) :] for prompt in prompts[start : start + ROWS_PER_PASS]]
            answers += _generate_pass(base.model, batch, max_new_tokens, sorted(stop_ids))
    return answers


@torch.no_grad()
def _generate_pass(model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, stop_ids: list[int]) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    pad = stop_ids[0] if stop_ids else 0  # masked wherever it stands before a prompt; after a stop it is cut off
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
        eos_token_id=stop_ids or None,
    )
    answers: list[list[int]] = output[:, width:].tolist()
    return answers
