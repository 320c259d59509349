"""A base is its content: what may change on disk without changing it, what may not, and what bad folders are told."""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from infra.errors import BadInput
from tests.workers.tiny_bases import FAMILIES, copy_with_config, make_base, save
from workers.architecture import architecture_of
from workers.identity import describe_base, diff, identify, training_view
from workers.spec import BaseModelSpec, QuantizationSpec


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bases") / "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_resharding_resaving_and_renaming_keep_the_identity(tmp_path: Path, family: str) -> None:
    original = make_base(tmp_path / "original", family)
    model = AutoModelForCausalLM.from_pretrained(original)
    save(model, tmp_path / "renamed" / "sharded", max_shard_size="10KB")
    again = identify(tmp_path / "renamed" / "sharded")
    assert len([name for name in again.files if name.endswith(".safetensors")]) > 2
    assert again.base_id == identify(original).base_id
    assert again.num_parameters == identify(original).num_parameters == model.num_parameters()


def test_metadata_and_order_of_tensors_in_a_file_keep_the_identity(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "copy")
    tensors = load_file(base / "model.safetensors")
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"saved_by": "somebody else"})
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() != (base / "model.safetensors").read_bytes()
    assert identify(tmp_path / "copy").base_id == identify(base).base_id


def test_tied_head_counts_once_whether_it_is_stored_or_not(tmp_path: Path) -> None:
    without = make_base(tmp_path / "without", "qwen2")
    stored = shutil.copytree(without, tmp_path / "with")
    tensors = load_file(without / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, stored / "model.safetensors", metadata={"format": "pt"})
    assert identify(stored).base_id == identify(without).base_id
    assert identify(stored).num_parameters == identify(without).num_parameters
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, stored / "model.safetensors", metadata={"format": "pt"})
    assert identify(stored).base_id != identify(without).base_id


