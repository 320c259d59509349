"""A classifier's head is the one its family has in transformers, is kept as PEFT keeps it, and names its labels."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, ElectraConfig

from infra.errors import BadInput
from tests.workers.tiny_adapters import BASE, classify_with_peft, train_with_peft, write_files
from tests.workers.tiny_bases import (
    CLASSIFIER_TARGETS,
    CLASSIFIERS,
    logits,
    make_base,
    make_classifier,
    make_encoder_base,
    make_model,
    save,
)
from workers.adapter import Adapter, adapter_id, build_adapter, check_against_model
from workers.adapter_files import CONFIG_NAME, WEIGHTS_NAME, adapter_files, read_adapter_folder
from workers.engine.head_shapes import apply_head, first_position, fresh_head, head_of
from workers.fitting import refuse_unfit
from workers.loading import load_model, quiet
from workers.spec import BaseModelSpec, PeftSpec

LABELS = ("bye", "hello", "pay")
FLOAT32 = BaseModelSpec(name_or_path="x")


def logits_of_the_formula(model: Any, head: dict[str, Tensor]) -> Tensor:
    """Logits of the row that `logits` gives a model, from the hidden states of its backbone by the formula of `head_shapes`."""
    shape = head_of(model)
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.arange(3, 23)[None]).last_hidden_state
        picked = hidden[:, 0] if shape.pooling == "first" else hidden[:, -1]
        pooled = picked if shape.pooler is None else model.get_submodule(shape.pooler)(picked[:, None])
        return apply_head(shape, head, pooled)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_the_formula_gives_the_logits_of_transformers(family: str) -> None:
    model = make_classifier(family, num_labels=3)
    shape = head_of(model)
    own = model.get_submodule(shape.module).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in own.items()} == shape.tensor_shapes(3)
    assert torch.allclose(logits_of_the_formula(model, own), logits(model), atol=1e-6)


def test_positions_of_a_sequence_start_where_the_family_counts_from() -> None:
    for family in ("bert", "roberta"):
        model = make_classifier(family)
        start, ids = first_position(model), torch.arange(3, 23)[None]
        with torch.no_grad():
            given = model(input_ids=ids, position_ids=torch.arange(start, start + 20)[None]).logits
        assert torch.equal(given, logits(model))


def test_a_fresh_head_is_a_function_of_the_seed_and_initialised_as_transformers_does() -> None:
    shape = head_of(make_classifier("roberta", initializer_range=0.5))
    first, again, other = (fresh_head(shape, 40, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["out_proj.weight"], other["out_proj.weight"])
    assert not first["dense.bias"].any()
    assert float(first["out_proj.weight"].std()) == pytest.approx(0.5, rel=0.1)
    assert float(first["dense.weight"].mean()) == pytest.approx(0.0, abs=0.1)


def test_a_family_without_a_known_head_is_refused() -> None:
    model = AutoModelForSequenceClassification.from_config(
        ElectraConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    with pytest.raises(BadInput, match="cannot be trained on a base of the family 'electra'; use one of bert"):
        head_of(model)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_peft_classifier_goes_through_our_files_with_the_same_logits(tmp_path: Path, family: str) -> None:
    expected = classify_with_peft(tmp_path / "theirs", family)
    adapter = read_adapter_folder(tmp_path / "theirs")
    check_against_model(adapter, make_classifier(family))
    assert adapter.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert adapter.config["modules_to_save"] == [adapter.head_module]
    ours = write_files(tmp_path / "ours", adapter)
    assert torch.equal(logits(PeftModel.from_pretrained(make_classifier(family, num_labels=3), ours).eval()), expected)
    assert not torch.equal(logits(make_classifier(family, num_labels=3)), expected)
    assert adapter_files(read_adapter_folder(ours)) == adapter_files(adapter)


def trained(model: Any, family: str) -> Adapter:
    """An adapter as training gives it: random factors of the family's targets, and a fresh head."""
    shape, generator = head_of(model), torch.Generator().manual_seed(5)
    tensors = {shape.peft_name(name): tensor for name, tensor in fresh_head(shape, len(LABELS), seed=3).items()}
    for name, layer in model.named_modules():
        if name.endswith(tuple(CLASSIFIER_TARGETS[family])) and "classifier" not in name:
            out_features, in_features = layer.weight.T.shape if family == "gpt2" else layer.weight.shape
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, in_features, generator=generator)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out_features, 2, generator=generator)
    return build_adapter(PeftSpec(r=2, lora_alpha=3.0), model, tensors, "some/base", LABELS)


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gpt2"])
def test_our_classifier_in_peft_gives_the_logits_of_base_and_update_and_head(tmp_path: Path, family: str) -> None:
    path = tmp_path / "base"
    make_base(path, family) if family in ("llama", "gpt2") else make_encoder_base(path, family)
    model = load_model(path, FLOAT32, task_type="SEQ_CLS")
    adapter = trained(model, family)
    refuse_unfit(adapter, path)
    adapter.config["base_model_name_or_path"] = str(path)
    ours = write_files(tmp_path / "ours", adapter)
    with quiet():
        theirs = AutoPeftModelForSequenceClassification.from_pretrained(ours, num_labels=3).eval()
    for module in adapter.modules:
        a, b = adapter.factors(module)
        update = adapter.scale(module) * (b @ a)
        model.get_parameter(f"{module}.weight").add_(update.T if family == "gpt2" else update)
    assert torch.allclose(logits(theirs), logits_of_the_formula(model, adapter.head), atol=1e-5)
    assert read_adapter_folder(ours).labels == LABELS


