"""Exported adapters compute under each consumer's rule what they compute with PEFT, in its own words and in its own folder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from infra.errors import BadInput, WorkFailed
from tests.workers.tiny_adapters import classify_with_peft, train_with_peft, write_files
from tests.workers.tiny_bases import logits, make_base, make_classifier, make_model, save
from workers.adapter import PREFIX
from workers.adapter_files import adapter_files, read_adapter_folder
from workers.consumers import CONSUMERS, find_consumer
from workers.export import compatibility, exported, layers_of, report, universal
from workers.export_merged import rounding_of, write_merged
from workers.export_proof import prove
from workers.identity import identify
from workers.loading import load_model
from workers.spec import BaseModelSpec

MIXED: dict[str, Any] = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5}, "r": 3}
ONE_LAYER: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}
LARGEST = 1e-5
"""Of logits in float64, where B was rounded to float32 once. The random GPT-2 with random factors of size 1 amplifies most: there
float32 arithmetic costs the stored adapter 4e-6 as well, and a B folded in float64 differs by 4e-15."""
ENGINES = ("vllm", "sglang", "lorax", "ray-llm", "llama-cpp")


def naive_logits(family: str, folder: Path) -> torch.Tensor:
    """Return float64 logits of a PEFT folder by the plainest rule there is: W x + lora_alpha / r B A x, and nothing else read."""
    model, config = make_model(family).double(), json.loads((folder / "adapter_config.json").read_text())
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    for name in [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]:
        update = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] * (config["lora_alpha"] / config["r"])
        weight = model.get_submodule(name.removeprefix(PREFIX)).weight
        weight.data += update.T if family == "gpt2" else update
    return logits(model)


def peft_logits(family: str, folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(make_model(family), folder).double().eval())


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", MIXED), ("llama", ONE_LAYER), ("qwen2", {"use_rslora": True, "lora_alpha": 7}), ("gpt2", {"lora_alpha": 5})],
)
def test_universal_form_gives_the_same_logits_under_the_naive_rule(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    train_with_peft(tmp_path / "theirs", family, **options)
    adapter = read_adapter_folder(tmp_path / "theirs")
    ours = universal(adapter, 8, layers_of(make_model(family)), "the/server")
    folder = write_files(tmp_path / "ours", ours)
    expected = peft_logits(family, tmp_path / "theirs")
    assert float((naive_logits(family, folder) - expected).abs().max()) < LARGEST
    assert float((peft_logits(family, folder) - expected).abs().max()) < LARGEST
    for name in adapter.modules:
        (a, b), (_, folded) = adapter.factors(name), ours.factors(name)
        exact = b.double() * adapter.scale(name)
        assert bool(((folded[:, : a.shape[0]].double() - exact).abs() <= 2.0**-24 * exact.abs()).all()), "rounded once"
        assert not folded[:, a.shape[0] :].any()
    config = ours.config
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"] == "the/server"
    assert {tuple(ours.factors(name)[0].shape)[0] for name in ours.modules} == {8}


def test_scales_that_are_powers_of_two_fold_without_any_rounding(tmp_path: Path) -> None:
    train_with_peft(tmp_path / "theirs", r=4, lora_alpha=8, alpha_pattern={"q_proj": 16})
    adapter = read_adapter_folder(tmp_path / "theirs")
    folder = write_files(tmp_path / "ours", universal(adapter, 16, layers_of(make_model("llama")), None))
    difference = naive_logits("llama", folder) - peft_logits("llama", tmp_path / "theirs")
    assert float(difference.abs().max()) < 1e-6  # what is left are the norms, which models compute in float32


def test_universal_form_has_every_layer_of_a_type_and_no_other(tmp_path: Path) -> None:
    train_with_peft(tmp_path / "theirs", **ONE_LAYER)
    ours = universal(read_adapter_folder(tmp_path / "theirs"), 8, layers_of(make_model("llama")), None)
    assert ours.modules == [f"model.layers.{n}.{part}" for n in (0, 1) for part in ("mlp.up_proj", "self_attn.q_proj")]
    assert ours.config["target_modules"] == ["q_proj", "up_proj"]
    assert not any(ours.factors(name)[1].any() for name in ours.modules if ".0." in name)


def test_adapter_that_a_consumer_reads_right_is_copied_as_it_is(tmp_path: Path) -> None:
    expected = train_with_peft(tmp_path / "theirs", lora_alpha=8)
    adapter = read_adapter_folder(tmp_path / "theirs")
    layers = layers_of(make_model("llama"))
    for consumer in CONSUMERS.values():
        found = compatibility(adapter, consumer, layers)
        assert found.form == ("merged" if consumer.name == "merged" else "plain"), found
        assert found.reasons == ()
    copy = exported(adapter, CONSUMERS["peft"], "plain", layers, None)
    assert adapter_files(copy) == adapter_files(adapter)
    assert torch.equal(
        logits(PeftModel.from_pretrained(make_model("llama"), write_files(tmp_path / "ours", copy)).eval()), expected
    )
    named = exported(adapter, CONSUMERS["vllm"], "plain", layers, "Qwen/Qwen3-0.6B")
    assert named.config == adapter.config | {"base_model_name_or_path": "Qwen/Qwen3-0.6B"}


@pytest.mark.parametrize(
    ("options", "universal_for"),
    [
        ({"use_rslora": True, "lora_alpha": 7}, {"sglang", "llama-cpp"}),
        ({"rank_pattern": {"q_proj": 2}}, {"vllm", "sglang", "lorax", "ray-llm"}),
        ({"alpha_pattern": {"q_proj": 2}}, set(ENGINES)),
        (ONE_LAYER, {"lorax"}),
    ],
    ids=["rslora", "rank pattern", "alpha pattern", "one layer"],
)
def test_each_consumer_gets_the_universal_form_for_what_it_reads_wrong(
    tmp_path: Path, options: dict[str, Any], universal_for: set[str]
) -> None:
    train_with_peft(tmp_path / "theirs", **options)
    found = report(read_adapter_folder(tmp_path / "theirs"), layers_of(make_model("llama")))
    assert {one.consumer for one in found if one.form == "universal"} == universal_for
    assert all(one.reasons for one in found if one.form == "universal")
    assert {one.form for one in found if one.consumer == "peft"} == {"plain"}


@pytest.mark.parametrize("engine", ["vllm", "sglang", "lorax"])
def test_proof_holds_for_the_export_and_shows_what_the_stored_form_would_have_cost(tmp_path: Path, engine: str) -> None:
    base = make_base(tmp_path / "base")
    train_with_peft(tmp_path / "theirs", **MIXED)
    adapter, layers, consumer = read_adapter_folder(tmp_path / "theirs"), layers_of(make_model("llama")), CONSUMERS[engine]
    files = adapter_files(exported(adapter, consumer, "universal", layers, "S"))
    proof = prove(adapter, consumer, base, layers, files=files)
    assert proof["float64"]["largest_difference"] < 1e-6
    assert proof["float32"]["largest_difference"] < 1e-4
    assert proof["if_read_as_stored"] > 1e-3
    assert proof["largest_effect"] > 1e-2
    with pytest.raises(WorkFailed, match="does not compute what the adapter does"):
        prove(adapter, consumer, base, layers, files=adapter_files(adapter))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_merged_folder_is_the_base_with_the_update_and_a_base_of_its_own(tmp_path: Path, family: str) -> None:
    base, target = make_base(tmp_path / "base", family), tmp_path / "merged"
    train_with_peft(tmp_path / "theirs", family, use_rslora=True)
    adapter, before = read_adapter_folder(tmp_path / "theirs"), identify(base)
    target.mkdir()
    write_merged(adapter, base, before.files, target)
    proof = prove(adapter, CONSUMERS["merged"], base, layers_of(make_model(family)), merged=target, rounding=2.0**-23)
    assert proof["float64"]["share_of_largest_logit"] < 1e-5
    after = identify(target)
    assert after.base_id != before.base_id
    assert after.architecture == before.architecture
    assert sorted(path.name for path in target.iterdir()) == sorted(before.files)
    assert (target / "config.json").read_bytes() == (base / "config.json").read_bytes()
    before_tensors, after_tensors = load_file(base / "model.safetensors"), load_file(target / "model.safetensors")
    changed = {name for name, tensor in after_tensors.items() if not torch.equal(tensor, before_tensors[name])}
    assert changed == {f"{name}.weight" for name in adapter.modules}


def test_base_in_several_files_is_merged_into_as_many(tmp_path: Path) -> None:
    base, target = save(make_model("llama"), tmp_path / "base", max_shard_size="30KB"), tmp_path / "merged"
    train_with_peft(tmp_path / "theirs")
    adapter, files = read_adapter_folder(tmp_path / "theirs"), identify(base).files
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    target.mkdir()
    write_merged(adapter, base, files, target)
    expected = logits(PeftModel.from_pretrained(make_model("llama"), tmp_path / "theirs").eval())
    merged = load_model(target, BaseModelSpec(name_or_path=str(target)))
    assert torch.allclose(logits(merged), expected, atol=1e-5)


def test_merged_weights_of_a_bfloat16_base_stay_bfloat16(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save(make_model("llama").bfloat16(), base)
    train_with_peft(tmp_path / "theirs")
    adapter, target = read_adapter_folder(tmp_path / "theirs"), tmp_path / "merged"
    target.mkdir()
    write_merged(adapter, base, identify(base).files, target)
    assert {tensor.dtype for tensor in load_file(target / "model.safetensors").values()} == {torch.bfloat16}
    assert rounding_of(adapter, base) == 2.0**-7
    proof = prove(
        adapter, CONSUMERS["merged"], base, layers_of(make_model("llama")), merged=target, rounding=rounding_of(adapter, base)
    )
    assert 0 < proof["float64"]["largest_difference"] < proof["largest_effect"]


def test_packed_or_missing_weights_are_not_merged_into(tmp_path: Path) -> None:
    train_with_peft(tmp_path / "theirs")
    adapter = read_adapter_folder(tmp_path / "theirs")
    (tmp_path / "out").mkdir()
    other = make_base(tmp_path / "gpt2", "gpt2")
    with pytest.raises(BadInput, match=r"stores no tensor model\.layers\.0\.mlp\.down_proj\.weight"):
        write_merged(adapter, other, identify(other).files, tmp_path / "out")


def test_what_no_form_can_carry_is_refused_with_the_way_out(tmp_path: Path) -> None:
    train_with_peft(tmp_path / "theirs", r=12)
    adapter, layers = read_adapter_folder(tmp_path / "theirs"), layers_of(make_model("llama"))
    dora = replace(adapter, config=adapter.config | {"use_dora": True})
    bias = replace(adapter, config=adapter.config | {"bias": "all"})
    for odd, word, plain in ((dora, "DoRA", {"peft"}), (bias, "biases", set())):
        found = {one.consumer: one for one in report(odd, layers)}
        assert {name for name, one in found.items() if one.form != "refused"} == plain
        assert all(word in one.reasons[0] for name, one in found.items() if name not in plain)
    low = compatibility(adapter, CONSUMERS["vllm"], layers, max_rank=8)
    assert low.form == "refused"
    assert "--max-lora-rank 12" in low.reasons[0]


def test_rank_above_what_an_engine_serves_at_all_is_refused(tmp_path: Path) -> None:
    train_with_peft(tmp_path / "theirs", r=600)
    adapter, layers = read_adapter_folder(tmp_path / "theirs"), layers_of(make_model("llama"))
    found = {one.consumer: one for one in report(adapter, layers)}
    assert {name for name, one in found.items() if one.form == "refused"} == {"vllm", "ray-llm"}
    assert "512 at most" in found["vllm"].reasons[0]


def test_rank_above_the_engines_default_is_a_note(tmp_path: Path) -> None:
    train_with_peft(tmp_path / "theirs", r=20)
    found = compatibility(read_adapter_folder(tmp_path / "theirs"), CONSUMERS["vllm"], layers_of(make_model("llama")))
    assert found.form == "plain"
    assert found.notes == ("start it with --max-lora-rank 20: the default is 16",)


def test_classifier_is_for_peft_alone(tmp_path: Path) -> None:
    classify_with_peft(tmp_path / "theirs", "bert")
    adapter, layers = read_adapter_folder(tmp_path / "theirs"), layers_of(make_classifier("bert"))
    found = {one.consumer: one for one in report(adapter, layers)}
    assert {name for name, one in found.items() if one.form != "refused"} == {"peft"}
    assert "head of its own" in found["merged"].reasons[0]
    with pytest.raises(BadInput, match="no universal form"):
        universal(adapter, 8, layers, None)


def test_unknown_consumer_is_refused_with_what_was_probably_meant() -> None:
    with pytest.raises(BadInput, match="did you mean 'sglang'"):
        find_consumer("sg-lang")
    with pytest.raises(BadInput, match="known are peft, vllm"):
        find_consumer("xyz")
