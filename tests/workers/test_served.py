"""An adapter in each form it may be served in: what they have in common, and what merging a QLoRA adapter elsewhere changes."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from infra.errors import BadInput
from tests.workers.tiny_adapters import classify_with_peft, train_with_peft
from tests.workers.tiny_bases import make_base, make_encoder_base, make_model
from workers.adapter import A_SUFFIX, B_SUFFIX, PREFIX, Adapter, lora_config, make_adapter
from workers.adapter_files import read_adapter_folder
from workers.data.rows import Row
from workers.engine.resident import ResidentBase
from workers.loading import load_model
from workers.served import Form, checksum, dense_weights, merged_weights, replaced, serve_forms
from workers.spec import BaseModelSpec, QuantizationSpec

PLAIN = BaseModelSpec(name_or_path="x")
NF4 = BaseModelSpec(name_or_path="x", quantization=QuantizationSpec(load_in_4bit=True))
TEXTS = [
    Row({"text": text}, f"row {number}") for number, text in enumerate(["Once upon a time", "There was a dog", "He ran"] * 7)
]


@pytest.fixture(scope="module")
def stories(test_data: Path) -> Path:
    return test_data / "bases" / "stories260k"


def adapter_on(base: Path, targets: Sequence[str] = ("q_proj", "down_proj")) -> Adapter:
    """Random factors whose updates are about a tenth of the weights."""
    model, generator, tensors = load_model(base, PLAIN), torch.Generator().manual_seed(0), {}
    for name, layer in model.named_modules():
        if name.endswith(tuple(targets)):
            rows, columns = layer.weight.shape
            tensors[f"{PREFIX}{name}{A_SUFFIX}"] = torch.randn(4, columns, generator=generator) * columns**-0.5
            tensors[f"{PREFIX}{name}{B_SUFFIX}"] = torch.randn(rows, 4, generator=generator) * 0.05
    config = lora_config(
        r=4, lora_alpha=6, lora_dropout=0.0, use_rslora=False, target_modules=targets, base_model_name_or_path="stories"
    )
    return make_adapter(config, tensors, "a test")


def by_name(forms: Sequence[Form]) -> dict[str, Form]:
    return {form.name: form for form in forms}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_weights_are_those_of_peft_and_leave_the_base_as_it_was(tmp_path: Path, family: str) -> None:
    train_with_peft(tmp_path / "adapter", family, use_rslora=True)
    expected = PeftModel.from_pretrained(make_model(family), tmp_path / "adapter").merge_and_unload().state_dict()
    base = ResidentBase(load_model(make_base(tmp_path / "base", family), PLAIN))
    adapter, before = read_adapter_folder(tmp_path / "adapter"), checksum(base.model)
    with replaced(base, merged_weights(adapter, dense_weights(base))):
        assert checksum(base.model) != before
        found = {name.replace(".base.", "."): tensor for name, tensor in base.model.state_dict().items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-5), name
    assert checksum(base.model) == before


def test_forms_of_an_adapter_of_a_plain_base(stories: Path) -> None:
    served = serve_forms(stories, PLAIN, adapter_on(stories), TEXTS, 64)
    forms = by_name(served.forms)
    assert list(forms) == ["separate", "hot-swapped", "merged", "merged and quantised"]
    assert forms["hot-swapped"].is_identical
    assert forms["hot-swapped"].metrics == forms["separate"].metrics
    assert 0.0 < forms["merged"].largest_logit_difference < 1e-3
    assert forms["merged"].metrics["eval/loss"] == pytest.approx(forms["separate"].metrics["eval/loss"], abs=1e-5)
    assert forms["merged and quantised"].largest_logit_difference > 0.1
    assert (served.num_rows, served.num_rows_compared) == (len(TEXTS), len(TEXTS))
    assert served.base_checksum == checksum(ResidentBase(load_model(stories, PLAIN)).model)


def test_qlora_adapter_is_the_same_function_only_when_merged_into_its_training_view(stories: Path) -> None:
    served = serve_forms(stories, NF4, adapter_on(stories), TEXTS, 64)
    forms = by_name(served.forms)
    assert list(forms) == [
        "separate",
        "hot-swapped",
        "merged into its training view",
        "merged into its training view, quantised",
        "merged into the original weights",
        "merged into the original weights, quantised",
    ]
    assert forms["hot-swapped"].is_identical
    assert forms["merged into its training view"].largest_logit_difference < 1e-3
    assert forms["merged into the original weights"].largest_logit_difference > 0.1
    verdict = served.advice[-1]
    change = forms["merged into the original weights"].metrics["eval/loss"]
    change -= forms["merged into its training view"].metrics["eval/loss"]
    assert verdict.startswith("merging into the original weights, not the nf4 view it was trained on, ")
    assert f"{'hurts' if change > 0 else 'helps'}: eval/loss {change:+.4f}" in verdict


def test_dequantised_weights_compute_what_the_4_bit_base_computes(stories: Path) -> None:
    base = ResidentBase(load_model(stories, NF4))
    weights = dense_weights(base)
    x = torch.randn(5, 64)
    layer = base.layers["model.layers.0.self_attn.q_proj"]
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weights["model.layers.0.self_attn.q_proj"]))
    assert weights.keys() == base.layers.keys()


def test_forms_of_a_classifier(tmp_path: Path) -> None:
    base = make_encoder_base(tmp_path / "base")
    classify_with_peft(tmp_path / "adapter", "bert", num_labels=2)
    adapter = read_adapter_folder(tmp_path / "adapter")
    rows = [
        Row({"text": text, "label": label}, text)
        for text, label in (("hello good morning", "LABEL_0"), ("pay my bill", "LABEL_1"), ("card lost", "LABEL_1"))
    ]
    forms = by_name(serve_forms(base, PLAIN, adapter, rows, 32).forms)
    assert forms["hot-swapped"].is_identical
    assert forms["merged"].metrics["eval/accuracy"] == forms["separate"].metrics["eval/accuracy"]
    assert forms["merged"].largest_logit_difference < 1e-3 < forms["merged and quantised"].largest_logit_difference


def test_adapter_of_another_base_is_refused(stories: Path, tmp_path: Path) -> None:
    train_with_peft(tmp_path / "adapter")
    with pytest.raises(BadInput, match="it was trained on another one"):
        serve_forms(stories, PLAIN, read_adapter_folder(tmp_path / "adapter"), TEXTS, 64)