def test_one_changed_bit_of_one_weight_is_another_base(base: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(base, tmp_path / "changed")
    data = bytearray((changed / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (changed / "model.safetensors").write_bytes(data)
    assert diff(identify(base), identify(changed)) == ["weights"]
    assert identify(changed).base_id != identify(base).base_id


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps: 1e-06 -> 1e-05"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: 2 -> (not set)"),
        ({"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}, "rope.rope_theta: 10000 -> 500000"),
        ({"hidden_act": "gelu"}, "hidden_act: silu -> gelu"),
        ({"head_dim": 16}, "head_dim: (not set) -> 16"),
    ],
)
def test_a_change_of_the_forward_pass_is_another_base_and_is_named(
    base: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    changed = copy_with_config(base, tmp_path / "changed", lambda raw: raw.update(change))
    assert identify(changed).base_id != identify(base).base_id
    assert diff(identify(base), identify(changed)) == [named]
    assert diff(describe_base(identify(base)), identify(changed)) == [named]


def test_what_does_not_alter_the_forward_pass_keeps_the_identity(base: Path, tmp_path: Path) -> None:
    def edit(raw: dict[str, Any]) -> None:
        raw.update(
            torch_dtype="bfloat16", use_cache=False, transformers_version="4.1.0", _name_or_path="elsewhere", eos_token_id=7
        )
        raw.update(initializer_range=0.5, attention_dropout=0.3, architectures=["Other"])
        raw.pop("dtype", None)

    assert identify(copy_with_config(base, tmp_path / "edited", edit)).base_id == identify(base).base_id


OLD_FILES: list[dict[str, Any]] = [
    {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128,
     "rms_norm_eps": 1e-6, "hidden_act": "silu", "vocab_size": 100, "tie_word_embeddings": False},
    {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
     "intermediate_size": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "vocab_size": 100, "rope_theta": 500000,
     "max_position_embeddings": 8192, "tie_word_embeddings": False,
     "rope_scaling": {"type": "linear", "factor": 2}},
    {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
     "intermediate_size": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "vocab_size": 100, "rope_theta": 500000.0,
     "max_position_embeddings": 131072, "tie_word_embeddings": True,
     "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
                      "rope_type": "llama3"}},
    {"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4,
     "intermediate_size": 128, "rms_norm_eps": 1e-6, "hidden_act": "silu", "vocab_size": 100, "rope_theta": 1000000.0,
     "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 2, "tie_word_embeddings": True},
    {"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4,
     "intermediate_size": 128, "rms_norm_eps": 1e-6, "hidden_act": "silu", "vocab_size": 100, "rope_theta": 1000000.0,
     "sliding_window": 512, "use_sliding_window": True, "max_window_layers": 2, "tie_word_embeddings": True},
    {"model_type": "mistral", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
     "intermediate_size": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "vocab_size": 100, "rope_theta": 10000.0,
     "sliding_window": 4096, "tie_word_embeddings": False},
    {"model_type": "gemma2", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4,
     "intermediate_size": 128, "rms_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
     "vocab_size": 100, "rope_theta": 10000.0, "sliding_window": 4096, "head_dim": 32, "query_pre_attn_scalar": 256,
     "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "tie_word_embeddings": True},
    {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128, "vocab_size": 100, "n_ctx": 128,
     "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    {"model_type": "gpt_neox", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 256,
     "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True,
     "max_position_embeddings": 128, "vocab_size": 100, "tie_word_embeddings": False},
]  # fmt: skip


@pytest.mark.parametrize("raw", OLD_FILES, ids=lambda raw: raw["model_type"])
def test_configurations_of_older_versions_describe_what_transformers_saves_today(tmp_path: Path, raw: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved.keys() != raw.keys()
    assert architecture_of(saved, tied=False) == architecture_of(raw, tied=False)


def test_code_that_comes_with_a_model_is_part_of_it(base: Path, tmp_path: Path) -> None:
    coded = copy_with_config(base, tmp_path / "coded", lambda raw: raw.update(auto_map={"AutoModel": "modeling.Model"}))
    (coded / "modeling.py").write_text("A = 1\n")
    first = identify(coded)
    (coded / "modeling.py").write_text("A = 2\n")
    assert identify(coded).base_id not in (first.base_id, identify(base).base_id)
    assert "modeling.py" in first.files


def test_training_view_tells_dtypes_and_quantisation_apart() -> None:
    specs = [
        BaseModelSpec(name_or_path="a"),
        BaseModelSpec(name_or_path="a", dtype="bfloat16"),
        BaseModelSpec(name_or_path="a", dtype="bfloat16", quantization=QuantizationSpec(load_in_4bit=True)),
    ]
    assert len({training_view(spec) for spec in specs}) == 3
    assert training_view(specs[0]) == training_view(BaseModelSpec(name_or_path="b", revision="0" * 40))


def test_cached_digests_are_used_until_the_file_changes(base: Path, tmp_path: Path) -> None:
    copy, cache = shutil.copytree(base, tmp_path / "copy"), tmp_path / "cache"
    first = identify(copy, cache)
    (entry,) = (cache / "digests").iterdir()
    entry.write_bytes(entry.read_bytes().replace(first.tensors[0].sha256.encode(), b"0" * 64))
    assert identify(copy, cache).base_id != first.base_id, "the cache was not read"
    weights = copy / "model.safetensors"
    known = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert identify(copy, cache).base_id == identify(copy).base_id != first.base_id


@pytest.mark.parametrize(
    "damage", [b"", b"{", b'{"format": "tensor-digests/1"}', b'{"format": "tensor-digests/1", "state": 3}\n']
)
def test_damaged_cache_is_no_cache(base: Path, tmp_path: Path, damage: bytes) -> None:
    expected = identify(base, tmp_path)
    (entry,) = (tmp_path / "digests").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage)
    assert identify(base, tmp_path) == expected
    assert entry.read_bytes() == whole


def _write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def _cut_in_header(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:50])


def _huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def _overlapping(folder: Path) -> None:
    header = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)


def _wrong_sizes(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)


def _missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    _write_index(folder, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})


def _misplaced_tensor(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    _write_index(folder, {"nowhere.weight": "model-00001-of-00001.safetensors"})


def _escaping_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    _write_index(folder, {"a": "../elsewhere.safetensors"})


def _twice(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        (folder / name).write_bytes(data)
    with safe_open(folder / "model.safetensors", framework="np") as file:
        first, second, *_ = file.keys()
    (folder / "model.safetensors").unlink()
    _write_index(folder, {first: names[0], second: names[1]})


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no base folder"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "names no 'model_type'"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (_only_pickle, r"pickle weights only \(pytorch_model.bin\); lorafleet never unpickles; .*save_pretrained"),
        (_truncate, "is truncated: its tensors end at byte"),
        (_cut_in_header, "is truncated or no safetensors file"),
        (_huge_header, "is truncated or no safetensors file"),
        (_overlapping, "gap or overlap before"),
        (_wrong_sizes, "damaged safetensors header"),
        (_missing_shard, "00001-of-00002.safetensors, model-00002-of-00002.safetensors are missing"),
        (_misplaced_tensor, "places 'nowhere.weight' in model-00001"),
        (_escaping_shard, "not a safetensors file of the folder itself"),
        (_twice, "in two weight files"),
    ],
)
def test_bad_folders_are_told_what_is_wrong(base: Path, tmp_path: Path, spoil: Any, sentence: str) -> None:
    folder = shutil.copytree(base, tmp_path / "copy")
    spoil(folder)
    with pytest.raises(BadInput, match=sentence):
        identify(folder)


def test_real_bases_have_their_known_ids(test_data: Path) -> None:
    known = {
        "stories260k": ("jihty3nstbz2vvyfy2nzjize2rcgiyjx", 260_032),
        "talk-5m": ("r6lyp4i2xxsp5oneymytd7k74hvcix2q", 5_401_856),
    }
    for name, (base_id, num_parameters) in known.items():
        found = identify(test_data / "bases" / name)
        assert (found.base_id, found.num_parameters) == (base_id, num_parameters)
        assert found.context_length == 512


def test_real_base_saved_again_by_transformers_is_the_same_base(test_data: Path, tmp_path: Path) -> None:
    source = test_data / "bases" / "stories260k"
    save(AutoModelForCausalLM.from_pretrained(source), tmp_path, max_shard_size="200KB")
    assert identify(tmp_path).base_id == identify(source).base_id
