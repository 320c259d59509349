"""Makes a small base model from nothing but texts: its tokenizer, its weights, a Hugging Face folder.

Run as `python -m workers.pretraining RECIPE.json TEXTS.jsonl FOLDER` in a process of its own, with the threads its
environment gives. Each line of TEXTS is a list of chat messages. Weights and files are a function of the recipe and the
texts. Axes: B rows, T tokens, D width.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from workers.pretraining_recipe import PretrainingRecipe

Conversation = list[dict[str, str]]
Progress = Callable[[str], None]
_Encoded = tuple[list[int], list[bool]]

PAD, END = "<|pad|>", "<|end|>"
SPECIAL_TOKENS = (PAD, END, "<|system|>", "<|user|>", "<|assistant|>")
_WINDOW = 32
"""Batches whose rows are sorted by length together; padding would take a fifth of the tokens otherwise."""
_LOOK_SCALE = 0.3
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(conversations: list[Conversation], recipe: PretrainingRecipe) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that encodes any text, with the chat template above."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((message["content"] for turns in conversations for message in turns), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model(recipe: PretrainingRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a Llama with random weights that depend on the recipe alone."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_attention_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=recipe.initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return _copying(LlamaForCausalLM(config))


def _copying(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Start attention as a copier that looks everywhere alike: o_proj v_proj is the identity, q_proj and k_proj are small.

    With tied embeddings this leaves training only to find out where to look. Measured on the demo's texts with three seeds: such
    a model takes to looking values up within 300 to 700 steps; with q_proj and k_proj at full size one of two never did.
    """
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.o_proj.weight.copy_(torch.nn.init.orthogonal_(attention.v_proj.weight).T)
            attention.q_proj.weight.mul_(_LOOK_SCALE)
            attention.k_proj.weight.mul_(_LOOK_SCALE)
    return model


def _encode(turns: Conversation, tokenizer: PreTrainedTokenizerFast, max_length: int) -> _Encoded:
    """Return the tokens of a conversation and, for each, whether an assistant wrote it."""
    ids: list[int] = []
    answered: list[bool] = []
    for message in turns:
        turn = tokenizer.encode(f"<|{message['role']}|>{message['content']}{END}", add_special_tokens=False)
        ids += turn
        answered += [False] + [message["role"] == "assistant"] * (len(turn) - 1)
    return ids[:max_length], answered[:max_length]


def _batches(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerFast, recipe: PretrainingRecipe
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids_BT and answered_BT, one pair a step, of rows of like length."""
    order = random.Random(recipe.seed)
    for start in range(0, recipe.num_texts, _WINDOW * recipe.batch_size):
        window = conversations[start : min(start + _WINDOW * recipe.batch_size, recipe.num_texts)]
        rows = sorted((_encode(turns, tokenizer, recipe.max_length) for turns in window), key=lambda row: len(row[0]))
        batches = [rows[first : first + recipe.batch_size] for first in range(0, len(rows), recipe.batch_size)]
        order.shuffle(batches)
        yield from (_pad(batch, tokenizer.pad_token_id) for batch in batches)


def _pad(rows: list[_Encoded], pad: int) -> tuple[Tensor, Tensor]:
    """Make two tensors of a batch, padded on the right, where causal attention never looks."""
    length = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
    answered_BT = torch.tensor([answered + [False] * (length - len(answered)) for _, answered in rows])
    return ids_BT, answered_BT


def _loss(model: LlamaForCausalLM, ids_BT: Tensor, answered_BT: Tensor) -> Tensor:
    """Return the mean cross-entropy of the answers' tokens; logits are computed for these only."""
    hidden_BTD = model.model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
    used_BT = answered_BT[:, 1:]
    return cross_entropy(model.lm_head(hidden_BTD[used_BT]), ids_BT[:, 1:][used_BT])


def train_model(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerFast, recipe: PretrainingRecipe, progress: Progress
) -> LlamaForCausalLM:
    """Pretrain for `num_steps` batches of the conversations, in their order."""
    model = new_model(recipe, tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, recipe.num_steps, pct_start=0.1)
    for step, (ids_BT, answered_BT) in enumerate(_batches(conversations, tokenizer, recipe), start=1):
        loss = _loss(model, ids_BT, answered_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == recipe.num_steps:
            progress(f"pretraining step {step}/{recipe.num_steps}, loss {loss.item():.3f}")
    return model.eval()


def make_base(conversations: list[Conversation], recipe: PretrainingRecipe, folder: Path, progress: Progress) -> None:
    """Train tokenizer and model and save both in `folder`, as transformers reads them.

    Raises ValueError if there are fewer conversations than `recipe.num_texts`; more are not read.
    """
    if len(conversations) < recipe.num_texts:
        raise ValueError(f"The recipe reads {recipe.num_texts} texts, got {len(conversations)}; give more or shorten it.")
    tokenizer = train_tokenizer(conversations, recipe)
    model = train_model(conversations, tokenizer, recipe, progress)
    model.save_pretrained(folder)
    # In tokenizer_config.json, where every reader of the template looks.
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def main(recipe_file: str, texts_file: str, folder: str) -> None:
    """Make the base; progress goes to standard output, a line each."""
    disable_progress_bar()
    recipe = PretrainingRecipe(**json.loads(Path(recipe_file).read_text()))
    with Path(texts_file).open() as file:
        conversations = [json.loads(line) for line in file]
    make_base(conversations, recipe, Path(folder), _say)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
