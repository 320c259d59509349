"""Adapters go through PEFT's files unchanged, and are told apart from what does not fit."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from infra.errors import BadInput
from infra.fingerprint import id_of_bytes
from tests.workers.tiny_adapters import BASE, OTHER_BASE, train_with_peft, write_files
from tests.workers.tiny_bases import FAMILIES, TARGETS, logits, make_model
from workers.adapter import adapter_id, build_adapter, canonical_targets, check_against_model
from workers.adapter_files import CONFIG_NAME, WEIGHTS_NAME, adapter_files, read_adapter_folder
from workers.engine.lora import install
from workers.spec import PeftSpec


def edit_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(raw | changes))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_adapter_goes_through_our_files_with_the_same_logits(tmp_path: Path, family: str, use_rslora: bool) -> None:
    expected = train_with_peft(tmp_path / "theirs", family, use_rslora=use_rslora, lora_dropout=0.1)
    adapter = read_adapter_folder(tmp_path / "theirs")
    check_against_model(adapter, make_model(family))
    ours = write_files(tmp_path / "ours", adapter)
    assert torch.equal(logits(PeftModel.from_pretrained(make_model(family), ours).eval()), expected)
    assert not torch.equal(logits(make_model(family)), expected)
    again = read_adapter_folder(ours)
    assert adapter_files(again) == adapter_files(adapter)


PATTERNS: list[dict[str, Any]] = [
    {"target_modules": r".*layers\.1\..*(q|v)_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 32}},
    {"rank_pattern": {"down_proj": 8}, "alpha_pattern": {"down_proj": 5}, "use_rslora": True},
]


@pytest.mark.parametrize("options", PATTERNS, ids=str)
def test_patterns_of_foreign_adapters_become_explicit_names_with_the_same_logits(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = train_with_peft(tmp_path / "theirs", **options)
    adapter = read_adapter_folder(tmp_path / "theirs")
    check_against_model(adapter, make_model("llama"))
    modules = {name for name, _ in make_model("llama").named_modules()}
    assert all(any(module.endswith(target) for module in modules) for target in adapter.config["target_modules"])
    assert all(module in modules for module in [*adapter.config["rank_pattern"], *adapter.config["alpha_pattern"]])
    ours = write_files(tmp_path / "ours", adapter)
    assert torch.equal(logits(PeftModel.from_pretrained(make_model("llama"), ours).eval()), expected)
    assert adapter_id(BASE, read_adapter_folder(ours)) == adapter_id(BASE, adapter)


def test_half_precision_factors_are_read_exactly(tmp_path: Path) -> None:
    train_with_peft(tmp_path)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / WEIGHTS_NAME).items()}
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    adapter = read_adapter_folder(tmp_path)
    assert all(torch.equal(adapter.tensors[name], tensor.float()) for name, tensor in tensors.items())
    assert {tensor.dtype for tensor in adapter.tensors.values()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_built_from_the_engines_layers_loads_in_peft(tmp_path: Path, family: str) -> None:
    train_with_peft(tmp_path / "theirs", family)
    tensors = read_adapter_folder(tmp_path / "theirs").tensors
    resident = make_model(family)
    install(resident)
    adapter = build_adapter(PeftSpec(r=4, lora_alpha=6.0, target_modules=["x"]), resident, tensors, "some/base")
    check_against_model(adapter, resident)
    assert adapter.config["target_modules"] == sorted(TARGETS[family])
    assert adapter.config["fan_in_fan_out"] == (family == "gpt2")
    assert isinstance(adapter.config["lora_alpha"], int)
    ours = write_files(tmp_path / "ours", adapter)
    theirs = PeftModel.from_pretrained(make_model(family), tmp_path / "theirs").eval()
    assert torch.equal(logits(PeftModel.from_pretrained(make_model(family), ours).eval()), logits(theirs))


def test_targets_are_as_short_as_they_can_be_without_matching_more() -> None:
    candidates = [f"h.{layer}.{name}" for layer in (0, 1) for name in ("attn", "attn.c_attn", "attn.c_proj", "mlp.c_proj")]
    attention = [name for name in candidates if ".attn." in name]
    assert canonical_targets(attention, candidates) == ["attn.c_proj", "c_attn"]
    assert canonical_targets(["h.0.attn.c_attn"], candidates) == ["0.attn.c_attn"]
    assert canonical_targets(attention[:2]) == attention[:2]


ID = """
import sys
from pathlib import Path
from workers.adapter import adapter_id
from workers.adapter_files import adapter_files, read_adapter_folder
from infra.fingerprint import id_of_bytes
adapter = read_adapter_folder(Path(sys.argv[1]))
print(adapter_id("b" * 32, adapter), *(id_of_bytes(data) for data in adapter_files(adapter).values()))
"""


def test_ids_and_file_bytes_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    train_with_peft(tmp_path, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])
    run = [sys.executable, "-c", ID, str(tmp_path)]
    said = subprocess.run(run, env=os.environ | {"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True).stdout
    adapter = read_adapter_folder(tmp_path)
    assert said.split() == [adapter_id(BASE, adapter), *(id_of_bytes(data) for data in adapter_files(adapter).values())]


def test_id_covers_what_the_adapter_computes_and_nothing_else(tmp_path: Path) -> None:
    train_with_peft(tmp_path)
    first = adapter_id(BASE, read_adapter_folder(tmp_path))
    save_file(load_file(tmp_path / WEIGHTS_NAME), tmp_path / WEIGHTS_NAME, metadata={"saved_by": "somebody else"})
    edit_config(
        tmp_path, lora_dropout=0.5, base_model_name_or_path="elsewhere", peft_version="0", r=4, rank_pattern={"q_proj": 4}
    )
    assert adapter_id(BASE, read_adapter_folder(tmp_path)) == first
    assert adapter_id(OTHER_BASE, read_adapter_folder(tmp_path)) != first
    edit_config(tmp_path, use_rslora=True, lora_alpha=3)  # 3 / sqrt(4) = 6 / 4: the same scale
    assert adapter_id(BASE, read_adapter_folder(tmp_path)) == first
    edit_config(tmp_path, lora_alpha=4)
    assert adapter_id(BASE, read_adapter_folder(tmp_path)) != first


def _drop(folder: Path, part: str) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    save_file({name: tensor for name, tensor in tensors.items() if part not in name}, folder / WEIGHTS_NAME)


def _edit_tensor(folder: Path, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    name = sorted(tensors)[0]
    tensors[name] = edit(tensors[name])
    save_file(tensors, folder / WEIGHTS_NAME)


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] = float("nan")
    return tensor


def _truncate(folder: Path) -> None:
    (folder / WEIGHTS_NAME).write_bytes((folder / WEIGHTS_NAME).read_bytes()[:-8])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no adapter folder"),
        (lambda folder: (folder / CONFIG_NAME).unlink(), "has no adapter_config.json"),
        (lambda folder: (folder / WEIGHTS_NAME).unlink(), "has no adapter_model.safetensors"),
        (lambda folder: (folder / WEIGHTS_NAME).rename(folder / "adapter_model.bin"), "never unpickles"),
        (lambda folder: (folder / CONFIG_NAME).write_text("{"), "not valid JSON"),
        (_truncate, "adapter_model.safetensors is truncated or damaged"),
        (lambda folder: edit_config(folder, peft_type="IA3"), "is a IA3 adapter"),
        (lambda folder: edit_config(folder, use_dora=True), "DoRA"),
        (lambda folder: edit_config(folder, bias="all"), "bias: 'all'"),
        (lambda folder: edit_config(folder, modules_to_save=["lm_head"]), "uses 'modules_to_save'"),
        (lambda folder: edit_config(folder, layer_replication=[[0, 1]]), "uses 'layer_replication'"),
        (lambda folder: edit_config(folder, some_new_option={"a": 1}), "uses 'some_new_option'"),
        (lambda folder: edit_config(folder, init_lora_weights="pissa_niter_4"), "pissa_niter_4, which changed its base"),
        (
            lambda folder: edit_config(folder, init_lora_weights="mica"),
            "init_lora_weights 'mica', which this version does not know",
        ),
        (lambda folder: edit_config(folder, r="4"), "has r '4', expected a positive number"),
        (lambda folder: edit_config(folder, lora_alpha=0), "has lora_alpha 0, expected a positive number"),
        (lambda folder: edit_config(folder, r=8), "have rank 4, adapter_config.json says 8"),
        (lambda folder: edit_config(folder, rank_pattern={"(": 8}), "no regular expression"),
        (
            lambda folder: edit_config(folder, target_modules=["q_proj"]),
            "tensors for model.layers.0.mlp.down_proj, which .* not target",
        ),
        (lambda folder: edit_config(folder, target_modules=["q_proj", "down_proj", "k_proj"]), "targets 'k_proj', but"),
        (lambda folder: _drop(folder, "layers.1.self_attn.q_proj.lora_B"), "has no lora_B for model.layers.1.self_attn.q_proj"),
        (lambda folder: _drop(folder, "lora_"), "has no tensors"),
        (lambda folder: _edit_tensor(folder, _poison), "NaN or infinity"),
        (lambda folder: _edit_tensor(folder, lambda tensor: tensor[:, :, None].clone()), r"not \[r, in\] and \[out, r\]"),
        (lambda folder: _edit_tensor(folder, lambda tensor: tensor.to(torch.int8)), "expected floating point"),
    ],
)
def test_foreign_folders_that_cannot_be_taken_are_told_why(tmp_path: Path, spoil: Callable[[Path], Any], sentence: str) -> None:
    train_with_peft(tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    with pytest.raises(BadInput, match=sentence):
        read_adapter_folder(tmp_path / "adapter")


def test_dora_of_real_peft_is_refused(tmp_path: Path) -> None:
    train_with_peft(tmp_path, use_dora=True)
    with pytest.raises(BadInput, match="DoRA"):
        read_adapter_folder(tmp_path)
    edit_config(tmp_path, use_dora=False)
    with pytest.raises(BadInput, match="lora_magnitude_vector.* is not a LoRA factor"):
        read_adapter_folder(tmp_path)


def test_adapter_of_another_model_is_refused_by_what_does_not_fit(tmp_path: Path) -> None:
    train_with_peft(tmp_path / "adapter")
    adapter = read_adapter_folder(tmp_path / "adapter")
    with pytest.raises(BadInput, match="factors for model.layers.1.* does not have"):
        check_against_model(adapter, make_model("llama", num_hidden_layers=1))
    with pytest.raises(BadInput, match="targets model.layers.2.* has no factors"):
        check_against_model(adapter, make_model("llama", num_hidden_layers=3))
    with pytest.raises(BadInput, match="down_proj map 48 to 32 features, this base maps 64 to 32"):
        check_against_model(adapter, make_model("llama", intermediate_size=64))
    train_with_peft(tmp_path / "zero", zero=True)
    with pytest.raises(BadInput, match="every lora_B of the adapter is zero"):
        check_against_model(read_adapter_folder(tmp_path / "zero"), make_model("llama"))
