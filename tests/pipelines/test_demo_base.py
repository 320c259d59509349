import hashlib
import shutil
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from infra.errors import WorkFailed
from pipelines.demo_base import BASE_FILES, ensure_demo_base
from pipelines.demo_text import customer_rows
from workers.pretraining_recipe import PretrainingRecipe

TINY = PretrainingRecipe(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_steps=5, batch_size=8
)


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def base(tmp_path_factory, said):
    return ensure_demo_base(tmp_path_factory.mktemp("one"), said.append, TINY)


@pytest.fixture(scope="module")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


def _digests(base):
    return {name: hashlib.sha256((base / name).read_bytes()).hexdigest() for name in BASE_FILES}


def test_a_base_that_is_there_is_not_made_again(base):
    lines = []
    before = (base / "model.safetensors").stat()
    assert ensure_demo_base(base.parent, lines.append, TINY) == base
    assert lines == []
    assert (base / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns


def test_a_base_that_lost_a_file_is_made_again_with_the_same_bytes(base, tmp_path):
    damaged = shutil.copytree(base, tmp_path / base.name)
    (damaged / "tokenizer.json").unlink()
    (damaged / "model.safetensors").write_bytes(b"")
    assert ensure_demo_base(tmp_path, lambda line: None, TINY) == damaged
    assert _digests(damaged) == _digests(base)


def test_progress_is_told_and_nothing_is_left_beside_the_base(base, said):
    assert any("step 5/5" in line for line in said)
    assert [path.name for path in base.parent.iterdir() if not path.name.endswith(".lock")] == [base.name]


def test_a_training_that_fails_is_one_sentence_and_leaves_no_base(tmp_path):
    broken = PretrainingRecipe(hidden_size=15, num_attention_heads=2, num_steps=1)
    with pytest.raises(WorkFailed, match="could not be made"):
        ensure_demo_base(tmp_path, lambda line: None, broken, name="broken")
    assert not (tmp_path / "broken").exists()


def test_the_folder_loads_offline_and_generates(base, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.config.tie_word_embeddings
    assert model.config.eos_token_id == tokenizer.eos_token_id != model.config.pad_token_id == tokenizer.pad_token_id
    prompt = tokenizer("<|user|>Hello<|end|><|assistant|>", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, min_new_tokens=3).shape[1] == prompt["input_ids"].shape[1] + 3


@pytest.mark.parametrize(
    "text", ["The printer in the lobby has a leak.", "{leg: Oslo -> Riga}", "naïve 日本 \n\t 🙂", "  two  spaces "]
)
def test_any_text_comes_back_from_its_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_specials_are_single_tokens(tokenizer):
    for special in ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"):
        assert len(tokenizer.encode(special)) == 1


def test_a_rendered_prompt_is_a_prefix_of_the_rendered_conversation(tokenizer):
    for row in customer_rows("acme", seed=0, count=20):
        turns = row["messages"] * 2
        for end in (1, 3):
            prompt = tokenizer.apply_chat_template(turns[:end], add_generation_prompt=True, tokenize=True)["input_ids"]
            whole = tokenizer.apply_chat_template(turns[: end + 1], tokenize=True)["input_ids"]
            assert whole[: len(prompt)] == prompt
            assert whole[-1] == tokenizer.eos_token_id


def test_asking_for_the_base_loads_no_torch():
    code = "import sys, pipelines.demo_base, pipelines.demo_text; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