def test_the_id_covers_head_and_labels_and_leaves_other_adapters_as_they_were(tmp_path: Path) -> None:
    model = make_classifier("bert")
    adapter = trained(model, "bert")
    ids = {adapter_id(BASE, adapter)}
    ids.add(adapter_id(BASE, build_adapter(PeftSpec(r=2, lora_alpha=3.0), model, adapter.tensors, "x", ("a", "b", "c"))))
    moved = {name: tensor + (1.0 if "classifier.bias" in name else 0.0) for name, tensor in adapter.tensors.items()}
    ids.add(adapter_id(BASE, build_adapter(PeftSpec(r=2, lora_alpha=3.0), model, moved, "x", LABELS)))
    assert len(ids) == 3
    train_with_peft(tmp_path)
    assert read_adapter_folder(tmp_path).head == {}
    assert read_adapter_folder(tmp_path).config["modules_to_save"] is None


def _edit(folder: Path, edit: Callable[[dict[str, Tensor]], Any], metadata: dict[str, str] | None = None) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_NAME, metadata)


def _config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(raw | changes))


def _poison(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.classifier.bias"][0] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: _config(folder, task_type="TOKEN_CLS"), "is of task_type TOKEN_CLS with modules_to_save"),
        (lambda folder: _config(folder, modules_to_save=["classifier", "lm_head"]), "uses 'modules_to_save'"),
        (lambda folder: _edit(folder, _poison), "the head holds NaN or infinity"),
        (
            lambda folder: _edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "classifier" in name]),
            "is of task_type SEQ_CLS with modules_to_save None; a classifier is SEQ_CLS and saves its one head",
        ),
        (
            lambda folder: _edit(folder, lambda tensors: None, {"labels": '["a", "b"]'}),
            r"a head of 3 outputs and 2 different labels \(a, b\)",
        ),
        (lambda folder: _edit(folder, lambda tensors: None, {"labels": '["a", "b", "a"]'}), "2 different labels"),
        (lambda folder: _edit(folder, lambda tensors: None, {"labels": '{"a": 1}'}), "no JSON list of texts"),
        (lambda folder: (folder / "config.json").write_text('{"id2label": {"1": "a"}}'), "does not name the labels 0 to 0"),
    ],
)
def test_foreign_classifiers_that_cannot_be_taken_are_told_why(
    tmp_path: Path, spoil: Callable[[Path], Any], sentence: str
) -> None:
    classify_with_peft(tmp_path, "bert")
    spoil(tmp_path)
    with pytest.raises(BadInput, match=sentence):
        read_adapter_folder(tmp_path)


def test_label_names_saved_with_a_foreign_adapter_are_kept(tmp_path: Path) -> None:
    classify_with_peft(tmp_path, "llama")
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "no", "1": "yes", "2": "perhaps"}}))
    assert read_adapter_folder(tmp_path).labels == ("no", "yes", "perhaps")


def test_a_head_that_the_base_does_not_have_is_refused(tmp_path: Path) -> None:
    classify_with_peft(tmp_path / "bert", "bert")
    adapter = read_adapter_folder(tmp_path / "bert")
    with pytest.raises(BadInput, match="head holds classifier.bias 3, classifier.weight 3x32, and one for this base holds cl"):
        check_against_model(adapter, make_classifier("roberta"))
    with pytest.raises(BadInput, match="this base holds score.weight 3x32; it was trained on another one"):
        check_against_model(adapter, make_classifier("llama"))


def test_an_adapted_pooler_is_refused(tmp_path: Path) -> None:
    classify_with_peft(tmp_path, "bert", target_modules="all-linear")
    with pytest.raises(BadInput, match="factors for bert.pooler.dense, a head, an embedding or a pooler"):
        check_against_model(read_adapter_folder(tmp_path), make_classifier("bert"))


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_base_without_a_head_is_loaded_to_classify(tmp_path: Path, family: str) -> None:
    made = make_classifier(family)
    save(made.base_model, tmp_path)
    model = load_model(tmp_path, FLOAT32, task_type="SEQ_CLS")
    head = make_classifier(family, num_labels=3, seed=1).get_submodule(head_of(model).module).state_dict()
    # One row times a weight: the last bit depends on where in memory the weight lies, as that of a mapped file may.
    assert torch.allclose(logits_of_the_formula(model, head), logits_of_the_formula(made, head), atol=1e-7)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_is_part_of_the_base_is_never_made_up(tmp_path: Path) -> None:
    make_encoder_base(tmp_path / "bert")
    tensors = load_file(tmp_path / "bert/model.safetensors")
    del tensors["pooler.dense.weight"]
    save_file(tensors, tmp_path / "bert/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="has no weights for bert.pooler.dense.weight .* does not make a model for classific"):
        load_model(tmp_path / "bert", FLOAT32, task_type="SEQ_CLS")


def test_a_causal_model_still_needs_its_head(tmp_path: Path) -> None:
    save(make_model("llama").base_model, tmp_path)
    with pytest.raises(BadInput, match="has no weights for lm_head.weight .* does not make a causal language model"):
        load_model(tmp_path, FLOAT32)
